// SPDX-License-Identifier: MIT
//
// The CONFIGURATION section (format/main_stream.md section 9.3).
//
//   size  field          refused
//      1  0x07
//      4  len            over the limit
//    len  machine type   a NUL in it
//      -  subsections    unknown ones, one twice, a version other than 1; each: 0x05, u8 len, name, be32 version, and
//           target-page-bits  be32 bits: other than this side's page size
//           capabilities      be32 count, (u8 len, name)*: too many, mapped-ram unless the limits allow it, unknown ones (only those that change
//                             the stream are listed, so the stream of an unknown one cannot be read)
//           uuid              16 bytes
#pragma once

#include <algorithm>
#include <bit>
#include <cstring>
#include <optional>
#include <utility>
#include <vector>

#include "multifd/format/init_packet.hpp"
#include "multifd/format/main_stream.hpp"
#include "multifd/qemu/detail/cursor.hpp"
#include "multifd/qemu/detail/names.hpp"
#include "multifd/qemu/limits.hpp"

namespace multifd::qemu {

/// The contents of a configuration section. Empty until the section has come; machine types before 2.4 send none.
/// Threads: one, the parser's.
class Configuration {
 public:
  explicit Configuration(const MainStreamLimits& limits)
      : names_(limits.max_machine_type_bytes + limits.max_capabilities * max_idstr_length) {
    capabilities_.reserve(limits.max_capabilities);
  }

  bool seen() const noexcept { return seen_; }
  std::string_view machine_type() const noexcept { return machine_type_; }
  /// The capabilities listed: at most x-ignore-shared and mapped-ram, since all others are refused.
  std::span<const std::string_view> capabilities() const noexcept { return capabilities_; }
  /// The VM's uuid, if the source sends it (capability validate-uuid).
  const std::optional<Uuid>& uuid() const noexcept { return uuid_; }
  bool ignore_shared() const noexcept { return lists(capability_ignore_shared); }
  bool mapped_ram() const noexcept { return lists(capability_mapped_ram); }

  /// Parses the whole section; `in` is at its 0x07. Each attempt begins at the front; because of in.wanted() there is
  /// at most one attempt per field.
  /// Errors: Errc::bad_configuration, stream_limit_exceeded, page_size_mismatch, mapped_ram_refused, unknown_capability.
  [[nodiscard]] Result<Parsed> parse(detail::Cursor& in, const MainStreamLimits& limits) noexcept {
    capabilities_.clear();
    uuid_.reset();
    bool page_bits_seen = false;
    bool capabilities_seen = false;

    if (!in.has(5)) return Parsed::more;
    in.u8();
    const auto length = in.be<std::uint32_t>();
    if (length > limits.max_machine_type_bytes)
      return in.refuse(Errc::stream_limit_exceeded, "machine type's length (max_machine_type_bytes)", length, {},
                       limits.max_machine_type_bytes);
    if (!in.has(length)) return Parsed::more;
    const std::string_view machine_type = in.text(length);
    if (machine_type.find('\0') != machine_type.npos)
      return in.refuse(Errc::bad_configuration, "NUL in the machine type", length);

    for (;;) {
      if (!in.has(1)) return Parsed::more;
      if (in.peek() != element_subsection) break;
      if (!in.has(2)) return Parsed::more;
      const std::size_t name_length = in.peek(1);
      if (!in.has(2 + name_length + 4)) return Parsed::more;
      in.take(2);
      const std::string_view name = in.text(name_length);
      if (const auto version = in.be<std::uint32_t>(); version != subsection_version)
        return in.refuse(Errc::bad_configuration, "subsection's version", version, name);
      Result<Parsed> parsed = Parsed::more;
      if (name == subsection_page_bits && !std::exchange(page_bits_seen, true)) {
        parsed = parse_page_bits(in, limits);
      } else if (name == subsection_capabilities && !std::exchange(capabilities_seen, true)) {
        parsed = parse_capabilities(in, limits);
      } else if (name == subsection_uuid && !uuid_) {
        parsed = parse_uuid(in);
      } else {
        return in.refuse(Errc::bad_configuration, "unknown or repeated subsection", name_length, name);
      }
      if (parsed != Parsed::whole) return parsed;
    }

    machine_type_ = names_.keep(machine_type);
    for (std::string_view& name : capabilities_) name = names_.keep(name);
    seen_ = true;
    return Parsed::whole;
  }

 private:
  bool lists(std::string_view name) const noexcept {
    return std::ranges::find(capabilities_, name) != capabilities_.end();
  }

  [[nodiscard]] Result<Parsed> parse_page_bits(detail::Cursor& in, const MainStreamLimits& limits) noexcept {
    if (!in.has(4)) return Parsed::more;
    const auto bits = in.be<std::uint32_t>();
    if (bits == static_cast<std::uint32_t>(std::countr_zero(limits.page_bytes))) return Parsed::whole;
    const std::uint64_t theirs = bits < 64 ? std::uint64_t{1} << bits : bits;
    return in.refuse(Errc::page_size_mismatch, "target page bits", theirs, {}, limits.page_bytes);
  }

  [[nodiscard]] Result<Parsed> parse_capabilities(detail::Cursor& in, const MainStreamLimits& limits) noexcept {
    if (!in.has(4)) return Parsed::more;
    const auto count = in.be<std::uint32_t>();
    if (count > limits.max_capabilities)
      return in.refuse(Errc::stream_limit_exceeded, "number of capabilities (max_capabilities)", count, {},
                       limits.max_capabilities);
    for (std::uint32_t i = 0; i < count; ++i) {
      if (!in.has(1)) return Parsed::more;
      const std::size_t length = in.peek();
      if (!in.has(1 + length)) return Parsed::more;
      in.u8();
      const std::string_view name = in.text(length);
      if (name == capability_mapped_ram) {
        if (!limits.mapped_ram) return in.refuse(Errc::mapped_ram_refused, "capabilities", 0, name);
      } else if (name != capability_ignore_shared)
        return in.refuse(Errc::unknown_capability, "capabilities", 0, name);
      if (lists(name)) return in.refuse(Errc::bad_configuration, "capability listed twice", 0, name);
      capabilities_.push_back(name);
    }
    return Parsed::whole;
  }

  [[nodiscard]] Result<Parsed> parse_uuid(detail::Cursor& in) noexcept {
    if (!in.has(sizeof(Uuid))) return Parsed::more;
    std::memcpy(uuid_.emplace().data(), in.take(sizeof(Uuid)).data(), sizeof(Uuid));
    return Parsed::whole;
  }

  detail::Names names_;
  bool seen_ = false;
  std::string_view machine_type_;
  std::vector<std::string_view> capabilities_;
  std::optional<Uuid> uuid_;
};

}  // namespace multifd::qemu

// SPDX-License-Identifier: MIT
//
// Writes a main stream (format/main_stream.md section 9): a source's from the header to the VM description, and, for a
// relay, elements that a MainStreamParser has cut out of another one, byte for byte. Page records cannot be passed on
// unchanged where records are dropped or inserted: CONTINUE means "the block of the record before", which is another
// one then (format/main_stream.md section 9.6, format/roles.md section 11 step 9).
#pragma once

#include <algorithm>
#include <array>
#include <chrono>
#include <cstddef>
#include <cstdint>
#include <optional>
#include <span>
#include <string_view>
#include <utility>

#include "multifd/config.hpp"
#include "multifd/format/extension.hpp"
#include "multifd/format/main_stream.hpp"
#include "multifd/format/mapped_ram.hpp"
#include "multifd/format/missing_pages.hpp"
#include "multifd/format/page_bitmap.hpp"
#include "multifd/format/page_digests.hpp"
#include "multifd/format/peer_failure.hpp"
#include "multifd/format/peer_settings.hpp"
#include "multifd/limits.hpp"
#include "multifd/memory/dirty_bitmap.hpp"
#include "multifd/qemu/detail/field_writer.hpp"
#include "multifd/qemu/element.hpp"
#include "multifd/qemu/ram_records.hpp"
#include "multifd/qemu/stream_style.hpp"
#include "multifd/result.hpp"
#include "multifd/transport/interrupt.hpp"
#include "multifd/transport/policy.hpp"

namespace multifd::qemu {

/// Gathers elements, and writes them when there are many, or when push_out() is called.
///
/// The order of calls for a source (format/roles.md section 18), with the channels' SYNCs wherever end_epoch() is:
///
///     begin_stream({.machine_type = "pc-q35-10.0"}), open_return_path(), ping(1)
///     start_ram(blocks), end_epoch(), end_section()
///     begin_part(), zero_page()..., end_epoch(), end_section()          each round
///     switchover_start(), begin_end(), ..., end_epoch(), end_section()  the guest has stopped
///     device()..., end_stream(text), push_out()
///
/// The caller decides what is written where: nothing checks that a footer ends a section.
/// Errors (of each call): the transport's. Sticky: every later call returns the first one, and gathered bytes are lost; but
///   for push_out()'s Errc::cancelled.
/// Threads: one, the transport's writing thread.
/// Cost: one buffer of 64 KiB, allocated at construction; nothing after it. Bytes are copied once; an element larger
///   than the buffer is written without a copy.
template <Transport T>
class MainStreamWriter {
 public:
  /// Params `link`: must outlive this object, and must not be written to elsewhere meanwhile. `style`: of the stream
  ///   that is made; forward() needs none.
  explicit MainStreamWriter(T& link, const StreamStyle& style = {}) : out_(link), style_(style) {}

  /// Bounds the writes from now on. Params `timeout`: how long the peer may take no byte; `interrupt`: ends a write; may be
  ///   null, and outlives this object. Default: no limit.
  void set_limits(std::chrono::milliseconds timeout, const Interrupt* interrupt) noexcept
    requires HasTimeLimits<T>
  {
    out_.set_limits(timeout, interrupt);
  }

  // ---- The beginning

  /// Writes the header and, where the style has one, the configuration.
  ///
  /// Errors: also Errc::bad_option (a name without a byte or over its bound: machine type 4096, capability 255).
  [[nodiscard]] Result<void> begin_stream(const StreamConfiguration& what) noexcept {
    if (what.machine_type.empty() || what.machine_type.size() > 4096)
      return fail(Errc::bad_option, Stage::setup, "machine type's length", what.machine_type.size());
    for (const std::string_view name : what.capabilities)
      if (name.empty() || name.size() > max_idstr_length)
        return fail(Errc::bad_option, Stage::setup, "capability's length", name.size());
    MULTIFD_TRY(put(wire::main_stream_magic, stream_version));
    if (!style_.configuration) return {};
    MULTIFD_TRY(put(element_configuration, static_cast<std::uint32_t>(what.machine_type.size()), what.machine_type));
    if (what.page_bits) {
      MULTIFD_TRY(put_subsection(subsection_page_bits, *what.page_bits));
    }
    if (!what.capabilities.empty()) {
      MULTIFD_TRY(put_subsection(subsection_capabilities, static_cast<std::uint32_t>(what.capabilities.size())));
    }
    for (const std::string_view name : what.capabilities) {
      MULTIFD_TRY(put_named(name));
    }
    if (what.uuid) {
      MULTIFD_TRY(put_subsection(subsection_uuid, std::span<const std::byte>(*what.uuid)));
    }
    return {};
  }

  /// Writes OPEN_RETURN_PATH. Ahead of RAM's START.
  [[nodiscard]] Result<void> open_return_path() noexcept { return put_command(command_open_return_path); }

  /// Writes a PING command, which the destination answers with a PONG of the same value. Only between sections, and
  /// where the return path is open.
  [[nodiscard]] Result<void> ping(std::uint32_t value) noexcept { return put_command(command_ping, value); }

  // ---- RAM

  /// Writes the header of RAM's START and the block list. end_section() ends it.
  ///
  /// Params `blocks`: in the order of their sizes, largest first, as QEMU has them. Their `gpa`, mapped-ram header and
  ///   `page_size` are written as `style` says, and where they are not 0.
  /// Errors: also Errc::bad_block_idstr, bad_block_size (subject: the block).
  [[nodiscard]] Result<void> start_ram(std::span<const BlockInfo> blocks) noexcept {
    MULTIFD_TRY(begin_ram(blocks));
    for (const BlockInfo& block : blocks) {
      MULTIFD_TRY(list_block(block));
    }
    return {};
  }

  /// start_ram() without the entries, for a stream whose entries do not follow each other: list_block() writes one.
  [[nodiscard]] Result<void> begin_ram(std::span<const BlockInfo> blocks) noexcept {
    std::uint64_t total = 0;
    for (const BlockInfo& block : blocks) {
      if (block.idstr.empty() || block.idstr.size() > max_idstr_length || block.idstr.contains('\0'))
        return fail(Errc::bad_block_idstr, Stage::setup, "block list", block.idstr.size(), 0, block.idstr);
      if (block.used_length == 0 || block.used_length % style_.page_bytes != 0 ||
          block.used_length > ~std::uint64_t{0} - style_.page_bytes - total)
        return fail(Errc::bad_block_size, Stage::setup, "block list", block.used_length, style_.page_bytes,
                    block.idstr);
      total += block.used_length;
    }
    MULTIFD_TRY(put_section_header(element_section_start, ram_section_id, ram_section_name, ram_instance, ram_version));
    in_ram_ = true;
    return put(total | ram_mem_size);
  }

  /// Writes an entry of the list, list_block_bytes() long. `block`: one of begin_ram()'s, in their order.
  [[nodiscard]] Result<void> list_block(const BlockInfo& block) noexcept {
    MULTIFD_TRY(put_named(block.idstr));
    MULTIFD_TRY(put(block.used_length));
    if (block.page_size != 0) {
      MULTIFD_TRY(put(block.page_size));
    }
    if (style_.gpa) {
      MULTIFD_TRY(put(block.gpa));
    }
    if (!style_.mapped_ram) return {};
    return append(wire::encode_mapped_ram_header(
        {.page_size = style_.page_bytes, .bitmap_offset = block.bitmap_offset, .pages_offset = block.pages_offset}));
  }
  std::size_t list_block_bytes(const BlockInfo& block) const noexcept {
    return 1 + block.idstr.size() + 8 + (block.page_size != 0 ? 8 : 0) + (style_.gpa ? 8 : 0) +
           (style_.mapped_ram ? wire::mapped_ram_header_bytes : 0);
  }

  /// Begins a PART, or the END, of RAM. end_section() ends it.
  [[nodiscard]] Result<void> begin_part() noexcept { return put_part(element_section_part); }
  [[nodiscard]] Result<void> begin_end() noexcept { return put_part(element_section_end); }

  /// Writes a ZERO record. Only inside a RAM section, ahead of the record that closes it.
  ///
  /// Params: `idstr`: the RAM block's name, 1 to 255 bytes. `offset`: bytes from the block's start, page aligned.
  [[nodiscard]] Result<void> zero_page(std::string_view idstr, std::uint64_t offset) noexcept {
    std::array<std::byte, max_zero_record_bytes> record;
    return append(std::span(record).first(encode_zero_record(record, offset, name_for(idstr))));
  }

  /// Writes a PAGE record. Place and params as zero_page(); `bytes`: the page's.
  [[nodiscard]] Result<void> page(std::string_view idstr, std::uint64_t offset,
                                  std::span<const std::byte> bytes) noexcept {
    std::array<std::byte, max_ram_record_header_bytes> header;
    if (auto begun = append(std::span(header).first(encode_page_header(header, offset, name_for(idstr)))); !begun)
      return begun;
    return append(bytes);
  }

  /// Ends an epoch inside a section: MULTIFD_FLUSH, or nothing where each section's end does (format/packets.md section
  /// 6.1).
  [[nodiscard]] Result<void> end_epoch() noexcept {
    return style_.sync_style == SyncStyle::per_round ? put(ram_multifd_flush) : Result<void>{};
  }

  /// Ends a section of RAM: EOS and, where the style has it, the footer.
  [[nodiscard]] Result<void> end_section() noexcept {
    MULTIFD_TRY(put(ram_eos));
    in_ram_ = false;
    return style_.footers ? footer(ram_section_id) : Result<void>{};
  }

  // ---- Devices and the end

  /// Writes SWITCHOVER_START, where the style has it: right ahead of RAM's END.
  [[nodiscard]] Result<void> switchover_start() noexcept {
    return style_.switchover_start ? put_command(command_switchover_start) : Result<void>{};
  }

  /// Writes a device's section, behind RAM's END. To an own peer also its size.
  ///
  /// Params `state`: opaque; a QEMU's must be what its device expects, byte for byte.
  /// Errors: also Errc::bad_option (a name without a byte, or over 255).
  [[nodiscard]] Result<void> device(const DeviceSection& section, std::span<const std::byte> state) noexcept {
    if (section.idstr.empty() || section.idstr.size() > max_idstr_length)
      return fail(Errc::bad_option, Stage::produce, "device's name", section.idstr.size());
    if (own_peer_) {
      MULTIFD_TRY(message(wire::encode_extension(wire::ExtensionKind::section_size, state.size()).view()));
    }
    const std::uint32_t id = next_section_id_++;
    MULTIFD_TRY(put_section_header(element_section_full, id, section.idstr, section.instance_id, section.version_id));
    MULTIFD_TRY(append(state));
    return style_.footers ? footer(id) : Result<void>{};
  }
  /// The number of device() calls so far.
  std::uint32_t devices() const noexcept { return next_section_id_ - first_device_id; }

  /// Writes the end mark and the VM description. Params `description`: JSON (VmDescription makes a small one); empty:
  /// none, which a QEMU whose machine wants one answers with SHUT(1). At most 4 GiB.
  [[nodiscard]] Result<void> end_stream(std::string_view description) noexcept {
    MULTIFD_TRY(put(element_eof));
    if (description.empty()) return {};
    return put(element_vm_description, static_cast<std::uint32_t>(description.size()), description);
  }

  // ---- To an own peer, which has answered the question (format/extension.md section 19)

  /// Asks whether the destination is ours; ask_peer() waits for the answer as well. All channels must be connected, or a
  /// QEMU does not answer.
  [[nodiscard]] Result<void> ask() noexcept { return ping(wire::extension_ping()); }

  /// Announces the source's settings, ahead of RAM's START. ACCEPTED, or FAILED, comes when START was read.
  [[nodiscard]] Result<void> settings(const wire::PeerSettings& settings) noexcept {
    MULTIFD_ASSERT(style_.footers);
    own_peer_ = true;
    return message(wire::encode_settings(settings).view());
  }

  /// Says which pages of a block are zero, between RAM's START and END; with the feature. Params: as missing_pages().
  [[nodiscard]] Result<void> known_zeros(std::uint32_t block, std::span<const std::uint64_t> bitmap) noexcept {
    constexpr std::size_t most_bytes = std::size_t{64} << 20;  // which the destination zeroes before it reads on
    return page_bitmap(wire::ExtensionKind::known_zeros, block, bitmap, most_bytes / style_.page_bytes / 64);
  }
  /// Asks what the destination's older copy has, ahead of the first PART and of known_zeros(); with the feature.
  [[nodiscard]] Result<void> base_wanted() noexcept {
    return message(wire::encode_extension(wire::ExtensionKind::base_wanted).view());
  }

  /// Writes bytes of the VMM's own, between sections. Params `bytes`: 1 to 16382.
  [[nodiscard]] Result<void> user_data(std::span<const std::byte> bytes) noexcept {
    MULTIFD_ASSERT(!bytes.empty() && bytes.size() <= wire::max_extension_bytes - 2);
    MULTIFD_TRY(put_command_header(wire::extension_number, 2 + bytes.size()));
    return put(static_cast<std::uint16_t>(wire::ExtensionKind::user_data), bytes);
  }

  /// Writes the digests of a whole block of a stopped guest, behind RAM's END, in as many messages as it takes.
  ///
  /// Params `block`: its place in start_ram()'s list. `memory`: the block. `zeros`: a bit for each page that is not read.
  /// Cost: reads each other page once; 8 bytes a page.
  [[nodiscard]] Result<void> page_digests(std::uint32_t block, std::span<const std::byte> memory,
                                          std::span<const std::uint64_t> zeros = {}) noexcept {
    const std::size_t pages = memory.size() / style_.page_bytes;
    const std::uint64_t of_zeros = digest_of_zeros(style_.page_bytes);
    for (std::size_t page = 0; page < pages;) {
      const std::size_t last = page + std::min(pages - page, wire::max_page_digests);
      const auto header = wire::encode_page_digests_header(block, page * style_.page_bytes);
      const std::size_t length = header.view().size() + 8 * (last - page);
      MULTIFD_TRY(put_command_header(wire::extension_number, length));
      MULTIFD_TRY(append(header.view()));
      for (; page < last; ++page) {
        MULTIFD_TRY(put(
            has_page(zeros, page) ? of_zeros : digest_of(memory.subspan(page * style_.page_bytes, style_.page_bytes))));
      }
    }
    return {};
  }

  /// Names a block's missing pages, right behind RAM's END, in as many messages as it takes. memory_follows() ends them.
  ///
  /// Params `block`: its place in start_ram()'s list. `bitmap`: bit p % 64 of word p / 64 for page p; none past the block.
  [[nodiscard]] Result<void> missing_pages(std::uint32_t block, std::span<const std::uint64_t> bitmap) noexcept {
    return page_bitmap(wire::ExtensionKind::missing_pages, block, bitmap);
  }
  /// Says that the pages which missing_pages() has named are asked for by the destination.
  [[nodiscard]] Result<void> memory_follows(const wire::MemoryFollows& follows) noexcept {
    return message(wire::encode_memory_follows(follows).view());
  }

  /// Says that all sections have been written. LOADED comes when the destination has loaded them.
  [[nodiscard]] Result<void> state_whole() noexcept {
    return message(wire::encode_extension(wire::ExtensionKind::state_whole, devices()).view());
  }

  /// Gives the guest away. From the first byte of this on the source must not run it again, whatever happens
  /// (section 19.7). end_stream() follows, then push_out().
  [[nodiscard]] Result<void> hand_over() noexcept {
    return message(wire::encode_extension(wire::ExtensionKind::hand_over).view());
  }

  /// Says why this side gives up, as the last of its messages, and pushes it out. Ends an open section of RAM first.
  /// Params `text`: what the destination shows, such as describe(error).
  [[nodiscard]] Result<void> failed(const Error& error, std::string_view text) noexcept {
    if (in_ram_) {
      MULTIFD_TRY(end_section());
    }
    MULTIFD_TRY(message(wire::encode_failed(error, text).view()));
    return push_out();
  }

  // ---- Everywhere

  /// Writes bytes of a stream as they are: devices' sections of a stream that somebody else has written.
  [[nodiscard]] Result<void> raw(std::span<const std::byte> bytes) noexcept { return append(bytes); }
  /// Writes an element that is no page: `element.bytes`.
  [[nodiscard]] Result<void> forward(const Element& element) noexcept { return append(element.bytes); }

  /// Writes a section's footer, where the stream has footers. Params `section_id`: the section's, as its START says.
  [[nodiscard]] Result<void> footer(std::uint32_t section_id) noexcept { return put(element_footer, section_id); }

  /// Writes the gathered bytes; may block until the peer takes them. What the Interrupt holds up goes out with the next call.
  [[nodiscard]] Result<void> push_out() noexcept { return out_.push_out(); }

 private:
  static constexpr std::uint32_t ram_section_id = 1;
  static constexpr std::uint32_t first_device_id = 2;

  template <class... Fields>
  [[nodiscard]] Result<void> put(const Fields&... fields) noexcept {
    return out_.put(fields...);
  }
  [[nodiscard]] Result<void> append(std::span<const std::byte> bytes) noexcept { return out_.append(bytes); }

  /// Names pages of a block, in as many messages as it takes.
  [[nodiscard]] Result<void> page_bitmap(wire::ExtensionKind kind, std::uint32_t block,
                                         std::span<const std::uint64_t> bitmap,
                                         std::size_t most_words = wire::max_page_bitmap_words) noexcept {
    for (std::span<const std::uint64_t> words = bitmap;;) {
      words = wire::next_words(words, most_words);
      if (words.empty()) return {};
      const auto first = static_cast<std::uint64_t>(words.data() - bitmap.data());
      const auto header = wire::encode_page_bitmap_header(kind, block, first * 64 * style_.page_bytes);
      MULTIFD_TRY(put_command_header(wire::extension_number, header.view().size() + words.size_bytes()));
      MULTIFD_TRY(append(header.view()));
      for (const std::uint64_t word : words) {
        MULTIFD_TRY(put(word));
      }
      words = bitmap.subspan(first + words.size());
    }
  }

  [[nodiscard]] Result<void> put_named(std::string_view name) noexcept {
    return put(static_cast<std::uint8_t>(name.size()), name);
  }
  template <class Field>
  [[nodiscard]] Result<void> put_subsection(std::string_view name, const Field& field) noexcept {
    MULTIFD_TRY(put(element_subsection));
    MULTIFD_TRY(put_named(name));
    return put(subsection_version, field);
  }
  [[nodiscard]] Result<void> put_section_header(std::uint8_t type, std::uint32_t id, std::string_view idstr,
                                                std::uint32_t instance, std::uint32_t version) noexcept {
    MULTIFD_TRY(put(type, id));
    MULTIFD_TRY(put_named(idstr));
    return put(instance, version);
  }
  [[nodiscard]] Result<void> put_part(std::uint8_t type) noexcept {
    in_ram_ = true;
    return put(type, ram_section_id);
  }
  [[nodiscard]] Result<void> put_command_header(std::uint16_t command, std::size_t length) noexcept {
    return put(element_command, command, static_cast<std::uint16_t>(length));
  }
  template <class... Fields>
  [[nodiscard]] Result<void> put_command(std::uint16_t command, const Fields&... fields) noexcept {
    MULTIFD_TRY(put_command_header(command, (sizeof(fields) + ... + 0)));
    return put(fields...);
  }
  [[nodiscard]] Result<void> message(std::span<const std::byte> data) noexcept {
    MULTIFD_TRY(put_command_header(wire::extension_number, data.size()));
    return append(data);
  }

  /// The name that a record needs: none if the block is that of the record before.
  std::string_view name_for(std::string_view idstr) noexcept {
    MULTIFD_ASSERT(!idstr.empty() && idstr.size() <= max_idstr_length);
    if (idstr == std::string_view(block_.data(), block_bytes_)) return {};
    block_bytes_ = idstr.copy(block_.data(), block_.size());
    return idstr;
  }

  detail::FieldWriter<T> out_;
  StreamStyle style_;
  bool in_ram_ = false;    ///< a section of RAM was begun here, and not ended
  bool own_peer_ = false;  ///< SETTINGS were written
  std::uint32_t next_section_id_ = first_device_id;
  std::array<char, max_idstr_length> block_;  ///< name of the block of the last record that was written
  std::size_t block_bytes_ = 0;
};

}  // namespace multifd::qemu

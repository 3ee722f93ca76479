// SPDX-License-Identifier: MIT
//
// Writes a main stream: elements that a MainStreamParser has cut out of another one, byte for byte, and records of
// pages made anew. Page records cannot be passed on unchanged where records are dropped or inserted: CONTINUE means
// "the block of the record before", which is another one then (format/main_stream.md section 9.6, format/roles.md
// section 11 step 9).
#pragma once

#include <algorithm>
#include <array>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <memory>
#include <optional>
#include <span>
#include <string_view>
#include <utility>

#include "multifd/config.hpp"
#include "multifd/format/byte_order.hpp"
#include "multifd/format/main_stream.hpp"
#include "multifd/limits.hpp"
#include "multifd/qemu/element.hpp"
#include "multifd/qemu/ram_records.hpp"
#include "multifd/result.hpp"
#include "multifd/transport/algorithms.hpp"
#include "multifd/transport/policy.hpp"

namespace multifd::qemu {

/// Gathers records, and writes them when there are many, or when push_out() is called.
///
/// The caller decides what is written where: nothing checks that a footer ends a section.
/// Errors (of each call): the transport's. Sticky: every later call returns the first one. Gathered bytes are lost
///   then.
/// Threads: one, the transport's writing thread.
/// Cost: one buffer of 64 KiB, allocated at construction; nothing after it. Bytes are copied once; an element larger
///   than the buffer is written without a copy.
template <Transport T>
class MainStreamWriter {
 public:
  /// Params `link`: must outlive this object, and must not be written to elsewhere meanwhile.
  explicit MainStreamWriter(T& link) : link_(&link), buffer_(std::make_unique_for_overwrite<std::byte[]>(capacity)) {}

  /// Writes an element that is no page: `element.bytes`.
  [[nodiscard]] Result<void> forward(const Element& element) noexcept { return append(element.bytes); }

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

  /// Writes a section's footer, where the stream has footers. Params `section_id`: the section's, as its START says.
  [[nodiscard]] Result<void> footer(std::uint32_t section_id) noexcept {
    std::array<std::byte, 5> bytes{std::byte{element_footer}};
    wire::store_be<std::uint32_t>(&bytes[1], section_id);
    return append(bytes);
  }

  /// Writes a PING command, which the destination answers with a PONG of the same value. Only between sections, and
  /// where the return path is open.
  [[nodiscard]] Result<void> ping(std::uint32_t value) noexcept {
    std::array<std::byte, 9> command;
    command[0] = std::byte{element_command};
    wire::store_be<std::uint16_t>(&command[1], command_ping);
    wire::store_be<std::uint16_t>(&command[3], sizeof value);
    wire::store_be<std::uint32_t>(&command[5], value);
    return append(command);
  }

  /// Writes the gathered bytes; may block until the peer takes them.
  [[nodiscard]] Result<void> push_out() noexcept {
    if (error_) return std::unexpected(*error_);
    return write({buffer_.get(), std::exchange(gathered_, 0)});
  }

 private:
  static constexpr std::size_t capacity = 64 * 1024;

  [[nodiscard]] Result<void> append(std::span<const std::byte> bytes) noexcept {
    if (error_) return std::unexpected(*error_);
    if (bytes.size() > capacity - gathered_) {
      if (auto pushed = push_out(); !pushed) return pushed;
      if (bytes.size() > capacity) return write(bytes);
    }
    std::copy(bytes.begin(), bytes.end(), buffer_.get() + gathered_);
    gathered_ += bytes.size();
    return {};
  }

  [[nodiscard]] Result<void> write(std::span<const std::byte> bytes) noexcept {
    if (bytes.empty()) return {};
    auto written = write_all(*link_, bytes);
    if (!written) error_ = written.error();
    return written;
  }

  /// The name that a record needs: none if the block is that of the record before.
  std::string_view name_for(std::string_view idstr) noexcept {
    MULTIFD_ASSERT(!idstr.empty() && idstr.size() <= max_idstr_length);
    if (idstr == std::string_view(block_.data(), block_bytes_)) return {};
    block_bytes_ = idstr.copy(block_.data(), block_.size());
    return idstr;
  }

  T* link_;
  std::unique_ptr<std::byte[]> buffer_;
  std::size_t gathered_ = 0;
  std::optional<Error> error_;
  std::array<char, max_idstr_length> block_;  ///< name of the block of the last record that was written
  std::size_t block_bytes_ = 0;
};

}  // namespace multifd::qemu

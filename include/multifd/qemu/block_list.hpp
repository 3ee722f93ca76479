// SPDX-License-Identifier: MIT
//
// The RAM blocks that a source announces in RAM's START (format/main_stream.md section 9.5), in the source's order,
// with a lookup by name.
//
//   size  field        refused
//      8  total|0x04   over the limit, 0
//   then, until the used_lengths add up to the total, per block:
//      1  len          0
//    len  idstr        a NUL in it, the same name twice
//      8  used_length  0, not a whole number of pages, more than is left of the total
//      8  page_size    (postcopy, huge pages) no power of two, less than a page
//      8  gpa          (x-ignore-shared) nothing
//     28  header       (mapped-ram) see format/mapped_ram.hpp; its offsets are compared with the file by who reads it
#pragma once

#include <algorithm>
#include <bit>
#include <optional>
#include <span>
#include <vector>

#include "multifd/format/main_stream.hpp"
#include "multifd/format/mapped_ram.hpp"
#include "multifd/qemu/detail/cursor.hpp"
#include "multifd/qemu/detail/names.hpp"
#include "multifd/qemu/element.hpp"
#include "multifd/qemu/limits.hpp"

namespace multifd::qemu {

/// Which optional fields the entries of a block list may have; known before it begins.
struct BlockFields {
  bool gpa = false;        ///< x-ignore-shared is among the capabilities: all entries have it
  bool mapped = false;     ///< mapped-ram is among the capabilities: all entries have a header
  bool page_size = false;  ///< POSTCOPY_ADVISE announced huge pages: some entries may have it
};

/// The block list of RAM's START, entry by entry, as far as it has come. Threads: one, the parser's; a reader of the stream
/// may look at it between two calls of the parser.
class BlockList {
 public:
  explicit BlockList(const MainStreamLimits& limits)
      : page_bytes_(limits.page_bytes),
        max_blocks_(limits.max_blocks),
        max_ram_bytes_(limits.max_ram_bytes),
        names_(limits.max_blocks * max_idstr_length) {
    blocks_.reserve(max_blocks_);
    by_name_.reserve(max_blocks_);
  }

  void set_page_bytes(std::size_t bytes) noexcept { page_bytes_ = bytes; }
  std::span<const BlockInfo> blocks() const noexcept { return blocks_; }
  std::uint64_t total_bytes() const noexcept { return total_; }
  /// Whether the used_lengths add up to the total.
  bool complete() const noexcept { return total_ != 0 && left_ == 0; }

  std::optional<std::uint32_t> find(std::string_view idstr) const noexcept {
    const auto at = position(idstr);
    if (at == by_name_.end() || blocks_[*at].idstr != idstr) return std::nullopt;
    return *at;
  }

  /// Parses the word in front of the entries. Errors: Errc::bad_block_list, stream_limit_exceeded.
  [[nodiscard]] Result<Parsed> parse_total(detail::Cursor& in) noexcept {
    if (!in.has(ram_word_bytes)) return Parsed::more;
    const auto word = in.be<std::uint64_t>();
    const std::uint64_t flags = word & (page_bytes_ - 1);
    if (flags != ram_mem_size) return in.refuse(Errc::bad_block_list, "RAM START without its size", flags);
    const std::uint64_t total = word - flags;
    if (total == 0) return in.refuse(Errc::bad_block_list, "no RAM at all");
    if (total > max_ram_bytes_)
      return in.refuse(Errc::stream_limit_exceeded, "bytes of RAM (max_ram_bytes)", total, {}, max_ram_bytes_);
    total_ = left_ = total;
    return Parsed::whole;
  }

  /// Parses the next entry; the list is not complete() yet. May peek at up to 16 bytes behind the entry, which every
  /// stream has that does not break off there.
  /// Errors: Errc::bad_block_list, repeated_block_name, bad_used_length, stream_limit_exceeded, bad_mapped_ram,
  ///   page_size_mismatch.
  [[nodiscard]] Result<Parsed> parse_entry(detail::Cursor& in, BlockFields fields) noexcept {
    if (!in.has(1)) return Parsed::more;
    const std::size_t length = in.peek();
    if (length == 0) return in.refuse(Errc::bad_block_list, "empty block name");
    if (blocks_.size() == max_blocks_)
      return in.refuse(Errc::stream_limit_exceeded, "number of RAM blocks (max_blocks)", max_blocks_ + 1, {},
                       max_blocks_);
    if (!in.has(1 + length + 8)) return Parsed::more;
    in.u8();
    const std::string_view name = in.text(length);
    if (name.find('\0') != name.npos) return in.refuse(Errc::bad_block_list, "NUL in a block's name", length);
    if (find(name)) return in.refuse(Errc::repeated_block_name, "block list", 0, name);
    BlockInfo block;
    block.used_length = in.be<std::uint64_t>();
    if (block.used_length == 0 || block.used_length % page_bytes_ != 0 || block.used_length > left_)
      return in.refuse(Errc::bad_used_length, "block list", block.used_length, name);

    if (fields.page_size) {
      const std::optional<bool> present = page_size_follows(in, fields, block.used_length == left_);
      if (!present) return Parsed::more;
      if (*present) {
        if (!in.has(8)) return Parsed::more;
        block.page_size = in.be<std::uint64_t>();
        if (!std::has_single_bit(block.page_size) || block.page_size < page_bytes_)
          return in.refuse(Errc::bad_block_list, "block's page size", block.page_size, name);
      }
    }
    if (fields.gpa) {
      if (!in.has(8)) return Parsed::more;
      block.gpa = in.be<std::uint64_t>();
    }

    if (fields.mapped) {
      if (!in.has(wire::mapped_ram_header_bytes)) return Parsed::more;
      const auto header =
          wire::parse_mapped_ram_header(in.take(wire::mapped_ram_header_bytes).first<wire::mapped_ram_header_bytes>());
      if (header.version != wire::mapped_ram_version)
        return in.refuse(Errc::bad_mapped_ram, "mapped-ram header's version", header.version, name,
                         wire::mapped_ram_version);
      if (header.page_size != page_bytes_)
        return in.refuse(Errc::page_size_mismatch, "mapped-ram header", header.page_size, name, page_bytes_);
      block.bitmap_offset = header.bitmap_offset;
      block.pages_offset = header.pages_offset;
    }

    left_ -= block.used_length;
    block.idstr = names_.keep(name);
    by_name_.insert(position(name), static_cast<std::uint32_t>(blocks_.size()));
    blocks_.push_back(block);
    return Parsed::whole;
  }

 private:
  using Index = std::vector<std::uint32_t>;

  /// Whether the entry has a page_size. The stream does not say so, but the bytes behind the entry do. The next name's
  /// length is never 0, and the first byte of a page_size and of a gpa is 0. The low bits of the record behind the last
  /// entry are never 0, and those of a page_size and of a gpa are 0. Empty: bytes are missing.
  std::optional<bool> page_size_follows(detail::Cursor& in, BlockFields fields, bool last) const noexcept {
    const std::size_t ahead = fields.gpa ? 8 : 0;
    if (!in.has(ahead + (last ? 8 : 1))) return std::nullopt;
    return last ? in.peek_be<std::uint64_t>(ahead) % page_bytes_ == 0 : in.peek(ahead) == 0;
  }

  Index::const_iterator position(std::string_view idstr) const noexcept {
    return std::ranges::lower_bound(by_name_, idstr, {}, [this](std::uint32_t i) { return blocks_[i].idstr; });
  }

  std::size_t page_bytes_;
  std::size_t max_blocks_;
  std::uint64_t max_ram_bytes_;
  std::uint64_t total_ = 0;
  std::uint64_t left_ = 0;  ///< the part of total_ that no entry has taken yet
  detail::Names names_;
  std::vector<BlockInfo> blocks_;
  Index by_name_;  ///< indices into blocks_, in the order of their names
};

}  // namespace multifd::qemu

// SPDX-License-Identifier: MIT
//
// The payload of RAM's sections (format/main_stream.md sections 9.5 and 9.6): START begins with the block list; every
// section has records up to EOS. "The same block as before" (CONTINUE) may refer to a record of an earlier section, so
// one RamSection parses all sections of a stream.
#pragma once

#include <optional>

#include "multifd/format/main_stream.hpp"
#include "multifd/peer_profile.hpp"
#include "multifd/qemu/block_list.hpp"
#include "multifd/qemu/detail/cursor.hpp"
#include "multifd/qemu/element.hpp"
#include "multifd/qemu/limits.hpp"

namespace multifd::qemu {

/// Parses RAM's sections; has the block list. Threads: one, the parser's.
class RamSection {
 public:
  explicit RamSection(const MainStreamLimits& limits)
      : page_bytes_(limits.page_bytes), xbzrle_(limits.xbzrle), list_(limits) {}

  const BlockList& list() const noexcept { return list_; }
  bool begun() const noexcept { return begun_; }
  /// Params `bytes`: a page size. Contract: START has not begun.
  void set_page_bytes(std::size_t bytes) noexcept {
    page_bytes_ = bytes;
    list_.set_page_bytes(bytes);
  }
  /// Known from the first FLUSH in START, or from START's end without one (section 6.1).
  std::optional<SyncStyle> sync_style() const noexcept { return sync_style_; }

  /// Begins with START, whose header has been parsed.
  void start(BlockFields fields) noexcept {
    fields_ = fields;
    place_ = Place::total;
    begun_ = true;
  }

  /// Parses the next part of a payload.
  /// Errors: those of BlockList; Errc::obsolete_ram_record, unknown_ram_record, record_without_block, bad_block_name,
  ///   unknown_block, offset_past_block, bad_zero_fill, bad_xbzrle.
  [[nodiscard]] Result<Parsed> parse(detail::Cursor& in, Element& out) noexcept {
    switch (place_) {
      case Place::total: {
        const auto parsed = list_.parse_total(in);
        if (parsed != Parsed::whole) return parsed;
        out.kind = ElementKind::ram_size;
        out.size = list_.total_bytes();
        place_ = Place::list;
        return Parsed::whole;
      }
      case Place::list: {
        const auto parsed = list_.parse_entry(in, fields_);
        if (parsed != Parsed::whole) return parsed;
        out.kind = ElementKind::block;
        out.block = static_cast<std::uint32_t>(list_.blocks().size() - 1);
        out.name = list_.blocks().back().idstr;
        out.size = list_.blocks().back().used_length;
        if (list_.complete()) place_ = Place::records;
        return Parsed::whole;
      }
      case Place::records: break;
    }
    return parse_record(in, out);
  }

 private:
  enum class Place : std::uint8_t { total, list, records };

  [[nodiscard]] Result<Parsed> parse_record(detail::Cursor& in, Element& out) noexcept {
    if (!in.has(ram_word_bytes)) return Parsed::more;
    const auto word = in.be<std::uint64_t>();
    const std::uint64_t flags = word & (page_bytes_ - 1);
    const std::uint64_t offset = word - flags;
    if (fields_.mapped && word != ram_eos)
      return in.refuse(Errc::unknown_ram_record, "RAM record of a stream with mapped-ram", word);
    switch (flags & ~ram_continue) {
      case ram_zero: return parse_page(in, out, ElementKind::zero_page, flags, offset);
      case ram_page: return parse_page(in, out, ElementKind::page, flags, offset);
      case ram_full: return in.refuse(Errc::obsolete_ram_record, "RAM record's flags", flags, "FULL");
      case ram_xbzrle:
        if (xbzrle_) return parse_page(in, out, ElementKind::xbzrle_page, flags, offset);
        return in.refuse(Errc::obsolete_ram_record, "RAM record's flags", flags, "XBZRLE");
      case ram_hook: return in.refuse(Errc::obsolete_ram_record, "RAM record's flags", flags, "HOOK");
      case ram_compress_page: return in.refuse(Errc::obsolete_ram_record, "RAM record's flags", flags, "COMPRESS_PAGE");
      default: break;
    }
    if (offset != 0 || (flags != ram_eos && flags != ram_multifd_flush))
      return in.refuse(Errc::unknown_ram_record, "RAM record's word", word);
    if (flags == ram_multifd_flush) {
      out.kind = ElementKind::flush;
      if (!sync_style_) sync_style_ = SyncStyle::per_round;
      out.closes_epoch = true;  // in both styles (section 6.1)
    } else {
      out.kind = ElementKind::end_of_records;
      if (!sync_style_) sync_style_ = SyncStyle::per_section;
      out.closes_epoch = sync_style_ == SyncStyle::per_section;
    }
    return Parsed::whole;
  }

  [[nodiscard]] Result<Parsed> parse_page(detail::Cursor& in, Element& out, ElementKind kind, std::uint64_t flags,
                                          std::uint64_t offset) noexcept {
    const bool continues = (flags & ram_continue) != 0;
    std::uint32_t index = current_;
    if (continues) {
      if (current_ == no_block) return in.refuse(Errc::record_without_block, "RAM record", offset);
    } else {
      if (!in.has(1)) return Parsed::more;
      const std::size_t length = in.peek();
      if (length == 0) return in.refuse(Errc::bad_block_name, "RAM record", 0);
      if (!in.has(1 + length)) return Parsed::more;
      in.u8();
      const std::string_view name = in.text(length);
      const auto found = list_.find(name);
      if (!found) return in.refuse(Errc::unknown_block, "RAM record", 0, name);
      index = *found;
    }
    const BlockInfo& block = list_.blocks()[index];
    // A block holds at least one page, so the subtraction cannot wrap. The offset is aligned: flags fill its low bits.
    if (offset > block.used_length - page_bytes_)
      return in.refuse(Errc::offset_past_block, "RAM record", offset, block.idstr);

    if (kind == ElementKind::zero_page) {
      if (!in.has(1)) return Parsed::more;
      if (const auto fill = in.u8(); fill != 0) return in.refuse(Errc::bad_zero_fill, "ZERO record", fill, block.idstr);
    } else if (kind == ElementKind::xbzrle_page) {
      if (!in.has(xbzrle_header_bytes)) return Parsed::more;
      if (const auto encoding = in.u8(); encoding != xbzrle_encoding)
        return in.refuse(Errc::bad_xbzrle, "XBZRLE record's encoding", encoding, block.idstr, xbzrle_encoding);
      const std::size_t length = in.be<std::uint16_t>();
      if (length > page_bytes_)
        return in.refuse(Errc::bad_xbzrle, "XBZRLE record's length", length, block.idstr, page_bytes_);
      if (!in.has(length)) return Parsed::more;
      out.data = in.take(length);
    } else {
      if (!in.has(page_bytes_)) return Parsed::more;
      out.data = in.take(page_bytes_);
    }
    current_ = index;
    out.kind = kind;
    out.continues = continues;
    out.block = index;
    out.offset = offset;
    out.size = page_bytes_;
    out.name = block.idstr;
    return Parsed::whole;
  }

  std::size_t page_bytes_;
  bool xbzrle_;
  BlockList list_;
  BlockFields fields_;
  Place place_ = Place::total;
  bool begun_ = false;
  std::uint32_t current_ = no_block;  ///< the block of the last record that had a page
  std::optional<SyncStyle> sync_style_;
};

}  // namespace multifd::qemu

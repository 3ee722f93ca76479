// SPDX-License-Identifier: MIT
//
// The stream of a mapped-ram file, apart from its pages and bitmaps (format/mapped_ram.md section 12.1).
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <span>
#include <string_view>
#include <utility>
#include <vector>

#include "multifd/image/file_stream.hpp"
#include "multifd/qemu/main_stream_writer.hpp"

namespace multifd::image {

/// Writes the stream of one file. The order of calls: create(), end_ram(), then stream().device()... or raw(), and end().
///
/// Threads: one.
/// Errors: the file's, of all calls.
/// Cost: two passes over the blocks; a buffer of 64 KiB.
class MappedRamHead {
 public:
  /// Writes everything ahead of the devices but bitmaps and pages, and gives the file its size, all holes.
  ///
  /// Params: `file`: must outlive this object. `what`: machine type and, where the source has one, uuid; `capabilities` is
  ///   set here. `blocks`: names and used_lengths, largest first, as QEMU has them. `offset`: where the stream begins:
  ///   QEMU's `file:PATH,offset=N`.
  /// Errors: also Errc::bad_block_idstr, bad_block_size, bad_page_size, bad_option; ENOMEM.
  [[nodiscard]] static Result<MappedRamHead> create(File& file, qemu::StreamConfiguration what,
                                                    std::span<const qemu::BlockInfo> blocks,
                                                    std::size_t page_bytes = 4096, std::uint64_t offset = 0) {
    if (!valid_page_bytes(page_bytes)) return fail(Errc::bad_page_size, Stage::setup, "image", page_bytes);
    return catch_bad_alloc(Stage::setup, "image", [&]() -> Result<MappedRamHead> {
      MappedRamHead head(file, page_bytes, offset);
      if (auto written = head.begin(what, blocks); !written) return std::unexpected(written.error());
      return head;
    });
  }

  /// The blocks, with their places in the file.
  std::span<const qemu::BlockInfo> blocks() const noexcept { return blocks_; }
  std::size_t page_bytes() const noexcept { return page_bytes_; }

  /// Ends RAM: an empty START and END. What follows are the devices. Errors: errno of pwrite().
  [[nodiscard]] Result<void> end_ram() noexcept {
    MULTIFD_TRY(writer_->end_section());
    MULTIFD_TRY(writer_->begin_end());
    return writer_->end_section();
  }

  /// For the devices' sections.
  qemu::MainStreamWriter<FileStream>& stream() noexcept { return *writer_; }

  /// Writes the end mark and the VM description, and cuts off what an older file has behind them. Errors: errno of pwrite()
  /// and ftruncate().
  [[nodiscard]] Result<void> end(std::string_view description) noexcept {
    MULTIFD_TRY(writer_->end_stream(description));
    return end();
  }
  /// The same for a stream whose devices came by raw(), with the end mark. Errors: as above: errno.
  [[nodiscard]] Result<void> end() noexcept {
    MULTIFD_TRY(writer_->push_out());
    return file_->resize(link_->position());
  }

 private:
  MappedRamHead(File& file, std::size_t page_bytes, std::uint64_t offset)
      : file_(&file), page_bytes_(page_bytes), link_(std::make_unique<FileStream>(file, offset)) {}

  [[nodiscard]] Result<void> begin(qemu::StreamConfiguration what, std::span<const qemu::BlockInfo> blocks) {
    const std::string_view capabilities[] = {qemu::capability_mapped_ram};
    what.capabilities = capabilities;
    qemu::StreamStyle style = qemu::style_of(what.machine_type, peer_multifd, page_bytes_);
    style.configuration = style.footers = true;  // nobody knows the files of older machine types
    style.mapped_ram = true;
    writer_ = std::make_unique<qemu::MainStreamWriter<FileStream>>(*link_, style);
    blocks_.assign(blocks.begin(), blocks.end());
    MULTIFD_TRY(file_->resize(link_->position()));  // what an older file holds takes no room, as QEMU does it
    MULTIFD_TRY(writer_->begin_stream(what));
    MULTIFD_TRY(writer_->begin_ram(blocks_));
    for (qemu::BlockInfo& block : blocks_) {
      MULTIFD_TRY(writer_->push_out());
      block.page_size = block.gpa = 0;
      const auto place =
          wire::place_mapped_ram(link_->position() + writer_->list_block_bytes(block), block.used_length / page_bytes_);
      block.bitmap_offset = place.bitmap_offset;
      block.pages_offset = place.pages_offset;
      MULTIFD_TRY(writer_->list_block(block));
      MULTIFD_TRY(writer_->push_out());
      link_->seek(block.pages_offset + block.used_length);
    }
    // The pages' area has its size from here on, whatever of it will be written.
    return file_->resize(link_->position());
  }

  File* file_;
  std::size_t page_bytes_;
  std::unique_ptr<FileStream> link_;  // the writer points to it
  std::unique_ptr<qemu::MainStreamWriter<FileStream>> writer_;
  std::vector<qemu::BlockInfo> blocks_;
};

}  // namespace multifd::image

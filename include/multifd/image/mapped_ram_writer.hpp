// SPDX-License-Identifier: MIT
//
// Saves a guest's memory to a mapped-ram file (format/mapped_ram.md section 12), over several channels, while the guest
// runs if need be: a page that is queued again is written again, to the same place.
#pragma once

#include <algorithm>
#include <cstdint>
#include <memory>
#include <span>
#include <string_view>
#include <utility>
#include <vector>

#include "multifd/engine/pipeline.hpp"
#include "multifd/image/mapped_ram_head.hpp"
#include "multifd/image/mapped_ram_outlet.hpp"
#include "multifd/qemu/ram_blocks.hpp"

namespace multifd::image {

/// Options of MappedRamWriter::open(). Those of the engine are SenderOptions' of the same name.
template <ZeroPagePolicy Z>
struct MappedRamWriterOptions {
  unsigned channels = 2;     ///< threads that write: 1 to 255
  std::uint64_t offset = 0;  ///< where the stream begins: QEMU's `file:PATH,offset=N`
  /// What pages are written to: the same file opened with O_DIRECT, which spares the page cache. Memory and page size must
  /// suit the file system: 4096 does. Outlives the writer. Default: the file itself.
  File* pages = nullptr;
  Z zero_pages{};                    ///< parameters of the policy
  engine::PipelineOptions engine{};  ///< bandwidth, depth, hooks, limits
};

/// Writes a file that QEMU 9.0 and later load.
///
/// The order of calls: open(), then per round of a live guest any number of queue_*() and one close_epoch(),
/// then end_ram() when the guest has stopped, stream().device()... for its devices, end(). The file is whole, and not yet on
/// the disk, when end() has succeeded; ahead of that no reader takes it, for the stream behind RAM is missing.
///
/// Params: `Z`: what finds zero pages: they become holes. A policy that reports them elsewhere (ZeroPagesLegacy) does not
///   compile. `From`: as Sender's.
/// Threads: cancel() and stats() any; the rest one.
/// Errors: the first error, from whichever thread, is what every later call returns.
template <ZeroPagePolicy Z = ZeroPagesMultifd, PageSource From = FromGuest>
class MappedRamWriter {
  using Pipeline = engine::Pipeline<MappedRamOutlet, Z, From>;
  static_assert(Z::stage != ZeroStage::producer, "MappedRamWriter: a file has no main stream beside its pages");

 public:
  /// Writes the head of the file and starts a thread for each channel.
  ///
  /// Params: `file`: open for writing, empty or to be overwritten; outlives the writer. `ram`: as Sender's. `what`: machine
  ///   type, uuid.
  /// Errors: MappedRamHead::create()'s; those of opening a Sender.
  /// Cost: a bit for each page, beside a Sender's.
  [[nodiscard]] static Result<MappedRamWriter> open(File& file, const RamMap& ram,
                                                    const qemu::StreamConfiguration& what,
                                                    MappedRamWriterOptions<Z> options = {}) {
    return catch_bad_alloc(Stage::setup, "image", [&]() -> Result<MappedRamWriter> {
      MappedRamWriter writer;
      MULTIFD_TRY_ASSIGN(const auto announced, qemu::announced_blocks(ram));
      MULTIFD_TRY_ASSIGN(auto head, MappedRamHead::create(file, what, announced, ram.page_bytes(), options.offset));
      writer.head_ = std::make_unique<MappedRamHead>(std::move(head));
      std::vector<qemu::BlockInfo> blocks;  // in the map's order
      for (const RamBlock& block : ram.blocks())
        blocks.push_back(*std::ranges::find(writer.head_->blocks(), block.idstr, &qemu::BlockInfo::idstr));
      MULTIFD_TRY_ASSIGN(writer.places_, MappedRamPlaces::create(file, blocks, ram.page_bytes(), options.channels));
      File& pages = options.pages != nullptr ? *options.pages : file;
      MULTIFD_TRY_ASSIGN(
          writer.pipeline_,
          Pipeline::open(ram, options.channels, std::move(options.zero_pages), std::move(options.engine),
                         [&](unsigned) -> Result<MappedRamOutlet> { return MappedRamOutlet(*writer.places_, pages); }));
      return writer;
    });
  }

  /// As Sender has them. Errors: those of Sender's calls of the same names: Errc::bad_range, and the first error.
  [[nodiscard]] Result<Queued> queue_page(BlockId block, std::uint64_t offset) noexcept
    requires From::guest
  {
    return pipeline_->producer.queue_page(block, offset);
  }
  [[nodiscard]] Result<QueuedPages> queue_range(BlockId block, std::uint64_t offset, std::uint64_t bytes) noexcept
    requires From::guest
  {
    return pipeline_->producer.queue_range(block, offset, bytes, engine::NoZeroSink{});
  }
  [[nodiscard]] Result<QueuedPages> queue_dirty(BlockId block, std::span<const std::uint64_t> bitmap,
                                                std::uint64_t first_page = 0) noexcept
    requires From::guest
  {
    return pipeline_->producer.queue_dirty(block, bitmap, first_page, engine::NoZeroSink{});
  }
  [[nodiscard]] Result<Queued> queue_zero(BlockId block, std::uint64_t offset) noexcept {
    return pipeline_->producer.queue_zero(block, offset);
  }
  [[nodiscard]] Result<QueuedPages> queue_copies(BlockId block, std::span<const std::uint64_t> offsets,
                                                 std::size_t normal_pages, PageBuffer& pages) noexcept
    requires From::copies
  {
    return pipeline_->producer.queue_copies(block, offsets, normal_pages, pages, engine::NoZeroSink{});
  }
  /// Closes the epoch, without a wait. Returns its number. Errors: the first error; Errc::already_closed.
  [[nodiscard]] Result<std::uint64_t> close_epoch() noexcept { return pipeline_->producer.close_epoch(); }
  /// Waits until all pages of an epoch that close_epoch() returned are in the file.
  [[nodiscard]] Result<void> wait(std::uint64_t epoch) noexcept { return pipeline_->wait(epoch); }

  /// Waits until all pages are in the file, writes the bitmaps, and ends RAM in the stream. Called once.
  [[nodiscard]] Result<void> end_ram() noexcept {
    MULTIFD_TRY(pipeline_->finish());
    MULTIFD_TRY(places_->write_bitmaps());
    return head_->end_ram();
  }
  /// For the devices' sections, behind end_ram().
  qemu::MainStreamWriter<FileStream>& stream() noexcept { return head_->stream(); }
  /// Writes the end mark and the VM description. fsync() is the caller's.
  [[nodiscard]] Result<void> end(std::string_view description) noexcept { return head_->end(description); }

  void cancel() noexcept { pipeline_->cancel("MappedRamWriter::cancel"); }
  /// Allocates the snapshot.
  SenderStats stats() const { return pipeline_->stats(); }
  /// Pages that the file holds now.
  std::uint64_t pages() const noexcept { return places_->pages(); }

 private:
  MappedRamWriter() = default;

  std::unique_ptr<MappedRamHead> head_;
  std::unique_ptr<MappedRamPlaces> places_;
  std::unique_ptr<Pipeline> pipeline_;  // behind what its outlets use, so that it ends first
};

}  // namespace multifd::image

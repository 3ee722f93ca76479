// SPDX-License-Identifier: MIT
#include "qemu_relay/pages.hpp"

#include <algorithm>
#include <cstring>

namespace relay {
namespace {

using namespace multifd;

/// ZeroPagesMultifd, but only in blocks where a destination's memory is zero before the first page comes.
struct ListedWhereFresh {
  static constexpr std::string_view name = "multifd";
  static constexpr ZeroStage stage = ZeroStage::channel;
  std::vector<bool> fresh;

  bool is_zero(PageRef page) const noexcept { return fresh[index(page.block)] && ZeroPagesMultifd{}.is_zero(page); }
};
static_assert(check_zero_page_policy<ListedWhereFresh>());

/// Runs of zero pages that may wait for the main stream; 6 MiB. What is more travels as bytes.
constexpr std::size_t most_zero_runs = 256 * 1024;

}  // namespace

Pages::Pages(const RamMap& ram, const program::StackOptions& out, program::OutMemory memory,
             std::vector<program::Link> links)
    : ram_(ram),
      fresh_(program::fresh_blocks(ram, memory)),
      by_record_(out.zero_pages == ZeroPagesLegacy::name),
      by_list_(out.zero_pages == ZeroPagesMultifd::name),
      bytes_pages_(program::need(PageBuffer::create())) {
  std::memset(bytes_pages_.data(), 0, multifd::batch_bytes);
  if (!by_list_) {
    sender_ = program::open_relay_sender(out, ram, std::move(links));
    return;
  }
  said_ = program::need(ReceivedPages::create(ram));
  sender_ = program::need(with_policy(out.compression, program::Compressors{}, [&]<class C>() {
    return open_any_sender_of<C, FromCopies>(ListedWhereFresh{.fresh = fresh_}, ram, std::move(links),
                                             out.for_library());
  }));
}

Result<void> Pages::take(ReceivedPacket& packet) {
  const std::lock_guard lock(mutex_);
  if (by_list_ && !fresh_[index(packet.block)]) return take_lists(packet);
  auto queued = sender_->queue_copies(packet.block, packet.offsets, packet.normal_pages, packet.pages,
                                      [&](std::uint64_t offset) { return note_zero(packet.block, offset); });
  if (!queued) return std::unexpected(queued.error());
  return {};
}

/// A packet of a block in which a zero page may be listed only where the destination has had one before.
Result<void> Pages::take_lists(ReceivedPacket& packet) {
  for (const std::uint64_t offset : packet.offsets.first(packet.normal_pages)) said_->set(packet.block, offset, 1);
  offsets_.assign(packet.offsets.begin(), packet.offsets.begin() + static_cast<std::ptrdiff_t>(packet.normal_pages));
  for (const std::uint64_t offset : packet.offsets.subspan(packet.normal_pages)) {
    if (said_->test_and_set(packet.block, offset)) {
      offsets_.push_back(offset);
    } else if (!note_zero(packet.block, offset)) {
      if (auto queued = queue_as_bytes(packet.block, offset); !queued) return queued;
    }
  }
  if (offsets_.empty()) return {};
  auto queued = sender_->queue_copies(packet.block, offsets_, packet.normal_pages, packet.pages, {});
  if (!queued) return std::unexpected(queued.error());
  return {};
}

Result<void> Pages::take(const DeviceState& state) {
  const std::lock_guard lock(mutex_);
  return sender_->queue_device_state(state);
}

Result<bool> Pages::take_zero(BlockId block, std::uint64_t offset) {
  const std::lock_guard lock(mutex_);
  if (by_record_ || (by_list_ && !fresh_[index(block)])) {
    ++zero_records_;
    if (by_list_) said_->set(block, offset, 1);
    return true;
  }
  if (auto queued = sender_->queue_zero(block, offset); !queued) return std::unexpected(queued.error());
  return false;
}

Result<void> Pages::close_epoch() {
  const std::lock_guard lock(mutex_);
  if (auto flushed = flush_bytes(); !flushed) return flushed;
  const auto epoch = sender_->close_epoch();
  if (!epoch) return std::unexpected(epoch.error());
  // Before the record that closes the epoch leaves: a destination that has the record and never gets the SYNCs,
  // because somebody dies in between, hangs for good.
  return sender_->wait(*epoch);
}

Result<void> Pages::write_zero_records(MainStreamWriter& main) {
  std::vector<ZeroRun> runs;
  {
    const std::lock_guard lock(mutex_);
    runs.swap(zero_runs_);
    for (const ZeroRun& run : runs) zero_records_ += run.pages;
  }
  for (const ZeroRun& run : runs) {
    const std::string_view idstr = ram_.block(run.block).idstr;
    for (std::uint64_t i = 0; i < run.pages; ++i)
      if (auto written = main.zero_page(idstr, run.offset + i * ram_.page_bytes()); !written) return written;
  }
  return {};
}

std::uint64_t Pages::zero_records() const {
  const std::lock_guard lock(mutex_);
  return zero_records_;
}

bool Pages::note_zero(BlockId block, std::uint64_t offset) {
  if (!zero_runs_.empty()) {
    ZeroRun& last = zero_runs_.back();
    if (last.block == block && last.offset + last.pages * ram_.page_bytes() == offset) {
      ++last.pages;
      return true;
    }
  }
  if (zero_runs_.size() == most_zero_runs) return false;
  zero_runs_.push_back({.block = block, .offset = offset, .pages = 1});
  return true;
}

Result<void> Pages::queue_as_bytes(BlockId block, std::uint64_t offset) {
  if (bytes_block_ != block || bytes_offsets_.size() == ram_.batch_pages()) {
    if (auto flushed = flush_bytes(); !flushed) return flushed;
    bytes_block_ = block;
  }
  bytes_offsets_.push_back(offset);
  return {};
}

Result<void> Pages::flush_bytes() {
  if (bytes_offsets_.empty()) return {};
  auto queued = sender_->queue_copies(bytes_block_, bytes_offsets_, bytes_offsets_.size(), bytes_pages_, {});
  bytes_offsets_.clear();
  std::memset(bytes_pages_.data(), 0, multifd::batch_bytes);  // another buffer came back
  if (!queued) return std::unexpected(queued.error());
  return {};
}

}  // namespace relay

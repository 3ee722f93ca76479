// SPDX-License-Identifier: MIT
//
// The stacks that the programs offer, chosen by name at run time: each Sender and Receiver type is instantiated here,
// once, and the programs see one type with virtual calls. A call moves thousands of pages, so that costs nothing.
#pragma once

#if defined(MULTIFD_HAS_IGZIP)  // set by CMake where the component exists
#include <multifd/compress/igzip.hpp>
#endif
#include <multifd/compress/nocomp.hpp>
#include <multifd/compress/zlib.hpp>
#include <multifd/compress/zstd.hpp>
#include <multifd/multifd.hpp>

#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "common/link.hpp"
#include "common/program.hpp"
#include "common/time_limits.hpp"

namespace program {

/// The policies that the programs offer.
#if defined(MULTIFD_HAS_IGZIP)
using Compressors = multifd::PolicyList<multifd::NoComp, multifd::Zlib, multifd::Igzip, multifd::Zstd>;
#else
using Compressors = multifd::PolicyList<multifd::NoComp, multifd::Zlib, multifd::Zstd>;
#endif
using ZeroPolicies = multifd::PolicyList<multifd::ZeroPagesNone, multifd::ZeroPagesLegacy, multifd::ZeroPagesMultifd>;

/// A compressor with its level set, where it has one.
template <class C>
C with_level(int level) {
  C parameters{};
  if constexpr (requires { parameters.level; }) parameters.level = level;
  return parameters;
}

/// Options that choose a sender's stack.
struct StackOptions {
  unsigned channels = 4;
  std::string compression = "none";
  int level = 1;
  std::string zero_pages = "multifd";
  std::uint64_t bandwidth = 0;
  multifd::PeerProfile peer = multifd::peer_multifd;
  multifd::Digest digest = multifd::Digest::off;
  // For relays.
  unsigned depth = 0;
  multifd::Uuid uuid{};
  multifd::ErrorHook on_error{};
  std::chrono::milliseconds progress_timeout = TimeLimits{}.progress;

  /// `option_prefix`: "" or "out-", for the options that a program has twice.
  void add_to(CLI::App& app, const std::string& option_prefix = {});
  /// What the option parser cannot see: throws Usage for a level that the compressor does not have, and for
  /// zero lists towards a peer that drops them.
  void check() const;

 private:
  std::string prefix_ = "--";
};

/// The names of --compression.
std::vector<std::string> compressor_names();

/// multifd::Sender, whatever its policies: see there for each method.
class AnySender {
 public:
  /// Whether the caller puts a zero page on its main stream.
  using OnZero = std::function<bool(std::uint64_t offset)>;
  virtual ~AnySender() = default;
  virtual multifd::Result<multifd::QueuedPages> queue_range(multifd::BlockId block, std::uint64_t offset,
                                                            std::uint64_t bytes, const OnZero& on_zero) = 0;
  virtual multifd::Result<multifd::QueuedPages> queue_dirty(multifd::BlockId block,
                                                            std::span<const std::uint64_t> bitmap,
                                                            const OnZero& on_zero) = 0;
  virtual multifd::Result<multifd::Queued> queue_zero(multifd::BlockId block, std::uint64_t offset) = 0;
  /// queue_zero() for all pages of a range; on_zero as queue_range().
  virtual multifd::Result<void> queue_zeros(multifd::BlockId block, std::uint64_t offset, std::uint64_t bytes,
                                            const OnZero& on_zero) = 0;
  virtual multifd::Result<multifd::QueuedPages> queue_copies(multifd::BlockId block,
                                                             std::span<const std::uint64_t> offsets,
                                                             std::size_t normal_pages, multifd::PageBuffer& pages,
                                                             const OnZero& on_zero) = 0;
  virtual multifd::Result<void> queue_device_state(const multifd::DeviceState& state) = 0;
  virtual multifd::Result<std::uint64_t> close_epoch() = 0;
  virtual multifd::Result<void> wait(std::uint64_t epoch) = 0;
  virtual multifd::Result<void> close_channels() = 0;
  virtual void cancel() = 0;
  virtual multifd::SenderStats stats() const = 0;
};

/// An AnySender of one stack. What its page source does not have is Errc::not_supported.
template <class C, class Z, class From = multifd::FromGuest>
class SenderOf final : public AnySender {
 public:
  /// Throws Failure.
  SenderOf(const StackOptions& options, Z zero_pages, const multifd::RamMap& ram, std::vector<Link> links)
      : sender_(need(Stack::open(ram, std::move(links),
                                 {.compressor = with_level<C>(options.level),
                                  .zero_pages = std::move(zero_pages),
                                  .uuid = options.uuid,
                                  .peer = options.peer,
                                  .bandwidth = options.bandwidth,
                                  .depth = options.depth,
                                  .progress_timeout = options.progress_timeout,
                                  .digest = options.digest,
                                  .on_error = options.on_error}))),
        page_bytes_(ram.page_bytes()) {}

  multifd::Result<multifd::QueuedPages> queue_range(multifd::BlockId block, std::uint64_t offset, std::uint64_t bytes,
                                                    const OnZero& on_zero) override {
    if constexpr (From::copies)
      return multifd::fail(multifd::Errc::not_supported, multifd::Stage::produce, "queue_range");
    else
      return sender_.queue_range(block, offset, bytes, on_zero);
  }
  multifd::Result<multifd::QueuedPages> queue_dirty(multifd::BlockId block, std::span<const std::uint64_t> bitmap,
                                                    const OnZero& on_zero) override {
    if constexpr (From::copies)
      return multifd::fail(multifd::Errc::not_supported, multifd::Stage::produce, "queue_dirty");
    else
      return sender_.queue_dirty(block, bitmap, 0, on_zero);
  }
  multifd::Result<multifd::Queued> queue_zero(multifd::BlockId block, std::uint64_t offset) override {
    return sender_.queue_zero(block, offset);
  }
  multifd::Result<void> queue_zeros(multifd::BlockId block, std::uint64_t offset, std::uint64_t bytes,
                                    const OnZero& on_zero) override {
    for (const std::uint64_t end = offset + bytes; offset < end; offset += page_bytes_) {
      const auto queued = sender_.queue_zero(block, offset);
      if (!queued) return std::unexpected(queued.error());
      if (*queued == multifd::Queued::zero_on_main) on_zero(offset);
    }
    return {};
  }
  multifd::Result<multifd::QueuedPages> queue_copies(multifd::BlockId block, std::span<const std::uint64_t> offsets,
                                                     std::size_t normal_pages, multifd::PageBuffer& pages,
                                                     const OnZero& on_zero) override {
    if constexpr (From::copies)
      return sender_.queue_copies(block, offsets, normal_pages, pages, on_zero);
    else
      return multifd::fail(multifd::Errc::not_supported, multifd::Stage::produce, "queue_copies");
  }
  multifd::Result<void> queue_device_state(const multifd::DeviceState& state) override {
    return sender_.queue_device_state(state);
  }
  multifd::Result<std::uint64_t> close_epoch() override { return sender_.close_epoch(); }
  multifd::Result<void> wait(std::uint64_t epoch) override { return sender_.wait(epoch); }
  multifd::Result<void> close_channels() override { return sender_.close_channels(); }
  void cancel() override { sender_.cancel(); }
  multifd::SenderStats stats() const override { return sender_.stats(); }

 private:
  using Stack = multifd::Sender<Link, C, Z, From>;
  Stack sender_;
  const std::size_t page_bytes_;
};

/// multifd::Sender::open() for the stack that the options name. Throws Failure.
std::unique_ptr<AnySender> open_sender(const StackOptions& options, const multifd::RamMap& ram,
                                       std::vector<Link> links);
/// The same for a relay: its pages come by queue_copies().
std::unique_ptr<AnySender> open_relay_sender(const StackOptions& options, const multifd::RamMap& ram,
                                             std::vector<Link> links);

/// What the programs set of multifd::ReceiverOptions; the barrier is manual, the memory fresh.
struct ReceiveOptions {
  multifd::UuidCheck uuid{};
  multifd::Populate populate = multifd::Populate::off;
  multifd::FirstPacket first_packet = multifd::FirstPacket::any;
  std::chrono::milliseconds hello_timeout = TimeLimits{}.hello;
  std::chrono::milliseconds progress_timeout = multifd::ReceiverOptions<multifd::NoComp>{}.progress_timeout;
  const multifd::Interrupt* interrupt = nullptr;  ///< ends the wait for the hellos; who has the receiver can cancel it
  multifd::PacketHook on_packet{};                ///< for relays: takes the pages, in place of memory
  multifd::DeviceStateHook on_device_state{};
  multifd::ErrorHook on_error{};
};

/// multifd::Receiver, whatever its compressor: see there for each method.
class AnyReceiver {
 public:
  using WhileHeld = std::function<multifd::Result<void>()>;
  virtual ~AnyReceiver() = default;
  virtual multifd::Result<std::uint64_t> release_epoch() = 0;
  virtual multifd::Result<std::uint64_t> release_epoch(const WhileHeld& while_held) = 0;
  virtual multifd::Result<void> finish() = 0;
  virtual multifd::Result<void> finish(std::chrono::milliseconds limit) = 0;
  virtual multifd::Result<void> end_epochs() = 0;
  /// These are Errc::not_supported with on_packet, and received() is false.
  virtual multifd::Result<void> apply_zero(multifd::BlockId block, std::uint64_t offset) = 0;
  virtual multifd::Result<void> apply_page(multifd::BlockId block, std::uint64_t offset,
                                           std::span<const std::byte> bytes) = 0;
  virtual unsigned ended_channels() const = 0;
  virtual bool received(multifd::BlockId block, std::uint64_t offset) const = 0;
  virtual multifd::Uuid peer_uuid() const = 0;
  virtual void cancel() = 0;
  virtual multifd::ReceiverStats stats() const = 0;
};

/// multifd::Receiver::open().
multifd::Result<std::unique_ptr<AnyReceiver>> open_receiver(const std::string& compression, const multifd::RamMap& ram,
                                                            std::vector<Link> links, ReceiveOptions options);

}  // namespace program

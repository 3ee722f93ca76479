// SPDX-License-Identifier: MIT
//
// AnySender and AnyReceiver: stacks that are chosen by name at run time, behind one type with virtual calls, so that
// the code around them is compiled once. A program lists the policies that it offers; each combination is compiled
// where open_any_sender() and open_any_receiver() are called, so call each in one source file. Transports are chosen
// with AnyTransport (transport/any_transport.hpp), for which one stack is compiled, or by calling the functions with
// another.
//
//   using Link        = AnyTransport<FdTransport, TlsTransport>;
//   using Compressors = PolicyList<NoComp, Zlib, Zstd>;
//   using ZeroPages   = PolicyList<ZeroPagesNone, ZeroPagesLegacy, ZeroPagesMultifd>;
//
//   auto tx = open_any_sender(Compressors{}, ZeroPages{}, ram, std::move(links), {.compression = "zstd", .level = 3});
//   auto queued = (*tx)->queue_dirty(block, bitmap, 0, on_zero);
#pragma once

#include <array>
#include <chrono>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <memory>
#include <new>
#include <optional>
#include <span>
#include <string_view>
#include <utility>
#include <vector>

#include "multifd/compress/nocomp.hpp"
#include "multifd/ends/into_hook.hpp"
#include "multifd/ends/into_memory.hpp"
#include "multifd/receiver.hpp"
#include "multifd/sender.hpp"
#include "multifd/stack.hpp"

namespace multifd {

/// A Sender with any policies. Sender explains what each call does.
///
/// Errors: those of Sender's calls of the same names.
/// Threads: as Sender: cancel(), stats(), set_bandwidth(), set_level(), wait() from any; the others from the producer's.
/// Lifetime: the destructor is Sender's: it cancels what has not been ended, joins, and never waits for the peer.
/// Cost: one virtual call per queue_*(), which queues many pages. Calls that a stack's page source does not
///   have fail with Errc::not_supported: queue_copies() with FromGuest, queue_range() and queue_dirty() with
///   FromCopies.
class AnySender {
 public:
  /// Called for each zero page under a policy that reports them to the caller (ZeroPagesLegacy). Returns whether the
  /// caller writes the page to its main stream; otherwise the page travels as bytes. Empty: all travel as bytes.
  using OnZero = std::function<bool(std::uint64_t offset)>;

  virtual ~AnySender() = default;
  [[nodiscard]] Result<QueuedPages> queue_range(BlockId block, std::uint64_t offset, std::uint64_t bytes,
                                                const OnZero& on_zero) {
    return do_queue_range(block, offset, bytes, on_zero);
  }
  [[nodiscard]] Result<QueuedPages> queue_dirty(BlockId block, std::span<const std::uint64_t> bitmap,
                                                std::uint64_t first_page, const OnZero& on_zero) {
    return do_queue_dirty(block, bitmap, first_page, on_zero);
  }
  [[nodiscard]] Result<Queued> queue_zero(BlockId block, std::uint64_t offset) { return do_queue_zero(block, offset); }
  /// `on_zero` is called for the pages that are Queued::zero_on_main, and must take them.
  /// Errors: also Errc::bad_option when `on_zero` is empty and is needed: nothing is queued.
  [[nodiscard]] Result<void> queue_zeros(BlockId block, std::uint64_t offset, std::uint64_t bytes,
                                         const OnZero& on_zero) {
    return do_queue_zeros(block, offset, bytes, on_zero);
  }
  [[nodiscard]] Result<QueuedPages> queue_copies(BlockId block, std::span<const std::uint64_t> offsets,
                                                 std::size_t normal_pages, PageBuffer& pages, const OnZero& on_zero) {
    return do_queue_copies(block, offsets, normal_pages, pages, on_zero);
  }
  [[nodiscard]] Result<void> queue_device_state(const DeviceState& state) { return do_queue_device_state(state); }
  [[nodiscard]] Result<void> push_out() { return do_push_out(); }
  [[nodiscard]] Result<std::uint64_t> close_epoch() { return do_close_epoch(); }
  [[nodiscard]] Result<void> wait(std::uint64_t epoch) { return do_wait(epoch); }
  [[nodiscard]] Result<void> settle(const wire::EpochWhole& whole) { return do_settle(whole); }
  virtual std::uint64_t take_lost(DirtyBitmaps& into) = 0;
  [[nodiscard]] Result<void> finish() { return do_finish(); }
  [[nodiscard]] Result<void> close_channels() { return do_close_channels(); }
  virtual void cancel() = 0;
  virtual void set_bandwidth(std::uint64_t bytes_per_s) = 0;
  [[nodiscard]] Result<void> set_level(int level) { return do_set_level(level); }
  virtual SenderStats stats() const = 0;
  virtual ChannelStats total() const = 0;

 private:
  // What is called is not what is virtual: GCC lets pass that the result of a virtual call is dropped.
  [[nodiscard]] virtual Result<QueuedPages> do_queue_range(BlockId block, std::uint64_t offset, std::uint64_t bytes,
                                                           const OnZero& on_zero) = 0;
  [[nodiscard]] virtual Result<QueuedPages> do_queue_dirty(BlockId block, std::span<const std::uint64_t> bitmap,
                                                           std::uint64_t first_page, const OnZero& on_zero) = 0;
  [[nodiscard]] virtual Result<Queued> do_queue_zero(BlockId block, std::uint64_t offset) = 0;
  [[nodiscard]] virtual Result<void> do_queue_zeros(BlockId block, std::uint64_t offset, std::uint64_t bytes,
                                                    const OnZero& on_zero) = 0;
  [[nodiscard]] virtual Result<QueuedPages> do_queue_copies(BlockId block, std::span<const std::uint64_t> offsets,
                                                            std::size_t normal_pages, PageBuffer& pages,
                                                            const OnZero& on_zero) = 0;
  [[nodiscard]] virtual Result<void> do_queue_device_state(const DeviceState& state) = 0;
  [[nodiscard]] virtual Result<void> do_push_out() = 0;
  [[nodiscard]] virtual Result<std::uint64_t> do_close_epoch() = 0;
  [[nodiscard]] virtual Result<void> do_wait(std::uint64_t epoch) = 0;
  [[nodiscard]] virtual Result<void> do_settle(const wire::EpochWhole& whole) = 0;
  [[nodiscard]] virtual Result<void> do_finish() = 0;
  [[nodiscard]] virtual Result<void> do_close_channels() = 0;
  [[nodiscard]] virtual Result<void> do_set_level(int level) = 0;
};

/// The names of the policies, and the fields of SenderOptions that do not depend on them. SenderOptions explains these.
struct AnySenderOptions {
  std::string_view compression = "none";    ///< a name of the compressors' list
  std::optional<int> level{};               ///< none: the compressor's default; compressors without levels ignore it
  std::string_view zero_pages = "multifd";  ///< a name of the zero policies' list; its parameters are the defaults
  Uuid uuid{};
  PeerProfile peer = peer_multifd;
  std::uint64_t bandwidth = 0;
  unsigned depth = 0;
  std::chrono::milliseconds progress_timeout = SenderOptions<NoComp, ZeroPagesNone>{}.progress_timeout;
  std::chrono::milliseconds confirm_timeout = SenderOptions<NoComp, ZeroPagesNone>{}.confirm_timeout;
  const Interrupt* interrupt = nullptr;
  Digest digest = Digest::off;
  std::function<Result<void>()> while_waiting{};
  ThreadHook thread_hook{};
  ErrorHook on_error{};
};

/// A Receiver with any policies. Receiver explains what each call does.
///
/// Errors: those of Receiver's calls of the same names.
/// Threads: as Receiver: cancel(), stats(), received(), ended_channels(), apply_zero() and apply_page() from any; the others
///   from one at a time.
/// Lifetime: the destructor is Receiver's: it cancels what has not been ended, joins, and never waits for the peer.
///
/// With a sink that does not write memory (IntoHook), apply_zero() and apply_page() fail with Errc::not_supported, and
/// received() returns false.
class AnyReceiver {
 public:
  using WhileHeld = std::function<Result<void>()>;  ///< empty: nothing to do

  virtual ~AnyReceiver() = default;
  [[nodiscard]] Result<std::uint64_t> release_epoch() { return do_release_epoch(); }
  [[nodiscard]] Result<std::uint64_t> release_epoch(const WhileHeld& while_held) {
    return do_release_epoch(while_held);
  }
  [[nodiscard]] Result<void> finish() { return do_finish(); }
  [[nodiscard]] Result<void> finish(std::chrono::milliseconds limit) { return do_finish(limit); }
  [[nodiscard]] Result<void> end_epochs() { return do_end_epochs(); }
  [[nodiscard]] Result<void> apply_zero(BlockId block, std::uint64_t offset, std::size_t pages = 1) {
    return do_apply_zero(block, offset, pages);
  }
  [[nodiscard]] Result<void> apply_page(BlockId block, std::uint64_t offset, std::span<const std::byte> bytes) {
    return do_apply_page(block, offset, bytes);
  }
  virtual std::array<std::uint8_t, 32> arrived_channels() const = 0;
  virtual void drop_older(unsigned channel, std::uint32_t generation) = 0;
  virtual unsigned ended_channels() const = 0;
  virtual bool received(BlockId block, std::uint64_t offset) const = 0;
  virtual Uuid peer_uuid() const = 0;
  virtual void cancel() = 0;
  /// Cost: allocates the snapshot, as Receiver::stats().
  virtual ReceiverStats stats() const = 0;
  virtual ChannelStats total() const = 0;

 private:
  // As in AnySender.
  [[nodiscard]] virtual Result<std::uint64_t> do_release_epoch() = 0;
  [[nodiscard]] virtual Result<std::uint64_t> do_release_epoch(const WhileHeld& while_held) = 0;
  [[nodiscard]] virtual Result<void> do_finish() = 0;
  [[nodiscard]] virtual Result<void> do_finish(std::chrono::milliseconds limit) = 0;
  [[nodiscard]] virtual Result<void> do_end_epochs() = 0;
  [[nodiscard]] virtual Result<void> do_apply_zero(BlockId block, std::uint64_t offset, std::size_t pages) = 0;
  [[nodiscard]] virtual Result<void> do_apply_page(BlockId block, std::uint64_t offset,
                                                   std::span<const std::byte> bytes) = 0;
};

/// The name of the compressor, and the fields of ReceiverOptions that do not depend on it. ReceiverOptions explains
/// these.
template <PageSink Into = IntoMemory>
struct AnyReceiverOptions {
  std::string_view compression = "none";  ///< a name of the compressors' list
  UuidCheck uuid{};
  Barrier barrier = Barrier::automatic;
  Into into{};
  FirstPacket first_packet = FirstPacket::any;
  std::chrono::milliseconds hello_timeout = ReceiverOptions<NoComp>{}.hello_timeout;
  Listener* listener = nullptr;
  const Interrupt* interrupt = nullptr;
  std::chrono::milliseconds barrier_timeout = ReceiverOptions<NoComp>{}.barrier_timeout;
  std::chrono::milliseconds progress_timeout = ReceiverOptions<NoComp>{}.progress_timeout;
  DeviceStateHook on_device_state{};
  ThreadHook thread_hook{};
  ErrorHook on_error{};
};

/// A compressor with its level set, where it has one. Params `level`: none: the default.
template <class C>
constexpr C with_level(std::optional<int> level) {
  C parameters{};
  if constexpr (requires { parameters.level = 0; })
    if (level) parameters.level = *level;
  return parameters;
}

namespace detail {

template <Transport T, Compressor C, ZeroPagePolicy Z, PageSource From>
class SenderOf final : public AnySender {
 public:
  explicit SenderOf(Sender<T, C, Z, From> sender) : sender_(std::move(sender)) {}

  [[nodiscard]] Result<QueuedPages> do_queue_range(BlockId block, std::uint64_t offset, std::uint64_t bytes,
                                                   const OnZero& on_zero) override {
    if constexpr (!From::guest)
      return fail(Errc::not_supported, Stage::produce, "queue_range");
    else
      return sender_.queue_range(block, offset, bytes, asked(on_zero));
  }
  [[nodiscard]] Result<QueuedPages> do_queue_dirty(BlockId block, std::span<const std::uint64_t> bitmap,
                                                   std::uint64_t first_page, const OnZero& on_zero) override {
    if constexpr (!From::guest)
      return fail(Errc::not_supported, Stage::produce, "queue_dirty");
    else
      return sender_.queue_dirty(block, bitmap, first_page, asked(on_zero));
  }
  [[nodiscard]] Result<Queued> do_queue_zero(BlockId block, std::uint64_t offset) override {
    return sender_.queue_zero(block, offset);
  }
  [[nodiscard]] Result<void> do_queue_zeros(BlockId block, std::uint64_t offset, std::uint64_t bytes,
                                            const OnZero& on_zero) override {
    if (Z::stage == ZeroStage::producer && !on_zero && bytes > 0)
      return fail(Errc::bad_option, Stage::produce, "queue_zeros: on_zero is empty");
    const auto queued = sender_.queue_zeros(block, offset, bytes, asked(on_zero));
    return queued ? Result<void>{} : std::unexpected(queued.error());
  }
  [[nodiscard]] Result<QueuedPages> do_queue_copies(BlockId block, std::span<const std::uint64_t> offsets,
                                                    std::size_t normal_pages, PageBuffer& pages,
                                                    const OnZero& on_zero) override {
    if constexpr (From::copies)
      return sender_.queue_copies(block, offsets, normal_pages, pages, asked(on_zero));
    else
      return fail(Errc::not_supported, Stage::produce, "queue_copies");
  }
  [[nodiscard]] Result<void> do_queue_device_state(const DeviceState& state) override {
    return sender_.queue_device_state(state);
  }
  [[nodiscard]] Result<void> do_push_out() override { return sender_.push_out(); }
  [[nodiscard]] Result<std::uint64_t> do_close_epoch() override { return sender_.close_epoch(); }
  [[nodiscard]] Result<void> do_wait(std::uint64_t epoch) override { return sender_.wait(epoch); }
  [[nodiscard]] Result<void> do_settle(const wire::EpochWhole& whole) override { return sender_.settle(whole); }
  std::uint64_t take_lost(DirtyBitmaps& into) override { return sender_.take_lost(into); }
  [[nodiscard]] Result<void> do_finish() override { return sender_.finish(); }
  [[nodiscard]] Result<void> do_close_channels() override { return sender_.close_channels(); }
  void cancel() override { sender_.cancel(); }
  void set_bandwidth(std::uint64_t bytes_per_s) override { sender_.set_bandwidth(bytes_per_s); }
  [[nodiscard]] Result<void> do_set_level(int level) override { return sender_.set_level(level); }
  SenderStats stats() const override { return sender_.stats(); }
  ChannelStats total() const override { return sender_.total(); }

 private:
  static auto asked(const OnZero& on_zero) noexcept {
    return [&on_zero](std::uint64_t offset) { return on_zero && on_zero(offset); };
  }

  Sender<T, C, Z, From> sender_;
};

template <Transport T, Compressor C, PageSink Into>
class ReceiverOf final : public AnyReceiver {
 public:
  explicit ReceiverOf(Receiver<T, C, Into> receiver) : receiver_(std::move(receiver)) {}

  [[nodiscard]] Result<std::uint64_t> do_release_epoch() override { return receiver_.release_epoch(); }
  [[nodiscard]] Result<std::uint64_t> do_release_epoch(const WhileHeld& while_held) override {
    return while_held ? receiver_.release_epoch(while_held) : receiver_.release_epoch();
  }
  [[nodiscard]] Result<void> do_finish() override { return receiver_.finish(); }
  [[nodiscard]] Result<void> do_finish(std::chrono::milliseconds limit) override { return receiver_.finish(limit); }
  [[nodiscard]] Result<void> do_end_epochs() override { return receiver_.end_epochs(); }
  [[nodiscard]] Result<void> do_apply_zero(BlockId block, std::uint64_t offset, std::size_t pages) override {
    if constexpr (requires { receiver_.apply_zero(block, offset, pages); })
      return receiver_.apply_zero(block, offset, pages);
    else
      return fail(Errc::not_supported, Stage::parse, "apply_zero");
  }
  [[nodiscard]] Result<void> do_apply_page(BlockId block, std::uint64_t offset,
                                           std::span<const std::byte> bytes) override {
    if constexpr (requires { receiver_.apply_page(block, offset, bytes); })
      return receiver_.apply_page(block, offset, bytes);
    else
      return fail(Errc::not_supported, Stage::parse, "apply_page");
  }
  std::array<std::uint8_t, 32> arrived_channels() const override { return receiver_.arrived_channels(); }
  void drop_older(unsigned channel, std::uint32_t generation) override { receiver_.drop_older(channel, generation); }
  unsigned ended_channels() const override { return receiver_.ended_channels(); }
  bool received(BlockId block, std::uint64_t offset) const override {
    if constexpr (requires { receiver_.received(); })
      return receiver_.received().test(block, offset);
    else
      return false;
  }
  Uuid peer_uuid() const override { return receiver_.peer_uuid(); }
  void cancel() override { receiver_.cancel(); }
  ReceiverStats stats() const override { return receiver_.stats(); }
  ChannelStats total() const override { return receiver_.total(); }

 private:
  Receiver<T, C, Into> receiver_;
};

/// Puts an opened Sender or Receiver on the heap, as an `Of`. Errors: ENOMEM; then it is destroyed, which cancels.
template <class Any, class Of, class Open>
[[nodiscard]] Result<std::unique_ptr<Any>> hidden(Open open) noexcept {
  std::unique_ptr<Any> any(new (std::nothrow) Of(std::move(open)));
  if (!any) return fail_errno(Stage::setup, "hide a stack behind AnySender or AnyReceiver", ENOMEM);
  return any;
}

}  // namespace detail

/// Opens the Sender of one stack whose zero policy is the caller's, and hides its type.
///
/// Params `options`: its `zero_pages` is ignored; `redial`: as Sender::open() has it. Errors: those of Sender::open(), ENOMEM among them.
/// Cost: as Sender::open(), and one allocation.
template <Compressor C, PageSource From = FromGuest, ZeroPagePolicy Z, Transport T>
[[nodiscard]] Result<std::unique_ptr<AnySender>> open_any_sender_of(Z zero_pages, const RamMap& ram,
                                                                    std::vector<T> links, AnySenderOptions options,
                                                                    packets::Redial<T>* redial = nullptr) {
  auto sender = Sender<T, C, Z, From>::open(ram, std::move(links),
                                            {.compressor = with_level<C>(options.level),
                                             .zero_pages = std::move(zero_pages),
                                             .uuid = options.uuid,
                                             .peer = options.peer,
                                             .bandwidth = options.bandwidth,
                                             .depth = options.depth,
                                             .progress_timeout = options.progress_timeout,
                                             .confirm_timeout = options.confirm_timeout,
                                             .interrupt = options.interrupt,
                                             .digest = options.digest,
                                             .while_waiting = std::move(options.while_waiting),
                                             .thread_hook = std::move(options.thread_hook),
                                             .on_error = std::move(options.on_error)},
                                            redial);
  if (!sender) return std::unexpected(sender.error());
  return detail::hidden<AnySender, detail::SenderOf<T, C, Z, From>>(std::move(*sender));
}

/// Opens the Sender whose policies the options name.
///
/// Params `compressors`, `zero_policies`: PolicyList of what the program offers. `From`: FromCopies for a relay.
/// Errors: Errc::unknown_policy when a list has no policy of that name; those of Sender::open().
/// Cost: every combination of the lists is compiled. One allocation beside Sender::open()'s.
template <PageSource From = FromGuest, class... Cs, class... Zs, Transport T>
[[nodiscard]] Result<std::unique_ptr<AnySender>> open_any_sender(PolicyList<Cs...> compressors,
                                                                 PolicyList<Zs...> zero_policies, const RamMap& ram,
                                                                 std::vector<T> links, AnySenderOptions options = {}) {
  return with_policies(options.compression, compressors, options.zero_pages, zero_policies, [&]<class C, class Z>() {
    return open_any_sender_of<C, From>(Z{}, ram, std::move(links), std::move(options));
  });
}

/// Opens the Receiver whose compressor the options name.
///
/// Params `compressors`: PolicyList of what the program offers. The sink is `options.into`'s type. `rejoins`: as
///   Receiver::open() has it.
/// Errors: Errc::unknown_policy when the list has no compressor of that name; those of Receiver::open().
/// Cost: every compressor of the list is compiled. One allocation beside Receiver::open()'s.
template <class... Cs, Transport T, PageSink Into = IntoMemory>
[[nodiscard]] Result<std::unique_ptr<AnyReceiver>> open_any_receiver(PolicyList<Cs...> compressors, const RamMap& ram,
                                                                     std::vector<T> links,
                                                                     AnyReceiverOptions<Into> options = {},
                                                                     packets::Rejoins<T>* rejoins = nullptr) {
  return with_policy(options.compression, compressors, [&]<class C>() -> Result<std::unique_ptr<AnyReceiver>> {
    auto receiver = Receiver<T, C, Into>::open(ram, std::move(links),
                                               {.uuid = options.uuid,
                                                .barrier = options.barrier,
                                                .into = std::move(options.into),
                                                .first_packet = options.first_packet,
                                                .hello_timeout = options.hello_timeout,
                                                .listener = options.listener,
                                                .interrupt = options.interrupt,
                                                .barrier_timeout = options.barrier_timeout,
                                                .progress_timeout = options.progress_timeout,
                                                .on_device_state = std::move(options.on_device_state),
                                                .thread_hook = std::move(options.thread_hook),
                                                .on_error = std::move(options.on_error)},
                                               rejoins);
    if (!receiver) return std::unexpected(receiver.error());
    return detail::hidden<AnyReceiver, detail::ReceiverOf<T, C, Into>>(std::move(*receiver));
  });
}

}  // namespace multifd

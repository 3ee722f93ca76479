// SPDX-License-Identifier: MIT
#include "common/stacks.hpp"

namespace program {
namespace {

using namespace multifd;

template <class C, class Z>
class SenderOf final : public AnySender {
 public:
  explicit SenderOf(Sender<FdTransport, C, Z> sender) : sender_(std::move(sender)) {}
  Result<QueuedPages> queue_range(BlockId block, std::uint64_t offset, std::uint64_t bytes,
                                  const OnZero& on_zero) override {
    return sender_.queue_range(block, offset, bytes, on_zero);
  }
  Result<QueuedPages> queue_dirty(BlockId block, std::span<const std::uint64_t> bitmap,
                                  const OnZero& on_zero) override {
    return sender_.queue_dirty(block, bitmap, 0, on_zero);
  }
  Result<std::uint64_t> sync() override { return sender_.sync(); }
  Result<void> wait(std::uint64_t epoch) override { return sender_.wait(epoch); }
  Result<void> close() override { return sender_.close(); }
  void cancel() override { sender_.cancel(); }
  SenderStats stats() const override { return sender_.stats(); }

 private:
  Sender<FdTransport, C, Z> sender_;
};

template <class C>
class ReceiverOf final : public AnyReceiver {
 public:
  explicit ReceiverOf(Receiver<FdTransport, C> receiver) : receiver_(std::move(receiver)) {}
  Result<std::uint64_t> sync() override { return receiver_.sync(); }
  Result<void> finish() override { return receiver_.finish(); }
  void cancel() override { receiver_.cancel(); }
  ReceiverStats stats() const override { return receiver_.stats(); }

 private:
  Receiver<FdTransport, C> receiver_;
};

}  // namespace

std::unique_ptr<AnySender> open_sender(const StackOptions& options, const RamMap& ram, std::vector<FdTransport> links) {
  return need(with_policies(options.compression, Compressors{}, options.zero_pages, ZeroPolicies{},
                            [&]<class C, class Z>() -> Result<std::unique_ptr<AnySender>> {
                              auto sender = Sender<FdTransport, C, Z>::open(ram, std::move(links),
                                                                            {.compressor = with_level<C>(options.level),
                                                                             .peer = options.peer,
                                                                             .bandwidth = options.bandwidth,
                                                                             .digest = options.digest});
                              if (!sender) return std::unexpected(sender.error());
                              return std::make_unique<SenderOf<C, Z>>(std::move(*sender));
                            }));
}

std::unique_ptr<AnyReceiver> open_receiver(const std::string& compression, const RamMap& ram,
                                           std::vector<FdTransport> links, ErrorHook on_error) {
  return need(with_policy(compression, Compressors{}, [&]<class C>() -> Result<std::unique_ptr<AnyReceiver>> {
    auto receiver = Receiver<FdTransport, C>::open(
        ram, std::move(links),
        {.barrier = Barrier::manual, .destination = DestinationMemory::zeroed, .on_error = std::move(on_error)});
    if (!receiver) return std::unexpected(receiver.error());
    return std::make_unique<ReceiverOf<C>>(std::move(*receiver));
  }));
}

}  // namespace program

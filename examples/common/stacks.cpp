// SPDX-License-Identifier: MIT
#include "common/stacks.hpp"

namespace program {
namespace {

using namespace multifd;

template <class C>
class ReceiverOf final : public AnyReceiver {
 public:
  explicit ReceiverOf(Receiver<Link, C> receiver) : receiver_(std::move(receiver)) {}
  Result<std::uint64_t> sync() override { return receiver_.sync(); }
  Result<std::uint64_t> sync(const WhileHeld& while_held) override { return receiver_.sync(while_held); }
  Result<void> finish() override { return receiver_.finish(); }
  Result<void> finish(std::chrono::milliseconds limit) override { return receiver_.finish(limit); }
  Result<void> end_epochs() override { return receiver_.end_epochs(); }
  Result<bool> mark_received(BlockId block, std::uint64_t offset, Arrived as) override {
    return receiver_.mark_received(block, offset, as);
  }
  unsigned ended_channels() const override { return receiver_.ended_channels(); }
  bool received(BlockId block, std::uint64_t offset) const override { return receiver_.received().test(block, offset); }
  Uuid peer_uuid() const override { return receiver_.peer_uuid(); }
  void cancel() override { receiver_.cancel(); }
  ReceiverStats stats() const override { return receiver_.stats(); }

 private:
  Receiver<Link, C> receiver_;
};

}  // namespace

std::unique_ptr<AnySender> open_sender(const StackOptions& options, const RamMap& ram, std::vector<Link> links) {
  return need(with_policies(options.compression, Compressors{}, options.zero_pages, ZeroPolicies{},
                            [&]<class C, class Z>() -> Result<std::unique_ptr<AnySender>> {
                              return std::make_unique<SenderOf<C, Z>>(options, Z{}, ram, std::move(links));
                            }));
}

Result<std::unique_ptr<AnyReceiver>> open_receiver(const std::string& compression, const RamMap& ram,
                                                   std::vector<Link> links, ReceiveOptions options) {
#if defined(MULTIFD_HAS_IGZIP)
  const std::string& decoder = compression;
#else
  const std::string decoder = compression == "igzip" ? "zlib" : compression;  // the same bytes
#endif
  return with_policy(decoder, Compressors{}, [&]<class C>() -> Result<std::unique_ptr<AnyReceiver>> {
    auto receiver = Receiver<Link, C>::open(ram, std::move(links),
                                            {.uuid = options.uuid,
                                             .barrier = Barrier::manual,
                                             .destination = DestinationMemory::zeroed,
                                             .populate = options.populate,
                                             .first_packet = options.first_packet,
                                             .hello_timeout = options.hello_timeout,
                                             .interrupt = options.interrupt,
                                             .progress_timeout = options.progress_timeout,
                                             .on_packet = std::move(options.on_packet),
                                             .on_device_state = std::move(options.on_device_state),
                                             .on_error = std::move(options.on_error)});
    if (!receiver) return std::unexpected(receiver.error());
    return std::make_unique<ReceiverOf<C>>(std::move(*receiver));
  });
}

}  // namespace program

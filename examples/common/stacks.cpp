// SPDX-License-Identifier: MIT
#include "common/stacks.hpp"

namespace program {
namespace {

using namespace multifd;

template <class C, class Into>
class ReceiverOf final : public AnyReceiver {
 public:
  explicit ReceiverOf(Receiver<Link, C, Into> receiver) : receiver_(std::move(receiver)) {}
  Result<std::uint64_t> release_epoch() override { return receiver_.release_epoch(); }
  Result<std::uint64_t> release_epoch(const WhileHeld& while_held) override {
    return receiver_.release_epoch(while_held);
  }
  Result<void> finish() override { return receiver_.finish(); }
  Result<void> finish(std::chrono::milliseconds limit) override { return receiver_.finish(limit); }
  Result<void> end_epochs() override { return receiver_.end_epochs(); }
  Result<void> apply_zero(BlockId block, std::uint64_t offset) override {
    if constexpr (Into::writes_memory)
      return receiver_.apply_zero(block, offset);
    else
      return fail(Errc::not_supported, Stage::parse, "apply_zero");
  }
  Result<void> apply_page(BlockId block, std::uint64_t offset, std::span<const std::byte> bytes) override {
    if constexpr (Into::writes_memory)
      return receiver_.apply_page(block, offset, bytes);
    else
      return fail(Errc::not_supported, Stage::parse, "apply_page");
  }
  unsigned ended_channels() const override { return receiver_.ended_channels(); }
  bool received(BlockId block, std::uint64_t offset) const override {
    if constexpr (Into::writes_memory)
      return receiver_.received().test(block, offset);
    else
      return false;
  }
  Uuid peer_uuid() const override { return receiver_.peer_uuid(); }
  void cancel() override { receiver_.cancel(); }
  ReceiverStats stats() const override { return receiver_.stats(); }

 private:
  Receiver<Link, C, Into> receiver_;
};

template <class C, class Into>
Result<std::unique_ptr<AnyReceiver>> open_receiver_of(Into into, const RamMap& ram, std::vector<Link> links,
                                                      ReceiveOptions& options) {
  auto receiver = Receiver<Link, C, Into>::open(ram, std::move(links),
                                                {.uuid = options.uuid,
                                                 .barrier = Barrier::manual,
                                                 .into = std::move(into),
                                                 .first_packet = options.first_packet,
                                                 .hello_timeout = options.hello_timeout,
                                                 .interrupt = options.interrupt,
                                                 .progress_timeout = options.progress_timeout,
                                                 .on_device_state = std::move(options.on_device_state),
                                                 .on_error = std::move(options.on_error)});
  if (!receiver) return std::unexpected(receiver.error());
  return std::make_unique<ReceiverOf<C, Into>>(std::move(*receiver));
}

template <class From>
std::unique_ptr<AnySender> open_sender_from(const StackOptions& options, const RamMap& ram, std::vector<Link> links) {
  return need(with_policies(options.compression, Compressors{}, options.zero_pages, ZeroPolicies{},
                            [&]<class C, class Z>() -> Result<std::unique_ptr<AnySender>> {
                              return std::make_unique<SenderOf<C, Z, From>>(options, Z{}, ram, std::move(links));
                            }));
}

}  // namespace

std::unique_ptr<AnySender> open_sender(const StackOptions& options, const RamMap& ram, std::vector<Link> links) {
  return open_sender_from<FromGuest>(options, ram, std::move(links));
}

std::unique_ptr<AnySender> open_relay_sender(const StackOptions& options, const RamMap& ram, std::vector<Link> links) {
  return open_sender_from<FromCopies>(options, ram, std::move(links));
}

Result<std::unique_ptr<AnyReceiver>> open_receiver(const std::string& compression, const RamMap& ram,
                                                   std::vector<Link> links, ReceiveOptions options) {
#if defined(MULTIFD_HAS_IGZIP)
  const std::string& decoder = compression;
#else
  const std::string decoder = compression == "igzip" ? "zlib" : compression;  // the same bytes
#endif
  return with_policy(decoder, Compressors{}, [&]<class C>() -> Result<std::unique_ptr<AnyReceiver>> {
    if (options.on_packet)
      return open_receiver_of<C>(IntoHook{std::move(options.on_packet)}, ram, std::move(links), options);
    return open_receiver_of<C>(IntoMemory{.destination = DestinationMemory::zeroed, .populate = options.populate}, ram,
                               std::move(links), options);
  });
}

}  // namespace program

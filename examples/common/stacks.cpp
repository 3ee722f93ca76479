// SPDX-License-Identifier: MIT
#include "common/stacks.hpp"

namespace program {
namespace {

using namespace multifd;

template <class C>
C with_level(int level) {
  C parameters{};
  if constexpr (requires { parameters.level; }) parameters.level = level;
  return parameters;
}

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

template <class List>
std::vector<std::string> names_of() {
  return {List::names.begin(), List::names.end()};
}

}  // namespace

std::vector<std::string> compressor_names() { return names_of<Compressors>(); }

void StackOptions::add_to(CLI::App& app) {
  app.add_option("--channels", channels, "Connections beside the main one")
      ->check(CLI::Range(1u, wire::max_channels))
      ->capture_default_str();
  app.add_option("--compression", compression, "How page data travels")
      ->check(CLI::IsMember(compressor_names()))
      ->capture_default_str();
  app.add_option("--level", level, "Compression level (zlib 0..9; zstd up to 22, below 0 is faster)")
      ->capture_default_str();
  app.add_option("--zero-pages", zero_pages, "Who looks for zero pages")
      ->check(CLI::IsMember(names_of<ZeroPolicies>()))
      ->capture_default_str();
  add_size(app, "--bandwidth", bandwidth, "Cap over all channels, per second (0: none)")->capture_default_str();
}

void StackOptions::check() const {
  const auto opened = with_policy(compression, Compressors{}, [&]<class C>() -> Result<void> {
    auto encoder = C::Encoder::open(with_level<C>(level), CodecLimits{});
    if (!encoder) return std::unexpected(encoder.error());
    return {};
  });
  const bool lists = with_policy(zero_pages, ZeroPolicies{}, []<class Z>() -> Result<bool> {
                       return Z::stage == ZeroStage::channel;
                     }).value_or(false);
  if (lists && !peer.zero_lists)
    throw Usage("--zero-pages " + zero_pages + " with --peer " + std::string(peer.name) + ": " +
                make_error_code(Errc::peer_lacks_zero_lists).message());
  if (!opened)
    throw Usage("--level " + std::to_string(level) + " with " + compression + ": " + describe(opened.error()));
}

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

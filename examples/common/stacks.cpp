// SPDX-License-Identifier: MIT
#include "common/stacks.hpp"

namespace program {
namespace {

using namespace multifd;

template <class Into>
Result<std::unique_ptr<AnyReceiver>> open_receiver_into(Into into, std::string_view compression, const RamMap& ram,
                                                        std::vector<Link> links, ReceiveOptions& options) {
  return open_any_receiver(Compressors{}, ram, std::move(links),
                           AnyReceiverOptions<Into>{.compression = compression,
                                                    .uuid = options.uuid,
                                                    .barrier = Barrier::manual,
                                                    .into = std::move(into),
                                                    .first_packet = options.first_packet,
                                                    .hello_timeout = options.hello_timeout,
                                                    .interrupt = options.interrupt,
                                                    .progress_timeout = options.progress_timeout,
                                                    .on_device_state = std::move(options.on_device_state),
                                                    .on_error = std::move(options.on_error)});
}

}  // namespace

std::unique_ptr<AnySender> open_relay_sender(const StackOptions& options, const RamMap& ram, std::vector<Link> links) {
  return need(open_any_sender<FromCopies>(Compressors{}, ZeroPolicies{}, ram, std::move(links), options.for_library()));
}

Result<std::unique_ptr<AnyReceiver>> open_receiver(const std::string& compression, const RamMap& ram,
                                                   std::vector<Link> links, ReceiveOptions options) {
#if defined(MULTIFD_HAS_IGZIP)
  const std::string& decoder = compression;
#else
  const std::string decoder = compression == "igzip" ? "zlib" : compression;  // the same bytes
#endif
  if (options.on_packet)
    return open_receiver_into(IntoHook{std::move(options.on_packet)}, decoder, ram, std::move(links), options);
  return open_receiver_into(IntoMemory{.destination = DestinationMemory::zeroed}, decoder, ram, std::move(links),
                            options);
}

}  // namespace program

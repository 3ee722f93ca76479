// SPDX-License-Identifier: MIT
//
// Compiled with -fno-exceptions -fno-rtti, never run: every stack, whole, as a VMM without exceptions would have it.
#include "multifd/compress/nocomp.hpp"
#include "multifd/compress/zlib.hpp"
#include "multifd/compress/zstd.hpp"
#include "multifd/multifd.hpp"
#include "multifd/receiver.hpp"
#include "multifd/sender.hpp"
#include "multifd/stack.hpp"
#include "multifd/testing/fault_transport.hpp"
#include "multifd/testing/memory_transport.hpp"
#include "multifd/transport/fd.hpp"
#include "multifd/transport/socket.hpp"

#if defined(__cpp_exceptions) || defined(__cpp_rtti)
#error "compile this file with -fno-exceptions -fno-rtti"
#endif

namespace multifd {

#define MULTIFD_INSTANTIATE(transport, compressor)                \
  template class Sender<transport, compressor, ZeroPagesNone>;    \
  template class Sender<transport, compressor, ZeroPagesLegacy>;  \
  template class Sender<transport, compressor, ZeroPagesMultifd>; \
  template class Receiver<transport, compressor>;

#define MULTIFD_INSTANTIATE_ALL(transport) \
  MULTIFD_INSTANTIATE(transport, NoComp)   \
  MULTIFD_INSTANTIATE(transport, Zlib)     \
  MULTIFD_INSTANTIATE(transport, Zstd)

MULTIFD_INSTANTIATE_ALL(FdTransport)
MULTIFD_INSTANTIATE_ALL(testing::MemoryTransport)
MULTIFD_INSTANTIATE_ALL(testing::FaultTransport<FdTransport>)

// The member templates, which the instantiations above leave out, by the call that programs use.
Result<QueuedPages> send_everything(std::string_view compressor, std::string_view zero_pages, const RamMap& ram,
                                    const Address& address, std::span<const std::uint64_t> bitmap) {
  auto links = connect_channels(address, 4);
  if (!links) return std::unexpected(links.error());
  return with_policies(compressor, PolicyList<NoComp, Zlib, Zstd>{}, zero_pages,
                       PolicyList<ZeroPagesNone, ZeroPagesLegacy, ZeroPagesMultifd>{},
                       [&]<class C, class Z>() -> Result<QueuedPages> {
                         auto tx = Sender<FdTransport, C, Z>::open(ram, std::move(*links));
                         if (!tx) return std::unexpected(tx.error());
                         const auto on_zero = [](std::uint64_t) {};
                         if (auto queued = tx->queue_range(BlockId{}, 0, 4096, on_zero); !queued) return queued;
                         auto queued = tx->queue_dirty(BlockId{}, bitmap, 0, on_zero);
                         if (auto closed = tx->close(); !closed) return std::unexpected(closed.error());
                         return queued;
                       });
}

}  // namespace multifd

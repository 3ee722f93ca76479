// SPDX-License-Identifier: MIT
//
// "Off" is a model of a policy, and leaves nothing behind: no zero check, no copies, no compressor, no hook in the machine
// code of a stack without them. Compiled once for each macro; behind it, which symbols the object file must not mention, or,
// to see that the pattern finds them, must:
//
// SENDER_OFF without zero checks: is_zero_|zero_prefix|zero_kernel|buffer_is_zero|zero_page_mask
// SENDER_ON     with zero checks: is_zero_|zero_prefix|zero_kernel|buffer_is_zero|zero_page_mask
// SENDER_OFF without copies of pages: queue_copies|allocate_copies|FromCopies|PageBuffer
// SENDER_ON     with copies of pages: queue_copies|allocate_copies|FromCopies|PageBuffer
// SENDER_OFF without compressors: deflate|ZSTD_|isal_|NoComp::(En|De)coder::
// SENDER_ON     with compressors: deflate|ZSTD_|isal_|NoComp::(En|De)coder::
// RECEIVER_OFF without hooks for pages: IntoHook|ReceivedPacket
// RECEIVER_ON     with hooks for pages: IntoHook|ReceivedPacket
// RECEIVER_OFF without buffers for pages: operator new[(]unsigned long, std::align_val_t, std::nothrow_t
// RECEIVER_ON     with buffers for pages: operator new[(]unsigned long, std::align_val_t, std::nothrow_t
// RECEIVER_OFF without decompressors: inflate|ZSTD_|isal_|NoComp::(En|De)coder::
// RECEIVER_ON     with decompressors: inflate|ZSTD_|isal_|NoComp::(En|De)coder::
// RECEIVER_ON without memory to write zeros to, or to populate: is_zero_|zero_kernel|PopulateAhead|madvise
// RECEIVER_OFF   with memory to write zeros to, or to populate: is_zero_|zero_kernel|PopulateAhead|madvise
//
// Options of the run time stay in every stack: the digest (XXH3), the bandwidth cap, and with IntoMemory populating.
#include "multifd/compress/nocomp.hpp"
#include "multifd/compress/zlib.hpp"
#include "multifd/receiver.hpp"
#include "multifd/sender.hpp"
#include "multifd/transport/fd.hpp"

using namespace multifd;

#if defined(SENDER_OFF)
using Tx = Sender<FdTransport, NoComp, ZeroPagesNone, FromGuest>;
template class multifd::Sender<FdTransport, NoComp, ZeroPagesNone, FromGuest>;
bool use(Tx& tx, BlockId block, std::span<const std::uint64_t> bitmap) {
  return tx.queue_range(block, 0, 4096) && tx.queue_dirty(block, bitmap);
}
#elif defined(SENDER_ON)
using Tx = Sender<FdTransport, Zlib, ZeroPagesMultifd, FromCopies>;
template class multifd::Sender<FdTransport, Zlib, ZeroPagesMultifd, FromCopies>;
bool use(Tx& tx, BlockId block, std::span<const std::uint64_t> offsets, PageBuffer& pages) {
  return tx.queue_copies(block, offsets, 1, pages).has_value();
}
#elif defined(RECEIVER_OFF)
template class multifd::Receiver<FdTransport, NoComp, IntoMemory>;
#elif defined(RECEIVER_ON)
template class multifd::Receiver<FdTransport, Zlib, IntoHook>;
#endif

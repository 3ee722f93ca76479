// SPDX-License-Identifier: MIT
//
// Compiled with -fno-exceptions -fno-rtti, never run: every stack, whole, as a VMM without exceptions would have it.
#include "multifd/any.hpp"
#include "multifd/compress/nocomp.hpp"
#if defined(MULTIFD_HAS_IGZIP)
#include "multifd/compress/igzip.hpp"
#endif
#include "multifd/compress/zlib.hpp"
#include "multifd/compress/zstd.hpp"
#include "multifd/format/compare_settings.hpp"
#include "multifd/format/page_digests.hpp"
#include "multifd/format/peer_failure.hpp"
#include "multifd/format/peer_settings.hpp"
#include "multifd/migrate/convergence.hpp"
#include "multifd/migrate/downtime_ramp.hpp"
#include "multifd/migrate/fixed_downtime.hpp"
#include "multifd/migrate/stall_detection.hpp"
#include "multifd/multifd.hpp"
#include "multifd/qemu/accept_source.hpp"
#include "multifd/qemu/main_stream.hpp"
#include "multifd/qemu/main_stream_reader.hpp"
#include "multifd/qemu/main_stream_writer.hpp"
#include "multifd/qemu/peer_handshake.hpp"
#include "multifd/qemu/ram_blocks.hpp"
#include "multifd/qemu/ram_records.hpp"
#include "multifd/qemu/return_path.hpp"
#include "multifd/qemu/return_path_reader.hpp"
#include "multifd/qemu/return_path_writer.hpp"
#include "multifd/qemu/stream_end.hpp"
#include "multifd/qemu/vm_description.hpp"
#include "multifd/receiver.hpp"
#include "multifd/sender.hpp"
#include "multifd/stack.hpp"
#include "multifd/testing/fault_transport.hpp"
#include "multifd/testing/memory_transport.hpp"
#include "multifd/transport/any_transport.hpp"
#include "multifd/transport/fd.hpp"
#include "multifd/transport/socket.hpp"
#include "multifd/transport/splice.hpp"
#if defined(MULTIFD_HAS_TLS)
#include "multifd/transport/tls.hpp"
#include "multifd/transport/tls_acceptor.hpp"
#endif
#if defined(MULTIFD_HAS_OPENSSL)
#include "multifd/migrate/gmac.hpp"
#include "multifd/transport/openssl.hpp"
#include "multifd/transport/openssl_acceptor.hpp"
#endif

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
// Pages leave without a copy.
template class Sender<SpliceTransport, NoComp, ZeroPagesMultifd>;
template class Receiver<SpliceTransport, NoComp>;
#if defined(MULTIFD_HAS_IGZIP)
MULTIFD_INSTANTIATE(FdTransport, Igzip)
#endif
#if defined(MULTIFD_HAS_TLS)
template class Sender<TlsTransport, NoComp, ZeroPagesMultifd>;
template class Receiver<TlsTransport, NoComp>;
template class AnyTransport<FdTransport, TlsTransport>;
template class Sender<AnyTransport<FdTransport, TlsTransport>, NoComp, ZeroPagesMultifd>;
template class Receiver<AnyTransport<FdTransport, TlsTransport>, NoComp>;

Result<std::vector<TlsTransport>> secure_everything(std::vector<FdTransport> links, const std::string& directory) {
  const auto credentials = TlsCredentials::x509(directory, TlsRole::client);
  if (!credentials) return std::unexpected(credentials.error());
  auto secured = tls_handshakes(std::move(links), *credentials, {.hostname = "localhost"});
  if (secured && !secured->empty()) (void)peek_magic(secured->front(), std::chrono::seconds(1));
  return secured;
}

template class BasicAcceptor<detail::BasicTlsPending<detail::GnutlsEngine>>;

Result<SourceLinks<TlsTransport>> accept_secured(Listener& listener, const TlsCredentials& credentials) {
  auto acceptor = TlsAcceptor::open(listener, {.credentials = &credentials});
  if (!acceptor) return std::unexpected(acceptor.error());
  return accept_source(*acceptor, 2);
}
#endif
#if defined(MULTIFD_HAS_OPENSSL)
template class Sender<OpensslTransport, NoComp, ZeroPagesMultifd>;
template class Receiver<OpensslTransport, NoComp>;
template class BasicAcceptor<detail::BasicTlsPending<detail::OpensslEngine>>;

Result<std::vector<OpensslTransport>> secure_by_openssl(std::vector<FdTransport> links, const std::string& file) {
  const auto credentials = OpensslCredentials::psk(file, TlsRole::client);
  if (!credentials) return std::unexpected(credentials.error());
  return tls_handshakes(std::move(links), *credentials);
}
#endif
template class BasicAcceptor<detail::PlainPending>;
template class migrate::Convergence<>;
template class migrate::Convergence<migrate::FixedDowntime, migrate::AutoConverge>;
template class migrate::Convergence<migrate::DowntimeRamp>;
template class migrate::Convergence<migrate::StallDetection>;
template class qemu::MainStreamReader<FdTransport>;
template class qemu::MainStreamWriter<FdTransport>;
template class qemu::ReturnPathReader<FdTransport>;
template class qemu::ReturnPathWriter<FdTransport>;
template class AnyTransport<FdTransport>;
template class Sender<FdTransport, NoComp, ResidencyAware<ZeroPagesLegacy>>;
template class Sender<FdTransport, NoComp, ResidencyAware<ZeroPagesMultifd>>;
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
                         if (auto closed = tx->close_channels(); !closed) return std::unexpected(closed.error());
                         return queued;
                       });
}

// Both ends of a stack by its names.
Result<void> name_everything(std::string_view compressor, const RamMap& ram, std::vector<FdTransport> out,
                             std::vector<FdTransport> in) {
  using Compressors = PolicyList<NoComp, Zlib, Zstd>;
  auto tx = open_any_sender(Compressors{}, PolicyList<ZeroPagesLegacy, ZeroPagesMultifd>{}, ram, std::move(out),
                            {.compression = compressor});
  if (!tx) return std::unexpected(tx.error());
  auto rx = open_any_receiver(Compressors{}, ram, std::move(in), AnyReceiverOptions<>{.compression = compressor});
  if (!rx) return std::unexpected(rx.error());
  if (auto finished = (*tx)->finish(); !finished) return finished;
  return (*rx)->finish();
}

// A destination's view of QEMU's main stream: everything that is not a template is compiled where it is used.
Result<void> hear_everything(std::span<const std::byte> stream, std::span<std::byte> answer) {
  auto parser = qemu::MainStreamParser::create({});
  if (!parser) return std::unexpected(parser.error());
  while (parser->tail() != qemu::StreamTail::description) {
    const auto element = parser->next();
    if (!element) return std::unexpected(element.error());
    if (!*element) {
      const auto room = parser->room();
      if (stream.size() < room.size()) return parser->finish();
      std::memcpy(room.data(), stream.data(), room.size());
      stream = stream.subspan(room.size());
      parser->commit(room.size());
    } else if ((*element)->kind == qemu::ElementKind::zero_page) {
      qemu::encode_zero_record(answer, (*element)->offset, (*element)->name);
    }
  }
  qemu::ReturnPathParser answers;
  const auto shut = qemu::encode_shut(0);
  std::memcpy(answers.room().data(), shut.data(), shut.size());
  answers.commit(shut.size());
  if (auto message = answers.next(); !message) return std::unexpected(message.error());
  return {};
}

// What the two ends of this library say beyond QEMU's stream.
Result<wire::FeatureList> shake_hands(FdTransport& link, const wire::PeerSettings& settings) {
  qemu::MainStreamWriter<FdTransport> writer(link);
  qemu::ReturnPathReader<FdTransport> reader(link);
  if (auto asked = qemu::ask_peer(writer, reader); !asked) return std::unexpected(asked.error());
  wire::PeerFailure theirs;
  return qemu::await_accepted(reader, settings, theirs);
}

Result<void> say_everything(const RamMap& ram, std::span<const std::byte> data, std::span<const std::byte> memory) {
  const auto message = wire::parse_extension(data, wire::Towards::destination);
  if (!message) return std::unexpected(message.error());
  auto settings = wire::parse_settings(*message);
  if (!settings) return std::unexpected(settings.error());
  if (auto same = wire::compare_settings(*settings, {}); !same) return same;
  if (auto good = wire::check_features(settings->features, {}); !good) return good;
  if (auto failure = wire::parse_failed(*message); failure) return std::unexpected(failure->error());
  const auto digests = wire::parse_page_digests(*message);
  if (!digests) return std::unexpected(digests.error());
  if (auto equal = wire::compare_page_digests(*digests, memory, 4096, "ram"); !equal) return equal;
  auto blocks = qemu::announced_blocks(ram);
  if (!blocks) return std::unexpected(blocks.error());
  qemu::VmDescription description;
  if (auto added = description.add({.idstr = "cpu"}, 1); !added) return added;
  if (auto text = description.text(); !text) return std::unexpected(text.error());
  return qemu::compare_blocks(*blocks, ram);
}

// A relay: packets as copies from the source's channels into those to the destination.
Result<void> relay_everything(Listener& listener, const Address& to, std::string_view zero_pages, std::uint64_t bytes) {
  auto source = accept_source(listener, 2);
  if (!source) return std::unexpected(source.error());
  RamMap ram;
  if (auto block = ram.add_elsewhere("pc.ram", bytes); !block) return std::unexpected(block.error());
  return with_policy(zero_pages, PolicyList<ZeroPagesNone, ZeroPagesLegacy, ZeroPagesMultifd>{},
                     [&]<class Z>() -> Result<void> {
                       auto links = connect_channels(to, 2);
                       if (!links) return std::unexpected(links.error());
                       auto tx = Sender<FdTransport, NoComp, Z, FromCopies>::open(ram, std::move(*links));
                       if (!tx) return std::unexpected(tx.error());
                       const auto take = [&](ReceivedPacket& packet) -> Result<void> {
                         auto queued = tx->queue_copies(packet.block, packet.offsets, packet.normal_pages, packet.pages,
                                                        [](std::uint64_t) { return false; });
                         return queued ? Result<void>{} : std::unexpected(queued.error());
                       };
                       const auto take_state = [&](const DeviceState& state) { return tx->queue_device_state(state); };
                       auto rx = Receiver<FdTransport, Zstd, IntoHook>::open(
                           ram, std::move(source->channels),
                           {.barrier = Barrier::manual, .into = {take}, .on_device_state = {.take = take_state}});
                       if (!rx) return std::unexpected(rx.error());
                       const auto close_epoch = [&]() -> Result<void> {
                         if (auto zero = tx->queue_zero(BlockId{}, 0); !zero) return std::unexpected(zero.error());
                         auto closed = tx->close_epoch();
                         return closed ? Result<void>{} : std::unexpected(closed.error());
                       };
                       if (auto epoch = rx->release_epoch(close_epoch); !epoch) return std::unexpected(epoch.error());
                       if (auto finished = rx->finish(); !finished) return finished;
                       return tx->close_channels();
                     });
}

}  // namespace multifd

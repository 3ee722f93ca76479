// SPDX-License-Identifier: MIT
//
// No error is dropped without a warning: each call below returns a Result, and ignores it. That every other one warns, too,
// tests/house.py holds.
#include "multifd/any.hpp"
#include "multifd/compress/zlib.hpp"
#include "multifd/compress/zstd.hpp"
#include "multifd/format/compare_settings.hpp"
#include "multifd/format/page_digests.hpp"
#include "multifd/format/peer_failure.hpp"
#include "multifd/format/peer_settings.hpp"
#include "multifd/multifd.hpp"
#include "multifd/qemu/accept_source.hpp"
#include "multifd/qemu/main_stream.hpp"
#include "multifd/qemu/main_stream_reader.hpp"
#include "multifd/qemu/main_stream_writer.hpp"
#include "multifd/qemu/peer_handshake.hpp"
#include "multifd/qemu/ram_blocks.hpp"
#include "multifd/qemu/return_path.hpp"
#include "multifd/qemu/return_path_reader.hpp"
#include "multifd/qemu/return_path_writer.hpp"
#include "multifd/qemu/vm_description.hpp"
#include "multifd/testing/fault_transport.hpp"
#include "multifd/testing/memory_transport.hpp"
#include "multifd/transport/socket.hpp"
#include "multifd/zero/residency.hpp"
#if defined(MULTIFD_HAS_IGZIP)
#include "multifd/compress/igzip.hpp"
#endif
#if defined(MULTIFD_HAS_TLS)
#include "multifd/transport/tls.hpp"
#endif
#if defined(MULTIFD_HAS_OPENSSL)
#include "multifd/transport/openssl_credentials.hpp"
#endif

#pragma GCC diagnostic ignored "-Wdeprecated-declarations"

using namespace multifd;
using namespace multifd::testing;
using namespace std::chrono_literals;

void sender(Sender<FdTransport, Zlib, ZeroPagesLegacy>& tx, const RamMap& ram, BlockId block) {
  tx.open(ram, {});                                      // dropped
  tx.queue_page(block, 0);                               // dropped
  tx.queue_range(block, 0, 4096, [](std::uint64_t) {});  // dropped
  tx.queue_dirty(block, {}, 0, [](std::uint64_t) {});    // dropped
  tx.queue_zero(block, 0);                               // dropped
  tx.queue_device_state({});                             // dropped
  tx.push_out();                                         // dropped
  tx.close_epoch();                                      // dropped
  tx.close_epoch_and_wait();                             // dropped
  tx.wait(0);                                            // dropped
  tx.set_level(1);                                       // dropped
  tx.finish();                                           // dropped
  tx.close_channels();                                   // dropped
  tx.close();                                            // dropped
  tx.sync();                                             // dropped
  tx.sync_and_wait();                                    // dropped
  tx.flush();                                            // dropped
}

void relay(Sender<FdTransport, NoComp, ZeroPagesNone, FromCopies>& tx, BlockId block, PageBuffer& pages) {
  tx.queue_copies(block, {}, 0, pages);  // dropped
}

void receiver(Receiver<FdTransport, Zstd>& rx, const RamMap& ram, BlockId block) {
  rx.open(ram, {});             // dropped
  rx.release_epoch();           // dropped
  rx.finish();                  // dropped
  rx.finish(1s);                // dropped
  rx.end_epochs();              // dropped
  rx.apply_zero(block, 0);      // dropped
  rx.apply_page(block, 0, {});  // dropped
  rx.sync();                    // dropped
}

void memory(RamMap& ram, BlockId block) {
  ram.add("pc.ram", {});            // dropped
  ram.add_read_only("pc.ram", {});  // dropped
  ram.add_elsewhere("pc.ram", 1);   // dropped
  ram.find("pc.ram");               // dropped
  ram.check(block, 0);              // dropped
  ram.resolve(block, 0);            // dropped
  PageBuffer::create();             // dropped
  PageRuns::create(1);              // dropped
  ReceivedPages::create(ram);       // dropped
  UntouchedPages::snapshot(ram);    // dropped
}

void sockets(const Address& address, Listener& listener, FdTransport& link, std::span<std::byte> bytes) {
  parse_address("tcp:[::1]:1");                   // dropped
  connect_to(address);                            // dropped
  connect_channels(address, 1);                   // dropped
  tcp_connect("::1", 1, 1);                       // dropped
  Listener::listen(address, 1);                   // dropped
  listener.accept(1s);                            // dropped
  listener.accept_channels(1, 1s);                // dropped
  peek_magic(link, 1s);                           // dropped
  FdTransport::adopt(0);                          // dropped
  link.write_some({});                            // dropped
  link.read_some({});                             // dropped
  link.finish();                                  // dropped
  Interrupt::create();                            // dropped
  write_all(link, std::span<const std::byte>{});  // dropped
  read_exact(link, bytes);                        // dropped
}

void main_stream(Listener& listener, qemu::MainStreamParser& stream, qemu::ReturnPathParser& answers) {
  accept_source(listener, 1);          // dropped
  qemu::MainStreamParser::create({});  // dropped
  stream.next();                       // dropped
  stream.finish();                     // dropped
  answers.next();                      // dropped
}

void policies(Zlib::Encoder& encoder, Zstd::Decoder& decoder) {
  Zlib::Encoder::open({}, {});    // dropped
  encoder.encode({});             // dropped
  encoder.set_level(1);           // dropped
  Zstd::Decoder::open({}, {});    // dropped
  decoder.decode({}, {});         // dropped
  NoComp::Encoder::open({}, {});  // dropped
  force_zero_kernel("avx2");      // dropped
  find_peer_profile("qemu-9.0");  // dropped
  const auto body = []<class C>() { return Result<void>{}; };
  with_policy("none", PolicyList<NoComp>{}, body);  // dropped
}

void run_time_choice(AnySender& tx, AnyReceiver& rx) {
  tx.close_epoch();    // dropped
  tx.finish();         // dropped
  rx.release_epoch();  // dropped
  rx.finish();         // dropped
}

void main_streams(qemu::MainStreamReader<FdTransport>& reader, qemu::MainStreamWriter<FdTransport>& writer) {
  reader.next();       // dropped
  writer.forward({});  // dropped
  writer.push_out();   // dropped
  writer.hand_over();  // dropped
}

void return_paths(qemu::ReturnPathReader<FdTransport>& reader, qemu::ReturnPathWriter<FdTransport>& writer,
                  const wire::ExtensionMessage& message, qemu::MainStreamWriter<FdTransport>& main,
                  wire::PeerFailure& theirs) {
  qemu::ask_peer(main, reader);              // dropped
  qemu::await_accepted(reader, {}, theirs);  // dropped
  qemu::check_settings(message, {});         // dropped
  reader.next();                             // dropped
  writer.running();                          // dropped
  wire::parse_extension({}, {});             // dropped
  wire::parse_settings(message);             // dropped
  wire::parse_failed(message);               // dropped
  wire::parse_page_digests(message);         // dropped
  wire::compare_settings({}, {});            // dropped
  wire::check_features({}, {});              // dropped
  wire::common_version(1);                   // dropped
  qemu::announced_blocks(RamMap());          // dropped
  qemu::compare_blocks({}, RamMap());        // dropped
  qemu::VmDescription().text();              // dropped
}

void testing_transports(FaultTransport<MemoryTransport>& link, MemoryTransport& pipe) {
  link.write_some({});  // dropped
  link.read_some({});   // dropped
  link.finish();        // dropped
  pipe.write_some({});  // dropped
  pipe.read_some({});   // dropped
  pipe.finish();        // dropped
}

#if defined(MULTIFD_HAS_IGZIP)
void igzip(Igzip::Encoder& encoder, Igzip::Decoder& decoder) {
  Igzip::Encoder::open({}, {});  // dropped
  encoder.encode({});            // dropped
  decoder.decode({}, {});        // dropped
}
#endif

#if defined(MULTIFD_HAS_TLS)
void tls(TlsTransport& link, FdTransport socket, const TlsCredentials& credentials) {
  TlsCredentials::x509("/", TlsRole::client);     // dropped
  TlsCredentials::psk("/", TlsRole::client);      // dropped
  tls_handshake(std::move(socket), credentials);  // dropped
  tls_handshakes({}, credentials);                // dropped
  link.write_some({});                            // dropped
  link.read_some({});                             // dropped
  link.finish();                                  // dropped
  peek_magic(link, 1s);                           // dropped
}
#endif

#if defined(MULTIFD_HAS_OPENSSL)
void openssl(const OpensslCredentials& credentials) {
  OpensslCredentials::x509("/", TlsRole::client);  // dropped
  OpensslCredentials::psk("/", TlsRole::client);   // dropped
  credentials.session({});                         // dropped
}
#endif

// SPDX-License-Identifier: MIT
//
// Plays a source by the calls that a VMM would make: MainStreamWriter, Sender and ReturnPathReader. For tests that look
// at its bytes (tests/format/written.py), or give them to a real QEMU (tests/interop/written.py).
//
//   play_source ADDRESS MACHINE PEER CHANNELS NAME=PAGES...
//
// PEER "multifd" asks whether the destination is ours, and shows the extension when it is. Page i of block b (from 0)
// is zero where i % 3 is 0, else 1024 times the little-endian word (b + 1) << 24 | i. What it hears goes to stdout, a
// line each.
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <string>
#include <string_view>
#include <vector>

#include "multifd/multifd.hpp"
#include "multifd/qemu/main_stream_writer.hpp"
#include "multifd/qemu/ram_blocks.hpp"
#include "multifd/qemu/return_path_reader.hpp"
#include "multifd/qemu/vm_description.hpp"
#include "multifd/transport/socket.hpp"

namespace {

using namespace multifd;
using namespace std::chrono_literals;

constexpr std::size_t page_bytes = 4096;

[[noreturn]] void give_up(const std::string& why) {
  std::printf("failed: %s\n", why.c_str());
  std::fflush(stdout);
  std::_Exit(1);
}

template <class T>
T need(Result<T> result) {
  if (!result) give_up(describe(result.error()));
  if constexpr (!std::is_void_v<T>) return std::move(*result);
}

std::vector<std::byte> content(std::uint32_t block, std::uint32_t pages) {
  std::vector<std::byte> memory(pages * page_bytes);
  for (std::uint32_t page = 0; page < pages; ++page) {
    if (page % 3 == 0) continue;
    const std::uint32_t word = (block + 1) << 24 | page;
    for (std::size_t at = 0; at < page_bytes; at += sizeof word)
      for (std::size_t i = 0; i < sizeof word; ++i)
        memory[page * page_bytes + at + i] = static_cast<std::byte>(word >> (8 * i));
  }
  return memory;
}

class Answers {
 public:
  explicit Answers(FdTransport& link) : reader_(link) {}

  void take_extension() { reader_.take_extension(); }

  /// The next message of a type, which is printed, as every message ahead of it.
  qemu::ReturnMessage wait(std::uint16_t type, wire::ExtensionKind kind = {}) {
    for (;;) {
      const auto message = need(reader_.next(30s));
      if (!message) give_up("the destination has closed the connection");
      print(*message);
      if (message->type == wire::extension_number && message->message.kind == wire::ExtensionKind::failed)
        give_up("the destination: " + std::string(need(wire::parse_failed(message->message)).text()));
      if (message->type == type && (type != wire::extension_number || message->message.kind == kind)) return *message;
    }
  }

 private:
  static void print(const qemu::ReturnMessage& message) {
    if (message.type == wire::extension_number)
      std::printf("%.*s %llu\n", static_cast<int>(wire::extension_name(message.message.kind).size()),
                  wire::extension_name(message.message.kind).data(),
                  static_cast<unsigned long long>(message.message.number));
    else
      std::printf("%s %#x\n", message.type == qemu::return_pong ? "PONG" : "SHUT", message.value);
    std::fflush(stdout);
  }

  qemu::ReturnPathReader<FdTransport> reader_;
};

using Writer = qemu::MainStreamWriter<FdTransport>;
using Source = Sender<FdTransport, NoComp, ZeroPagesLegacy>;

/// A section of RAM with all pages of all blocks.
void send_round(const RamMap& ram, Source& tx, Writer& main) {
  for (std::uint32_t i = 0; i < ram.blocks().size(); ++i) {
    const RamBlock& block = ram.blocks()[i];
    static_cast<void>(need(tx.queue_range(BlockId{i}, 0, block.bytes,
                                          [&](std::uint64_t offset) { need(main.zero_page(block.idstr, offset)); })));
  }
  static_cast<void>(need(tx.close_epoch()));
  need(main.end_epoch());
  need(main.end_section());
  need(main.push_out());
}

void migrate(const Address& address, std::string_view machine, const PeerProfile& peer, unsigned channels,
             const RamMap& ram) {
  FdTransport link = need(connect_to(address));
  auto links = need(connect_channels(address, channels));
  auto tx = need(Source::open(ram, std::move(links), {.peer = peer}));
  Writer main(link, qemu::style_of(machine, peer));
  Answers answers(link);
  need(main.begin_stream({.machine_type = machine}));
  need(main.open_return_path());
  need(main.ping(1));
  bool own = false;
  if (peer.name == peer_multifd.name) {
    need(main.ask());
    need(main.push_out());
    answers.wait(qemu::return_pong);
    own = wire::version_in_pong(answers.wait(qemu::return_pong).value).has_value();
  }
  const auto blocks = need(qemu::announced_blocks(ram));
  if (own) {
    answers.take_extension();
    wire::PeerSettings settings;
    settings.features.add({.name = wire::feature_page_digests, .needed = true});
    settings.channels = channels;
    settings.page_bytes = page_bytes;
    settings.compression = wire::flag_none;
    settings.zero_pages = wire::ZeroPagesMode::legacy;
    settings.digest = Digest::off;
    settings.tls = false;
    settings.paths = 1;
    need(main.settings(settings));
  }
  need(main.start_ram(blocks));
  static_cast<void>(need(tx.close_epoch()));  // START ends one, too
  need(main.end_epoch());
  need(main.end_section());
  need(main.push_out());
  if (own) answers.wait(wire::extension_number, wire::ExtensionKind::accepted);
  need(main.begin_part());
  send_round(ram, tx, main);
  need(main.switchover_start());
  need(main.begin_end());
  send_round(ram, tx, main);
  need(tx.close_channels());
  qemu::VmDescription description(page_bytes);
  if (own) {
    const qemu::DeviceSection cpu{.idstr = "cpu", .instance_id = 1, .version_id = 2};
    const std::string_view state = "state";
    need(main.device(cpu, std::as_bytes(std::span(state))));
    need(description.add(cpu, state.size()));
    for (std::uint32_t i = 0; i < blocks.size(); ++i)
      need(main.page_digests(i, ram.block(need(ram.find(blocks[i].idstr))).host));
    need(main.state_whole());
    need(main.push_out());
    answers.wait(wire::extension_number, wire::ExtensionKind::loaded);
    need(main.hand_over());
  }
  need(main.end_stream(need(description.text())));
  need(main.push_out());
  answers.wait(qemu::return_shut);
}

}  // namespace

int main(int argc, char** argv) {
  if (argc < 6) {
    std::fprintf(stderr, "usage: play_source ADDRESS MACHINE PEER CHANNELS NAME=PAGES...\n");
    return 2;
  }
  RamMap ram(page_bytes);
  std::vector<std::vector<std::byte>> memory;
  for (int i = 5; i < argc; ++i) {
    const std::string_view argument = argv[i];
    const std::size_t equals = argument.rfind('=');
    if (equals == argument.npos) give_up("NAME=PAGES");
    memory.push_back(
        content(static_cast<std::uint32_t>(i - 5), static_cast<std::uint32_t>(std::atoi(argv[i] + equals + 1))));
    static_cast<void>(need(ram.add(argument.substr(0, equals), memory.back())));
  }
  migrate(need(parse_address(argv[1])), argv[2], need(find_peer_profile(argv[3])),
          static_cast<unsigned>(std::atoi(argv[4])), ram);
  return 0;
}

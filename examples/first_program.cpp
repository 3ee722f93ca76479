// SPDX-License-Identifier: MIT
//
// The program of the README's first screen, whole: two functions that a VMM would have, and a main() that runs them
// against each other.

// [readme]
#include <multifd/compress/zstd.hpp>
#include <multifd/multifd.hpp>

using multifd::Result;

// On the host that the guest leaves: send everything, then what got dirty meanwhile.
Result<void> send_guest(std::span<std::byte> memory, std::span<const std::uint64_t> dirty, std::uint16_t port) {
  multifd::RamMap ram;
  auto block = ram.add("pc.ram", memory);
  if (!block) return std::unexpected(block.error());

  auto links = multifd::tcp_connect("127.0.0.1", port, /*channels=*/4);
  if (!links) return std::unexpected(links.error());

  using Sender = multifd::Sender<multifd::FdTransport, multifd::Zstd, multifd::ZeroPagesMultifd>;
  auto tx = Sender::open(ram, std::move(*links), {.compressor = {.level = 1}});
  if (!tx) return std::unexpected(tx.error());

  if (auto r = tx->queue_range(*block, 0, memory.size()); !r) return std::unexpected(r.error());
  if (auto r = tx->close_epoch(); !r) return std::unexpected(r.error());  // an epoch ends; the call does not wait
  if (auto r = tx->queue_dirty(*block, dirty); !r) return std::unexpected(r.error());
  return tx->finish();  // until the other host says that everything has arrived
}

// On the host that it goes to.
Result<void> receive_guest(std::span<std::byte> memory, multifd::Listener& listener) {
  multifd::RamMap ram;
  if (auto block = ram.add("pc.ram", memory); !block) return std::unexpected(block.error());

  auto links = listener.accept_channels(4, std::chrono::seconds(30));
  if (!links) return std::unexpected(links.error());

  using Receiver = multifd::Receiver<multifd::FdTransport, multifd::Zstd>;
  auto rx = Receiver::open(ram, std::move(*links), {.listener = &listener});
  if (!rx) return std::unexpected(rx.error());
  return rx->finish();
}
// [readme end]

#include <algorithm>
#include <cstdio>
#include <thread>
#include <vector>

int main() {
  std::vector<std::byte> here(64 << 20, std::byte{42});
  std::vector<std::byte> there(here.size());
  const std::vector<std::uint64_t> dirty(here.size() / 4096 / 64, 0x1111);  // as KVM_GET_DIRTY_LOG fills it
  std::fill_n(here.begin(), here.size() / 2, std::byte{0});

  const auto report = [](const char* who, const Result<void>& result) {
    if (!result) std::fprintf(stderr, "%s: %s\n", who, describe(result.error()).c_str());
    return result.has_value();
  };
  auto listener = multifd::Listener::listen({.host = "127.0.0.1"}, 4);
  if (!listener) return report("listen", std::unexpected(listener.error())) ? 0 : 1;
  bool received = false;
  std::thread receiver([&] { received = report("receiver", receive_guest(there, *listener)); });
  const bool sent = report("sender", send_guest(here, dirty, listener->local_address().port));
  receiver.join();
  std::puts(here == there ? "equal" : "different");
  return sent && received && here == there ? 0 : 1;
}

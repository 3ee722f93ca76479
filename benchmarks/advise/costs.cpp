// SPDX-License-Identifier: MIT
#include "advise/costs.hpp"

#include <fmt/format.h>
#include <sys/mman.h>

#include <multifd/multifd.hpp>
#include <multifd/transport/listen.hpp>

#include <algorithm>
#include <array>
#include <atomic>
#include <cerrno>
#include <cstring>
#include <exception>
#include <thread>

#include "advise/transfer.hpp"
#include "common/program.hpp"
#include "common/report.hpp"
#include "common/stacks.hpp"
#include "null_transport.hpp"

namespace advise {
namespace {

using namespace multifd;
using program::Failure;
using program::need;

/// The least that `pass()` returns, over at least three calls and about so many seconds: whatever else runs on the
/// machine only adds to a cost, by the caches that it takes away.
template <class Pass>
double quickest_pass(double seconds, const Pass& pass) {
  const program::Stopwatch watch;
  double best = pass();
  for (int passes = 1; passes < 3 || watch.seconds() < seconds; ++passes) best = std::min(best, pass());
  return best;
}

/// Producer's CPU time per page when ranges are queued.
double measure_queue(const Image& image, double seconds) {
  RamMap ram(page_bytes);
  const BlockId block = need(ram.add_read_only("ram", image.sample()));
  std::vector<NullTransport> links(1);
  auto sender = need(Sender<NullTransport, NoComp, ZeroPagesNone>::open(ram, std::move(links)));
  const double best = quickest_pass(seconds, [&] {
    const std::uint64_t start = thread_cpu_ns();
    double pages = 0;
    while (pages < 1e6) {
      need(sender.queue_range(block, 0, image.sample().size()));
      pages += static_cast<double>(image.zero.size());
    }
    need(sender.close_epoch_and_wait());
    return static_cast<double>(thread_cpu_ns() - start) / pages;
  });
  need(sender.close_channels());
  return best;
}

/// The library's own check, in order over the whole memory.
double measure_check(std::span<const std::byte> memory, std::size_t zero_pages, double seconds) {
  const ZeroPagesMultifd policy;
  const std::byte* const host = memory.data();
  const std::size_t pages = memory.size() / page_bytes;
  std::array<std::uint64_t, zero_mask_pages> offsets;
  std::array<const std::byte*, zero_mask_pages> group_pages;
  return quickest_pass(seconds, [&] {
    std::uint64_t found = 0;
    const std::uint64_t start = thread_cpu_ns();
    for (std::size_t first = 0; first < pages; first += offsets.size()) {
      const std::size_t count = std::min(offsets.size(), pages - first);
      for (std::size_t i = 0; i < count; ++i) {
        offsets[i] = (first + i) * page_bytes;
        group_pages[i] = host + offsets[i];
      }
      const PageGroup group{.page_bytes = page_bytes, .offsets = {offsets.data(), count}, .pages = group_pages.data()};
      found += static_cast<std::uint64_t>(__builtin_popcountll(zero_mask(policy, group)));
    }
    const auto spent = static_cast<double>(thread_cpu_ns() - start);
    if (found != zero_pages) throw Failure("the zero check disagrees with itself");
    return spent / static_cast<double>(pages);
  });
}

/// What packets over a socket cost each side.
struct Pumped {
  double packets = 0;
  double payload_bytes = 0;
  double send_ns = 0;
  double receive_ns = 0;
};

/// A connection over loopback TCP: packets of a header and `payload` bytes from `from` into `to`, both walked through
/// from start to end again and again, read as the library's receiver reads them. The sender waits until the packet
/// before has been read, as if it were an encoder: so the receiver sleeps and wakes for each packet, and nothing piles
/// up between them.
Pumped pump_once(std::span<const std::byte> from, std::span<std::byte> to, std::size_t payload, double seconds) {
  auto listener = need(Listener::listen({.host = "127.0.0.1"}, 1), "loopback");
  FdTransport out = need(connect_to(listener.local_address()), "loopback");
  FdTransport in = need(listener.accept(std::chrono::seconds(5)), "loopback");

  Pumped pumped;
  Result<void> received;
  std::atomic<std::uint64_t> taken = 0;  // packets
  std::atomic<bool> ended = false;
  std::thread receiver([&] {
    std::array<std::byte, wire::header_bytes(page_bytes)> header;
    std::size_t at = 0;
    std::size_t ahead = 0;
    const auto read = [&](std::span<iovec> parts, std::size_t least) -> std::size_t {
      const auto arrived = read_at_least(in, parts, least);
      if (!arrived) received = std::unexpected(arrived.error());
      return arrived.value_or(0);
    };
    for (;;) {
      if (ahead < header.size()) {
        iovec rest = mutable_buffer(std::span(header).subspan(ahead));
        const std::size_t wanted = rest.iov_len;
        if (read({&rest, 1}, wanted) < wanted) break;
      }
      ahead = 0;
      taken.fetch_add(payload == 0 ? 1 : 0, std::memory_order_relaxed);
      if (payload == 0) continue;
      iovec parts[] = {{to.data() + at, payload}, mutable_buffer(header)};
      const std::size_t arrived = read(parts, payload);
      if (arrived < payload) break;
      taken.fetch_add(1, std::memory_order_relaxed);
      ahead = arrived - payload;
      at = at + 2 * payload <= to.size() ? at + payload : 0;
    }
    pumped.receive_ns = static_cast<double>(thread_cpu_ns());
    ended = true;
  });
  const auto send = [&]() -> Result<void> {
    std::array<std::byte, wire::header_bytes(page_bytes)> header{};
    const program::Stopwatch watch;
    std::uint64_t sent_packets = 0;
    std::size_t at = 0;
    while (watch.seconds() < seconds) {
      while (taken.load(std::memory_order_relaxed) < sent_packets && !ended) std::this_thread::yield();
      const std::uint64_t start = thread_cpu_ns();
      iovec parts[] = {const_buffer(header), const_buffer(from.data() + at, payload)};
      if (auto sent = write_all(out, std::span(parts).first(payload > 0 ? 2 : 1)); !sent) return sent;
      pumped.send_ns += static_cast<double>(thread_cpu_ns() - start);
      ++sent_packets;
      at = at + 2 * payload <= from.size() ? at + payload : 0;
    }
    pumped.packets = static_cast<double>(sent_packets);
    pumped.payload_bytes = pumped.packets * static_cast<double>(payload);
    return out.finish();
  };
  const Result<void> sent = send();
  if (!sent) in.shutdown();
  receiver.join();
  need(sent, "loopback");
  need(received, "loopback");
  return pumped;
}

/// The cheapest of four.
Pumped pump(std::span<const std::byte> from, std::span<std::byte> to, std::size_t payload, double seconds) {
  Pumped best;
  const auto cost = [](const Pumped& each) { return (each.send_ns + each.receive_ns) / each.packets; };
  for (int round = 0; round < 4; ++round) {
    const Pumped each = pump_once(from, to, payload, seconds / 4);
    if (round == 0 || cost(each) < cost(best)) best = each;
  }
  return best;
}

/// The cheapest of some transfers of the library's own, as both ends' CPU time goes. `spread`: how much more the next
/// one took, as a share; may be null.
Transfer cheapest_transfer(std::span<std::byte> from, ZeroMode zero_pages, double seconds, unsigned cores, Steps& steps,
                           double* spread = nullptr) {
  const program::Mapping to = memory_for(Destination::warm, from.size(), steps.interrupt());
  const program::Stopwatch watch;
  Transfer best;
  std::vector<double> costs;
  const auto cost = [](const Transfer& each) { return each.senders_cpu_s + each.receivers_cpu_s; };
  for (int round = 0; round < 3 || watch.seconds() < seconds; ++round) {
    const Transfer each = transfer(from, to, Destination::warm,
                                   {.zero_pages = zero_pages, .channels = std::min(2u, cores)}, steps.interrupt());
    costs.push_back(cost(each));
    if (round == 0 || cost(each) < cost(best)) best = each;
  }
  std::ranges::sort(costs);
  if (spread != nullptr) *spread = costs[1] / costs[0] - 1;
  return best;
}

void measure_sockets(const Image& image, double seconds, unsigned cores, HostCosts& costs, Steps& steps) {
  constexpr double s = 1e9;
  // Packets without pages: zero memory, less the check.
  steps.next("sockets, packets without pages");
  const program::Mapping zeros = program::Mapping::anonymous(64 << 20);
  zeros.populate(&steps.interrupt());
  const double zero_pages = static_cast<double>(zeros.bytes().size() / page_bytes);
  const double check_ns = measure_check(zeros.bytes(), zeros.bytes().size() / page_bytes, seconds / 4);
  const Transfer empty = cheapest_transfer(zeros.bytes(), ZeroMode::multifd, seconds, cores, steps);
  costs.send_packet_ns = std::max(500.0, (empty.senders_cpu_s * s - zero_pages * check_ns) / empty.packets);
  costs.receive_packet_ns = empty.receivers_cpu_s * s / empty.packets;

  steps.next("sockets, guest memory");
  const Transfer pages = cheapest_transfer(image.sample(), ZeroMode::none, seconds, cores, steps, &costs.spread);
  const auto bytes = static_cast<double>(image.sample().size());
  // A stream of full packets wakes no thread, so the packets' own cost is not subtracted: they are few.
  costs.send_page_ns = pages.senders_cpu_s * s / bytes;
  costs.receive_page_ns = pages.receivers_cpu_s * s / bytes;

  steps.next("sockets, encoded packets");
  const Pumped headers = pump({}, {}, 0, seconds);
  std::vector<std::byte> buffer(128 << 10);
  std::vector<std::byte> back(buffer.size());
  const Pumped encoded = pump(buffer, back, buffer.size(), seconds);
  const auto per_byte = [&](double ns, double header_ns) {
    return std::max(0.0, ns - encoded.packets * header_ns / headers.packets) / encoded.payload_bytes;
  };
  costs.send_payload_ns = per_byte(encoded.send_ns, headers.send_ns);
  costs.receive_payload_ns = per_byte(encoded.receive_ns, headers.receive_ns);
}

/// CPU time per byte of touching fresh memory: the second time, after it was given back. The first time may be the
/// host's cost of this virtual machine and not that of a fault.
double measure_faults(int advice) {
  constexpr std::size_t bytes = 128 << 20;
  constexpr std::size_t align = 2 << 20;
  void* const memory = ::mmap(nullptr, bytes + align, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (memory == MAP_FAILED) throw Failure(fmt::format("128 MiB of memory: {}", std::strerror(errno)));
  const auto unused = -reinterpret_cast<std::uintptr_t>(memory) % align;
  auto* const first = static_cast<std::byte*>(memory) + unused;
  (void)::madvise(first, bytes, advice);
  double spent = 0;
  for (int round = 0; round < 2; ++round) {
    const std::uint64_t start = thread_cpu_ns();
    for (std::size_t at = 0; at < bytes; at += page_bytes) *static_cast<volatile std::byte*>(first + at) = std::byte{1};
    spent = static_cast<double>(thread_cpu_ns() - start);
    (void)::madvise(first, bytes, MADV_DONTNEED);
  }
  ::munmap(memory, bytes + align);
  return spent / bytes;
}

/// How much more CPU time the same work takes when all cores do it. A level of zstd stands for all work: it computes,
/// and it reads memory.
double measure_busy(const Image& image, double seconds, unsigned cores) {
  const auto run = [&](unsigned threads) {
    std::vector<double> ns_per_byte(threads);
    std::vector<std::exception_ptr> errors(threads);
    std::vector<std::thread> workers;
    std::atomic<unsigned> waiting = threads;
    for (unsigned i = 0; i < threads; ++i)
      workers.emplace_back([&, i] {
        waiting.fetch_sub(1);
        try {
          auto encoder = need(Zstd::Encoder::open({.level = 1}, {.page_bytes = page_bytes}));
          while (waiting.load() != 0) std::this_thread::yield();
          const program::Stopwatch watch;
          const std::uint64_t start = thread_cpu_ns();
          double bytes = 0;
          const std::size_t packet = std::min(multifd::batch_bytes, image.sample().size());
          for (std::size_t at = image.sample().size() / threads * i; watch.seconds() < seconds; at += packet) {
            if (at + packet > image.sample().size()) at = 0;
            const iovec pages = const_buffer(image.sample().subspan(at, packet));
            need(encoder.encode({&pages, 1}));
            bytes += static_cast<double>(packet);
          }
          ns_per_byte[i] = static_cast<double>(thread_cpu_ns() - start) / bytes;
        } catch (...) {
          errors[i] = std::current_exception();
        }
      });
    for (std::thread& worker : workers) worker.join();
    for (const std::exception_ptr& error : errors)
      if (error) std::rethrow_exception(error);
    double sum = 0;
    for (const double each : ns_per_byte) sum += each;
    return sum / threads;
  };
  const double alone = quickest_pass(0, [&] { return run(1); });
  return std::max(1.0, quickest_pass(0, [&] { return run(cores); }) / alone);
}

}  // namespace

void Steps::next(std::string what) {
  if (interrupt_.triggered()) throw Failure("cancelled");
  const std::lock_guard lock(mutex_);
  what_ = std::move(what);
}

std::string Steps::now() const {
  const std::lock_guard lock(mutex_);
  return what_;
}

HostCosts measure_host(const Image& image, double seconds, unsigned cores, Steps& steps) {
  HostCosts costs;
  steps.next("queueing");
  costs.queue_ns = measure_queue(image, seconds / 2);
  steps.next("zero check");
  costs.check_ns = measure_check(image.sample(), image.zero_pages, seconds / 2);
  measure_sockets(image, seconds, cores, costs, steps);
  steps.next("faults of fresh memory");
  costs.fault_ns = measure_faults(MADV_HUGEPAGE);
  costs.fault_small_ns = measure_faults(MADV_NOHUGEPAGE);
  steps.next("all cores at once");
  costs.busy_cores = cores;
  if (cores > 1) costs.busy_factor = measure_busy(image, seconds / 3, cores);
  return costs;
}

}  // namespace advise

// SPDX-License-Identifier: MIT
#include "advise/link.hpp"

#include <fmt/format.h>
#include <netinet/tcp.h>
#include <sys/socket.h>

#include <multifd/format/byte_order.hpp>
#include <multifd/multifd.hpp>
#include <multifd/transport/connect.hpp>

#include <algorithm>
#include <array>
#include <atomic>
#include <fstream>
#include <list>
#include <thread>
#include <vector>

#include "common/program.hpp"
#include "common/report.hpp"
#include "corpus.hpp"

namespace advise {
namespace {

using namespace multifd;
using program::Failure;
using program::need;

constexpr std::uint32_t magic = 0x4d46444c;  // "MFDL"
enum : std::uint32_t { say_stream = 0, say_bye = 1 };
constexpr std::size_t hello_bytes = 8;
constexpr std::size_t report_bytes = 24;

/// No call on the socket takes longer: then it fails with Errc::timed_out.
void limit_calls(const FdTransport& link, int seconds) {
  const timeval limit{.tv_sec = seconds, .tv_usec = 0};
  ::setsockopt(link.native_handle(), SOL_SOCKET, SO_RCVTIMEO, &limit, sizeof limit);
  ::setsockopt(link.native_handle(), SOL_SOCKET, SO_SNDTIMEO, &limit, sizeof limit);
}

struct Report {
  double bytes = 0;
  double seconds = 0;
  unsigned cores = 1;
};

/// One connection's stream; `link` is connected.
Result<Report> stream(FdTransport& link, std::uint32_t what, std::span<const std::byte> bytes, double seconds) {
  std::array<std::byte, hello_bytes> hello;
  wire::store_be(hello.data(), magic);
  wire::store_be(hello.data() + 4, what);
  if (auto sent = write_all(link, std::span<const std::byte>(hello)); !sent) return std::unexpected(sent.error());
  for (const program::Stopwatch watch; watch.seconds() < seconds;)
    if (auto sent = write_all(link, bytes); !sent) return std::unexpected(sent.error());
  if (auto ended = link.finish(); !ended) return std::unexpected(ended.error());
  std::array<std::byte, report_bytes> answer;
  if (auto read = read_exact(link, std::span<std::byte>(answer)); !read) return std::unexpected(read.error());
  const auto word = [&](std::size_t at) { return wire::load_be<std::uint64_t>(answer.data() + at); };
  return Report{.bytes = static_cast<double>(word(0)),
                .seconds = static_cast<double>(word(8)) * 1e-9,
                .cores = static_cast<unsigned>(std::clamp<std::uint64_t>(word(16), 1, 4096))};
}

/// The listening side of one connection; whatever a stranger sends is read and forgotten. True after a bye.
bool serve_one(FdTransport& link) {
  limit_calls(link, 10);
  std::array<std::byte, hello_bytes> hello;
  if (!read_exact(link, std::span<std::byte>(hello))) return false;
  if (wire::load_be<std::uint32_t>(hello.data()) != magic) return false;
  std::vector<std::byte> buffer(512 << 10);
  iovec part = mutable_buffer(buffer);
  std::uint64_t bytes = 0;
  const program::Stopwatch watch;
  while (watch.seconds() < 120) {
    const auto arrived = link.read_some({&part, 1});
    if (!arrived) return false;
    if (*arrived == 0) break;
    bytes += *arrived;
  }
  std::array<std::byte, report_bytes> answer;
  wire::store_be(answer.data(), bytes);
  wire::store_be(answer.data() + 8, static_cast<std::uint64_t>(watch.seconds() * 1e9));
  wire::store_be(answer.data() + 16, std::uint64_t{std::max(1u, std::thread::hardware_concurrency())});
  if (!write_all(link, std::span<const std::byte>(answer))) return false;
  (void)link.finish();
  return wire::load_be<std::uint32_t>(hello.data() + 4) == say_bye;
}

double rtt_of(const FdTransport& link) {
  tcp_info info{};
  socklen_t size = sizeof info;
  if (::getsockopt(link.native_handle(), IPPROTO_TCP, TCP_INFO, &info, &size) != 0) return 0;
  return info.tcpi_rtt * 1e-6;
}

}  // namespace

MeasuredLink measure_link(const Address& address, unsigned most_connections, double seconds, Steps& steps) {
  // Random bytes: some links compress.
  static const std::vector<std::byte> bytes = [] {
    std::vector<std::byte> made(256 << 10);
    corpus::fill(made, "random", 1);
    return made;
  }();
  SocketOptions options{.connect_timeout = std::chrono::seconds(5)};
  options.interrupt = &steps.interrupt();
  MeasuredLink result{.link = {.name = to_string(address)}};
  // Round robin, so that what else goes on for a while disturbs every number of connections alike.
  std::vector<std::pair<unsigned, std::vector<double>>> passes;
  for (unsigned connections = 1; connections <= most_connections; connections *= 2) passes.emplace_back(connections, 0);
  for (unsigned pass = 0; pass < 3; ++pass)
    for (auto& [connections, rates] : passes) {
      steps.next(fmt::format("{} with {} connection{}", to_string(address), connections, connections > 1 ? "s" : ""));
      auto links = need(connect_channels(address, connections, options), to_string(address));
      if (connections == 1) result.link.rtt_s = rtt_of(links[0]);
      const program::OnInterrupt cut(steps.interrupt(), [&] {
        for (FdTransport& link : links) link.shutdown();
      });
      std::vector<Result<Report>> reports(connections, Report{});
      std::vector<std::thread> senders;
      for (unsigned i = 0; i < connections; ++i) {
        limit_calls(links[i], 10);
        senders.emplace_back([&, i] { reports[i] = stream(links[i], say_stream, bytes, seconds); });
      }
      for (std::thread& sender : senders) sender.join();
      double sum = 0;
      double longest = 0;
      for (const Result<Report>& each : reports) {
        const Report report = need(each, to_string(address));
        sum += report.bytes;
        longest = std::max(longest, report.seconds);
        result.peer_cores = report.cores;
      }
      if (longest <= 0 || sum <= 0) throw Failure(fmt::format("{}: the peer measured nothing", to_string(address)));
      rates.push_back(sum / longest);
    }
  for (auto& [connections, rates] : passes) {
    std::ranges::sort(rates);
    const double median = rates[rates.size() / 2];
    result.link.measured.push_back(
        {.connections = connections, .bytes_per_s = median, .spread = (rates.back() - rates.front()) / median});
    result.link.bytes_per_s = std::max(result.link.bytes_per_s, median);
  }
  result.link.nominal_bits_per_s = result.link.bytes_per_s * 8;
  FdTransport last = need(connect_to(address, options), to_string(address));
  limit_calls(last, 10);
  need(stream(last, say_bye, {}, 0), to_string(address));
  return result;
}

bool serve_link(Listener& listener, std::chrono::seconds idle, const Interrupt& interrupt) {
  struct Guest {
    FdTransport link;
    std::atomic<bool> ended = false;
    std::thread thread;
  };
  constexpr std::size_t most_guests = max_channels;
  std::list<Guest> guests;
  Interrupt over = need(Interrupt::create());
  std::atomic<bool> bye = false;
  const program::OnInterrupt stop(interrupt, [&] { over.trigger(); });
  // One that has ended still has its answer on the way, which a shutdown would take back.
  const auto leave = [&](Guest& guest) {
    if (!guest.ended) guest.link.shutdown();
    guest.thread.join();
  };
  while (!bye) {
    auto link = listener.accept(idle, &over);
    if (!link) break;  // no connection came, a signal came, or the bye
    for (auto guest = guests.begin(); guest != guests.end();) {
      const bool ended = guest->ended;
      if (ended) leave(*guest);
      guest = ended ? guests.erase(guest) : std::next(guest);
    }
    if (guests.size() >= most_guests) continue;
    Guest& guest = guests.emplace_back(std::move(*link));
    guest.thread = std::thread([&guest, &bye, &over] {
      const bool said_bye = serve_one(guest.link);
      guest.ended = true;
      if (!said_bye) return;
      bye = true;
      over.trigger();
    });
  }
  // The peer that said bye has got its answer; others would keep this side until their time limit.
  for (Guest& guest : guests) leave(guest);
  return bye;
}

MeasuredLink measure_loopback(unsigned most_connections, double seconds, Steps& steps) {
  auto listener = need(Listener::listen({.host = "127.0.0.1"}, 256), "loopback");
  Interrupt over = need(Interrupt::create());
  std::thread peer([&] { (void)serve_link(listener, std::chrono::seconds(60), over); });
  const auto end = [&] {
    over.trigger();
    peer.join();
  };
  try {
    MeasuredLink result = measure_link(listener.local_address(), most_connections, seconds, steps);
    end();
    result.link.name = "loopback";
    return result;
  } catch (...) {
    end();
    throw;
  }
}

}  // namespace advise

// SPDX-License-Identifier: MIT
//
// A whole Sender and Receiver in one process over real sockets, beside the raw pump over sockets with the same settings.
//
//   pipeline/<what>/<socket>/channels:N      what: pump, or the zero-page policy; memory of random pages, warm
//   pipeline/splice/<socket>/channels:N      as pipeline/none, by SpliceTransport
//   pattern/<pattern>/channels:2             ZeroPagesMultifd over other memory
//   codec/<compressor>/channels:2            the pattern "mixed"
//   pipeline/tls/tcp/channels:N              as pipeline/none/tcp, under TLS 1.3 by TlsCipher::automatic; handshakes not timed
//
//   bytes_per_second of RAM; cpu_s_per_gib and switches per batch: both ends together
#include <benchmark/benchmark.h>
#include <sys/mman.h>
#include <sys/resource.h>

#include <chrono>
#include <cstdlib>
#include <cstring>
#include <map>
#include <string>
#include <thread>
#include <vector>

#include "corpus.hpp"
#include "multifd/compress/nocomp.hpp"
#include "multifd/compress/zlib.hpp"
#include "multifd/compress/zstd.hpp"
#include "multifd/multifd.hpp"
#include "multifd/transport/splice.hpp"
#include "socket_pump.hpp"
#if defined(MULTIFD_HAS_TLS)
#include "multifd/transport/tls.hpp"
#include "support/tls_files.hpp"
#endif

namespace {

using namespace multifd;
using Clock = std::chrono::steady_clock;

/// MULTIFD_BENCH_MIB says how much memory is moved: 2048 MiB, unless a smoke run wants less.
std::uint64_t ram_bytes() {
  static const std::uint64_t bytes = [] {
    const char* const mib = std::getenv("MULTIFD_BENCH_MIB");
    return (mib != nullptr ? std::strtoull(mib, nullptr, 10) : 2048) << 20;
  }();
  return bytes;
}

std::span<std::byte> map_memory() {
  void* const memory =
      ::mmap(nullptr, ram_bytes(), PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_POPULATE, -1, 0);
  if (memory == MAP_FAILED) throw std::bad_alloc();
  return {static_cast<std::byte*>(memory), ram_bytes()};
}

/// The source's memory; one pattern at a time, so that no more than twice the RAM is needed.
std::span<std::byte> source(const std::string& pattern) {
  static const std::span<std::byte> memory = map_memory();
  static std::string filled;
  if (filled != pattern) {
    std::memset(memory.data(), 0, memory.size());
    corpus::fill(memory, pattern, 1);
    filled = pattern;
  }
  return memory;
}

std::span<std::byte> destination() {
  static const std::span<std::byte> memory = [] {
    const auto fresh = map_memory();
    std::memset(fresh.data(), 1, fresh.size());
    return fresh;
  }();
  return memory;
}

template <class R>
auto need(R result) {
  if (!result) throw std::runtime_error(describe(result.error()));
  if constexpr (!std::is_void_v<typename R::value_type>) return std::move(*result);
}

/// Connected pairs over loopback TCP or a UNIX socket.
struct Links {
  using Transport = FdTransport;
  std::vector<FdTransport> out, in;
  Links(bool tcp, unsigned channels) {
    auto listener =
        need(Listener::listen(tcp ? Address{.host = "127.0.0.1"}
                                  : need(parse_address("unix:/tmp/bench_pipeline." + std::to_string(::getpid()))),
                              channels));
    std::thread accepting([&] { in = need(listener.accept_channels(channels, std::chrono::seconds(10))); });
    out = need(connect_channels(listener.local_address(), channels, {}));
    accepting.join();
  }
};

/// The same, of which guest pages leave without a copy.
struct SpliceLinks {
  using Transport = SpliceTransport;
  std::vector<SpliceTransport> out, in;
  SpliceLinks(bool tcp, unsigned channels) {
    Links plain(tcp, channels);
    for (FdTransport& link : plain.out) out.emplace_back(std::move(link));
    for (FdTransport& link : plain.in) in.emplace_back(std::move(link));
  }
};

#if defined(MULTIFD_HAS_TLS)
/// The same under TLS with certificates.
struct TlsLinks {
  using Transport = TlsTransport;
  std::vector<TlsTransport> out, in;
  TlsLinks(bool tcp, unsigned channels) {
    static const auto client = need(TlsCredentials::x509(test::tls_files() + "/good", TlsRole::client));
    static const auto server = need(TlsCredentials::x509(test::tls_files() + "/good", TlsRole::server));
    Links plain(tcp, channels);
    std::thread serving([&] { in = need(tls_handshakes(std::move(plain.in), server)); });
    out = need(tls_handshakes(std::move(plain.out), client, {.hostname = "localhost"}));
    serving.join();
  }
};
#endif

struct Usage {
  long switches = 0;
  double cpu_s = 0;
  static Usage now() {
    rusage usage{};
    getrusage(RUSAGE_SELF, &usage);
    const auto s = [](timeval t) { return static_cast<double>(t.tv_sec) + 1e-6 * static_cast<double>(t.tv_usec); };
    return {usage.ru_nvcsw + usage.ru_nivcsw, s(usage.ru_utime) + s(usage.ru_stime)};
  }
};

/// `transfer(links)` moves everything once.
template <class L, class Transfer>
void measure(benchmark::State& state, bool tcp, unsigned channels, Transfer&& transfer) {
  double cpu = 0;
  double switches = 0;
  double gib = 0;
  for (auto _ : state) {
    L links(tcp, channels);
    const Usage before = Usage::now();
    const auto began = Clock::now();
    transfer(links);
    const double seconds = std::chrono::duration<double>(Clock::now() - began).count();
    const Usage after = Usage::now();
    state.SetIterationTime(seconds);
    cpu += after.cpu_s - before.cpu_s;
    switches += static_cast<double>(after.switches - before.switches);
    gib += static_cast<double>(ram_bytes()) / (1 << 30);
  }
  state.SetBytesProcessed(state.iterations() * static_cast<std::int64_t>(ram_bytes()));
  state.counters["cpu_s_per_gib"] = cpu / gib;
  state.counters["switches"] = switches / (gib * 2048);
}

template <class C, class Z, class L = Links>
void migrate(benchmark::State& state, const std::string& pattern, bool tcp, C compressor) {
  const auto from = source(pattern);
  const auto to = destination();
  RamMap out, in;
  const BlockId block = need(out.add_read_only("ram", from));
  need(in.add("ram", to));
  using T = typename L::Transport;
  measure<L>(state, tcp, static_cast<unsigned>(state.range(0)), [&](L& links) {
    std::thread receiving([&] {
      auto receiver = need(Receiver<T, C>::open(in, std::move(links.in), {.compressor = compressor}));
      need(receiver.finish());
    });
    auto sender = need(Sender<T, C, Z>::open(out, std::move(links.out), {.compressor = compressor}));
    need(sender.queue_range(block, 0, from.size()));
    need(sender.close_channels());
    receiving.join();
  });
  if (std::memcmp(from.data(), to.data(), from.size()) != 0) state.SkipWithError("memory differs");
}

void pump_random(benchmark::State& state, bool tcp) {
  const auto from = source("random");
  const auto to = destination();
  const auto handles = [](const std::vector<FdTransport>& links) {
    std::vector<int> fds;
    for (const FdTransport& link : links) fds.push_back(link.native_handle());
    return fds;
  };
  measure<Links>(state, tcp, static_cast<unsigned>(state.range(0)), [&](Links& links) {
    std::thread receiving([&] { pump::pump_receive(handles(links.in), to); });
    pump::pump_send(handles(links.out), from);
    receiving.join();
  });
}

benchmark::internal::Benchmark* settings(benchmark::internal::Benchmark* benchmark) {
  return benchmark->ArgName("channels")->UseManualTime()->Iterations(1)->Unit(benchmark::kMillisecond);
}

template <class Body>
benchmark::internal::Benchmark* add(const std::string& name, Body body) {
  return settings(benchmark::RegisterBenchmark(name.c_str(), body));
}

const bool registered = [] {
  for (const bool tcp : {true, false}) {
    const std::string socket = tcp ? "tcp" : "unix";
    const auto all = [](benchmark::internal::Benchmark* one) {
      for (const int channels : {1, 2, 4, 8, 16, 32}) one->Arg(channels);
    };
    all(add("pipeline/pump/" + socket, [tcp](benchmark::State& state) { pump_random(state, tcp); }));
    all(add("pipeline/none/" + socket,
            [tcp](benchmark::State& state) { migrate<NoComp, ZeroPagesNone>(state, "random", tcp, {}); }));
    all(add("pipeline/splice/" + socket,
            [tcp](benchmark::State& state) { migrate<NoComp, ZeroPagesNone, SpliceLinks>(state, "random", tcp, {}); }));
    all(add("pipeline/multifd/" + socket,
            [tcp](benchmark::State& state) { migrate<NoComp, ZeroPagesMultifd>(state, "random", tcp, {}); }));
  }
#if defined(MULTIFD_HAS_TLS)
  add("pipeline/tls/tcp",
      [](benchmark::State& state) { migrate<NoComp, ZeroPagesNone, TlsLinks>(state, "random", true, {}); })
      ->Arg(1)
      ->Arg(2)
      ->Arg(4)
      ->Arg(8);
#endif
  for (const std::string pattern : {"zero", "half", "mixed"})
    add("pattern/" + pattern, [pattern](benchmark::State& state) {
      migrate<NoComp, ZeroPagesMultifd>(state, pattern, true, {});
    })->Arg(2);
  add("codec/zlib", [](benchmark::State& state) { migrate<Zlib, ZeroPagesMultifd>(state, "mixed", true, {}); })->Arg(2);
  add("codec/zstd", [](benchmark::State& state) { migrate<Zstd, ZeroPagesMultifd>(state, "mixed", true, {}); })->Arg(2);
  add("codec/zstd-20", [](benchmark::State& state) {
    migrate<Zstd, ZeroPagesMultifd>(state, "mixed", true, {.level = -20});
  })->Arg(2);
  return true;
}();

}  // namespace

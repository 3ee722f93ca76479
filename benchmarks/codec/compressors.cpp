// SPDX-License-Identifier: MIT
//
// What a compressor makes of each pattern, one thread, packets of 128 pages as a channel gets them: pages that are not
// zero, neighbours as one run.
//
//   compress/<pattern>/<compressor>/<level>      bytes_per_second: page bytes in, per second of the thread
//   decompress/<pattern>/<compressor>/<level>    bytes_per_second: page bytes out
//   ratio: page bytes / payload bytes. bytes_vs_plain: payload bytes / those of the baseline.
//   Baselines: zlib_plain/1 and zstd_plain/1, the library called page by page as QEMU does. Compare speeds with them.
//
// A case is one pass over its pages; repeat it, with the cases in turn, for figures to believe:
//   bench_codec --benchmark_repetitions=5 --benchmark_enable_random_interleaving=true
//     --benchmark_report_aggregates_only=true --benchmark_out=codec.json --benchmark_out_format=json
// takes two minutes; benchmarks/codec/table.py makes a table of the file.
#include <benchmark/benchmark.h>
#include <fmt/format.h>

#include <algorithm>
#include <cstring>
#include <functional>
#include <map>
#include <string>
#include <vector>

#include "codec/plain.hpp"
#include "corpus.hpp"
#if defined(MULTIFD_HAS_IGZIP)
#include "multifd/compress/igzip.hpp"
#endif
#include "multifd/compress/nocomp.hpp"
#include "multifd/compress/zlib.hpp"
#include "multifd/compress/zstd.hpp"

namespace {

using multifd::CodecLimits;
using multifd::ConstBuffers;
using multifd::MutableBuffers;

constexpr std::size_t packet_bytes = 128 * corpus::page_bytes;
constexpr std::size_t compress_packets = 64;    // 32 MiB
constexpr std::size_t decompress_packets = 16;  // 8 MiB: what they are made from costs time too
constexpr std::string_view patterns[] = {"mixed", "guest", "library", "text", "random"};

/// The packets of a pattern.
class Packets {
 public:
  explicit Packets(std::string_view pattern) : memory_(2 * compress_packets * packet_bytes) {
    corpus::fill(memory_, pattern, 1);
    std::vector<iovec> runs;
    std::size_t pages = 0;
    for (std::size_t at = 0; at < memory_.size() && packets_.size() < compress_packets; at += corpus::page_bytes) {
      std::byte* const page = memory_.data() + at;
      if (page[0] == std::byte{} && std::memcmp(page, page + 1, corpus::page_bytes - 1) == 0) continue;
      if (!runs.empty() && static_cast<std::byte*>(runs.back().iov_base) + runs.back().iov_len == page) {
        runs.back().iov_len += corpus::page_bytes;
      } else {
        runs.push_back({page, corpus::page_bytes});
      }
      if (++pages * corpus::page_bytes < packet_bytes) continue;
      packets_.push_back(std::exchange(runs, {}));
      pages = 0;
    }
    if (packets_.size() < compress_packets) throw std::runtime_error("not enough pages");
  }
  /// `count` of them, from all over.
  std::vector<std::vector<iovec>> some(std::size_t count) const {
    std::vector<std::vector<iovec>> chosen;
    for (std::size_t i = 0; i < count; ++i) chosen.push_back(packets_[i * packets_.size() / count]);
    return chosen;
  }

  static const Packets& of(std::string_view pattern) {
    static std::map<std::string_view, Packets> made;
    return made.try_emplace(pattern, pattern).first->second;
  }

 private:
  std::vector<std::byte> memory_;
  std::vector<std::vector<iovec>> packets_;
};

template <class Encoder>
std::size_t encode_all(Encoder& encoder, std::span<const std::vector<iovec>> packets, auto&& take) {
  std::size_t bytes = 0;
  for (const std::vector<iovec>& runs : packets) {
    const auto payload = encoder.encode(runs);
    if (!payload) std::abort();
    bytes += multifd::total_bytes(*payload);
    take(*payload, runs);
  }
  return bytes;
}

constexpr auto drop = [](ConstBuffers payload, const std::vector<iovec>&) { benchmark::DoNotOptimize(payload.data()); };

/// Payload bytes of the baseline with the same format.
template <class Plain>
double plain_bytes(std::string_view pattern, std::size_t packets) {
  static std::map<std::pair<std::string_view, std::size_t>, double> known;
  const auto [entry, is_new] = known.try_emplace({pattern, packets});
  if (is_new) {
    auto encoder = Plain::Encoder::open({}, {});
    entry->second = static_cast<double>(encode_all(*encoder, Packets::of(pattern).some(packets), drop));
  }
  return entry->second;
}

template <class Plain>
void report(benchmark::State& state, std::string_view pattern, std::size_t packets, std::size_t payload_bytes) {
  const auto page_bytes = static_cast<double>(packets * packet_bytes);
  state.SetBytesProcessed(state.iterations() * static_cast<std::int64_t>(packets * packet_bytes));
  state.counters["ratio"] = page_bytes / static_cast<double>(payload_bytes);
  state.counters["bytes_vs_plain"] = static_cast<double>(payload_bytes) / plain_bytes<Plain>(pattern, packets);
}

template <class C, class Plain>
void compress(benchmark::State& state, std::string_view pattern, C parameters) {
  std::size_t payload_bytes = 0;
  for (auto _ : state) {
    state.PauseTiming();
    const auto packets = Packets::of(pattern).some(compress_packets);
    auto encoder = C::Encoder::open(parameters, {});
    if (!encoder) return state.SkipWithError("Encoder::open");
    state.ResumeTiming();
    payload_bytes = encode_all(*encoder, packets, drop);
  }
  report<Plain>(state, pattern, compress_packets, payload_bytes);
}

template <class C, class Plain>
void decompress(benchmark::State& state, std::string_view pattern, C parameters) {
  const auto packets = Packets::of(pattern).some(decompress_packets);
  auto encoder = C::Encoder::open(parameters, {});
  if (!encoder) return state.SkipWithError("Encoder::open");
  std::vector<std::vector<std::byte>> payloads;
  const std::size_t payload_bytes = encode_all(*encoder, packets, [&](ConstBuffers payload, const auto&) {
    std::vector<std::byte>& copy = payloads.emplace_back();
    for (const iovec& part : payload) {
      const auto* bytes = static_cast<const std::byte*>(part.iov_base);
      copy.insert(copy.end(), bytes, bytes + part.iov_len);
    }
  });
  // Memory of the receiver: the same runs, somewhere else.
  std::vector<std::byte> memory(packet_bytes, std::byte{1});
  std::vector<std::vector<iovec>> targets;
  for (const std::vector<iovec>& runs : packets) {
    std::vector<iovec>& target = targets.emplace_back(runs);
    std::byte* at = memory.data();
    for (iovec& run : target) at += (run.iov_base = at, run.iov_len);
  }
  for (auto _ : state) {
    state.PauseTiming();
    auto decoder = C::Decoder::open(parameters, {});
    if (!decoder) return state.SkipWithError("Decoder::open");
    state.ResumeTiming();
    for (std::size_t i = 0; i < payloads.size(); ++i)
      if (!decoder->decode(payloads[i], targets[i])) return state.SkipWithError("payload refused");
    benchmark::ClobberMemory();
  }
  report<Plain>(state, pattern, decompress_packets, payload_bytes);
}

template <class C, class Plain>
void add(const std::string& name, C parameters = {}) {
  for (const std::string_view pattern : patterns) {
    const std::string ending = fmt::format("/{}/{}", pattern, name);
    benchmark::RegisterBenchmark(("compress" + ending).c_str(), compress<C, Plain>, pattern, parameters)->Iterations(1);
    benchmark::RegisterBenchmark(("decompress" + ending).c_str(), decompress<C, Plain>, pattern, parameters)
        ->Iterations(2);
  }
}

[[maybe_unused]] const bool registered = [] {
  add<multifd::NoComp, plain::Zstd>("none/0");
  add<plain::Zlib, plain::Zlib>("zlib_plain/1");
  add<multifd::Zlib, plain::Zlib>("zlib/1");
#if defined(MULTIFD_HAS_IGZIP)
  for (const int level : {1, 2}) add<multifd::Igzip, plain::Zlib>(fmt::format("igzip/{}", level), {.level = level});
#endif
  add<plain::Zstd, plain::Zstd>("zstd_plain/1");
  for (const int level : {3, 1, -1, -2, -3, -5, -8, -10, -20, -50})
    add<multifd::Zstd, plain::Zstd>(fmt::format("zstd/{}", level), {.level = level});
  return true;
}();

}  // namespace

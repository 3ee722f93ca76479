// SPDX-License-Identifier: MIT
//
// measure_codecs(): every policy of program::Compressors, so that a new one needs a row in levels_of() at most.
#include <fmt/format.h>

#include <multifd/compress/policy.hpp>
#include <multifd/format/constants.hpp>
#include <multifd/memory/page_runs.hpp>
#include <multifd/thread.hpp>

#include <algorithm>
#include <cstring>
#include <numeric>

#include "advise/costs.hpp"
#include "common/stacks.hpp"

namespace advise {
namespace {

using namespace multifd;
using program::need;

/// Levels worth a row: from the quickest to where more time buys little.
std::vector<int> levels_of(std::string_view compressor) {
  if (compressor == "zlib") return {1, 6};
  if (compressor == "igzip") return {1, 2, 3};
  if (compressor == "zstd") return {-50, -20, -10, -5, -1, 1, 3};
  return {1};
}

/// The sample in packets. Two adjacent pages, then a jump, so that any first part of the order is like the whole.
class Packets {
 public:
  explicit Packets(const Image& image) : image_(image), pages_(image.zero.size()) {
    const std::size_t packets = (pages_ + packet_pages - 1) / packet_pages;
    const std::size_t pairs = (packets + 1) / 2;
    std::size_t stride = std::max<std::size_t>(1, pairs * 618 / 1000);
    while (std::gcd(stride, pairs) != 1) ++stride;
    for (std::size_t i = 0; i < pairs; ++i)
      for (const std::size_t packet : {i * stride % pairs * 2, i * stride % pairs * 2 + 1})
        if (packet < packets) order_.push_back(packet);
  }

  std::size_t size() const noexcept { return order_.size(); }

  /// Gathers the pages of the i-th packet that are not zero; returns their bytes.
  std::size_t gather(std::size_t i, PageRuns& runs) const {
    runs.clear();
    const std::size_t first = order_[i] * packet_pages;
    for (std::size_t page = first; page < std::min(first + packet_pages, pages_); ++page)
      if (!image_.zero[page]) runs.add(image_.sample().data() + page * page_bytes, page_bytes);
    return total_bytes(runs.view());
  }

 private:
  static constexpr std::size_t packet_pages = wire::page_count(page_bytes);
  const Image& image_;
  std::size_t pages_;
  std::vector<std::size_t> order_;
};

struct Tally {
  double bytes = 0;
  double payload = 0;
  double encode_ns = 0;
  double decode_ns = 0;
};

/// Encodes the packets of `gather(i, runs)` and decodes what came out, in chunks of `chunk_bytes` that are alike, until
/// `seconds` of CPU time and at least one chunk are done, or `most_packets`. The bytes are those of the first chunk, so
/// that every level is judged by the same pages; the times are those of the quickest chunk, because other processes
/// only add.
template <class C, class Gather>
Tally code(const C& parameters, std::size_t most_packets, double seconds, double chunk_bytes, const Gather& gather) {
  const CodecLimits limits{.page_bytes = page_bytes};
  auto encoder = need(C::Encoder::open(parameters, limits), fmt::format("{}", C::name));
  auto decoder = need(C::Decoder::open(parameters, limits), fmt::format("{}", C::name));
  PageRuns runs = need(PageRuns::create(wire::page_count(page_bytes)));
  // Pages arrive all over a guest's memory: a ring larger than the caches near a core.
  constexpr std::size_t slots = 32;
  const program::Mapping to = program::Mapping::anonymous(slots * limits.packet_bytes);
  std::ranges::fill(to.bytes(), std::byte{1});  // so that no fault is timed
  Tally result, chunk;
  double spent_ns = 0;
  const auto end_chunk = [&] {
    if (result.bytes == 0) {
      result = chunk;
    } else {
      const double share = result.bytes / chunk.bytes;
      result.encode_ns = std::min(result.encode_ns, chunk.encode_ns * share);
      result.decode_ns = std::min(result.decode_ns, chunk.decode_ns * share);
    }
    spent_ns += chunk.encode_ns + chunk.decode_ns;
    chunk = {};
  };
  for (std::size_t i = 0; i < most_packets && spent_ns <= seconds * 1e9; ++i) {
    const std::size_t bytes = gather(i, runs);
    if (bytes == 0) continue;
    const std::uint64_t start = thread_cpu_ns();
    const ConstBuffers payload = need(encoder.encode(runs.view()));
    const std::uint64_t encoded = thread_cpu_ns();
    if (payload.size() != 1) throw program::Failure(fmt::format("{}: a payload in several parts", C::name));
    const iovec pages{to.bytes().data() + i % slots * limits.packet_bytes, bytes};
    need(decoder.decode({static_cast<const std::byte*>(payload[0].iov_base), payload[0].iov_len}, {&pages, 1}));
    const std::uint64_t decoded = thread_cpu_ns();
    chunk.bytes += static_cast<double>(bytes);
    chunk.payload += static_cast<double>(payload[0].iov_len);
    chunk.encode_ns += static_cast<double>(encoded - start);
    chunk.decode_ns += static_cast<double>(decoded - encoded);
    if (chunk.bytes >= chunk_bytes) end_chunk();
  }
  if (result.bytes == 0 && chunk.bytes > 0) end_chunk();  // less than one chunk in all
  return result;
}

template <class C>
CodecCosts measure(const C& parameters, const Packets& packets, double seconds) {
  CodecCosts costs{.compressor = std::string(C::name)};
  if constexpr (C::payload_form == PayloadForm::pages) {
    costs.sends_pages = true;
    return costs;
  } else {
    const double chunk_bytes = seconds >= 0.1 ? double(32 << 20) : double(4 << 20);
    const Tally full = code(parameters, packets.size(), seconds, chunk_bytes,
                            [&](std::size_t i, PageRuns& runs) { return packets.gather(i, runs); });
    if (full.bytes > 0) {
      costs.ratio = full.bytes / full.payload;
      costs.encode_ns = full.encode_ns / full.bytes;
      costs.decode_ns = full.decode_ns / full.bytes;
    }
    static std::vector<std::byte> zeros(multifd::batch_bytes);
    const Tally zero = code(parameters, 64, seconds / 10, double(4 << 20), [&](std::size_t, PageRuns& runs) {
      runs.clear();
      runs.add(zeros.data(), zeros.size());
      return zeros.size();
    });
    costs.zero_ratio = zero.bytes / zero.payload;
    costs.zero_encode_ns = zero.encode_ns / zero.bytes;
    costs.zero_decode_ns = zero.decode_ns / zero.bytes;
    return costs;
  }
}

template <class C>
void measure_levels(const Packets& packets, double seconds, Steps& steps, std::vector<CodecCosts>& all) {
  if constexpr (requires(C parameters) { parameters.level; }) {
    for (const int level : levels_of(C::name)) {
      steps.next(fmt::format("{} {}", C::name, level));
      all.push_back(measure(multifd::with_level<C>(level), packets, seconds));
      all.back().level = level;
    }
  } else {
    steps.next(fmt::format("compression {}", C::name));
    all.push_back(measure(C{}, packets, seconds));
  }
}

template <class... Cs>
std::vector<CodecCosts> measure_list(PolicyList<Cs...>, const Packets& packets, double seconds, Steps& steps) {
  std::vector<CodecCosts> all;
  (measure_levels<Cs>(packets, seconds, steps, all), ...);
  return all;
}

}  // namespace

std::vector<CodecCosts> measure_codecs(const Image& image, double seconds, Steps& steps) {
  return measure_list(program::Compressors{}, Packets(image), seconds, steps);
}

}  // namespace advise

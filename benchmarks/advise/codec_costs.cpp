// SPDX-License-Identifier: MIT
//
// measure_codecs(): every policy of program::Compressors, so that a new one needs a row in levels_of() at most.
#include <fmt/format.h>

#include <multifd/channel/page_runs.hpp>
#include <multifd/compress/policy.hpp>
#include <multifd/thread.hpp>
#include <multifd/wire/constants.hpp>

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

/// The sample in packets. Two neighbours, then a jump, so that any first part of the order is like the whole.
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

/// Encodes the packets of `gather(i, runs)`, decodes what came out, and adds up, until `seconds` of CPU time and the
/// first `least_bytes` are done, or `most_packets`.
template <class C, class Gather>
void code(const C& parameters, std::size_t most_packets, double seconds, double least_bytes, Tally& first_pass,
          Tally& all, const Gather& gather) {
  const CodecLimits limits{.page_bytes = page_bytes};
  auto encoder = need(C::Encoder::open(parameters, limits), fmt::format("{}", C::name));
  auto decoder = need(C::Decoder::open(parameters, limits), fmt::format("{}", C::name));
  PageRuns runs = need(PageRuns::create(wire::page_count(page_bytes)));
  // Pages arrive all over a guest's memory: a ring larger than the caches near a core.
  constexpr std::size_t slots = 32;
  const program::Mapping to = program::Mapping::anonymous(slots * limits.packet_bytes);
  to.populate();
  for (std::size_t i = 0; i < most_packets; ++i) {
    const std::size_t bytes = gather(i, runs);
    if (bytes == 0) continue;
    const std::uint64_t start = thread_cpu_ns();
    const ConstBuffers payload = need(encoder.encode(runs.view()));
    const std::uint64_t encoded = thread_cpu_ns();
    if (payload.size() != 1) throw program::Failure(fmt::format("{}: a payload in several parts", C::name));
    const iovec pages{to.bytes().data() + i % slots * limits.packet_bytes, bytes};
    need(decoder.decode({static_cast<const std::byte*>(payload[0].iov_base), payload[0].iov_len}, {&pages, 1}));
    const std::uint64_t decoded = thread_cpu_ns();
    const auto add = [&](Tally& tally) {
      tally.bytes += static_cast<double>(bytes);
      tally.payload += static_cast<double>(payload[0].iov_len);
      tally.encode_ns += static_cast<double>(encoded - start);
      tally.decode_ns += static_cast<double>(decoded - encoded);
    };
    if (first_pass.bytes < least_bytes) add(first_pass);
    add(all);
    if (all.bytes >= least_bytes && all.encode_ns + all.decode_ns > seconds * 1e9) break;
  }
}

template <class C>
CodecCosts measure(const C& parameters, const Packets& packets, double seconds) {
  CodecCosts costs{.compressor = std::string(C::name)};
  if constexpr (C::payload_form == PayloadForm::pages) {
    costs.sends_pages = true;
    return costs;
  } else {
    // The ratio is that of the same pages for every level; quick levels go on, for a steadier speed.
    const double least_bytes = seconds >= 0.1 ? double(32 << 20) : double(4 << 20);
    Tally first_pass, all;
    code(parameters, packets.size(), seconds, least_bytes, first_pass, all,
         [&](std::size_t i, PageRuns& runs) { return packets.gather(i, runs); });
    if (all.bytes > 0) {
      costs.ratio = first_pass.bytes / first_pass.payload;
      costs.encode_ns = all.encode_ns / all.bytes;
      costs.decode_ns = all.decode_ns / all.bytes;
    }
    static std::vector<std::byte> zeros(wire::packet_page_bytes);
    Tally zero;
    code(parameters, 64, seconds / 10, 0, zero, zero, [&](std::size_t, PageRuns& runs) {
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
      all.push_back(measure(program::with_level<C>(level), packets, seconds));
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

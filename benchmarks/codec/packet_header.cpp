// SPDX-License-Identifier: MIT
//
// What the header of a 128-page packet costs beside its pages: written by the sender; parsed, and each offset turned
// into memory, by the receiver.
//
//   header/encode, header/parse    time: per packet. per_page_ns: the same per page.
#include <benchmark/benchmark.h>

#include <vector>

#include "multifd/format/packet.hpp"
#include "multifd/memory/ram_map.hpp"

namespace {

using namespace multifd;

constexpr std::size_t page_bytes = 4096;
constexpr std::size_t packet_pages = 128;

class Header {
 public:
  Header() {
    for (std::size_t i = 0; i < packet_pages; ++i) offsets_.push_back((i * 37 + 5) % 1024 * page_bytes);
  }
  void encode() noexcept {
    wire::encode_header(bytes_.data(), {.pages_alloc = packet_pages,
                                        .normal_pages = packet_pages,
                                        .next_packet_size = packet_pages * page_bytes,
                                        .packet_num = ++packet_num_,
                                        .idstr = "pc.ram"});
    for (std::size_t i = 0; i < packet_pages; ++i) wire::store_offset(bytes_.data(), i, offsets_[i]);
  }
  std::span<const std::byte> bytes() const noexcept { return bytes_; }

 private:
  std::vector<std::byte> bytes_ = std::vector<std::byte>(wire::header_bytes(page_bytes));
  std::vector<std::uint64_t> offsets_;
  std::uint64_t packet_num_ = 0;
};

struct Setup {
  Setup() { block = *ram.add("pc.ram", memory); }
  std::vector<std::byte> memory = std::vector<std::byte>(1024 * page_bytes);
  RamMap ram{page_bytes};
  BlockId block;
  Header header;
};

void report(benchmark::State& state) {
  using benchmark::Counter;
  state.counters["per_page_ns"] =
      Counter(static_cast<double>(state.iterations()) * packet_pages * 1e-9, Counter::kIsRate | Counter::kInvert);
}

void encode(benchmark::State& state) {
  Setup setup;
  for (auto _ : state) {
    setup.header.encode();
    benchmark::DoNotOptimize(setup.header.bytes().data());
    benchmark::ClobberMemory();
  }
  report(state);
}

void parse(benchmark::State& state) {
  Setup setup;
  setup.header.encode();
  for (auto _ : state) {
    const auto parsed = wire::parse_header(setup.header.bytes(), {});
    if (!parsed) return state.SkipWithError("header refused");
    for (std::uint32_t i = 0; i < parsed->normal_pages; ++i) {
      const auto page = setup.ram.resolve(setup.block, wire::load_offset(setup.header.bytes().data(), i));
      if (!page) return state.SkipWithError("offset refused");
      benchmark::DoNotOptimize(page->data());
    }
  }
  report(state);
}

BENCHMARK(encode)->Name("header/encode")->MinTime(0.05);
BENCHMARK(parse)->Name("header/parse")->MinTime(0.05);

}  // namespace

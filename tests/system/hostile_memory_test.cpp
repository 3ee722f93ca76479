// SPDX-License-Identifier: MIT
//
// The memory of a receiver is bounded by its caller's settings, whatever numbers its peer says:
//
//   channels x (64 KiB + payload buffer + decoder + device-state limit) + 64 KiB + 1 bit for each page of the map
//
// The payload buffer is 1 MiB with a compressor, else none; zlib's decoder is 64 KiB, zstd's what zstd estimates for
// max_window_log. Prints the most that was allocated and resident.
#include <doctest/doctest.h>
#include <malloc.h>

#include <algorithm>
#include <cstdio>
#include <fstream>
#include <string>
#include <vector>

#ifndef ZSTD_STATIC_LINKING_ONLY
#define ZSTD_STATIC_LINKING_ONLY
#endif
#include <zstd.h>

#include "multifd/compress/nocomp.hpp"
#include "multifd/compress/zlib.hpp"
#include "multifd/compress/zstd.hpp"
#include "multifd/receiver.hpp"
#include "support/allocation_count.hpp"
#include "support/links.hpp"
#include "support/memory.hpp"
#include "support/raw_stream.hpp"

using namespace multifd;
using namespace test;

namespace {

constexpr std::size_t page = 4096;
constexpr unsigned channels = 4;
constexpr std::size_t device_limit = 1 << 20;
constexpr int window_log = 20;

/// The most that was resident since it was last asked, in bytes; 0 where the system does not say.
std::int64_t take_resident_peak() {
  std::int64_t kib = 0;
  std::ifstream status("/proc/self/status");
  for (std::string line; std::getline(status, line);)
    if (line.starts_with("VmHWM:")) kib = std::atoll(line.c_str() + 6);
  std::ofstream("/proc/self/clear_refs") << '5';
  return kib * 1024;
}

template <class C>
std::int64_t bound(const RamMap& map) {
  std::size_t channel = 64 * 1024 + device_limit;
  if (C::payload_form == PayloadForm::encoded) channel += wire::max_payload_bytes;
  if (std::is_same_v<C, Zlib>) channel += 64 * 1024;
  if (std::is_same_v<C, Zstd>) channel += ZSTD_estimateDStreamSize(std::size_t{1} << window_log);
  return static_cast<std::int64_t>(channels * channel + 64 * 1024 + map.total_bytes() / page / 8);
}

struct Attack {
  const char* what;
  Bytes stream;  ///< after the hello
};

/// Those of channel `id`, on a page of its own: two channels that write one page in one epoch race, as
/// format/packets.md section 6 has it.
template <class C>
std::vector<Attack> attacks(unsigned id) {
  std::vector<Attack> all;
  const std::uint64_t offset = id * page;
  const auto packet = [&](const char* what, const Packet& p) { all.push_back({what, RawStream().packet(p).bytes()}); };
  const std::uint32_t most = 0xffffffff;
  packet("counts of 2^32 - 1", {.flags = C::method, .pages_alloc = most, .normal_pages = most, .zero_pages = most});
  packet("normal pages of 2^32 - 1", {.flags = C::method, .normal_pages = most, .next_packet_size = most});
  packet("payload of 4 GiB", {.flags = C::method, .next_packet_size = most, .normal = {offset}});
  packet("payload of 1 MiB + 1", {.flags = C::method, .next_packet_size = (1 << 20) + 1, .normal = {offset}});
  packet("payload of 1 MiB of noise",
         {.flags = C::method, .normal = {offset}, .payload = Bytes(1 << 20, std::byte{0xa7})});
  packet("offset of 2^64 - 1", {.flags = C::method, .normal = {~std::uint64_t{0}}, .payload = Bytes(page)});
  packet("SYNC of 2^32 - 1 pages", {.flags = 1, .pages_alloc = most, .next_packet_size = most});
  all.push_back({"device state of 4 GiB", RawStream().device_state(most, 0).bytes()});
  all.push_back({"device state of the limit + 1", RawStream().device_state(device_limit + 1, 0).bytes()});
  {
    // Each one larger than the one before: what was there for it is of no use.
    RawStream growing;
    for (const std::size_t bytes : {device_limit / 2, device_limit - 4096, device_limit - 1, device_limit})
      growing.device_state(bytes, bytes);
    all.push_back({"device state that grows to the limit", growing.bytes()});
  }
  if constexpr (std::is_same_v<C, Zstd>) {
    for (const int log : {window_log, window_log + 1, 27, 31}) {
      // A frame's header of that window, then a block of one byte, repeated to the block's limit.
      Bytes frame = {std::byte{0x28}, std::byte{0xb5}, std::byte{0x2f},
                     std::byte{0xfd}, std::byte{0},    std::byte(log - 10) << 3};
      frame.insert(frame.end(), {std::byte{0x02}, std::byte{0x00}, std::byte{0x10}, std::byte{7}});
      packet("zstd window", {.flags = C::method, .normal = {offset}, .payload = frame});
    }
  }
  if constexpr (C::payload_form == PayloadForm::encoded) {
    // A page's worth of input that would be many pages.
    const Bytes much(128 * page, std::byte{9});
    packet("a bomb", {.flags = C::method, .normal = {offset}, .payload = Encoded<C>()(much)});
  }
  return all;
}

}  // namespace

TEST_CASE_TEMPLATE("A receiver's memory is bounded by its settings, whatever numbers its peer says", C, NoComp, Zlib,
                   Zstd) {
  const Watchdog watchdog("memory under hostile input");
  mallopt(M_MMAP_THRESHOLD, 128 * 1024);  // or each thread's heap keeps what was large, for later
  Block memory(1024 * page);
  memory.fill(std::byte{1});  // resident before
  RamMap map;
  REQUIRE(map.add("pc.ram", memory.bytes()).has_value());
  ReceiverOptions<C> options{.hello_timeout = 5s, .barrier_timeout = 200ms, .progress_timeout = 500ms};
  if constexpr (std::is_same_v<C, Zstd>) options.compressor.max_window_log = window_log;
  options.on_device_state = {.take = [](const DeviceState&) { return Result<void>{}; }, .limit_bytes = device_limit};

  const std::int64_t most = bound<C>(map);
  std::int64_t allocated = 0;
  std::int64_t resident = 0;
  std::vector<std::vector<Attack>> of_channels;
  for (unsigned id = 0; id < channels; ++id) of_channels.push_back(attacks<C>(id));
  for (std::size_t i = 0; i < of_channels[0].size(); ++i) {
    CAPTURE(std::string(of_channels[0][i].what));
    Links<MemoryTransport> links;
    for (unsigned id = 0; id < channels; ++id) {
      const Attack& attack = of_channels[id][i];
      auto pair = memory_links(1, attack.stream.size() + 64);
      RawStream stream;
      stream.hello(id).raw(attack.stream);
      REQUIRE(write_all(pair.sender[0], std::span<const std::byte>(stream.bytes())).has_value());
      links.sender.push_back(std::move(pair.sender[0]));
      links.receiver.push_back(std::move(pair.receiver[0]));
    }
    take_resident_peak();
    const std::int64_t resident_before = take_resident_peak();
    restart_peak();
    const std::int64_t before = live_bytes();
    {
      auto rx = Receiver<MemoryTransport, C>::open(map, std::move(links.receiver), options);
      const auto finished = rx ? rx->finish() : std::unexpected(rx.error());
      CHECK_FALSE(finished.has_value());
    }
    const std::int64_t now = peak_bytes() - before;
    CHECK(now <= most);
    allocated = std::max(allocated, now);
    resident = std::max(resident, take_resident_peak() - resident_before);
  }
  const auto kib = [](std::int64_t bytes) { return std::to_string(bytes / 1024) + " KiB"; };
  MESSAGE(C::name, ", ", channels, " channels: bound ", kib(most), ", allocated at most ", kib(allocated),
          ", resident at most ", kib(resident), " more than before");
  // Stacks of the threads, and pages that are partly used. A sanitizer keeps books of everything.
  if (live_bytes() != 0) CHECK(resident <= most + 1024 * 1024);
}

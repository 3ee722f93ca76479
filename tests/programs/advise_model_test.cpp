// SPDX-License-Identifier: MIT
#include <doctest/doctest.h>
#include <advise/model.hpp>
#include <advise/rate.hpp>

#include <algorithm>
#include <cmath>

using namespace advise;

namespace {

constexpr double gib = 1 << 30;

/// Costs as a machine might have them, so that what must hold does not hang on a measurement.
HostCosts some_host() {
  return {.queue_ns = 2,
          .check_ns = 100,
          .send_page_ns = 0.3,
          .receive_page_ns = 0.3,
          .send_payload_ns = 0.25,
          .receive_payload_ns = 0.25,
          .send_packet_ns = 3000,
          .receive_packet_ns = 3000,
          .fault_ns = 0.2,
          .fault_small_ns = 0.6};
}

CodecCosts plain() { return {.compressor = "none", .sends_pages = true}; }

CodecCosts packer(std::string name, int level, double ratio, double encode_ns) {
  return {.compressor = std::move(name),
          .level = level,
          .ratio = ratio,
          .encode_ns = encode_ns,
          .decode_ns = encode_ns / 3,
          .zero_ratio = 1000,
          .zero_encode_ns = 0.2,
          .zero_decode_ns = 0.2};
}

Setup over(double gbit, unsigned cores = 4) {
  const Rate rate = *parse_rate(std::to_string(gbit) + "Gbit");
  return {.link = {.name = "test", .nominal_bits_per_s = rate.nominal_bits_per_s, .bytes_per_s = rate.bytes_per_s},
          .source_cores = cores,
          .destination_cores = cores};
}

const std::vector<unsigned> counts = {1, 2, 4, 8};

const Prediction& quickest(const std::vector<Prediction>& all) { return *choose(all, {}, Goal::time, least_tie).best; }
const Prediction& cheapest(const std::vector<Prediction>& all) { return *choose(all, {}, Goal::cpu, least_tie).best; }

/// A prediction with figures by hand.
Prediction figures(std::string compressor, unsigned channels, double seconds, double cpu_s, double wire_bytes = gib,
                   ZeroMode mode = ZeroMode::multifd) {
  return {.compressor = std::move(compressor),
          .zero_pages = mode,
          .channels = channels,
          .seconds = seconds,
          .source_cpu_s = cpu_s,
          .wire_bytes = wire_bytes};
}

}  // namespace

TEST_CASE("zero pages cost a place in a packet, a record, or all their bytes") {
  const ImageFacts zeros{.bytes = gib, .zero_share = 1, .touched_share = 0};
  const Setup setup = over(10);
  const Prediction listed = predict(zeros, some_host(), plain(), ZeroMode::multifd, 2, setup);
  const Prediction records = predict(zeros, some_host(), plain(), ZeroMode::legacy, 2, setup);
  const Prediction bytes = predict(zeros, some_host(), plain(), ZeroMode::none, 2, setup);
  CHECK(listed.wire_bytes < 0.005 * gib);
  CHECK(records.wire_bytes < 0.005 * gib);
  CHECK(bytes.wire_bytes > gib);
  CHECK(bytes.wire_bytes < 1.01 * gib);
  CHECK(listed.seconds < bytes.seconds / 5);
  CHECK(predict(zeros, some_host(), packer("zstd", 1, 3, 3), ZeroMode::none, 2, setup).wire_bytes < 0.01 * gib);
}

TEST_CASE("what cannot be compressed travels as it is on a quick link") {
  const ImageFacts random{.bytes = gib};
  const std::vector<CodecCosts> codecs = {plain(), packer("zstd", -50, 1, 0.5), packer("zlib", 1, 1, 15)};
  for (const double gbit : {25.0, 100.0, 400.0}) {
    const auto all = predict_all(random, some_host(), codecs, counts, over(gbit));
    CHECK(quickest(all).compressor == "none");
    CHECK(cheapest(all).compressor == "none");
  }
}

TEST_CASE("the slower the link, the more a compressor may cost") {
  const ImageFacts guest{.bytes = gib, .zero_share = 0.4};
  const std::vector<CodecCosts> codecs = {plain(), packer("zstd", -50, 2, 0.5), packer("zstd", 3, 4, 8)};
  const auto best_at = [&](double gbit) {
    return quickest(predict_all(guest, some_host(), codecs, counts, over(gbit)));
  };
  CHECK(best_at(0.1).level == 3);
  CHECK(best_at(0.1).limit == Limit::link);
  CHECK(best_at(12).level == -50);
  CHECK(best_at(400).compressor == "none");
  CHECK(best_at(400).limit != Limit::link);
}

TEST_CASE("a prediction is never quicker than its link, and channels help until the cores are busy") {
  const ImageFacts guest{.bytes = gib, .zero_share = 0.4};
  for (const double gbit : {0.1, 1.0, 10.0, 100.0})
    for (const ZeroMode mode : zero_modes) {
      const CodecCosts codec = packer("zstd", 1, 3, 3);
      double before = 1e9;
      for (const unsigned channels : counts) {
        const Setup setup = over(gbit);
        const Prediction each = predict(guest, some_host(), codec, mode, channels, setup);
        CHECK(each.seconds >= each.wire_bytes / setup.link.bytes_per_s);
        CHECK(each.seconds <= before * 1.001);
        CHECK(each.seconds >= each.source_cpu_s / 4);
        CHECK(each.seconds >= each.destination_cpu_s / 4);
        before = each.seconds;
      }
    }
}

TEST_CASE("two ends on one host share its cores") {
  const ImageFacts guest{.bytes = gib};
  Setup setup = over(400, 2);
  const Prediction apart = predict(guest, some_host(), packer("zstd", 1, 3, 3), ZeroMode::multifd, 2, setup);
  setup.one_host = true;
  const Prediction together = predict(guest, some_host(), packer("zstd", 1, 3, 3), ZeroMode::multifd, 2, setup);
  CHECK(together.limit == Limit::host);
  CHECK(together.seconds >= together.cpu_s() / 2);
  CHECK(together.seconds > apart.seconds);
}

TEST_CASE("fresh memory at the destination costs a fault for what is touched, and only for that") {
  const ImageFacts sparse{.bytes = gib, .zero_share = 0.9, .touched_share = 0.25};
  const HostCosts host = some_host();
  Setup setup = over(10);
  const auto destination_cpu = [&](Destination memory, ZeroMode mode) {
    setup.destination = memory;
    return predict(sparse, host, plain(), mode, 2, setup).destination_cpu_s;
  };
  const double warm = destination_cpu(Destination::warm, ZeroMode::multifd);
  CHECK(destination_cpu(Destination::fresh, ZeroMode::multifd) - warm ==
        doctest::Approx(0.25 * gib * host.fault_ns * 1e-9));
  CHECK(destination_cpu(Destination::fresh_small, ZeroMode::multifd) - warm ==
        doctest::Approx(0.1 * gib * host.fault_small_ns * 1e-9));
  const double warm_bytes = destination_cpu(Destination::warm, ZeroMode::none);
  CHECK(destination_cpu(Destination::fresh, ZeroMode::none) - warm_bytes ==
        doctest::Approx(gib * host.fault_ns * 1e-9));
}

TEST_CASE("a link's capacity: measured, between measurements, and by windows") {
  Link link{.name = "test", .measured = {{1, 100.0}, {2, 180.0}, {4, 200.0}}};
  CHECK(link.capacity(1) == 100);
  CHECK(link.capacity(2) == 180);
  CHECK(link.capacity(3) == doctest::Approx(190));
  CHECK(link.capacity(16) == 200);
  link.window_bytes = 10;
  link.rtt_s = 0.5;
  CHECK(link.capacity(1) == 20);
  CHECK(link.capacity(4) == 80);
  CHECK(link.capacity(16) == 200);
  CHECK(Link{}.capacity(4) == 0);
}

TEST_CASE("among equals the fewest channels and lists of zero pages are recommended") {
  const ImageFacts guest{.bytes = gib, .zero_share = 0};
  const auto all = predict_all(guest, some_host(), {plain()}, counts, over(1));
  CHECK(quickest(all).channels == 1);
  HostCosts host = some_host();
  host.check_ns = 0;
  CHECK(quickest(predict_all(guest, host, {plain()}, counts, over(1))).zero_pages == ZeroMode::multifd);
  CHECK(std::ranges::is_sorted(all, {}, &Prediction::seconds));
  CHECK(all.size() == 12);
}

TEST_CASE("a guest that writes converges while the link carries more than it writes") {
  const ImageFacts guest{.bytes = gib, .zero_share = 0.5};
  const Setup setup = over(10);
  const Prediction stack = predict(guest, some_host(), plain(), ZeroMode::multifd, 4, setup);
  const auto with = [&](double bytes_per_s, double working_set) {
    return forecast(guest, some_host(), plain(), stack, setup,
                    {.bytes_per_s = bytes_per_s, .working_set_bytes = working_set, .max_downtime_s = 0.05});
  };
  const Forecast idle = with(1e6, gib);
  CHECK(idle.converges);
  CHECK(idle.rounds == 1);
  const Forecast busy = with(6e8, gib);
  CHECK(busy.converges);
  CHECK(busy.rounds > idle.rounds);
  CHECK(busy.seconds > idle.seconds);
  CHECK(busy.downtime_s <= 0.05);
  const Forecast wild = with(5e9, gib);
  CHECK_FALSE(wild.converges);
  CHECK(wild.seconds == stack.seconds);
  // However quickly it writes, to little memory.
  CHECK(with(5e9, 16 << 20).converges);
}

TEST_CASE("what differs by less than the measurements' spread is a tie, and the rule decides") {
  // As they come from run to run: the same four, with another one a little ahead each time.
  for (const unsigned ahead : counts) {
    std::vector<Prediction> all;
    for (const unsigned count : counts) all.push_back(figures("none", count, count == ahead ? 0.93 : 1.0, 2.0));
    std::ranges::sort(all, {}, &Prediction::seconds);
    const Choice spread = choose(all, {}, Goal::time, 0.1);
    CHECK(spread.best->channels == 1);
    CHECK(spread.equals == 3);
    const Choice exact = choose(all, {}, Goal::time, least_tie);
    CHECK(exact.best->channels == ahead);
    CHECK(exact.equals == 0);
  }
}

TEST_CASE("ties are decided by the other figure, then channels, then lists of zero pages, then bytes, in any order") {
  const auto best_of = [](std::vector<Prediction> all, Goal goal) {
    std::string found;
    std::ranges::sort(all, {}, &Prediction::compressor);
    do {
      const std::string each = choose(all, {}, goal, 0.1).best->compressor;
      CHECK((found.empty() || found == each));
      found = each;
    } while (std::ranges::next_permutation(all, {}, &Prediction::compressor).found);
    return found;
  };
  CHECK(best_of({figures("a", 1, 1.0, 5), figures("b", 8, 1.05, 2), figures("c", 2, 2, 1)}, Goal::time) == "b");
  CHECK(best_of({figures("a", 1, 1.0, 5), figures("b", 8, 1.05, 2), figures("c", 2, 2, 1)}, Goal::cpu) == "c");
  CHECK(best_of({figures("a", 4, 1.0, 2), figures("b", 2, 1.05, 2.1), figures("c", 8, 0.99, 2)}, Goal::time) == "b");
  CHECK(best_of({figures("a", 2, 1, 2, gib, ZeroMode::legacy), figures("b", 2, 1, 2),
                 figures("c", 2, 1, 2, gib, ZeroMode::none)},
                Goal::time) == "b");
  CHECK(best_of({figures("a", 2, 1, 2, 3e6), figures("b", 2, 1, 2, 2e6), figures("c", 2, 1, 2, 1e6)}, Goal::time) ==
        "c");
  // A chain of small steps is no tie from end to end.
  CHECK(best_of({figures("a", 8, 1.0, 2), figures("b", 4, 1.08, 2), figures("c", 1, 1.16, 2)}, Goal::time) == "b");
}

TEST_CASE("the measurements' spread is the tie, between 2 and 25 %") {
  Link link{.name = "test"};
  HostCosts host = some_host();
  CHECK(spread_of(host, link) == 0);
  host.spread = 0.07;
  CHECK(spread_of(host, link) == 0.07);
  link.measured = {{1, 100.0, 0.01}, {2, 180.0, 0.15}, {4, 200.0, 0.9}};
  CHECK(spread_of(host, link) == 0.15);
  link.measured.push_back({8, 200.0, 0.9});
  CHECK(spread_of(host, link) == 0.9);
  CHECK(tie_of(0) == 0.02);
  CHECK(tie_of(0.15) == 0.15);
  CHECK(tie_of(0.9) == 0.25);
}

TEST_CASE("a stack that does not converge is never recommended to a guest that writes") {
  const std::vector<Prediction> all = {figures("quick", 1, 1, 1), figures("slow", 1, 2, 2), figures("dear", 1, 3, 9)};
  const std::vector<Forecast> some = {
      {.seconds = 1}, {.converges = true, .seconds = 5}, {.converges = true, .seconds = 3}};
  CHECK(choose(all, some, Goal::time, least_tie).best->compressor == "dear");  // its rounds end sooner
  CHECK(choose(all, some, Goal::cpu, least_tie).best->compressor == "slow");
  const Choice none = choose(all, std::vector<Forecast>(3), Goal::time, least_tie);
  CHECK(none.best == nullptr);
  CHECK(none.equals == 0);
}

TEST_CASE("what would help a guest that writes too fast does help") {
  const ImageFacts guest{.bytes = gib, .zero_share = 0.5};
  const Setup setup = over(10);
  for (const unsigned channels : counts) {
    const Prediction stack = predict(guest, some_host(), plain(), ZeroMode::multifd, channels, setup);
    Writing writing{.bytes_per_s = 5e9, .working_set_bytes = gib, .max_downtime_s = 0.05};
    const auto converges = [&] { return forecast(guest, some_host(), plain(), stack, setup, writing).converges; };
    REQUIRE_FALSE(converges());
    const double rate = most_dirty_rate(guest, some_host(), plain(), stack, setup, writing);
    const double downtime = downtime_of_working_set(guest, some_host(), plain(), stack, setup, writing);
    writing.bytes_per_s = rate;
    CHECK(converges());
    writing.bytes_per_s = 1.02 * rate;
    CHECK_FALSE(converges());
    writing = {.bytes_per_s = 5e9, .working_set_bytes = gib, .max_downtime_s = downtime * 1.0001};
    CHECK(converges());
    // A small working set converges whatever is written to it.
    writing = {.bytes_per_s = 5e9, .working_set_bytes = 1e6, .max_downtime_s = 0.05};
    CHECK(std::isinf(most_dirty_rate(guest, some_host(), plain(), stack, setup, writing)));
  }
}

TEST_CASE("speeds are read in bits of the line or bytes of the stream") {
  CHECK(parse_rate("10Gbit")->nominal_bits_per_s == 1e10);
  CHECK(parse_rate("10Gbit")->bytes_per_s == doctest::Approx(1e10 / 8 * ethernet_share));
  CHECK(parse_rate("2.5 gbit/s")->nominal_bits_per_s == 2.5e9);
  CHECK(parse_rate("100MBIT")->nominal_bits_per_s == 1e8);
  CHECK(parse_rate("1.5GiB/s")->bytes_per_s == 1.5 * gib);
  CHECK(parse_rate("500MiB")->bytes_per_s == 500.0 * (1 << 20));
  for (const char* const bad : {"", "10", "Gbit", "-1Gbit", "+1Gbit", " 1Gbit", "1Gbitx", "1 Gbit/h", "nanGbit",
                                "infGbit", "0x10Gbit", "0Gbit", "1e300Gbit", "1GB", "10Gbit/s/s"})
    CHECK_MESSAGE(!parse_rate(bad).has_value(), bad);
}

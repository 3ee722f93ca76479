// SPDX-License-Identifier: MIT
#include "advise/model.hpp"

#include <fmt/format.h>

#include <multifd/format/constants.hpp>
#include <multifd/format/init_packet.hpp>

#include <algorithm>
#include <cmath>
#include <functional>
#include <limits>
#include <tuple>

namespace advise {
namespace {

constexpr double ns = 1e-9;

/// How much stages that are near each other add up: 1 would be their sum, infinity their maximum.
constexpr double norm = 6;

/// A legacy zero page on QEMU's main stream: be64 with flag CONTINUE, and one byte (format/main_stream.md section 9.6).
constexpr double legacy_record_bytes = 9;

/// The slowdown of each of `busy` threads on `cores` cores.
double slowdown(const HostCosts& host, unsigned busy, unsigned cores) {
  const unsigned running = std::min(busy, cores);
  if (running <= 1 || host.busy_cores <= 1) return 1;
  const double share = std::min(1.0, double(running - 1) / double(host.busy_cores - 1));
  return 1 + (host.busy_factor - 1) * share;
}

}  // namespace

const char* to_string(ZeroMode mode) noexcept {
  constexpr const char* names[] = {"none", "legacy", "multifd"};
  return names[static_cast<std::size_t>(mode)];
}

const char* to_string(Destination destination) noexcept {
  constexpr const char* names[] = {"warm", "fresh", "fresh-4k"};
  return names[static_cast<std::size_t>(destination)];
}

const char* to_string(Limit limit) noexcept {
  constexpr const char* names[] = {"link", "source CPU", "destination CPU", "producer", "CPU of the host"};
  return names[static_cast<std::size_t>(limit)];
}

std::string name_of(const CodecCosts& codec) {
  return codec.level ? fmt::format("{} {}", codec.compressor, *codec.level) : codec.compressor;
}

std::string name_of(const Prediction& prediction) {
  const std::string level = prediction.level ? fmt::format(" {}", *prediction.level) : std::string();
  return fmt::format("{}{}, zero pages {}", prediction.compressor, level, to_string(prediction.zero_pages));
}

double Link::capacity(unsigned channels) const noexcept {
  double most = bytes_per_s;
  if (!measured.empty()) {
    const auto above = std::ranges::find_if(measured, [&](const Measured& m) { return m.connections >= channels; });
    if (above == measured.end()) {
      most = measured.back().bytes_per_s;
    } else if (above == measured.begin() || above->connections == channels) {
      most = above->bytes_per_s;
    } else {
      const Measured& below = *(above - 1);
      const double share = double(channels - below.connections) / double(above->connections - below.connections);
      most = below.bytes_per_s + share * (above->bytes_per_s - below.bytes_per_s);
    }
    if (bytes_per_s > 0) most = std::min(most, bytes_per_s);
  }
  // A connection has no more than its window on the way, and waits for the peer's word a round trip long.
  if (window_bytes > 0 && rtt_s > 0) {
    const double windows = channels * window_bytes / rtt_s;
    most = most > 0 ? std::min(most, windows) : windows;
  }
  return most;
}

Prediction predict(const ImageFacts& image, const HostCosts& host, const CodecCosts& codec, ZeroMode zero_pages,
                   unsigned channels, const Setup& setup) {
  const auto page_bytes = static_cast<std::size_t>(image.page_bytes);
  const auto packet_pages = static_cast<double>(multifd::wire::page_count(page_bytes));
  const auto header_bytes = static_cast<double>(multifd::wire::header_bytes(page_bytes));
  const double pages = image.bytes / image.page_bytes;
  const double full_bytes = image.bytes * (1 - image.zero_share);
  const double zero_bytes = image.bytes - full_bytes;
  const double zero_bytes_sent = zero_pages == ZeroMode::none ? zero_bytes : 0;

  // Bytes.
  const double payload = full_bytes / codec.ratio + zero_bytes_sent / codec.zero_ratio;
  const double queued_pages = zero_pages == ZeroMode::legacy ? full_bytes / image.page_bytes : pages;
  const double packets = std::ceil(queued_pages / packet_pages);
  const double records = zero_pages == ZeroMode::legacy ? zero_bytes / image.page_bytes * legacy_record_bytes : 0;
  const double greetings = channels * (header_bytes + double(multifd::wire::InitPacketBytes{}.size()));
  Prediction result{.compressor = codec.compressor,
                    .level = codec.level,
                    .zero_pages = zero_pages,
                    .channels = channels,
                    .wire_bytes = payload + packets * header_bytes + records + greetings};

  // CPU.
  const double check_s = pages * host.check_ns * ns;
  double producer_s = pages * host.queue_ns * ns;
  if (zero_pages == ZeroMode::legacy) producer_s += check_s;
  // Packets full of guest memory follow each other and wake no thread: their cost is that of their bytes.
  const double waking = codec.sends_pages ? packets - payload / (packet_pages * image.page_bytes) : packets;
  const double send_s =
      waking * host.send_packet_ns * ns + payload * (codec.sends_pages ? host.send_page_ns : host.send_payload_ns) * ns;
  const double receive_s = waking * host.receive_packet_ns * ns +
                           payload * (codec.sends_pages ? host.receive_page_ns : host.receive_payload_ns) * ns;
  double encode_s = full_bytes * codec.encode_ns * ns + zero_bytes_sent * codec.zero_encode_ns * ns;
  if (zero_pages == ZeroMode::multifd) encode_s += check_s;
  double decode_s = full_bytes * codec.decode_ns * ns + zero_bytes_sent * codec.zero_decode_ns * ns;
  const bool all_touched = zero_pages == ZeroMode::none;
  if (setup.destination == Destination::fresh)
    decode_s += image.bytes * (all_touched ? 1 : image.touched_share) * host.fault_ns * ns;
  if (setup.destination == Destination::fresh_small)
    decode_s += (full_bytes + zero_bytes_sent) * host.fault_small_ns * ns;

  // Busy cores slow each other down. Sockets were measured with two channels and both
  // their ends at work.
  const unsigned busy = setup.one_host ? 2 * channels : channels;
  const unsigned destination_cores = setup.one_host ? setup.source_cores : setup.destination_cores;
  const auto with_neighbours = [&](double own_s, double socket_s, unsigned cores) {
    const double slower = slowdown(host, busy, cores);
    return own_s * slower + socket_s * std::max(1.0, slower / slowdown(host, 4, cores));
  };
  const double source_s = with_neighbours(encode_s, send_s, setup.source_cores);
  const double destination_s = with_neighbours(decode_s, receive_s, destination_cores);
  result.source_cpu_s = source_s + producer_s;
  result.destination_cpu_s = destination_s;

  // Time.
  const double capacity = setup.link.capacity(channels);
  const double source_workers = std::min(channels, setup.source_cores);
  const double destination_workers = std::min(channels, destination_cores);
  struct Stage {
    double seconds;
    Limit limit;
  };
  const Stage stages[] = {
      {capacity > 0 ? result.wire_bytes / capacity : 0, Limit::link},
      {std::max(source_s / source_workers, result.source_cpu_s / setup.source_cores), Limit::source},
      {destination_s / destination_workers, Limit::destination},
      {producer_s, Limit::producer},
      {setup.one_host ? result.cpu_s() / setup.source_cores : 0, Limit::host}};
  const Stage& slowest = *std::ranges::max_element(stages, {}, &Stage::seconds);
  result.limit = slowest.limit;
  double sum = 0;
  for (const Stage& stage : stages) sum += std::pow(slowest.seconds > 0 ? stage.seconds / slowest.seconds : 0, norm);
  // Connecting, and the last SYNC with its answer.
  result.seconds = slowest.seconds * std::pow(sum, 1 / norm) + 3 * setup.link.rtt_s;
  return result;
}

std::vector<Prediction> predict_all(const ImageFacts& image, const HostCosts& host,
                                    const std::vector<CodecCosts>& codecs, const std::vector<unsigned>& channels,
                                    const Setup& setup) {
  std::vector<Prediction> all;
  for (const CodecCosts& codec : codecs)
    for (const ZeroMode mode : zero_modes)
      for (const unsigned count : channels) all.push_back(predict(image, host, codec, mode, count, setup));
  std::ranges::sort(all, {},
                    [](const Prediction& p) { return std::tuple(p.seconds, p.channels, p.compressor, p.level); });
  return all;
}

Forecast forecast(const ImageFacts& image, const HostCosts& host, const CodecCosts& codec, const Prediction& prediction,
                  const Setup& setup, const Writing& writing) {
  // What was dirtied is not zero, and its place at the destination has been touched.
  Setup again = setup;
  again.destination = Destination::warm;
  ImageFacts dirty = image;
  dirty.zero_share = 0;
  const auto seconds_for = [&](double bytes) {
    dirty.bytes = bytes;
    return predict(dirty, host, codec, prediction.zero_pages, prediction.channels, again).seconds;
  };
  constexpr unsigned most_rounds = 200;
  Forecast result{.seconds = prediction.seconds};
  double last_round = prediction.seconds;
  for (; result.rounds < most_rounds; ++result.rounds) {
    const double left = std::min({writing.bytes_per_s * last_round, writing.working_set_bytes, image.bytes});
    const double round = seconds_for(left);
    if (round <= writing.max_downtime_s) {
      result.converges = true;
      result.downtime_s = round;
      result.seconds += round;
      return result;
    }
    // Rounds that hardly shrink never end.
    if (round > 0.98 * last_round) break;
    result.seconds += round;
    last_round = round;
  }
  result = {.seconds = prediction.seconds};
  return result;
}

double most_dirty_rate(const ImageFacts& image, const HostCosts& host, const CodecCosts& codec,
                       const Prediction& prediction, const Setup& setup, Writing writing) {
  const auto converges = [&](double bytes_per_s) {
    writing.bytes_per_s = bytes_per_s;
    return forecast(image, host, codec, prediction, setup, writing).converges;
  };
  double least = 0;  // converges with
  double most = 1e12;
  if (converges(most)) return std::numeric_limits<double>::infinity();
  if (!converges(least)) return 0;
  while (most - least > 0.01 * most && most > 1) {
    const double middle = (least + most) / 2;
    (converges(middle) ? least : most) = middle;
  }
  return least;
}

double downtime_of_working_set(const ImageFacts& image, const HostCosts& host, const CodecCosts& codec,
                               const Prediction& prediction, const Setup& setup, const Writing& writing) {
  Writing patient = writing;
  patient.max_downtime_s = std::numeric_limits<double>::infinity();  // so that the first rest is taken
  return forecast(image, host, codec, prediction, setup, patient).downtime_s;
}

double spread_of(const HostCosts& host, const Link& link) {
  double spread = host.spread;
  if (!link.measured.empty()) {
    std::vector<double> spreads;
    for (const Link::Measured& each : link.measured) spreads.push_back(each.spread);
    const auto middle = spreads.begin() + static_cast<std::ptrdiff_t>(spreads.size() / 2);
    std::ranges::nth_element(spreads, middle);
    spread = std::max(spread, *middle);
  }
  return spread;
}

double tie_of(double spread) { return std::clamp(spread, least_tie, most_tie); }

Choice choose(const std::vector<Prediction>& predictions, const std::vector<Forecast>& forecasts, Goal goal,
              double tie) {
  struct Candidate {
    const Prediction* prediction;
    double seconds;
    double cpu_s;
  };
  std::vector<Candidate> left;
  for (std::size_t i = 0; i < predictions.size(); ++i) {
    if (!forecasts.empty() && !forecasts[i].converges) continue;
    left.push_back(
        {&predictions[i], forecasts.empty() ? predictions[i].seconds : forecasts[i].seconds, predictions[i].cpu_s()});
  }
  // Keeps what is within the tie of the least: of all that is left at once, so that the order means nothing.
  const auto keep_least = [&](auto figure) {
    const double least = std::invoke(figure, *std::ranges::min_element(left, {}, figure));
    std::erase_if(left, [&](const Candidate& each) { return std::invoke(figure, each) > least * (1 + tie); });
  };
  if (left.empty()) return {};
  keep_least(goal == Goal::time ? &Candidate::seconds : &Candidate::cpu_s);
  const std::size_t equals = left.size() - 1;
  keep_least(goal == Goal::time ? &Candidate::cpu_s : &Candidate::seconds);
  const auto rank = [](const Candidate& each) {
    const Prediction& p = *each.prediction;
    // A record for each zero page is work for the main stream, so lists in the packets come first.
    return std::tuple(p.channels, std::ranges::find(zero_modes, p.zero_pages), p.wire_bytes, p.compressor, p.level);
  };
  return {.best = std::ranges::min_element(left, {}, rank)->prediction, .equals = equals};
}

}  // namespace advise

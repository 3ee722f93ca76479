// SPDX-License-Identifier: MIT
//
// The prediction: pure functions from what was measured to seconds, CPU seconds and bytes of a migration. Nothing here
// reads a clock, a file or a socket.
//
//   bytes   each normal page travels divided by the compressor's ratio, each packet has a header; zero pages travel as
//           their place in a packet (multifd), as a record of the main stream (legacy), or as bytes (none)
//   CPU     bytes and pages times the unit costs
//   time    the slowest of: the link; the workers at either end (their CPU over min(channels, cores)); all CPU of an
//   end
//           over its cores; the producer. Where stages are near each other they get in each other's way, so they are
//           summed up as a p-norm, whose value is just above the largest.
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

namespace advise {

enum class ZeroMode : std::uint8_t { none, legacy, multifd };
inline constexpr ZeroMode zero_modes[] = {ZeroMode::multifd, ZeroMode::legacy, ZeroMode::none};
const char* to_string(ZeroMode mode) noexcept;

/// What the destination's memory is when the first page arrives.
enum class Destination : std::uint8_t {
  warm,         ///< every page touched before
  fresh,        ///< never touched, huge pages asked for
  fresh_small,  ///< never touched, 4 KiB pages
};
const char* to_string(Destination destination) noexcept;

/// What is known of the memory to be moved.
struct ImageFacts {
  double bytes = 0;
  double page_bytes = 4096;
  double zero_share = 0;     ///< of the pages
  double touched_share = 1;  ///< of the 2 MiB extents: those with any page that is not zero
};

/// One compressor at one level, on this image's pages. Costs are CPU time per byte of pages.
struct CodecCosts {
  std::string compressor{};
  std::optional<int> level{};
  bool sends_pages = false;  ///< the payload is the pages as they lie, not what an encoder wrote
  double ratio = 1;          ///< page bytes by payload bytes, of pages that are not zero
  double encode_ns = 0;
  double decode_ns = 0;
  double zero_ratio = 1;  ///< the same of zero pages that travel as bytes
  double zero_encode_ns = 0;
  double zero_decode_ns = 0;
};

/// "zstd -5".
std::string name_of(const CodecCosts& codec);

/// CPU time of everything else.
struct HostCosts {
  double queue_ns = 0;  ///< per page, at the producer
  double check_ns = 0;  ///< per page of this image, for the zero check
  // Sockets: per byte from or to guest memory; per byte from or to the small buffer of an encoder; per packet, of
  // those that are not full of guest memory.
  double send_page_ns = 0, receive_page_ns = 0;
  double send_payload_ns = 0, receive_payload_ns = 0;
  double send_packet_ns = 0, receive_packet_ns = 0;
  double fault_ns = 0;        ///< per byte of fresh memory, huge pages
  double fault_small_ns = 0;  ///< per byte of fresh memory, 4 KiB pages
  double busy_factor = 1;     ///< a core's slowdown when `busy_cores` work at once
  double spread = 0;          ///< how far the two cheapest of some equal transfers are apart, as a share
  unsigned busy_cores = 1;
};

/// What is between the two ends.
struct Link {
  std::string name{};
  double nominal_bits_per_s = 0;
  double bytes_per_s = 0;  ///< most of all connections together; 0: no bound
  struct Measured {
    unsigned connections;
    double bytes_per_s;  ///< the median of some passes
    double spread = 0;   ///< from their slowest to their quickest, as a share of the median
  };
  std::vector<Measured> measured{};  ///< by rising number of connections; empty: not measured
  double rtt_s = 0;
  double window_bytes = 0;  ///< most bytes in flight on one connection; 0: no bound

  /// Bytes per second that so many connections get; 0: no bound.
  double capacity(unsigned channels) const noexcept;
};

struct Setup {
  Link link{};
  unsigned source_cores = 1;
  unsigned destination_cores = 1;
  bool one_host = false;  ///< both ends share the source's cores
  Destination destination = Destination::fresh;
};

enum class Limit : std::uint8_t { link, source, destination, producer, host };
const char* to_string(Limit limit) noexcept;

struct Prediction {
  std::string compressor{};
  std::optional<int> level{};
  ZeroMode zero_pages{};
  unsigned channels = 1;
  double seconds = 0;
  double source_cpu_s = 0;
  double destination_cpu_s = 0;
  double wire_bytes = 0;
  Limit limit{};

  double cpu_s() const noexcept { return source_cpu_s + destination_cpu_s; }
};

/// "zstd -5, zero pages multifd".
std::string name_of(const Prediction& prediction);

Prediction predict(const ImageFacts& image, const HostCosts& host, const CodecCosts& codec, ZeroMode zero_pages,
                   unsigned channels, const Setup& setup);

/// predict() for every codec, mode and number of channels, quickest first.
std::vector<Prediction> predict_all(const ImageFacts& image, const HostCosts& host,
                                    const std::vector<CodecCosts>& codecs, const std::vector<unsigned>& channels,
                                    const Setup& setup);

/// A guest that goes on writing while it is moved.
struct Writing {
  double bytes_per_s = 0;        ///< distinct page bytes dirtied
  double working_set_bytes = 0;  ///< most that is ever dirty
  double max_downtime_s = 0.3;
};
struct Forecast {
  bool converges = false;
  unsigned rounds = 1;
  double seconds = 0;  ///< in all; of the first round when it does not converge
  double downtime_s = 0;
};
/// Rounds, each sending what was dirtied in the one before, until the rest fits into the downtime.
Forecast forecast(const ImageFacts& image, const HostCosts& host, const CodecCosts& codec, const Prediction& prediction,
                  const Setup& setup, const Writing& writing);

/// The most that a guest may dirty per second for this stack to converge; 0: it never does, infinity: whatever it
/// writes.
double most_dirty_rate(const ImageFacts& image, const HostCosts& host, const CodecCosts& codec,
                       const Prediction& prediction, const Setup& setup, Writing writing);
/// The downtime with which it converges at this dirty rate: the guest's working set is sent while it stands still.
double downtime_of_working_set(const ImageFacts& image, const HostCosts& host, const CodecCosts& codec,
                               const Prediction& prediction, const Setup& setup, const Writing& writing);

/// Figures that are closer than this share are equal, also where everything was measured exactly: the model is no
/// better.
inline constexpr double least_tie = 0.02;
/// And where the measurements' own spread is larger than this share, what they say is only good for so much.
inline constexpr double most_tie = 0.25;
/// The measurements' own spread: the larger one of the host's, and of the link's median over the numbers of
/// connections.
double spread_of(const HostCosts& host, const Link& link);
/// What counts as equal with this spread.
double tie_of(double spread);

/// What a recommendation is to have least of.
enum class Goal : std::uint8_t { time, cpu };

/// The rule by which equals are told apart, in words that follow "decided by".
inline constexpr const char* rule_of_ties =
    "the other one of time and CPU, then fewest channels, then zero pages in lists, then fewest bytes on the wire";

struct Choice {
  const Prediction* best = nullptr;  ///< null: there is none, because no stack converges
  std::size_t equals = 0;            ///< how many other stacks are as good within the tie, so that the rule decided
};

/// Recommends one of `predictions`, by rule_of_ties, always the same one whatever order they are in.
///
/// Params: `forecasts`: of each prediction, or empty; where they are given, only stacks that converge are recommended,
///   and the time is that of all rounds. `tie`: see tie_of().
Choice choose(const std::vector<Prediction>& predictions, const std::vector<Forecast>& forecasts, Goal goal,
              double tie);

}  // namespace advise

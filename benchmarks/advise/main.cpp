// SPDX-License-Identifier: MIT
//
// multifd_advise: which stack of compressor, zero pages and channels suits this guest, this link and this host.
#include <fmt/format.h>

#include <multifd/format/constants.hpp>

#include <CLI/CLI.hpp>
#include <algorithm>
#include <fstream>
#include <nlohmann/json.hpp>
#include <optional>
#include <thread>

#include "advise/link.hpp"
#include "advise/output.hpp"
#include "advise/plot.hpp"
#include "advise/rate.hpp"
#include "common/gnuplot.hpp"
#include "common/limits.hpp"
#include "common/part_file.hpp"
#include "common/program.hpp"
#include "common/progress.hpp"
#include "common/report.hpp"
#include "common/tell.hpp"
#include "corpus.hpp"

namespace {

using namespace advise;
using program::Failure;
using program::need;
using program::Usage;

constexpr const char* description =
    R"(Says which stack of compressor, zero-page mode and channels suits a guest and a link.

Looks at the guest's memory (a file, or generated patterns), measures what each step costs on this host with the
library's own code, and predicts for every stack and number of channels: seconds, CPU seconds at both ends, bytes on the
wire. The destination is taken to be a host like this one. The model: each page costs CPU at the source (zero check,
encode, send) and at the destination (receive, decode, first touch of its memory); the time is that of the slowest of
the link, the CPU of either end over min(channels, cores), and the producer.

  multifd_advise --image guest.ram --link 10Gbit --plot advice.svg
  multifd_advise --pattern mixed --size 1G --link 25Gbit --rtt 0.2 --json -
  multifd_advise --listen tcp::4444                  on the destination, then here
  multifd_advise --image guest.ram --connect tcp:192.0.2.7:4444)";

constexpr const char* footer = R"(
A nominal link (10Gbit) carries 94 % of its bits as TCP's bytes, at 1500 bytes a frame. With --rtt a connection carries
at most half of tcp_rmem's or tcp_wmem's largest size per round trip. CPU costs of sockets are those of loopback TCP: a
network card with offloads costs about the same or less.
Exit status: 0 done, 1 failed (one line on stderr), 2 wrong usage.)";

struct Settings {
  std::string image;
  std::vector<std::string> patterns;
  std::uint64_t size = std::uint64_t{1} << 30;
  std::uint64_t sample = std::uint64_t{256} << 20;
  std::uint64_t seed = 1;
  std::string link;
  std::string connect;
  std::string listen;
  double rtt_ms = 0;
  unsigned cores = std::max(1u, std::thread::hardware_concurrency());
  std::optional<unsigned> destination_cores;
  std::vector<unsigned> channels = {1, 2, 4, 8};
  std::string destination = "fresh";
  std::uint64_t dirty_rate = 0;
  std::uint64_t working_set = 0;
  double max_downtime_ms = 300;
  double time = 15;
  std::size_t rows = 0;
  bool verify = false;
  unsigned verify_rounds = 3;
  std::string json_path;
  std::string plot;
  std::string plot_data;
};

/// The most that one connection has on the way: half of the socket's largest buffer, the rest is the kernel's own.
double window_of_this_host() {
  double least = 0;
  for (const char* const path : {"/proc/sys/net/ipv4/tcp_rmem", "/proc/sys/net/ipv4/tcp_wmem"}) {
    std::ifstream file(path);
    double low = 0, usual = 0, most = 0;
    if (file >> low >> usual >> most) least = least == 0 ? most : std::min(least, most);
  }
  return least / 2;
}

void check(const Settings& settings) {
  const int sources = int(!settings.image.empty()) + int(!settings.patterns.empty());
  const int links = int(!settings.link.empty()) + int(!settings.connect.empty());
  if (!settings.listen.empty()) {
    if (sources + links != 0) throw Usage("--listen is the other end: it takes no image and no link");
    return;
  }
  if (sources != 1) throw Usage("one of --image and --pattern is needed");
  if (links != 1) throw Usage("one of --link and --connect is needed");
  if (!settings.link.empty() && settings.link != "loopback" && !parse_rate(settings.link))
    throw Usage(fmt::format("--link {}: a speed as 10Gbit, 100Mbit, 1.2GiB/s, 500MiB/s, or loopback", settings.link));
  if (!settings.plot.empty() && !settings.plot.ends_with(".svg") && !settings.plot.ends_with(".png"))
    throw Usage(fmt::format("--plot {}: the name has to end in .svg or .png", settings.plot));
  if (settings.working_set != 0 && settings.dirty_rate == 0) throw Usage("--working-set needs --dirty-rate");
}

int listen(const Settings& settings) {
  const multifd::Interrupt& interrupt = program::catch_signals();
  auto listener = need(multifd::Listener::listen(program::address_of(settings.listen, "--listen"), 256),
                       "listen on " + settings.listen);
  program::tell("listening on {}\n", to_string(listener.local_address()));
  constexpr std::chrono::minutes idle{10};
  const bool measured = [&] {
    const program::Progress waiting(
        fmt::format("waiting for multifd_advise --connect {}, and serving it", to_string(listener.local_address())),
        "If it runs already: does its address lead here? Nobody is waited for longer than 10 minutes",
        std::chrono::seconds(20));
    return serve_link(listener, idle, interrupt);
  }();
  if (measured) {
    fmt::print("measured; the other side has the result\n");
    return program::exit_done;
  }
  if (interrupt.triggered()) throw Failure("cancelled");
  throw Failure("nobody came for 10 minutes");
}

Setup find_setup(const Settings& settings, Steps& steps) {
  Setup setup{.source_cores = settings.cores, .destination_cores = settings.destination_cores.value_or(settings.cores)};
  for (const Destination each : {Destination::warm, Destination::fresh, Destination::fresh_small})
    if (settings.destination == to_string(each)) setup.destination = each;
  const unsigned most = std::min(64u, std::ranges::max(settings.channels));
  // Half a second is enough for TCP to find its speed, on what is not far away.
  const double seconds = std::clamp(settings.time / 40, 0.05, 2.0);  // three times
  if (!settings.connect.empty()) {
    MeasuredLink measured = measure_link(program::address_of(settings.connect, "--connect"), most, seconds, steps);
    setup.link = std::move(measured.link);
    setup.destination_cores = settings.destination_cores.value_or(measured.peer_cores);
  } else if (settings.link == "loopback") {
    setup.link = measure_loopback(most, seconds, steps).link;
    setup.one_host = true;
  } else {
    const Rate rate = *parse_rate(settings.link);
    setup.link = {.name = settings.link,
                  .nominal_bits_per_s = rate.nominal_bits_per_s,
                  .bytes_per_s = rate.bytes_per_s,
                  .window_bytes = window_of_this_host()};
  }
  if (settings.rtt_ms > 0) setup.link.rtt_s = settings.rtt_ms * 1e-3;
  return setup;
}

int advise_on(const Settings& settings) {
  const multifd::Interrupt& interrupt = program::catch_signals();
  const program::Stopwatch watch;
  program::JsonFile json_file(settings.json_path);
  Steps steps(interrupt);
  try {
    if (!settings.plot.empty()) program::need_gnuplot();
    // Before the measuring: a name that is taken is no surprise after it.
    std::optional<program::PartFile> plot_data, plot;
    if (!settings.plot_data.empty()) plot_data.emplace(settings.plot_data).check_writes();
    if (!settings.plot.empty()) plot.emplace(settings.plot).check_writes();
    std::optional<program::Progress> progress;
    progress.emplace(
        [&] { return program::Snapshot{.line = fmt::format("measuring, {:.0f} s: {}", watch.seconds(), steps.now())}; },
        std::chrono::hours(1));
    steps.next("reading the image");
    Image image = settings.image.empty() ? make_image(settings.patterns, settings.size, settings.sample, settings.seed)
                                         : read_image(settings.image, settings.sample);
    Findings findings{.image = std::move(image)};
    findings.channels = settings.channels;
    look_at(findings.image, interrupt);
    findings.setup = find_setup(settings, steps);
    // Two thirds of the time for some dozen levels, the rest for everything else.
    findings.codecs = measure_codecs(findings.image, settings.time / 20, steps);
    const unsigned here = std::max(1u, std::thread::hardware_concurrency());
    findings.host = measure_host(findings.image, settings.time / 30, std::min(here, settings.cores), steps);
    findings.spread = spread_of(findings.host, findings.setup.link);
    findings.predictions =
        predict_all(findings.image.facts, findings.host, findings.codecs, findings.channels, findings.setup);
    if (settings.dirty_rate != 0) {
      findings.writing = {.bytes_per_s = static_cast<double>(settings.dirty_rate),
                          .working_set_bytes = settings.working_set != 0 ? static_cast<double>(settings.working_set)
                                                                         : findings.image.facts.bytes,
                          .max_downtime_s = settings.max_downtime_ms * 1e-3};
      for (const Prediction& each : findings.predictions) {
        const auto codec = std::ranges::find_if(findings.codecs, [&](const CodecCosts& other) {
          return other.compressor == each.compressor && other.level == each.level;
        });
        findings.forecasts.push_back(
            forecast(findings.image.facts, findings.host, *codec, each, findings.setup, findings.writing));
        const auto ask = [&](auto figure) {
          return figure(findings.image.facts, findings.host, *codec, each, findings.setup, findings.writing);
        };
        findings.most_dirty_rate = std::max(findings.most_dirty_rate, ask(most_dirty_rate));
        findings.least_downtime_s = std::min(findings.least_downtime_s, ask(downtime_of_working_set));
      }
    }
    if (settings.verify) {
      // Both ends run here, so the stacks to try are those that would be best here.
      Setup here_setup{
          .source_cores = here, .destination_cores = here, .one_host = true, .destination = findings.setup.destination};
      if (!findings.setup.one_host) here_setup.link.bytes_per_s = findings.setup.link.bytes_per_s;
      findings.verified = verify(findings.image, findings.host, findings.codecs,
                                 worth_verifying(findings.predictions, 8), here_setup, settings.verify_rounds, steps);
    }
    progress.reset();
    findings.seconds = watch.seconds();
    if (settings.json_path != "-") {
      print_tables(findings, settings.rows);
      if (settings.verify) print_verified(findings.verified);
    }
    if (plot_data) write_plot_data(findings, *plot_data);
    if (plot) draw(findings, *plot);
    for (std::optional<program::PartFile>* const file : {&plot_data, &plot}) {
      if (!*file) continue;
      (*file)->sync();
      (*file)->rename();
      (*file)->release();
    }
    json_file.write(to_json(findings));
    return program::exit_done;
  } catch (const std::exception& error) {
    json_file.write({{"ok", false}, {"error", program::text_of(error)}, {"seconds", watch.seconds()}});
    throw;
  }
}

}  // namespace

int main(int argc, char** argv) {
  Settings settings;
  CLI::App app(description, "multifd_advise");
  app.footer(footer);
  app.add_option("--image", settings.image, "The guest's memory: a memory image, a process's dump, any file");
  const std::vector<std::string> patterns(corpus::patterns.begin(), corpus::patterns.end());
  app.add_option("--pattern", settings.patterns, "Generated memory instead; several: the same share of each")
      ->check(CLI::IsMember(patterns))
      ->delimiter(',');
  program::add_size(app, "--size", settings.size, "How much generated memory");
  program::add_size(app, "--sample", settings.sample, "Look at no more than that, in windows of 8 MiB spread evenly");
  app.add_option("--seed", settings.seed, "Of generated memory")->capture_default_str();
  app.add_option("--link", settings.link,
                 "10Gbit, 100Mbit (of the line), 1.2GiB/s, 500MiB/s (of a stream), or loopback");
  app.add_option("--connect", settings.connect, "Measure the link to a multifd_advise --listen there");
  app.add_option("--listen", settings.listen, "Be that other end, once: tcp:HOST:PORT");
  app.add_option("--rtt", settings.rtt_ms, "Round trip of the link in milliseconds")->check(CLI::Range(0.0, 10'000.0));
  app.add_option("--cores", settings.cores, "Cores that the migration may use at each end")
      ->check(CLI::Range(1u, 1024u))
      ->capture_default_str();
  app.add_option("--destination-cores", settings.destination_cores,
                 "Where the destination has others (--connect: what the peer says)")
      ->check(CLI::Range(1u, 1024u));
  app.add_option("--channels", settings.channels, "Numbers of channels to predict")
      ->check(CLI::Range(1u, multifd::max_channels))
      ->delimiter(',')
      ->capture_default_str();
  app.add_option("--destination", settings.destination,
                 "The destination's memory: never touched (huge pages or 4 KiB pages), or warm")
      ->check(CLI::IsMember({"fresh", "fresh-4k", "warm"}))
      ->capture_default_str();
  program::add_size(app, "--dirty-rate", settings.dirty_rate, "The guest goes on writing, so many bytes per second");
  program::add_size(app, "--working-set", settings.working_set, "What it writes to at most (0: all)");
  app.add_option("--max-downtime", settings.max_downtime_ms, "Milliseconds that the guest may stand still")
      ->check(CLI::Range(1.0, 1e6))
      ->capture_default_str();
  app.add_option("--time", settings.time, "Seconds for measuring, about")
      ->check(CLI::Range(0.2, 600.0))
      ->capture_default_str();
  app.add_option("--rows", settings.rows, "Print only the quickest stacks (0: all)")->capture_default_str();
  app.add_flag("--verify", settings.verify, "Move the sample over loopback with eight stacks: predicted and measured");
  app.add_option("--verify-rounds", settings.verify_rounds, "How often each")
      ->check(CLI::Range(1u, 100u))
      ->capture_default_str();
  app.add_option("--json", settings.json_path, "Write one JSON object to a file, or to stdout for -");
  app.add_option("--plot", settings.plot, "Draw time against link speed to a new .svg or .png (needs gnuplot)");
  app.add_option("--plot-data", settings.plot_data, "Write the picture's table to a new file");
  return program::run(app, argc, argv, [&] {
    check(settings);
    std::ranges::sort(settings.channels);
    settings.channels.erase(std::ranges::unique(settings.channels).begin(), settings.channels.end());
    return settings.listen.empty() ? advise_on(settings) : listen(settings);
  });
}

// SPDX-License-Identifier: MIT
#include "advise/plot.hpp"

#include <fmt/format.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <limits>
#include <map>
#include <tuple>

#include "advise/rate.hpp"
#include "common/gnuplot.hpp"
#include "common/program.hpp"

namespace advise {
namespace {

using program::quoted;

std::vector<double> speeds() {
  std::vector<double> all;
  constexpr int steps_per_decade = 40;
  for (double at = 1e8; at < 4e11; at *= std::pow(10, 1.0 / steps_per_decade)) all.push_back(at);
  all.push_back(4e11);
  return all;
}

std::string data_table(const Curves& curves) {
  std::string text = "# Mbit/s";
  for (const Curve& curve : curves.curves) text += fmt::format("\t{}", curve.label);
  text += "\tbest\n";
  for (std::size_t i = 0; i < curves.bits_per_s.size(); ++i) {
    text += fmt::format("{:.6g}", curves.bits_per_s[i] / 1e6);
    double best = std::numeric_limits<double>::infinity();
    for (const Curve& curve : curves.curves) {
      text += fmt::format("\t{:.6g}", curve.seconds[i]);
      best = std::min(best, curve.seconds[i]);
    }
    text += fmt::format("\t{:.6g}\n", best);
  }
  return text;
}

std::string script_for(const Findings& findings, const program::PartFile& picture) {
  // Dark enough for white paper, and apart from each other for most colour-blind people.
  static constexpr std::array<const char*, most_curves> colours = {"#0072b2", "#d55e00", "#009e73", "#cc79a7",
                                                                   "#56b4e9", "#b8860b", "#444444", "#999999"};
  const Curves curves = curves_of(findings);
  std::string script;
  const auto line = [&]<class... Args>(fmt::format_string<Args...> format, Args&&... args) {
    script += fmt::format(format, std::forward<Args>(args)...) + "\n";
  };
  script += program::gnuplot_terminal(picture);
  line("$curves << END_OF_CURVES\n{}END_OF_CURVES", data_table(curves));
  line("set logscale xy");
  line("set xrange [99.9:400001]\nset mytics 10");
  line(
      "set xtics ('100 Mbit' 100, '1 Gbit' 1000, '10 Gbit' 10000, '25' 25000, '40' 40000, '100 Gbit' 100000, "
      "'400' 400000)");
  line("set xlabel 'speed of the link, bits per second' offset 0,-0.3");
  line("set ylabel {}", quoted(fmt::format("seconds to move {}", program::format_bytes(findings.image.facts.bytes))));
  line("set format y '%g'");
  line("set grid xtics ytics mytics lc rgb '#b4b4b4' lw 1 dt 1, lc rgb '#dcdcdc' lw 1 dt 1");
  line("set border 3 lc rgb '#555555'\nset tics nomirror");
  line("set key outside right center vertical Left reverse samplen 2.5 spacing 1.5 title {} left noenhanced",
       quoted("compressor, level, zero pages"));
  line("set title {} noenhanced offset 0,0.3",
       quoted(fmt::format("{}: {:.0f} % zero pages, {} cores at the source, {} at the destination", findings.image.name,
                          100 * findings.image.facts.zero_share, findings.setup.source_cores,
                          findings.setup.destination_cores)));
  const double asked = findings.setup.link.nominal_bits_per_s / 1e6;
  if (asked >= 100 && asked <= 400000) {
    line("set arrow 1 from first {0:.6g}, graph 0 to first {0:.6g}, graph 1 nohead lc rgb '#aa0000' lw 1.5 dt 2",
         asked);
    line("set label 1 {} at first {:.6g}, graph 0.985 {} tc rgb '#aa0000' noenhanced", quoted(findings.setup.link.name),
         asked, asked > 20000 ? "right offset -0.7,0" : "left offset 0.7,0");
  }
  // The lowest of the lines, wide and pale behind them: one follows it from stack to stack.
  script += fmt::format("plot $curves using 1:{} with lines lw 11 lc rgb '#ffe08a' title 'the best of them'",
                        curves.curves.size() + 2);
  for (std::size_t i = 0; i < curves.curves.size(); ++i)
    script += fmt::format(", \\\n  $curves using 1:{} with lines lw 2.6 lc rgb '{}' dt {} title {} noenhanced", i + 2,
                          colours[i % colours.size()], curves.curves[i].label.starts_with("none") ? 4 : 1,
                          quoted(curves.curves[i].label));
  return script + "\n";
}

}  // namespace

Curves curves_of(const Findings& findings) {
  Curves result{.bits_per_s = speeds()};
  struct Candidate {
    const CodecCosts* codec;
    ZeroMode mode;
    std::vector<double> seconds{};
    std::size_t place = 0;  ///< in the list
    double wins = 0;        ///< points at which it is the quickest
  };
  std::vector<Candidate> candidates;
  for (const CodecCosts& codec : findings.codecs)
    for (const ZeroMode mode : zero_modes) {
      Candidate candidate{.codec = &codec, .mode = mode, .place = candidates.size()};
      for (const double bits : result.bits_per_s) {
        Setup setup = findings.setup;
        setup.one_host = false;
        setup.link.measured.clear();
        setup.link.bytes_per_s = bits / 8 * ethernet_share;
        double best = std::numeric_limits<double>::infinity();
        for (const unsigned channels : findings.channels)
          best = std::min(best, predict(findings.image.facts, findings.host, codec, mode, channels, setup).seconds);
        candidate.seconds.push_back(best);
      }
      candidates.push_back(std::move(candidate));
    }
  // The first in the list wins a tie, because otherwise a line would consist of pieces of several.
  for (std::size_t i = 0; i < result.bits_per_s.size(); ++i) {
    Candidate* winner = &candidates.front();
    for (Candidate& each : candidates)
      if (each.seconds[i] < winner->seconds[i] * (1 - least_tie)) winner = &each;
    winner->wins += 1;
  }
  const auto is_baseline = [](const Candidate& each) {
    return each.codec->sends_pages && each.mode != ZeroMode::legacy;
  };
  std::ranges::sort(candidates, [&](const Candidate& a, const Candidate& b) {
    return std::tuple(is_baseline(a), a.wins, b.place) > std::tuple(is_baseline(b), b.wins, a.place);
  });
  // Of one compressor and level, one zero mode is enough beside the baselines; what never wins, once per compressor.
  std::map<std::string, unsigned> seen;
  for (Candidate& each : candidates) {
    if (result.curves.size() == most_curves) break;
    const std::string codec = name_of(*each.codec);
    if (!is_baseline(each) && (seen[codec] > 0 || (each.wins == 0 && seen[each.codec->compressor + "*"] > 0))) continue;
    ++seen[codec];
    ++seen[each.codec->compressor + "*"];
    result.curves.push_back(
        {.label = fmt::format("{}, {}", codec, to_string(each.mode)), .seconds = std::move(each.seconds)});
  }
  // The legend in the order in which the lines begin, slowest link first.
  std::ranges::sort(result.curves, [](const Curve& a, const Curve& b) { return a.seconds[0] > b.seconds[0]; });
  return result;
}

void draw(const Findings& findings, const program::PartFile& picture) {
  program::draw_by_gnuplot(script_for(findings, picture), picture);
}

void write_plot_data(const Findings& findings, const program::PartFile& table) {
  program::write_text(table.fd(), data_table(curves_of(findings)), table.part());
}

}  // namespace advise

// SPDX-License-Identifier: MIT
#include "simulate/plot.hpp"

#include <fmt/format.h>

#include <algorithm>
#include <cmath>
#include <string>
#include <string_view>
#include <vector>

#include "common/gnuplot.hpp"

namespace simulate {
namespace {

using program::quoted;

/// One rule's lines.
struct Curve {
  std::string name;
  std::string whose;
  const Summary* summary = nullptr;
  std::vector<const Outcome*> outcomes{};
};

std::vector<Curve> curves_of(const Comparison& comparison) {
  std::vector<Curve> curves;
  for (std::size_t i = 0; i < comparison.rules.size(); ++i) {
    const NamedRule& rule = comparison.rules[i];
    curves.push_back(
        {.name = std::string(rule.name), .whose = std::string(rule.whose), .summary = &comparison.summaries[i]});
    for (const Trial& trial : comparison.trials) curves.back().outcomes.push_back(&trial.outcomes[i]);
  }
  curves.push_back({.name = "oracle", .whose = "oracle, knows the trace", .summary = &comparison.oracle});
  for (const Trial& trial : comparison.trials) curves.back().outcomes.push_back(&trial.oracle);
  return curves;
}

/// How many times the oracle's cost.
double over_oracle(const Comparison& comparison, const Curve& curve, std::size_t trial) {
  return cost(*curve.outcomes[trial], comparison.judge) / cost(comparison.trials[trial].oracle, comparison.judge);
}

/// Dark enough for white paper, and apart from each other for most colour-blind people.
std::string_view style_of(std::string_view rule) {
  if (rule == "oracle") return "lc rgb '#000000' lw 1.5 dt 3";
  if (rule == "priced") return "lc rgb '#0072b2' lw 4";
  if (rule == "priced-sync-first") return "lc rgb '#0072b2' lw 2 dt 2";
  if (rule == "qemu") return "lc rgb '#e69f00' lw 2.5";
  if (rule == "cloud-hypervisor") return "lc rgb '#009e73' lw 2.5";
  if (rule == "ramp") return "lc rgb '#cc79a7' lw 2.5";
  if (rule == "stall") return "lc rgb '#d55e00' lw 2.5";
  return "lc rgb '#999999' lw 2 dt 2";
}

std::string legend_of(const Curve& curve, std::size_t trials) {
  const Summary& summary = *curve.summary;
  std::string text = curve.name == "priced-sync-first" ? "multifd's default, sync first" : curve.whose;
  if (std::isfinite(summary.downtime_s))
    text += fmt::format(": {:.0f} ms, {:.1f} s", summary.downtime_s * 1e3, summary.total_s);
  if (summary.failed > 0)
    text +=
        fmt::format(" ({:.0f} % never end)", 100.0 * static_cast<double>(summary.failed) / static_cast<double>(trials));
  return text;
}

/// A block of gnuplot's: for each value, the percentage of all that are no greater. What is infinite is never reached.
std::string block_of(const std::string& name, std::vector<double> values, double least, double most) {
  std::ranges::sort(values);
  std::string text = fmt::format("${} << END_OF_BLOCK\n{:.6g} 0\n", name, least);
  double percent = 0;
  for (std::size_t i = 0; i < values.size() && std::isfinite(values[i]); ++i) {
    percent = 100.0 * static_cast<double>(i + 1) / static_cast<double>(values.size());
    text += fmt::format("{:.6g} {:.6g}\n", std::max(least, values[i]), percent);
  }
  return text + fmt::format("{:.6g} {:.6g}\nEND_OF_BLOCK\n", most, percent);
}

}  // namespace

void draw(const Comparison& comparison, const program::PartFile& picture) {
  constexpr double least_s = 0.01, most_s = 10, most_over = 3;
  std::string script = program::gnuplot_terminal(picture);
  const auto line = [&]<class... Args>(fmt::format_string<Args...> format, Args&&... args) {
    script += fmt::format(format, std::forward<Args>(args)...) + "\n";
  };
  const std::vector<Curve> curves = curves_of(comparison);
  for (std::size_t n = 0; n < curves.size(); ++n) {
    std::vector<double> downtimes, costs;
    for (std::size_t i = 0; i < comparison.trials.size(); ++i) {
      const Outcome& outcome = *curves[n].outcomes[i];
      downtimes.push_back(outcome.done ? outcome.downtime_s : HUGE_VAL);
      costs.push_back(over_oracle(comparison, curves[n], i));
    }
    script += block_of(fmt::format("downtime{}", n), std::move(downtimes), least_s, most_s);
    script += block_of(fmt::format("cost{}", n), std::move(costs), 1, most_over);
  }
  // Those that matter most are drawn last, so that nothing covers them, and named first.
  const auto plot = [&](std::string_view block, bool named) {
    script += "plot ";
    for (std::size_t n = curves.size(); n-- > 0;)
      script += fmt::format("${}{} using 1:2 with lines {} notitle, \\\n  ", block, n, style_of(curves[n].name));
    for (std::size_t n = 0; named && n < curves.size(); ++n)
      script += fmt::format("NaN with lines {} title {} noenhanced, \\\n  ", style_of(curves[n].name),
                            quoted(legend_of(curves[n], comparison.trials.size())));
    script += "NaN notitle\n";
  };
  line("set multiplot");
  line("set label 9 {} noenhanced at screen 0.5, 0.955 center font ',17'",
       quoted(fmt::format("When to stop the guest: live migration of {} simulated guests", comparison.trials.size())));
  line("set logscale x\nset yrange [0:102]\nset ytics 20 format '%g %%'\nset tmargin at screen 0.85");
  line("set bmargin at screen 0.33\nset grid xtics ytics lc rgb '#d0d0d0' lw 1 dt 1\nset border 3 lc rgb '#555555'");
  line("set tics nomirror");

  line("set lmargin at screen 0.065\nset rmargin at screen 0.50\nset nokey\nset xrange [{}:{}]", least_s, most_s);
  line("set xtics ('10 ms' 0.01, '30 ms' 0.03, '100 ms' 0.1, '300 ms' 0.3, '1 s' 1, '3 s' 3, '10 s' 10)");
  line("set title 'Downtime: migrations that stay below' offset 0,-0.4\nset xlabel 'downtime' offset 0,0.2");
  const double limit = multifd::migrate::seconds(comparison.judge.price.max_downtime);
  line("set arrow 1 from first {0:.6g}, graph 0 to first {0:.6g}, graph 1 nohead lc rgb '#aa0000' lw 1.2 dt 2", limit);
  line("set label 1 'limit' at first {:.6g}, graph 0.04 left offset 0.6,0 tc rgb '#aa0000'", limit);
  plot("downtime", false);

  line("unset arrow 1\nunset label 1\nunset label 9\nset lmargin at screen 0.56\nset rmargin at screen 0.985");
  line("set xrange [1:{}]", most_over);
  line("set xtics ('1x' 1, '1.1x' 1.1, '1.2x' 1.2, '1.5x' 1.5, '2x' 2, '3x' 3)");
  line("set title 'Cost (time and priced downtime): migrations that stay below' offset 0,-0.4");
  line("set xlabel 'times the cost under the oracle' offset 0,0.2");
  line(
      "set key at screen 0.5, 0.015 center bottom vertical maxrows 4 Left reverse samplen 2.5 width -5 noenhanced font "
      "',13'");
  line("set key title 'Medians of downtime and total time'");
  plot("cost", true);
  line("unset multiplot");
  program::draw_by_gnuplot(script, picture);
}

void write_plot_data(const Comparison& comparison, const program::PartFile& table) {
  std::string text = "# rule\ttrace\ttotal_s\tdowntime_s\tcost_over_oracle\n";
  for (const Curve& curve : curves_of(comparison))
    for (std::size_t i = 0; i < curve.outcomes.size(); ++i)
      if (curve.outcomes[i]->done)
        text +=
            fmt::format("{}\t{}\t{:.6g}\t{:.6g}\t{:.6g}\n", curve.name, comparison.trials[i].name,
                        curve.outcomes[i]->total_s, curve.outcomes[i]->downtime_s, over_oracle(comparison, curve, i));
  program::write_text(table.fd(), text, table.part());
}

}  // namespace simulate

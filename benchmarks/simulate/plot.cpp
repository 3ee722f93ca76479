// SPDX-License-Identifier: MIT
#include "simulate/plot.hpp"

#include <fmt/format.h>

#include <array>
#include <cmath>
#include <string>
#include <vector>

#include "common/gnuplot.hpp"

namespace simulate {
namespace {

using program::quoted;

/// One rule's dots.
struct Cloud {
  std::string name;
  std::string whose;
  const Summary* summary = nullptr;
  std::vector<const Outcome*> outcomes{};
};

std::vector<Cloud> clouds_of(const Comparison& comparison) {
  std::vector<Cloud> clouds;
  for (std::size_t i = 0; i < comparison.rules.size(); ++i) {
    const NamedRule& rule = comparison.rules[i];
    clouds.push_back(
        {.name = std::string(rule.name), .whose = std::string(rule.whose), .summary = &comparison.summaries[i]});
    for (const Trial& trial : comparison.trials) clouds.back().outcomes.push_back(&trial.outcomes[i]);
  }
  clouds.push_back({.name = "oracle", .whose = "oracle, knows the trace", .summary = &comparison.oracle});
  for (const Trial& trial : comparison.trials) clouds.back().outcomes.push_back(&trial.oracle);
  return clouds;
}

std::string legend_of(const Cloud& cloud, std::size_t trials) {
  const Summary& summary = *cloud.summary;
  std::string text = cloud.whose;
  if (std::isfinite(summary.downtime_s))
    text += fmt::format(": {:.0f} ms, {:.3g} s", summary.downtime_s * 1e3, summary.total_s);
  if (summary.failed > 0) text += fmt::format(" ({} of {} never end)", summary.failed, trials);
  return text;
}

}  // namespace

void draw(const Comparison& comparison, const program::PartFile& picture) {
  // Dark enough for white paper, and apart from each other for most colour-blind people. The default rule comes first.
  constexpr std::array colours = {"#0072b2", "#d55e00", "#e69f00", "#009e73", "#cc79a7", "#999999"};
  std::string script = program::gnuplot_terminal(picture);
  const auto line = [&]<class... Args>(fmt::format_string<Args...> format, Args&&... args) {
    script += fmt::format(format, std::forward<Args>(args)...) + "\n";
  };
  const std::vector<Cloud> clouds = clouds_of(comparison);
  for (std::size_t i = 0; i < clouds.size(); ++i) {
    line("$dots{} << END_OF_DOTS", i);
    line("0 0");  // gnuplot refuses an empty block; a logarithmic axis leaves it out
    for (const Outcome* each : clouds[i].outcomes)
      if (each->done) line("{:.6g} {:.6g}", each->total_s, each->downtime_s);
    line("END_OF_DOTS\n$median{} << END_OF_MEDIAN\n0 0", i);
    if (std::isfinite(clouds[i].summary->downtime_s))
      line("{:.6g} {:.6g}", clouds[i].summary->total_s, clouds[i].summary->downtime_s);
    line("END_OF_MEDIAN");
  }
  line("set logscale xy\nset xrange [3:400]\nset yrange [0.008:12]");
  line("set xtics ('5 s' 5, '10 s' 10, '20 s' 20, '1 min' 60, '2 min' 120, '5 min' 300, '20 min' 1200)");
  line("set ytics ('10 ms' 0.01, '30 ms' 0.03, '100 ms' 0.1, '300 ms' 0.3, '1 s' 1, '3 s' 3, '10 s' 10)");
  line("set xlabel 'total time' offset 0,-0.3\nset ylabel 'downtime'");
  line("set grid xtics ytics lc rgb '#d0d0d0' lw 1 dt 1\nset border 3 lc rgb '#555555'\nset tics nomirror");
  line("set key outside bottom center vertical maxrows 4 Left reverse samplen 1.5 spacing 1.3 noenhanced");
  line("set title {} noenhanced offset 0,0.3",
       quoted(
           fmt::format("When to stop the guest: live migration of {} simulated guests (dots), and the medians (marks)",
                       comparison.trials.size())));
  const double limit = multifd::migrate::seconds(comparison.judge.price.max_downtime);
  line("set arrow 1 from graph 0, first {0:.6g} to graph 1, first {0:.6g} nohead lc rgb '#aa0000' lw 1.2 dt 2", limit);
  line("set label 1 'limit' at graph 0.995, first {:.6g} right offset 0,0.6 tc rgb '#aa0000'", limit);
  script += "plot ";
  // Baselines first, so that nothing covers the default rule; medians above all dots.
  for (const bool medians : {false, true})
    for (std::size_t n = clouds.size(); n-- > 0;) {
      const bool is_oracle = n + 1 == clouds.size();
      const std::string colour = is_oracle ? "#000000" : colours[n % colours.size()];
      if (medians)
        script += fmt::format("$median{} using 1:2 with points pt {} ps {} lw 2 lc rgb '{}' title {} noenhanced{}", n,
                              is_oracle ? 2 : 7, n == 0 ? 2.4 : 1.9, colour,
                              quoted(legend_of(clouds[n], comparison.trials.size())), n == 0 ? "\n" : ", \\\n  ");
      else
        script += fmt::format("$dots{} using 1:2 with points pt 7 ps {} lc rgb '#{}{}' notitle, \\\n  ", n,
                              n == 0 ? 0.5 : 0.35, n == 0 ? "40" : "70", colour.substr(1));
    }
  program::draw_by_gnuplot(script, picture);
}

void write_plot_data(const Comparison& comparison, const program::PartFile& table) {
  std::string text = "# rule\ttrace\ttotal_s\tdowntime_s\n";
  for (const Cloud& cloud : clouds_of(comparison))
    for (std::size_t i = 0; i < cloud.outcomes.size(); ++i)
      if (cloud.outcomes[i]->done)
        text += fmt::format("{}\t{}\t{:.6g}\t{:.6g}\n", cloud.name, comparison.trials[i].name,
                            cloud.outcomes[i]->total_s, cloud.outcomes[i]->downtime_s);
  program::write_text(table.fd(), text, table.part());
}

}  // namespace simulate

// SPDX-License-Identifier: MIT
//
// What was found, for people (tables on stdout) and for programs (one JSON object).
#pragma once

#include <limits>
#include <nlohmann/json_fwd.hpp>
#include <string>
#include <vector>

#include "advise/costs.hpp"
#include "advise/image.hpp"
#include "advise/model.hpp"
#include "advise/verify.hpp"

namespace advise {

/// Everything that one start of the program has found.
struct Findings {
  Image image;
  Setup setup{};
  std::vector<unsigned> channels{};
  HostCosts host{};
  std::vector<CodecCosts> codecs{};
  std::vector<Prediction> predictions{};  ///< quickest first
  std::vector<Forecast> forecasts{};      ///< of each prediction; empty when none was requested
  Writing writing{};
  double spread = 0;  ///< spread_of() what was measured
  /// The most dirty rate with which any stack converges, and the least downtime with which any does at `writing`.
  double most_dirty_rate = 0;
  double least_downtime_s = std::numeric_limits<double>::infinity();
  Verification verified{};
  double seconds = 0;  ///< that finding it took
};

void print_tables(const Findings& findings, std::size_t most_rows);
void print_verified(const Verification& verified);
nlohmann::json to_json(const Findings& findings);

}  // namespace advise

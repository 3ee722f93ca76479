// SPDX-License-Identifier: MIT
//
// Unit costs, measured on this host and this image with the library's own policies. All in CPU time of the thread that
// works, so that other load on the machine disturbs them little.
#pragma once

#include <multifd/transport/interrupt.hpp>

#include <mutex>
#include <string>
#include <vector>

#include "advise/image.hpp"
#include "advise/model.hpp"

namespace advise {

/// What is going on, for the progress line, and whether to go on.
class Steps {
 public:
  explicit Steps(const multifd::Interrupt& interrupt) : interrupt_(interrupt) {}
  /// Announces the next step. Throws program::Failure once a signal has come.
  void next(std::string what);
  std::string now() const;
  const multifd::Interrupt& interrupt() const noexcept { return interrupt_; }

 private:
  const multifd::Interrupt& interrupt_;
  mutable std::mutex mutex_;
  std::string what_;
};

/// Measures every compressor at each of its levels. `seconds`: about what each of them may take.
std::vector<CodecCosts> measure_codecs(const Image& image, double seconds, Steps& steps);

/// Measures everything else. `seconds`: about what each of some ten measurements may take; `cores`: most at once.
HostCosts measure_host(const Image& image, double seconds, unsigned cores, Steps& steps);

}  // namespace advise

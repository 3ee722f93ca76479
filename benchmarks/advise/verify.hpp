// SPDX-License-Identifier: MIT
//
// Whether the model is right here: the library's own Sender and Receiver move the sample over loopback TCP inside this
// process, and what that took is put beside what was predicted for it.
#pragma once

#include <vector>

#include "advise/costs.hpp"
#include "advise/image.hpp"
#include "advise/model.hpp"

namespace advise {

struct Verified {
  Prediction predicted;  ///< of moving the sample between two ends that share this host
  double seconds = 0;
  double source_cpu_s = 0;
  double destination_cpu_s = 0;
  double wire_bytes = 0;  ///< on the channels
  double seconds_error() const noexcept { return predicted.seconds / seconds - 1; }
  double cpu_error() const noexcept { return predicted.cpu_s() / (source_cpu_s + destination_cpu_s) - 1; }
};

/// Picks what is worth trying: the best of each kind of stack, at most `most`.
std::vector<Prediction> worth_verifying(const std::vector<Prediction>& predictions, std::size_t most);

struct Verification {
  std::vector<Verified> stacks{};
  double other_cores = 0;  ///< how many cores other programs used meanwhile: with much of that, seconds say little
};

/// Moves the sample once for each stack, `rounds` times round robin, and reports the quickest run of each.
/// `setup.link.bytes_per_s` is a cap on the sender.
Verification verify(const Image& image, const HostCosts& host, const std::vector<CodecCosts>& codecs,
                    const std::vector<Prediction>& stacks, const Setup& setup, unsigned rounds, Steps& steps);

}  // namespace advise

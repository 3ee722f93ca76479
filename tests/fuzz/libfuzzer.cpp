// SPDX-License-Identifier: MIT
//
// libFuzzer's side of the one target that is linked in.
#include "fuzz/fuzz.hpp"

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size);
extern "C" std::size_t LLVMFuzzerCustomMutator(std::uint8_t* data, std::size_t size, std::size_t most, unsigned seed);
extern "C" std::size_t LLVMFuzzerMutate(std::uint8_t* data, std::size_t size, std::size_t most);

int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  fuzz::targets().front().test(std::as_bytes(std::span(data, size)));
  return 0;
}

std::size_t LLVMFuzzerCustomMutator(std::uint8_t* data, std::size_t size, std::size_t most, unsigned seed) {
  const fuzz::Target& target = fuzz::targets().front();
  fuzz::Rng rng(seed);
  // One in four knows nothing of the format, so that nothing is out of reach.
  if (target.mutate == nullptr || fuzz::below(rng, 4) == 0) return LLVMFuzzerMutate(data, size, most);
  const auto bytes = std::as_bytes(std::span(data, size));
  fuzz::Bytes input(bytes.begin(), bytes.end());
  target.mutate(input, most, rng);
  size = std::min(input.size(), most);
  std::ranges::copy(std::span(input).first(size), std::as_writable_bytes(std::span(data, size)).begin());
  return size;
}

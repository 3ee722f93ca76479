// SPDX-License-Identifier: MIT
//
//   fuzz                                      names the targets
//   fuzz TARGET [--mutations N] FILE|FOLDER...   gives each file to the target, and N mutations of each
//
// Needs no libFuzzer: it replays corpora and findings with any compiler, and tries the mutators.
#include <filesystem>
#include <fstream>
#include <iterator>
#include <string>

#include "fuzz/fuzz.hpp"

namespace {

using namespace fuzz;
namespace fs = std::filesystem;

Rng random_bytes(1);

Bytes read(const fs::path& path) {
  std::ifstream file(path, std::ios::binary);
  require(file.is_open(), path.c_str());
  const std::string text{std::istreambuf_iterator<char>(file), {}};
  const auto bytes = std::as_bytes(std::span(text));
  return {bytes.begin(), bytes.end()};
}

std::vector<fs::path> files(std::span<char*> arguments) {
  std::vector<fs::path> found;
  for (const char* argument : arguments) {
    if (!fs::is_directory(argument)) {
      found.emplace_back(argument);
      continue;
    }
    for (const auto& entry : fs::directory_iterator(argument)) found.push_back(entry.path());
  }
  std::ranges::sort(found);
  return found;
}

/// For debugging: the input that ended the program is in this file.
void keep(const Bytes& input) {
  std::ofstream file("fuzz-last-input", std::ios::binary);
  file.write(reinterpret_cast<const char*>(input.data()), static_cast<std::streamsize>(input.size()));
}

}  // namespace

extern "C" std::size_t LLVMFuzzerMutate(std::uint8_t* data, std::size_t size, std::size_t most);

/// What libFuzzer offers to mutators, in a few words.
std::size_t LLVMFuzzerMutate(std::uint8_t* data, std::size_t size, std::size_t most) {
  switch (size == 0 ? 0 : below(random_bytes, 3)) {
    case 0:
      if (size < most) data[size++] = static_cast<std::uint8_t>(random_bytes());
      return size;
    case 1: return 1 + below(random_bytes, size);
    default: data[below(random_bytes, size)] = static_cast<std::uint8_t>(random_bytes()); return size;
  }
}

int main(int argc, char** argv) {
  std::span<char*> arguments(argv + 1, static_cast<std::size_t>(argc - 1));
  if (arguments.empty()) {
    for (const Target& target : targets()) std::printf("%s\n", target.name.data());
    return 0;
  }
  const auto target = std::ranges::find(targets(), std::string_view(arguments[0]), &Target::name);
  if (target == targets().end()) {
    std::fprintf(stderr, "fuzz: no target %s\n", arguments[0]);
    return 2;
  }
  arguments = arguments.subspan(1);
  std::size_t mutations = 0;
  if (arguments.size() >= 2 && std::string_view(arguments[0]) == "--mutations") {
    mutations = std::strtoul(arguments[1], nullptr, 10);
    arguments = arguments.subspan(2);
  }
  const bool debug = std::getenv("FUZZ_KEEP") != nullptr;
  std::size_t inputs = 0;
  for (const fs::path& path : files(arguments)) {
    const Bytes seed = read(path);
    Bytes input = seed;
    Rng rng(static_cast<unsigned>(1 + inputs));
    for (std::size_t i = 0; i <= mutations; ++i) {
      if (debug) keep(input);
      target->test(input);
      ++inputs;
      if (i % 4 == 3) input = seed;  // else mutations of mutations, which soon are refused at their first byte
      const std::size_t most = seed.size() + 4096;
      if (target->mutate != nullptr) {
        target->mutate(input, most, rng);
      } else {
        const std::size_t size = input.size();
        input.resize(most);
        input.resize(LLVMFuzzerMutate(reinterpret_cast<std::uint8_t*>(input.data()), size, most));
      }
    }
  }
  if (inputs == 0) {
    std::fprintf(stderr, "fuzz: nothing to replay\n");
    return 1;
  }
  std::printf("%s: %zu inputs\n", target->name.data(), inputs);
  return 0;
}

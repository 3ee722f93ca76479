// SPDX-License-Identifier: MIT
//
// make_image: writes a file of one of the benchmarks' patterns, for programs that are measured from the outside.
#include <fcntl.h>
#include <sys/mman.h>
#include <unistd.h>

#include <CLI/CLI.hpp>
#include <cstdio>

#include "corpus.hpp"

int main(int argc, char** argv) {
  std::string path;
  std::string pattern = "mixed";
  std::uint64_t size = 0;
  std::uint64_t seed = 1;
  CLI::App app("Writes a file filled with a pattern, zero pages as holes.", "make_image");
  app.add_option("file", path, "The file to write")->required();
  app.add_option("--pattern", pattern, "What to fill it with")
      ->check(CLI::IsMember(std::vector<std::string>(corpus::patterns.begin(), corpus::patterns.end())))
      ->capture_default_str();
  app.add_option("--size", size, "Bytes, as 512M")->transform(CLI::AsSizeValue(false))->required();
  app.add_option("--seed", seed, "The same seed makes the same bytes")->capture_default_str();
  CLI11_PARSE(app, argc, argv);
  if (size == 0 || size % corpus::page_bytes != 0) {
    std::fprintf(stderr, "make_image: --size has to be a multiple of %zu\n", corpus::page_bytes);
    return 2;
  }
  const int fd = ::open(path.c_str(), O_RDWR | O_CREAT | O_TRUNC | O_CLOEXEC, 0644);
  void* memory = MAP_FAILED;
  if (fd >= 0 && ::ftruncate(fd, static_cast<off_t>(size)) == 0)
    memory = ::mmap(nullptr, size, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
  if (memory == MAP_FAILED) {
    std::perror(path.c_str());
    return 1;
  }
  try {
    corpus::fill({static_cast<std::byte*>(memory), size}, pattern, seed);
  } catch (const std::exception& error) {
    std::fprintf(stderr, "make_image: %s\n", error.what());
    return 1;
  }
  return ::msync(memory, size, MS_ASYNC) == 0 ? 0 : 1;
}

// SPDX-License-Identifier: MIT
//
// What tests/interop/capture.py recorded: the streams of real QEMUs, and what their guests' memory was at the end.
// Throws when a capture is not what its manifest says.
#pragma once

#include <zstd.h>

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <filesystem>
#include <fstream>
#include <iterator>
#include <map>
#include <span>
#include <sstream>
#include <stdexcept>
#include <string>
#include <vector>

#include "multifd/memory/page_digest.hpp"

namespace golden {

struct CapturedBlock {
  std::uint64_t bytes = 0;
  std::uint64_t digest = 0;
};

/// One migration of a running guest.
struct Capture {
  std::string name;
  std::map<std::string, std::string> how;  ///< the manifest's lines of one value: qemu, machine, compression...
  std::vector<std::byte> main;
  std::vector<std::vector<std::byte>> channels;  ///< by id
  std::map<std::string, CapturedBlock> blocks;   ///< all that the source had, after it stopped

  bool from_qemu_7_2() const { return how.at("qemu").starts_with("7.2"); }
  bool machine_is(const char* version) const { return how.at("machine").ends_with(std::string("-") + version); }
  /// SWITCHOVER_START: machine types from 10.0 on.
  bool announces_switchover() const { return machine_is("10.0") || machine_is("11.1"); }
  bool has_return_path() const { return how.at("return-path") == "on"; }
};

namespace detail {

inline std::vector<std::byte> read_zst(const std::filesystem::path& path, std::size_t bytes, std::uint64_t digest) {
  std::ifstream file(path, std::ios::binary);
  const std::string packed{std::istreambuf_iterator<char>(file), {}};
  std::vector<std::byte> plain(bytes);
  if (ZSTD_decompress(plain.data(), bytes, packed.data(), packed.size()) != bytes ||
      multifd::digest_of(plain) != digest)
    throw std::runtime_error(path.string() + " is not what its manifest says");
  return plain;
}

inline Capture read_capture(const std::filesystem::path& folder) {
  Capture capture;
  std::ifstream manifest(folder / "manifest.txt");
  for (std::string line; std::getline(manifest, line);) {
    std::istringstream words(line);
    std::string key, name;
    std::uint64_t bytes = 0, digest = 0;
    words >> key;
    if (key != "stream" && key != "block") {
      std::getline(words >> std::ws, capture.how[key]);
      continue;
    }
    if (!(words >> name >> bytes >> std::hex >> digest)) throw std::runtime_error(folder.string() + ": " + line);
    if (key == "block") {
      capture.blocks[name] = {bytes, digest};
    } else {
      auto& stream = name == "main" ? capture.main : capture.channels.emplace_back();
      stream = read_zst(folder / (name + ".zst"), bytes, digest);
    }
  }
  capture.name = capture.how.at("capture");
  if (capture.name != folder.filename() || std::to_string(capture.channels.size()) != capture.how.at("channels"))
    throw std::runtime_error(folder.string() + ": wrong manifest");
  return capture;
}

}  // namespace detail

/// All captures, in the order of their names.
inline const std::vector<Capture>& captures() {
  static const std::vector<Capture> all = [] {
    std::vector<std::filesystem::path> folders;
    for (const auto& entry :
         std::filesystem::directory_iterator(std::filesystem::path(__FILE__).parent_path() / "captures"))
      if (entry.is_directory()) folders.push_back(entry.path());
    std::ranges::sort(folders);
    std::vector<Capture> read;
    for (const auto& folder : folders) read.push_back(detail::read_capture(folder));
    return read;
  }();
  return all;
}

}  // namespace golden

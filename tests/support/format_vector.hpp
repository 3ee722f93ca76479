// SPDX-License-Identifier: MIT
//
// The test vectors of include/multifd/format/*.md, as bytes: format/README.md says how they are written.
#pragma once

#include <cstddef>
#include <filesystem>
#include <fstream>
#include <iterator>
#include <stdexcept>
#include <string>
#include <string_view>
#include <vector>

#include "golden/hex_dump.hpp"

namespace test {

/// One vector.
inline std::vector<std::byte> format_vector(const char* file, const std::string& name) {
  const auto root = std::filesystem::path(__FILE__).parent_path().parent_path().parent_path();
  std::ifstream in(root / "include/multifd/format" / file);
  const std::string text(std::istreambuf_iterator<char>(in), {});
  const std::size_t begin = text.find("```vector " + name + "\n");
  if (begin == text.npos) throw std::runtime_error("no vector " + name + " in format/" + file);
  const std::string_view block = std::string_view(text).substr(begin, text.find("```\n", begin + 3) - begin);
  const std::size_t size = block.find("\nsize ");
  if (size == block.npos) throw std::runtime_error("no size in vector " + name);
  return from_hex(std::stoul(std::string(block.substr(size + 6, 10))), block);
}

}  // namespace test

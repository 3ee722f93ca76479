// SPDX-License-Identifier: MIT
#include "common/uuid.hpp"

#include <fmt/format.h>
#include <sys/random.h>

#include <cerrno>
#include <cstring>

#include "common/program.hpp"

namespace program {

std::string to_string(const multifd::Uuid& uuid) {
  std::string text;
  for (std::size_t i = 0; i < uuid.size(); ++i) {
    if (i == 4 || i == 6 || i == 8 || i == 10) text += '-';
    text += fmt::format("{:02x}", std::to_integer<unsigned>(uuid[i]));
  }
  return text;
}

std::optional<multifd::Uuid> parse_uuid(std::string text) {
  std::erase(text, '-');
  if (text.size() != 32 || text.find_first_not_of("0123456789abcdefABCDEF") != text.npos) return std::nullopt;
  multifd::Uuid uuid;
  for (std::size_t i = 0; i < uuid.size(); ++i)
    uuid[i] = static_cast<std::byte>(std::stoul(text.substr(2 * i, 2), nullptr, 16));
  return uuid;
}

multifd::Uuid new_uuid() {
  multifd::Uuid uuid;
  if (::getrandom(uuid.data(), uuid.size(), 0) != static_cast<ssize_t>(uuid.size()))
    throw Failure(fmt::format("getrandom: {}", std::strerror(errno)));
  return uuid;
}

}  // namespace program

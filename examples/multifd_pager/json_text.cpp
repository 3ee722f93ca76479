// SPDX-License-Identifier: MIT
#include "multifd_pager/json_text.hpp"

#include <fmt/format.h>

#include <mutex>
#include <nlohmann/json.hpp>

#include "common/program.hpp"
#include "multifd_pager/handshake.hpp"

namespace pager {
namespace {

using nlohmann::json;
using program::Failure;

/// Finds where a value ends.
class Brackets {
 public:
  /// Whether this was its last character. Throws Failure.
  bool take(char c, char open) {
    if (in_string_) {
      if (escaped_)
        escaped_ = false;
      else if (c == '\\')
        escaped_ = true;
      else if (c == '"')
        in_string_ = false;
      return false;
    }
    if (depth_ == 0) {
      if (c == ' ' || c == '\t' || c == '\r' || c == '\n') return false;
      if (c != open) throw Failure(fmt::format("handshake: JSON that does not begin with {}", open));
    }
    if (c == '"') in_string_ = true;
    if ((c == '[' || c == '{') && ++depth_ > most_) throw Failure("handshake: JSON that is nested too deeply");
    return (c == ']' || c == '}') && --depth_ == 0;
  }

 private:
  static constexpr unsigned most_ = 4;  // an object, its list of regions, a region, and one for later versions
  unsigned depth_ = 0;
  bool in_string_ = false;
  bool escaped_ = false;
};

}  // namespace

json read_json(Incoming& in, char open) {
  std::string text;
  Brackets brackets;
  for (std::size_t seen = 0;;) {
    if (text.size() == max_handshake_bytes)
      throw Failure(fmt::format("handshake: JSON of more than {} bytes", max_handshake_bytes));
    in.read(text, std::min<std::size_t>(max_handshake_bytes - text.size(), 16 * 1024));
    bool whole = false;
    while (!whole && seen < text.size()) whole = brackets.take(text[seen++], open);
    if (!whole) continue;
    text.resize(seen);
    break;
  }
  static std::mutex one;
  const std::lock_guard lock(one);
  json value = json::parse(text, nullptr, false);
  if (value.is_discarded()) throw Failure("handshake: not JSON");
  return value;
}

std::optional<std::uint64_t> number_if_there(const json& object, const char* key, const std::string& where) {
  const auto found = object.find(key);
  if (found == object.end()) return std::nullopt;
  if (!found->is_number_unsigned()) throw Failure(fmt::format("handshake: {}: {} is no whole number", where, key));
  return found->get<std::uint64_t>();
}

std::uint64_t number_of(const json& object, const char* key, const std::string& where) {
  const auto number = number_if_there(object, key, where);
  if (!number) throw Failure(fmt::format("handshake: {}: {} is missing", where, key));
  return *number;
}

std::string text_of(const json& object, const char* key, const std::string& where) {
  const auto found = object.find(key);
  if (found == object.end()) return {};
  if (!found->is_string()) throw Failure(fmt::format("handshake: {}: {} is no text", where, key));
  auto text = found->get<std::string>();
  if (text.empty() || text.size() > 255)
    throw Failure(fmt::format("handshake: {}: {} has {} bytes", where, key, text.size()));
  return text;
}

}  // namespace pager

// SPDX-License-Identifier: MIT
//
// JSON from a stream, where nothing but the text itself says where it ends; and its fields, each of the right type.
#pragma once

#include <cstdint>
#include <nlohmann/json_fwd.hpp>
#include <optional>
#include <string>

#include "multifd_pager/incoming.hpp"

namespace pager {

/// Reads one value. Params `open`: '[' or '{', which it begins with. Throws Failure: too long, too deep, no JSON.
/// Cost: a few times max_handshake_bytes while it is parsed, which one connection does at a time.
nlohmann::json read_json(Incoming& in, char open);

/// A whole number that is not negative. Throws Failure, about `where`, also where the key is missing.
std::uint64_t number_of(const nlohmann::json& object, const char* key, const std::string& where);
/// The same; nothing where the key is missing.
std::optional<std::uint64_t> number_if_there(const nlohmann::json& object, const char* key, const std::string& where);
/// A text; "" where the key is missing.
std::string text_of(const nlohmann::json& object, const char* key, const std::string& where);

}  // namespace pager

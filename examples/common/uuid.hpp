// SPDX-License-Identifier: MIT
//
// Uuids as text, and new ones.
#pragma once

#include <multifd/multifd.hpp>

#include <optional>
#include <string>

namespace program {

/// "00112233-4455-6677-8899-aabbccddeeff".
std::string to_string(const multifd::Uuid& uuid);
/// The other way round; dashes are not needed. None: not 32 hexadecimal digits.
std::optional<multifd::Uuid> parse_uuid(std::string text);
/// Random. Throws Failure.
multifd::Uuid new_uuid();

}  // namespace program

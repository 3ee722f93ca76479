// SPDX-License-Identifier: MIT
//
// The VM description at the end of a migration stream (format/main_stream.md section 9.10).
#pragma once

#include <cstddef>
#include <optional>
#include <span>
#include <string>

namespace program {

/// A description is no longer than this.
inline constexpr std::size_t most_description_bytes = 16 * 1024 * 1024;
/// End mark, element, length.
inline constexpr std::size_t description_header_bytes = 6;

/// Where the text begins in the bytes of a stream's end; none: no description stands there.
std::optional<std::size_t> find_description(std::span<const std::byte> end);

/// The text behind the end mark of devices' state in a file, `fd`; empty: there is none. Throws Failure about `path`.
std::string description_of(int fd, const std::string& path);

}  // namespace program

// SPDX-License-Identifier: MIT
//
// How a side that gives up makes sure that its reason arrives.
#pragma once

#include <array>
#include <chrono>
#include <cstddef>
#include <functional>
#include <optional>
#include <span>
#include <string>
#include <string_view>

#include "multifd/buffers.hpp"
#include "multifd/error_value.hpp"
#include "multifd/qemu/return_path_writer.hpp"
#include "multifd/result.hpp"
#include "multifd/time_limit.hpp"

namespace multifd::migrate::detail {

/// For a last word, either way.
inline constexpr std::chrono::milliseconds farewell{500};

/// Calls `say` with what the other side is told of `error`: the text of `reason`, a hook that may be empty; by default
/// describe()'s. It is told something without memory for a text, too.
template <class Say>
void say_reason(const Error& error, const std::function<std::string(const Error&)>& reason, Say say) {
  std::optional<std::string> text;
  ignore_bad_alloc([&] { text = reason ? reason(error) : describe(error); });
  say(text ? std::string_view(*text) : std::string_view("it has run out of memory"));
}

template <class Link>
bool is_secured(const Link& link) noexcept {
  if constexpr (requires { link.secured(); })
    return link.secured();
  else
    return false;
}

/// Reads and drops what comes until the peer ends, for `limit` at most: a connection that is closed with bytes unread
/// is reset, and what was written last is lost with it. Errors: timed_out; those of the connection.
template <class Link>
[[nodiscard]] Result<void> drain(Link& link, std::chrono::milliseconds limit) noexcept {
  std::array<std::byte, 4096> room;
  const auto deadline = deadline_after(limit);
  for (;;) {
    const auto left = std::chrono::ceil<std::chrono::milliseconds>(deadline - std::chrono::steady_clock::now());
    if (left.count() <= 0) return fail(Errc::timed_out, Stage::close, "the other side's end");
    const iovec buffer = mutable_buffer(std::span(room));
    MULTIFD_TRY_ASSIGN(const std::size_t got, link.read_some(std::span(&buffer, 1), left, nullptr));
    if (got == 0) return {};
  }
}

/// Says FAILED and SHUT(1) to an own source, and waits a moment for its end. The source then shows this side's reason.
/// Params `reason`: as say_reason()'s.
template <class Link>
void say_failed(Link& main, const Error& error, const std::function<std::string(const Error&)>& reason) {
  qemu::ReturnPathWriter<Link> writer(main);
  writer.set_limits(farewell, nullptr);
  say_reason(error, reason, [&](std::string_view text) {
    if (!writer.failed(error, text) || !writer.shut(1) || !main.finish()) return;
    static_cast<void>(drain(main, farewell));
  });
}

}  // namespace multifd::migrate::detail

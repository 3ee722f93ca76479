// SPDX-License-Identifier: MIT
//
// Result<T> is std::expected<T, Error>; the functions below write the failure arm on one line.
// GCC 12 has no monadic members: test and dereference, or MULTIFD_TRY below.
#pragma once

#include <cerrno>
#include <cstdint>
#include <expected>
#include <new>
#include <utility>

#include "multifd/error_value.hpp"

namespace multifd {

template <class T>
using Result = std::expected<T, Error>;

/// Makes the failure arm of a Result from one of our codes. `op` must be static text.
[[nodiscard, gnu::cold, gnu::noinline]] inline std::unexpected<Error> fail(  //
    Errc code, Stage stage, const char* op = "", std::uint64_t detail = 0, std::uint64_t expected = 0,
    const Subject& subject = {}) noexcept {
  return std::unexpected(
      Error{.code = code, .stage = stage, .op = op, .detail = detail, .expected = expected, .subject = subject});
}

/// Makes the failure arm of a Result from an errno (by default the current one).
[[nodiscard, gnu::cold, gnu::noinline]] inline std::unexpected<Error> fail_errno(Stage stage, const char* op,
                                                                                 int value = errno) noexcept {
  return std::unexpected(Error{.code = std::error_code(value, std::system_category()), .stage = stage, .op = op});
}

/// Calls `make`, which returns a Result. A std::bad_alloc that a container throws inside becomes ENOMEM. In a build
/// without exceptions running out of memory ends the program.
template <class Make>
[[nodiscard]] auto catch_bad_alloc(Stage stage, const char* op, Make&& make) -> decltype(make()) {
#if defined(__cpp_exceptions)
  try {
    return make();
  } catch (const std::bad_alloc&) {
    return fail_errno(stage, op, ENOMEM);
  }
#else
  static_cast<void>(stage), static_cast<void>(op);
  return make();
#endif
}

/// Calls `what`, one of several things that an end consists of: the others have to be done as well when memory is short.
template <class What>
void ignore_bad_alloc(What&& what) {
  static_cast<void>(catch_bad_alloc(Stage::none, "", [&]() -> Result<void> {
    what();
    return {};
  }));
}

}  // namespace multifd

// For functions that return a Result themselves, on compilers without the monadic members. Each hands an error on at once:
//
//   MULTIFD_TRY(expression)                 expression is a Result; its value, if any, is dropped
//   MULTIFD_TRY_ASSIGN(auto x, expression)  declares or assigns x from the value
//
// They are statements: not for an `if` without braces.
#define MULTIFD_TRY(...)                                                   \
  do {                                                                     \
    if (auto multifd_result = (__VA_ARGS__); !multifd_result) [[unlikely]] \
      return ::std::unexpected(multifd_result.error());                    \
  } while (false)
#define MULTIFD_TRY_ASSIGN(target, ...) \
  MULTIFD_TRY_ASSIGN_AS(MULTIFD_TRY_NAME(multifd_result_, __COUNTER__), target, __VA_ARGS__)
#define MULTIFD_TRY_ASSIGN_AS(name, target, ...) \
  auto name = (__VA_ARGS__);                     \
  if (!name) [[unlikely]]                        \
    return ::std::unexpected(name.error());      \
  target = *::std::move(name)
#define MULTIFD_TRY_NAME(a, b) MULTIFD_TRY_JOIN(a, b)
#define MULTIFD_TRY_JOIN(a, b) a##b

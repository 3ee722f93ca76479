// SPDX-License-Identifier: MIT
//
// FAILED (format/extension.md section 19.5): why one side gives up, as the other side can show it. The last message in
// its direction.
//
//   off  size  field     refused
//     2     1  kind      0, above 3. 1: `code` is an Errc; 2: an errno; 3: neither
//     3     1  zero      nothing
//     4     4  code      nothing
//     8     4  last      nothing; the sender's last_errc: if it differs, `code` of kind 1 means nothing
//    12     8  detail    nothing
//    20     8  expected  nothing
//    28     n  text      over 400 bytes; what is not printable is shown as '?'
#pragma once

#include <algorithm>
#include <array>
#include <cstddef>
#include <cstdint>
#include <span>
#include <string_view>
#include <system_error>

#include "multifd/format/extension.hpp"
#include "multifd/result.hpp"

namespace multifd::wire {

inline constexpr std::size_t max_failure_text_bytes = 400;

/// What a side gives as its reason. Threads: as a plain value.
class PeerFailure {
 public:
  std::error_code reason{};    ///< Errc, errno, or none where it means nothing here
  std::uint64_t detail = 0;    ///< Error::detail
  std::uint64_t expected = 0;  ///< Error::expected

  /// Takes a text; a longer one is cut, and what is not printable ASCII becomes '?'.
  void set_text(std::string_view text) noexcept {
    length_ = std::min(text.size(), max_failure_text_bytes);
    std::transform(text.begin(), text.begin() + static_cast<std::ptrdiff_t>(length_), text_.begin(),
                   [](char c) { return c >= ' ' && c <= '~' ? c : '?'; });
  }
  std::string_view text() const noexcept { return {text_.data(), length_}; }

  /// The same as an error of this side: Errc::peer_gave_up with the reason, whose subject has the text's beginning.
  Error error() const noexcept {
    return {.code = Errc::peer_gave_up,
            .detail = detail,
            .expected = expected,
            .subject = beside_the_reason(),
            .peer_reason = reason};
  }

 private:
  /// The text without what the reason says already: a Subject is short, and what matters is which setting, and both values.
  Subject beside_the_reason() const noexcept {
    std::string_view front = text(), back;
    if (reason.category() == category()) {
      const std::string_view known = multifd::detail::errc_info(reason.value()).text;
      if (const std::size_t at = front.find(known); at != front.npos) {
        back = front.substr(at + known.size());
        front = front.substr(0, at);
        if (back.starts_with(' ')) back.remove_prefix(1);
      }
    }
    constexpr std::string_view in_setup = "hello: ";
    if (front.starts_with(in_setup)) front.remove_prefix(in_setup.size());
    return Subject(front).append(back);
  }

  std::array<char, max_failure_text_bytes> text_;
  std::size_t length_ = 0;
};

using FailedBytes = FieldWriter<28 + max_failure_text_bytes>;

/// Encodes FAILED. Params `text`: what the other side shows, such as describe(error); any bytes, of any length.
inline FailedBytes encode_failed(const Error& error, std::string_view text) noexcept {
  const bool ours = error.code.category() == category();
  const bool of_the_system = error.code.category() == std::system_category();
  PeerFailure shown;
  shown.set_text(text);
  FailedBytes bytes;
  bytes.be(static_cast<std::uint16_t>(ExtensionKind::failed));
  bytes.be(static_cast<std::uint8_t>(!error.code ? 3 : ours ? 1 : of_the_system ? 2 : 3)).be(std::uint8_t{0});
  bytes.be(static_cast<std::uint32_t>(error.code.value())).be(static_cast<std::uint32_t>(last_errc));
  return bytes.be(error.detail).be(error.expected).text(shown.text());
}

/// Parses a FAILED that parse_extension() has returned. Errors: Errc::bad_extension_message (detail: the kind).
[[nodiscard]] inline Result<PeerFailure> parse_failed(const ExtensionMessage& message) noexcept {
  FieldReader in(message.body);
  const auto kind = in.be<std::uint8_t>();
  in.be<std::uint8_t>();
  const auto code = static_cast<int>(in.be<std::uint32_t>());
  const auto last = in.be<std::uint32_t>();
  PeerFailure failure;
  failure.detail = in.be<std::uint64_t>();
  failure.expected = in.be<std::uint64_t>();
  if (!in.good() || kind < 1 || kind > 3)
    return fail(Errc::bad_extension_message, Stage::parse, "kind of a reason", kind, 0, "FAILED");
  failure.set_text(in.text(in.left()));
  const bool known = last == static_cast<std::uint32_t>(last_errc) && code >= 1 && code <= last_errc;
  if (kind == 1 && known) failure.reason = static_cast<Errc>(code);
  if (kind == 2) failure.reason = {code, std::system_category()};
  return failure;
}

}  // namespace multifd::wire

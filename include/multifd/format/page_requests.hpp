// SPDX-License-Identifier: MIT
//
// Memory on demand between two ends of this library (format/page_requests.md section 21): what a client and a page server
// say to each other on a connection. The answers to requests are packets (packet.hpp).
//
//   server's greeting              client's hello
//   off  size  field               off  size  field
//     0     4  magic "mfPS"          0     4  magic "mfPC"
//     4     4  version = 1           4     4  version = 1
//     8    16  session               8    16  session
//    24     4  page size            24     4  page size; 0: the server's
//    28     4  compression bits     28     4  compression bits
//                                   32     1  kind: 0 urgent, 1 background
//                                   33     3  0
#pragma once

#include <algorithm>
#include <array>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <optional>
#include <span>
#include <string_view>

#include "multifd/config.hpp"
#include "multifd/format/byte_order.hpp"
#include "multifd/format/constants.hpp"
#include "multifd/format/fields.hpp"
#include "multifd/format/main_stream.hpp"
#include "multifd/format/packet.hpp"
#include "multifd/format/peer_failure.hpp"
#include "multifd/limits.hpp"
#include "multifd/options.hpp"
#include "multifd/result.hpp"

namespace multifd::wire {

inline constexpr std::uint32_t page_server_magic = 0x6d665053;    // "mfPS"
inline constexpr std::uint32_t page_client_magic = 0x6d665043;    // "mfPC"
inline constexpr std::uint32_t page_accepted_magic = 0x6d665041;  // "mfPA"
inline constexpr std::uint32_t page_failed_magic = 0x6d665046;    // "mfPF"
inline constexpr std::uint32_t page_whole_magic = 0x6d665057;     // "mfPW"
inline constexpr std::uint32_t page_requests_version = 1;

inline constexpr std::size_t page_greeting_bytes = 32;
inline constexpr std::size_t page_hello_bytes = 36;

// ---- Section 21.2: how a connection begins

/// What both sides say first, each without waiting for the other.
struct PageHello {
  Uuid session{};
  std::uint32_t page_bytes = 0;  ///< of a client 0: the server's
  std::uint32_t method = flag_none;
  std::uint8_t kind = 0;  ///< a client's: 0 urgent, 1 background
};

/// Encodes a client's hello.
inline std::array<std::byte, page_hello_bytes> encode_page_hello(const PageHello& hello) noexcept {
  std::array<std::byte, page_hello_bytes> bytes{};
  store_be<std::uint32_t>(&bytes[0], page_client_magic);
  store_be<std::uint32_t>(&bytes[4], page_requests_version);
  std::ranges::copy(hello.session, &bytes[8]);
  store_be<std::uint32_t>(&bytes[24], hello.page_bytes);
  store_be<std::uint32_t>(&bytes[28], hello.method);
  bytes[32] = std::byte{hello.kind};
  return bytes;
}

/// Encodes a server's greeting.
inline std::array<std::byte, page_greeting_bytes> encode_page_greeting(const PageHello& hello) noexcept {
  std::array<std::byte, page_greeting_bytes> bytes;
  const auto longer = encode_page_hello(hello);
  std::ranges::copy(std::span(longer).first<page_greeting_bytes>(), bytes.begin());
  store_be<std::uint32_t>(&bytes[0], page_server_magic);
  return bytes;
}

namespace detail {

[[nodiscard]] inline Result<PageHello> parse_page_hello(std::span<const std::byte> bytes,
                                                        std::uint32_t magic) noexcept {
  FieldReader in(bytes);
  if (const auto got = in.be<std::uint32_t>(); got != magic)
    return fail(Errc::bad_magic, Stage::hello, "page connection", got, magic);
  if (const auto got = in.be<std::uint32_t>(); got != page_requests_version)
    return fail(Errc::extension_version_mismatch, Stage::hello, "page connection", got, page_requests_version);
  PageHello hello;
  std::ranges::copy(in.take(hello.session.size()), hello.session.begin());
  hello.page_bytes = in.be<std::uint32_t>();
  hello.method = in.be<std::uint32_t>();
  return hello;
}

}  // namespace detail

/// Parses a client's hello. Errors (stage hello): Errc::bad_magic, extension_version_mismatch, bad_page_request (a kind
/// over 1). compare() has the rest. Threads: any.
[[nodiscard]] inline Result<PageHello> parse_page_hello(std::span<const std::byte, page_hello_bytes> bytes) noexcept {
  auto hello = detail::parse_page_hello(bytes, page_client_magic);
  if (!hello) return hello;
  hello->kind = std::to_integer<std::uint8_t>(bytes[32]);
  if (hello->kind > 1) return fail(Errc::bad_page_request, Stage::hello, "kind of connection", hello->kind, 1);
  return hello;
}

/// Parses a server's greeting. Errors (stage hello): Errc::bad_magic, extension_version_mismatch, page_size_mismatch (no
/// page size at all). Threads: any.
[[nodiscard]] inline Result<PageHello> parse_page_greeting(
    std::span<const std::byte, page_greeting_bytes> bytes) noexcept {
  auto greeting = detail::parse_page_hello(bytes, page_server_magic);
  if (greeting && !valid_page_bytes(greeting->page_bytes))
    return fail(Errc::page_size_mismatch, Stage::hello, "page server", greeting->page_bytes);
  return greeting;
}

/// Compares what the peer says with this side's. Errors (stage hello; the peer's, this side's): Errc::wrong_session,
/// page_size_mismatch (0 on either side fits all), wrong_compression.
[[nodiscard]] inline Result<void> compare(const PageHello& peer, const PageHello& own) noexcept {
  if (peer.session != own.session) return fail(Errc::wrong_session, Stage::hello, "page connection");
  if (peer.page_bytes != own.page_bytes && peer.page_bytes != 0 && own.page_bytes != 0)
    return fail(Errc::page_size_mismatch, Stage::hello, "page connection", peer.page_bytes, own.page_bytes);
  if (peer.method != own.method)
    return fail(Errc::wrong_compression, Stage::hello, "page connection", peer.method, own.method);
  return {};
}

// ---- Section 21.3: the server's block list

inline constexpr std::size_t page_accepted_bytes = 12;  ///< magic, be32 blocks, be32 bytes of the list
inline constexpr std::size_t max_page_blocks = 1024;
inline constexpr std::size_t least_page_block_bytes = 8 + 1 + 1;
inline constexpr std::size_t max_page_block_bytes = 8 + 1 + max_idstr_length;

/// Encodes an entry of the list. Params `idstr`: 1 to 255 bytes (contract).
inline FieldWriter<max_page_block_bytes> encode_page_block(std::string_view idstr, std::uint64_t bytes) noexcept {
  FieldWriter<max_page_block_bytes> entry;
  entry.be(bytes).be(static_cast<std::uint8_t>(idstr.size())).text(idstr);
  return entry;
}

/// What stands ahead of the list.
struct PageBlockList {
  std::uint32_t blocks = 0;
  std::uint32_t bytes = 0;
};

inline std::array<std::byte, page_accepted_bytes> encode_page_accepted(const PageBlockList& list) noexcept {
  std::array<std::byte, page_accepted_bytes> bytes;
  store_be<std::uint32_t>(&bytes[0], page_accepted_magic);
  store_be<std::uint32_t>(&bytes[4], list.blocks);
  store_be<std::uint32_t>(&bytes[8], list.bytes);
  return bytes;
}

/// Parses what stands ahead of the list. Errors (stage hello): Errc::bad_magic, stream_limit_exceeded (over
/// max_page_blocks), bad_block_list (a number of bytes that so many blocks cannot have).
[[nodiscard]] inline Result<PageBlockList> parse_page_accepted(
    std::span<const std::byte, page_accepted_bytes> bytes) noexcept {
  FieldReader in(bytes);
  if (const auto got = in.be<std::uint32_t>(); got != page_accepted_magic)
    return fail(Errc::bad_magic, Stage::hello, "page server's answer", got, page_accepted_magic);
  PageBlockList list;
  list.blocks = in.be<std::uint32_t>();
  list.bytes = in.be<std::uint32_t>();
  if (list.blocks > max_page_blocks)
    return fail(Errc::stream_limit_exceeded, Stage::hello, "page server's blocks", list.blocks, max_page_blocks);
  if (list.blocks == 0 || list.bytes < list.blocks * least_page_block_bytes ||
      list.bytes > list.blocks * max_page_block_bytes)
    return fail(Errc::bad_block_list, Stage::hello, "page server's blocks", list.bytes);
  return list;
}

/// Takes the list apart, and calls `take(idstr, bytes)`, which returns a Result<void>, for each block.
///
/// Errors (stage hello): Errc::bad_block_list (an entry without a name or a whole one, or bytes left over), bad_used_length
///   (no whole number of pages, or none; detail: bytes); those of `take`, which has to find a name that comes twice.
template <class Take>
[[nodiscard]] Result<void> parse_page_blocks(std::span<const std::byte> bytes, std::uint32_t blocks,
                                             std::size_t page_bytes, Take&& take) {
  FieldReader in(bytes);
  for (std::uint32_t i = 0; i < blocks; ++i) {
    const auto size = in.be<std::uint64_t>();
    const std::string_view idstr = in.text(in.be<std::uint8_t>());
    if (!in.good() || idstr.empty() || idstr.contains('\0'))
      return fail(Errc::bad_block_list, Stage::hello, "page server's block", i);
    if (size == 0 || size % page_bytes != 0)
      return fail(Errc::bad_used_length, Stage::hello, "page server's block", size, page_bytes, idstr);
    MULTIFD_TRY(take(idstr, size));
  }
  if (in.left() != 0) return fail(Errc::bad_block_list, Stage::hello, "behind the page server's blocks", in.left());
  return {};
}

// ---- Section 21.4: why the server gives up

inline constexpr std::size_t page_failed_header_bytes = 6;  ///< magic, be16 bytes of what follows
inline constexpr std::size_t least_page_failed_bytes = 28;
inline constexpr std::size_t max_page_failed_bytes = least_page_failed_bytes + max_failure_text_bytes;

using PageFailedBytes = FieldWriter<page_failed_header_bytes + max_page_failed_bytes>;

inline PageFailedBytes encode_page_failed(const Error& error, std::string_view text) noexcept {
  const FailedBytes failed = encode_failed(error, text);
  PageFailedBytes bytes;
  return bytes.be(page_failed_magic).be(static_cast<std::uint16_t>(failed.view().size())).bytes(failed.view());
}

/// The bytes behind a page_failed_header. Params `header`: page_failed_header_bytes, with the magic (contract).
/// Errors: Errc::bad_extension_message (detail: a number that is too small or too large).
[[nodiscard]] inline Result<std::size_t> parse_page_failed_size(const std::byte* header) noexcept {
  const auto size = load_be<std::uint16_t>(header + 4);
  if (size < least_page_failed_bytes || size > max_page_failed_bytes)
    return fail(Errc::bad_extension_message, Stage::parse, "page server's reason", size, max_page_failed_bytes);
  return size;
}

/// Parses those bytes. Errors: Errc::bad_extension_message, unexpected_extension_message (no FAILED).
[[nodiscard]] inline Result<PeerFailure> parse_page_failed(std::span<const std::byte> bytes) noexcept {
  MULTIFD_TRY_ASSIGN(const auto message, parse_extension(bytes, Towards::source));
  if (message.kind != ExtensionKind::failed)
    return fail(Errc::unexpected_extension_message, Stage::parse, "page server's reason",
                static_cast<std::uint64_t>(message.kind));
  return parse_failed(message);
}

// ---- Section 21.5: requests

enum class PageRequestKind : std::uint8_t {
  pages,    ///< REQ_PAGES_ID, REQ_PAGES
  whole,    ///< SHUT(0): the guest has every page
  gave_up,  ///< SHUT of another value
};

struct PageRequest {
  PageRequestKind kind{};
  std::string_view idstr{};  ///< empty: the block of the request before
  std::uint64_t start = 0;
  std::uint32_t bytes = 0;
};

inline constexpr std::size_t max_page_request_bytes = qemu::return_header_bytes + 13 + max_idstr_length;

/// Encodes what a client says. Params `request.idstr`: at most 255 bytes (contract).
inline FieldWriter<max_page_request_bytes> encode_page_request(const PageRequest& request) noexcept {
  FieldWriter<max_page_request_bytes> to;
  if (request.kind != PageRequestKind::pages) {
    to.be(qemu::return_shut).be(std::uint16_t{4}).be(std::uint32_t{request.kind == PageRequestKind::gave_up});
    return to;
  }
  const bool named = !request.idstr.empty();
  to.be(named ? qemu::return_req_pages_id : qemu::return_req_pages);
  to.be(static_cast<std::uint16_t>(named ? 13 + request.idstr.size() : 12)).be(request.start).be(request.bytes);
  if (named) to.be(static_cast<std::uint8_t>(request.idstr.size())).text(request.idstr);
  return to;
}

/// Checks a request for pages against the block. Errors (stage parse): Errc::bad_page_request (detail: what is wrong with
/// it, expected: what it is compared with).
[[nodiscard]] inline Result<void> check_page_request(const PageRequest& request, std::uint64_t block_bytes,
                                                     std::size_t page_bytes, std::string_view idstr) noexcept {
  const auto bad = [&](const char* what, std::uint64_t value, std::uint64_t limit) {
    return fail(Errc::bad_page_request, Stage::parse, what, value, limit, idstr);
  };
  if (request.start % page_bytes != 0) return bad("page request's start", request.start, page_bytes);
  if (request.bytes == 0 || request.bytes % page_bytes != 0)
    return bad("page request's length", request.bytes, page_bytes);
  if (request.bytes > batch_bytes) return bad("page request's length", request.bytes, batch_bytes);
  if (request.bytes > block_bytes || request.start > block_bytes - request.bytes)
    return bad("page request's start", request.start, block_bytes);
  return {};
}

/// An incremental parser of what a client says behind its hello, used as qemu::ReturnPathParser is. Allocates nothing.
///
/// Threads: one at a time.
class PageRequestParser {
 public:
  /// The buffer for the connection's next bytes. Not empty after next() said "more"; empty after an error.
  std::span<std::byte> room() noexcept {
    if (error_) return {};
    std::memmove(buffer_.data(), buffer_.data() + begin_, end_ - begin_);
    end_ -= begin_;
    begin_ = 0;
    return std::span(buffer_).subspan(end_);
  }

  /// Says how many bytes have arrived in room(). Contract: not more than it had.
  void commit(std::size_t bytes) noexcept {
    MULTIFD_ASSERT(bytes <= buffer_.size() - end_);
    end_ += bytes;
  }

  /// Takes the next whole message; none if bytes are missing for it. Its idstr is valid until the next call of room().
  ///
  /// Errors (stage parse, sticky, detail: the refused value): Errc::unknown_return_message (also behind SHUT),
  ///   bad_return_length, bad_block_name (an empty name). Cost: no allocation. Wire: format/page_requests.md section 21.5.
  [[nodiscard]] Result<std::optional<PageRequest>> next() noexcept {
    if (error_) return std::unexpected(*error_);
    auto taken = take();
    if (!taken) error_ = taken.error();
    return taken;
  }

  /// Whether a message has begun that is not whole. Called after next() has returned none.
  bool inside() const noexcept { return end_ > begin_; }

 private:
  [[nodiscard]] Result<std::optional<PageRequest>> take() noexcept {
    constexpr std::size_t header = qemu::return_header_bytes;
    if (end_ - begin_ < header) return std::nullopt;
    const auto type = load_be<std::uint16_t>(&buffer_[begin_]);
    const auto length = load_be<std::uint16_t>(&buffer_[begin_ + 2]);
    const bool named = type == qemu::return_req_pages_id;
    if (shut_ || (!named && type != qemu::return_req_pages && type != qemu::return_shut))
      return fail(Errc::unknown_return_message, Stage::parse, "page request", type);
    const std::size_t least = named ? 13 : type == qemu::return_req_pages ? 12 : 4;
    const std::size_t most = named ? least + max_idstr_length : least;
    if (length < least || length > most)
      return fail(Errc::bad_return_length, Stage::parse, "page request", length, least);
    if (end_ - begin_ < header + length) return std::nullopt;
    FieldReader in({&buffer_[begin_ + header], length});
    begin_ += header + length;
    PageRequest request;
    if (type == qemu::return_shut) {
      shut_ = true;
      request.kind = in.be<std::uint32_t>() == 0 ? PageRequestKind::whole : PageRequestKind::gave_up;
      return request;
    }
    request.start = in.be<std::uint64_t>();
    request.bytes = in.be<std::uint32_t>();
    if (!named) return request;
    if (const auto size = in.be<std::uint8_t>(); size != in.left())
      return fail(Errc::bad_return_length, Stage::parse, "page request's name", size, in.left());
    request.idstr = in.text(in.left());
    if (request.idstr.empty()) return fail(Errc::bad_block_name, Stage::parse, "page request", 0);
    return request;
  }

  std::array<std::byte, 4096> buffer_;
  std::size_t begin_ = 0;
  std::size_t end_ = 0;
  bool shut_ = false;
  std::optional<Error> error_;
};

// ---- Section 21.6: answers

/// Checks that a packet has the pages that were asked for, all of them and in order.
///
/// Params `header`, `bytes`: of the packet, from parse_header(); `idstr`, `start`, `asked_bytes`: what was asked for.
/// Errors (stage parse): Errc::unasked_pages (detail: the offset or the number, expected: what was asked for).
/// Cost: one walk over the offsets.
[[nodiscard]] inline Result<void> check_page_answer(const PacketHeader& header, const std::byte* bytes,
                                                    std::string_view idstr, std::uint64_t start,
                                                    std::uint64_t asked_bytes, std::size_t page_bytes) noexcept {
  const auto unasked = [&](const char* what, std::uint64_t got, std::uint64_t asked) {
    return fail(Errc::unasked_pages, Stage::parse, what, got, asked, idstr);
  };
  const std::uint64_t pages = asked_bytes / page_bytes;
  if (header.is_sync()) return unasked("flags of an answer", header.flags, 0);
  if (header.normal_pages + header.zero_pages != pages)
    return unasked("pages of an answer", header.normal_pages + header.zero_pages, pages);
  if (header.idstr != idstr) return fail(Errc::unasked_pages, Stage::parse, "block of an answer", 0, 0, header.idstr);
  // Both lists ascend, so that every page of the range is next in one of them.
  std::size_t normal = 0;
  std::size_t zero = header.normal_pages;
  for (std::uint64_t page = 0; page < pages; ++page) {
    const std::uint64_t wanted = start + page * page_bytes;
    if (normal < header.normal_pages && load_offset(bytes, normal) == wanted)
      ++normal;
    else if (zero < pages && load_offset(bytes, zero) == wanted)
      ++zero;
    else
      return unasked("page of an answer", load_offset(bytes, normal < header.normal_pages ? normal : zero), wanted);
  }
  return {};
}

}  // namespace multifd::wire

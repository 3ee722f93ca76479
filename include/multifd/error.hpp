// SPDX-License-Identifier: MIT
//
// What can go wrong: `Errc` is specific (tests and logs name it), `Condition` is coarse (programs branch on it),
// `Stage` is where in the work. One occurrence is an Error (error_value.hpp).
#pragma once

#include <cerrno>
#include <cstdint>
#include <iterator>
#include <string>
#include <system_error>

// The library's own error codes: one row a code, with its name, its condition and its text; where Error::detail and
// Error::expected hold something better than "value" and "expected", the names of these two follow. A code's number is
// its place in the list, so a new row changes the numbers of the rows behind it (format/answer.hpp: last_errc).

// A peer broke the wire format (format/packets.md sections 2, 3 and 4, format/hardening.md section 16).
#define MULTIFD_ERRC_FORMAT(ROW)                                                                                       \
  ROW(bad_magic, peer_protocol, "wrong magic number: not a multifd channel")                                           \
  ROW(bad_version, peer_protocol, "unknown multifd version")                                                           \
  ROW(uuid_mismatch, peer_protocol, "the channel belongs to another VM (uuid differs)")                                \
  ROW(channel_id_out_of_range, peer_protocol,                                                                          \
      "channel id is not below the channel count: do both sides use the same number of channels?", "id",               \
      "channels here")                                                                                                 \
  ROW(duplicate_channel_id, peer_protocol, "two channels have the same id")                                            \
  ROW(channel_count_mismatch, peer_protocol, "the two sides use different numbers of channels: set the same on both",  \
      "the peer's", "this side's")                                                                                     \
  ROW(too_many_channels, peer_protocol,                                                                                \
      "the source opened more channels than expected: set the same number on both sides")                              \
  ROW(too_many_pages, peer_protocol, "packet announces more pages than it can hold")                                   \
  ROW(wrong_compression, peer_protocol,                                                                                \
      "the peer compresses with another method than this side expects: set the same compression on both", "flag bits") \
  ROW(block_list_mismatch, peer_protocol,                                                                              \
      "the two sides have different RAM blocks: register the same names and sizes on both", "the peer's",              \
      "this side's")                                                                                                   \
  ROW(bad_block_name, peer_protocol, "RAM block name is empty or not terminated")                                      \
  ROW(unknown_block, peer_protocol, "RAM block is not known here")                                                     \
  ROW(offset_misaligned, peer_protocol, "page offset is not a multiple of the page size", "offset", "page size")       \
  ROW(offset_past_block, peer_protocol, "page offset lies past the end of its RAM block", "offset", "of")              \
  ROW(duplicate_page, peer_protocol, "the same page twice in one packet", "offset", "of")                              \
  ROW(bad_payload_size, peer_protocol, "payload size does not fit the packet's pages")                                 \
  ROW(payload_too_large, peer_protocol, "payload is larger than its bound")                                            \
  ROW(corrupt_payload, peer_protocol, "compressed payload is corrupt")                                                 \
  ROW(truncated_hello, peer_protocol, "connection ended inside the initial packet")                                    \
  ROW(truncated_header, peer_protocol, "connection ended inside a packet header")                                      \
  ROW(truncated_payload, peer_protocol, "connection ended inside a packet's payload")                                  \
  ROW(device_state_refused, peer_protocol, "device-state packet, which this side does not take")                       \
  ROW(bad_device_state, peer_protocol, "device-state packet with a broken header")                                     \
  ROW(data_before_sync, peer_protocol, "data packet before the first SYNC")                                            \
  ROW(data_after_end, peer_protocol, "data packet behind the last epoch")                                              \
  ROW(unsynced_end, peer_protocol, "channel ended although a SYNC is owed")                                            \
  ROW(sync_mismatch, peer_protocol, "channels sent different numbers of SYNCs")                                        \
  ROW(digest_mismatch, peer_protocol, "page data differs from the digest it was sent with")

// A peer broke QEMU's main stream or its return path (format/main_stream.md section 9), or uses what no multifd
// stream carries (format/roles.md section 11 step 13).
#define MULTIFD_ERRC_STREAM(ROW)                                                                                      \
  ROW(bad_stream_magic, peer_protocol,                                                                                \
      "not QEMU's migration stream (no QEVM in front): is the source a QEMU, and does TLS agree?")                    \
  ROW(bad_stream_version, peer_protocol, "migration stream is not of version 3")                                      \
  ROW(truncated_stream, peer_protocol, "main stream ended in the middle: the source has the reason")                  \
  ROW(stream_limit_exceeded, peer_protocol, "length or count in the main stream is over this side's limit",           \
      "announced", "limit")                                                                                           \
  ROW(bad_configuration, peer_protocol, "configuration section is malformed")                                         \
  ROW(unknown_capability, peer_protocol,                                                                              \
      "source has a capability on that changes the stream in an unknown way: turn it off there")                      \
  ROW(mapped_ram_refused, peer_protocol,                                                                              \
      "source has mapped-ram on, which is for files only: turn that capability off")                                  \
  ROW(page_size_mismatch, peer_protocol, "guest's page size differs between the two sides: set the source's",         \
      "page size of the peer", "of this side")                                                                        \
  ROW(unknown_element, peer_protocol, "main stream element of an unknown type: is multifd on at the source?")         \
  ROW(unexpected_element, peer_protocol, "main stream element in a place where it has no meaning")                    \
  ROW(unknown_command, peer_protocol, "unknown command in the main stream")                                           \
  ROW(bad_command_length, peer_protocol, "command of the main stream has a wrong length")                             \
  ROW(postcopy_refused, peer_protocol,                                                                                \
      "postcopy, which cannot pass here: do not start it, or turn postcopy-ram off at the source")                    \
  ROW(colo_refused, peer_protocol, "COLO, which cannot pass here: turn x-colo off at the source")                     \
  ROW(unknown_section, peer_protocol,                                                                                 \
      "device that sends its state in rounds like RAM, in a format unknown here: unplug it, or turn its migration "   \
      "capability off")                                                                                               \
  ROW(early_device_refused, peer_protocol,                                                                            \
      "device that sends its state ahead of RAM (virtio-mem does), in a format unknown here: unplug it")              \
  ROW(unexpected_section, peer_protocol, "section of the main stream out of order: RAM starts once, and ends once")   \
  ROW(wrong_section_id, peer_protocol, "section id is not that of RAM")                                               \
  ROW(bad_ram_version, peer_protocol, "RAM section is not of version 4")                                              \
  ROW(bad_footer, peer_protocol, "section has no footer, or the footer of another section")                           \
  ROW(bad_block_list, peer_protocol, "RAM block list contradicts itself")                                             \
  ROW(repeated_block_name, peer_protocol, "RAM block list has a name twice")                                          \
  ROW(bad_used_length, peer_protocol,                                                                                 \
      "RAM block's length is zero, not a whole number of pages, or more than is left of the total")                   \
  ROW(obsolete_ram_record, peer_protocol,                                                                             \
      "RAM record that multifd excludes: turn xbzrle, compress and RDMA off at the source")                           \
  ROW(bad_xbzrle, peer_protocol, "XBZRLE record is malformed: its changes do not fit into a page")                    \
  ROW(unknown_ram_record, peer_protocol, "unknown RAM record: is the page size right, and multifd on at the source?") \
  ROW(record_without_block, peer_protocol, "RAM record for the block of the record before it, but there is none")     \
  ROW(bad_zero_fill, peer_protocol, "zero page that is to be filled with something else")                             \
  ROW(unknown_return_message, peer_protocol, "message on the return path that is unknown, or comes after the last")   \
  ROW(bad_return_length, peer_protocol, "message on the return path has a wrong length")

// A peer of our own broke the extension of the main stream, or does not fit this side (format/extension.md section 19).
#define MULTIFD_ERRC_EXTENSION(ROW)                                                                             \
  ROW(bad_extension_message, peer_protocol, "message of multifd's own extension is malformed")                  \
  ROW(unexpected_extension_message, peer_protocol, "message of multifd's own extension out of order")           \
  ROW(extension_version_mismatch, peer_protocol,                                                                \
      "the two versions of multifd do not understand each other: update the older one", "version of the peer",  \
      "of this side")                                                                                           \
  ROW(unknown_feature, peer_protocol,                                                                           \
      "the peer needs a feature that this side does not have: update this side, or turn the feature off there") \
  ROW(missing_feature, peer_protocol,                                                                           \
      "the peer does not have a feature that this side needs: update the peer, or turn the feature off here")   \
  ROW(unknown_setting, peer_protocol,                                                                           \
      "the peer has a setting that this side does not know and must not ignore: update this side", "number")    \
  ROW(setting_mismatch, peer_protocol, "the two sides are set differently: set the same on both")

// A peer failed to prove itself, or broke TLS (format/tls.md section 14).
#define MULTIFD_ERRC_TLS(ROW)                                                                                          \
  ROW(tls_not_spoken, peer_protocol, "the peer does not speak TLS: switch TLS on there, too, or off here")             \
  ROW(tls_no_common_ground, peer_protocol,                                                                             \
      "the two sides share no way to do TLS: use certificates on both, or pre-shared keys on both")                    \
  ROW(tls_no_certificate, peer_protocol, "the peer has no certificate: give it client-cert.pem and client-key.pem")    \
  ROW(tls_untrusted_certificate, peer_protocol,                                                                        \
      "the peer's certificate is not from this side's authority: give both sides the same ca-cert.pem, and "           \
      "certificates signed by it")                                                                                     \
  ROW(tls_expired_certificate, peer_protocol,                                                                          \
      "the peer's certificate has expired, or is not valid yet: renew it, and check both clocks")                      \
  ROW(tls_revoked_certificate, peer_protocol,                                                                          \
      "the peer's certificate is on this side's ca-crl.pem: give it a new one")                                        \
  ROW(tls_wrong_purpose, peer_protocol,                                                                                \
      "the peer's certificate is for another purpose: a server needs one for servers, a client one for clients")       \
  ROW(tls_wrong_hostname, peer_protocol,                                                                               \
      "the server's certificate is for another name: connect to a name that it has, or say which to expect")           \
  ROW(tls_wrong_key, peer_protocol, "the two sides' pre-shared keys differ: give both the same user and the same key") \
  ROW(tls_refused, peer_protocol,                                                                                      \
      "the peer refused this side over TLS: its own message says why (certificate, authority, key)")

// A peer went away, a time limit passed, or the caller cancelled.
#define MULTIFD_ERRC_ENDS(ROW)                                                                                         \
  ROW(peer_closed, peer_gone, "the peer closed the connection")                                                        \
  ROW(peer_gave_up, peer_gone, "the other side gave up")                                                               \
  ROW(unconfirmed, peer_gone, "the receiver ended, and has not confirmed that all arrived")                            \
  ROW(tls_truncated, peer_gone,                                                                                        \
      "the TLS stream was cut without a close_notify: the peer failed, or somebody on the way cut it")                 \
  ROW(timed_out, timed_out, "time limit passed")                                                                       \
  ROW(did_not_converge, timed_out,                                                                                     \
      "the migration does not converge: the guest dirties its memory faster than it can be sent; allow more downtime " \
      "or "                                                                                                            \
      "time, or throttle it")                                                                                          \
  ROW(cancelled, cancelled, "cancelled")

// The caller asked for something impossible.
#define MULTIFD_ERRC_MISUSE(ROW)                                                                                     \
  ROW(bad_page_size, misuse, "page size is not a power of two from 1024 to 65536")                                   \
  ROW(bad_block_size, misuse, "RAM block is empty or not a whole number of pages", "bytes", "page size")             \
  ROW(bad_block_idstr, misuse, "RAM block idstr must have 1 to 255 bytes and no NUL")                                \
  ROW(duplicate_block, misuse, "a RAM block of that idstr is already registered")                                    \
  ROW(bad_channel_count, misuse, "channel count must be from 1 to 255")                                              \
  ROW(bad_range, misuse, "page range is not inside its RAM block, or not page aligned", "at", "of")                  \
  ROW(bad_address, misuse, "address must be tcp:HOST:PORT or unix:PATH")                                             \
  ROW(bad_option, misuse, "option is out of its range")                                                              \
  ROW(read_only_block, misuse, "RAM block was registered read-only")                                                 \
  ROW(block_without_memory, misuse, "RAM block has no memory here")                                                  \
  ROW(peer_lacks_zero_lists, misuse,                                                                                 \
      "this peer drops zero pages listed in packets (QEMU before 9.0): use legacy or none")                          \
  ROW(peer_lacks_device_state, misuse, "this peer does not know device-state packets (PeerProfile)")                 \
  ROW(peer_lacks_confirmation, misuse,                                                                               \
      "this peer or transport gives no confirmation: use close_channels(), and learn the end from your main stream") \
  ROW(unknown_policy, misuse, "no policy of that name is offered")                                                   \
  ROW(not_supported, misuse, "not supported by this stack")                                                          \
  ROW(already_closed, misuse, "already closed")

// A file of guest memory is not what it should be (format/mapped_ram.md section 12, format/seekable_zstd.md section 20).
#define MULTIFD_ERRC_IMAGE(ROW)                                                                                       \
  ROW(truncated_image, bad_file, "file ends in the middle of what it should hold: it was cut, or never finished",     \
      "at", "size")                                                                                                   \
  ROW(not_mapped_ram, bad_file, "migration stream without the capability mapped-ram: not an image of guest memory")   \
  ROW(bad_mapped_ram, bad_file, "mapped-ram header of an unknown version, or with fields that contradict each other") \
  ROW(bad_image_layout, bad_file,                                                                                     \
      "mapped-ram header whose bitmap or pages lie outside the file, overlap, or are not page aligned", "at", "of")   \
  ROW(not_seekable, bad_file,                                                                                         \
      "not in zstd's seekable format: no seek table at the end; the file was cut, or another program made it")        \
  ROW(bad_seek_table, bad_file, "seek table of a compressed image that contradicts itself or the file")               \
  ROW(corrupt_frame, bad_file, "compressed frame of an image is corrupt", "frame at", "expected")                     \
  ROW(frame_mismatch, bad_file, "compressed frame holds other bytes than the seek table's checksum says", "frame at", \
      "expected")                                                                                                     \
  ROW(needs_base, bad_file, "image that holds only what differs from another one: name that base, too")               \
  ROW(wrong_base, bad_file, "this is not the image that the incremental one was made against")                        \
  ROW(unclear_addresses, bad_file,                                                                                    \
      "where the guest sees its memory is unclear: say which blocks its RAM is, and how much of it is below 4 GiB",   \
      "RAM here", "the guest was told")

// Memory on demand: a guest that runs before its memory is there (format/page_requests.md section 21). And what came later:
// a code's number never changes.
#define MULTIFD_ERRC_POSTCOPY(ROW)                                                                                    \
  ROW(not_userfaultfd, misuse, "descriptor is no userfaultfd")                                                        \
  ROW(bad_region, misuse,                                                                                             \
      "region of guest memory that is not page aligned, overlaps another, or is outside its block", "at", "of")       \
  ROW(bad_handshake, peer_protocol, "a VMM's handshake for its guest's memory is malformed, or has no descriptor",    \
      "at")                                                                                                           \
  ROW(bad_page_request, peer_protocol, "request for pages that are outside the block, not aligned, none or too many", \
      "at", "of")                                                                                                     \
  ROW(unasked_pages, peer_protocol, "answer with other pages than were asked for", "offset", "asked for")             \
  ROW(wrong_session, peer_protocol, "page connection of another migration, or of a guest that is gone")               \
  ROW(bad_prefetch_list, bad_file, "list of pages to prefetch is malformed, or is another guest's", "line")           \
  ROW(memory_lost, peer_gone, "the rest of the guest's memory cannot be had any more, and the guest cannot go on")    \
  ROW(guest_gone, peer_gone, "the process whose memory is served has ended")                                          \
  ROW(session_lost, peer_gone,                                                                                        \
      "the destination has lost this migration: its process has ended, or is another one; start it again")

#define MULTIFD_ERRCS(ROW)    \
  MULTIFD_ERRC_FORMAT(ROW)    \
  MULTIFD_ERRC_STREAM(ROW)    \
  MULTIFD_ERRC_EXTENSION(ROW) \
  MULTIFD_ERRC_TLS(ROW)       \
  MULTIFD_ERRC_ENDS(ROW) MULTIFD_ERRC_MISUSE(ROW) MULTIFD_ERRC_IMAGE(ROW) MULTIFD_ERRC_POSTCOPY(ROW)

namespace multifd {

/// Few conditions for programs to branch on: `if (error.code == Condition::peer_gone)`.
enum class Condition {
  peer_protocol = 1,  ///< The peer sent bytes that the format or our limits forbid.
  peer_gone,          ///< The peer closed or reset the connection, or cannot be reached.
  timed_out,          ///< A time limit passed.
  cancelled,          ///< cancel() was called.
  misuse,             ///< The caller's arguments or order of calls.
  local_io,           ///< The operating system refused something on this side.
  bad_file,           ///< A file holds bytes that its format forbids, or is not whole.
};

namespace detail {
#define MULTIFD_NAME(name, ...) name,
enum class ErrcRow { MULTIFD_ERRCS(MULTIFD_NAME) };
#undef MULTIFD_NAME
}  // namespace detail

/// The library's own error codes: the rows of MULTIFD_ERRCS, counted from 1, because the value 0 says "no error" in a
/// std::error_code. Operating system errors keep their errno in std::system_category().
enum class Errc {
#define MULTIFD_VALUE(name, ...) name = static_cast<int>(detail::ErrcRow::name) + 1,
  MULTIFD_ERRCS(MULTIFD_VALUE)
#undef MULTIFD_VALUE
};

/// Where in the work an error happened.
enum class Stage : std::uint8_t {
  none,
  setup,       ///< open(): options, memory, threads
  connect,     ///< resolving and connecting
  accept,      ///< listening and accepting
  handshake,   ///< TLS, before the first byte
  hello,       ///< a channel's initial packet
  produce,     ///< the producer's queue_*() calls
  zero_check,  ///< looking for zero pages
  encode,      ///< compressing
  write,       ///< writing to the transport
  read,        ///< reading from the transport
  parse,       ///< checking a packet header
  decode,      ///< decompressing into guest memory
  sync,        ///< the barrier between epochs
  close,       ///< orderly end
};

constexpr const char* to_string(Stage stage) noexcept {
  constexpr const char* names[] = {"none",  "setup",   "connect",    "accept", "handshake",
                                   "hello", "produce", "zero check", "encode", "write",
                                   "read",  "parse",   "decode",     "sync",   "close"};
  return names[static_cast<std::size_t>(stage)];
}

namespace detail {

/// What the table says about one Errc.
struct ErrcInfo {
  Condition condition;
  const char* text;
  const char* detail = "value";       ///< what Error::detail is
  const char* expected = "expected";  ///< what Error::expected is
};

#define MULTIFD_INFO(name, condition, ...) ErrcInfo{Condition::condition, __VA_ARGS__},
inline constexpr ErrcInfo errc_table[] = {MULTIFD_ERRCS(MULTIFD_INFO)};
#undef MULTIFD_INFO
inline constexpr ErrcInfo unknown_errc{Condition::local_io, "unknown multifd error"};

constexpr const ErrcInfo& errc_info(int value) noexcept {
  return value >= 1 && value <= static_cast<int>(std::size(errc_table)) ? errc_table[value - 1] : unknown_errc;
}

constexpr Condition errno_condition(int value) noexcept {
  switch (value) {
    case EPIPE:
    case ECONNRESET:
    case ECONNABORTED:
    case ENOTCONN:  // what shutdown() says of a connection that the peer has reset
    case ECONNREFUSED:
    case EHOSTUNREACH:
    case ENETUNREACH: return Condition::peer_gone;
    case ETIMEDOUT: return Condition::timed_out;
    case ECANCELED: return Condition::cancelled;
    default: return Condition::local_io;
  }
}

class ErrcCategory final : public std::error_category {
 public:
  const char* name() const noexcept override { return "multifd"; }
  std::string message(int value) const override { return errc_info(value).text; }
};

}  // namespace detail

/// Codes travel as numbers (format/answer.hpp), which mean the same only where the list is the same.
inline constexpr int last_errc = static_cast<int>(std::size(detail::errc_table));

/// The category of Errc codes.
inline const std::error_category& category() noexcept {
  static const detail::ErrcCategory instance;
  return instance;
}

inline const std::error_category& condition_category() noexcept;

/// The coarse condition of a failure's code, ours or the operating system's; `code` is not zero.
inline Condition condition_of(const std::error_code& code) noexcept {
  if (code.category() == category()) return detail::errc_info(code.value()).condition;
  if (code.category() == std::system_category() || code.category() == std::generic_category())
    return detail::errno_condition(code.value());
  // Other libraries' categories (GnuTLS') know their conditions themselves.
  const std::error_condition own = code.default_error_condition();
  return own.category() == condition_category() ? static_cast<Condition>(own.value()) : Condition::local_io;
}

namespace detail {

class ConditionCategory final : public std::error_category {
 public:
  const char* name() const noexcept override { return "multifd condition"; }
  std::string message(int value) const override {
    switch (static_cast<Condition>(value)) {
      case Condition::peer_protocol: return "the peer broke the protocol";
      case Condition::peer_gone: return "the peer is gone";
      case Condition::timed_out: return "a time limit passed";
      case Condition::cancelled: return "cancelled";
      case Condition::misuse: return "wrong use";
      case Condition::local_io: return "local failure";
      case Condition::bad_file: return "the file is damaged, or of another format";
    }
    return "unknown";
  }
  bool equivalent(const std::error_code& code, int value) const noexcept override {
    return code && condition_of(code) == static_cast<Condition>(value);
  }
};

}  // namespace detail

/// The category of Condition.
inline const std::error_category& condition_category() noexcept {
  static const detail::ConditionCategory instance;
  return instance;
}

inline std::error_code make_error_code(Errc code) noexcept { return {static_cast<int>(code), category()}; }
inline std::error_condition make_error_condition(Condition condition) noexcept {
  return {static_cast<int>(condition), condition_category()};
}

}  // namespace multifd

template <>
struct std::is_error_code_enum<multifd::Errc> : std::true_type {};
template <>
struct std::is_error_condition_enum<multifd::Condition> : std::true_type {};

#undef MULTIFD_ERRCS
#undef MULTIFD_ERRC_FORMAT
#undef MULTIFD_ERRC_STREAM
#undef MULTIFD_ERRC_EXTENSION
#undef MULTIFD_ERRC_TLS
#undef MULTIFD_ERRC_ENDS
#undef MULTIFD_ERRC_MISUSE
#undef MULTIFD_ERRC_IMAGE
#undef MULTIFD_ERRC_POSTCOPY

// SPDX-License-Identifier: MIT
//
// What can go wrong: `Errc` is specific (tests and logs name it), `Condition` is coarse (programs branch on it), `Stage`
// is where in the work. One occurrence is an Error (error_value.hpp).
#pragma once

#include <cerrno>
#include <cstdint>
#include <string>
#include <system_error>

namespace multifd {

/// The library's own error codes. Operating system errors keep their errno in std::system_category().
enum class Errc {
  // A peer broke the wire format (format/packets.md sections 2, 3 and 4, format/hardening.md section 16).
  bad_magic = 1,
  bad_version,
  uuid_mismatch,
  channel_id_out_of_range,
  duplicate_channel_id,
  channel_count_mismatch,
  too_many_channels,
  too_many_pages,
  wrong_compression,
  block_list_mismatch,
  bad_block_name,
  unknown_block,
  offset_misaligned,
  offset_past_block,
  duplicate_page,
  bad_payload_size,
  payload_too_large,
  corrupt_payload,
  truncated_hello,
  truncated_header,
  truncated_payload,
  device_state_refused,
  bad_device_state,
  data_before_sync,
  data_after_end,
  unsynced_end,
  sync_mismatch,
  digest_mismatch,
  // A peer broke QEMU's main stream or its return path (format/main_stream.md section 9), or uses what no multifd
  // stream carries (format/roles.md section 11 step 13).
  bad_stream_magic,
  bad_stream_version,
  truncated_stream,
  stream_limit_exceeded,
  bad_configuration,
  unknown_capability,
  mapped_ram_refused,
  page_size_mismatch,
  unknown_element,
  unexpected_element,
  unknown_command,
  bad_command_length,
  postcopy_refused,
  colo_refused,
  unknown_section,
  early_device_refused,
  unexpected_section,
  wrong_section_id,
  bad_ram_version,
  bad_footer,
  bad_block_list,
  repeated_block_name,
  bad_used_length,
  obsolete_ram_record,
  unknown_ram_record,
  record_without_block,
  bad_zero_fill,
  unknown_return_message,
  bad_return_length,
  // A peer failed to prove itself, or broke TLS (format/tls.md section 14).
  tls_not_spoken,
  tls_no_common_ground,
  tls_no_certificate,
  tls_untrusted_certificate,
  tls_expired_certificate,
  tls_revoked_certificate,
  tls_wrong_purpose,
  tls_wrong_hostname,
  tls_wrong_key,
  tls_refused,
  // A peer went away.
  peer_closed,
  peer_gave_up,
  unconfirmed,
  tls_truncated,
  // Time and will.
  timed_out,
  cancelled,
  // The caller asked for something impossible.
  bad_page_size,
  bad_block_size,
  bad_block_idstr,
  duplicate_block,
  bad_channel_count,
  bad_range,
  bad_address,
  bad_option,
  read_only_block,
  block_without_memory,
  peer_lacks_zero_lists,
  peer_lacks_device_state,
  peer_lacks_confirmation,
  unknown_policy,
  not_supported,
  already_closed,  // the last: see last_errc
};

/// Codes travel as numbers (wire/answer.hpp), which mean the same only where the list is the same.
inline constexpr int last_errc = static_cast<int>(Errc::already_closed);

/// Few conditions for programs to branch on: `if (error.code == Condition::peer_gone)`.
enum class Condition {
  peer_protocol = 1,  ///< The peer sent bytes that the format or our limits forbid.
  peer_gone,          ///< The peer closed or reset the connection, or cannot be reached.
  timed_out,          ///< A time limit passed.
  cancelled,          ///< cancel() was called.
  misuse,             ///< The caller's arguments or order of calls.
  local_io,           ///< The operating system refused something on this side.
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

/// The text and the condition of each Errc, in one place.
struct ErrcInfo {
  const char* text;
  Condition condition;
  const char* detail = "value";       ///< what Error::detail is
  const char* expected = "expected";  ///< what Error::expected is
};

constexpr ErrcInfo errc_info(int value) noexcept {
  using C = Condition;
  switch (static_cast<Errc>(value)) {
    case Errc::bad_magic: return {"wrong magic number: not a multifd channel", C::peer_protocol};
    case Errc::bad_version: return {"unknown multifd version", C::peer_protocol};
    case Errc::uuid_mismatch: return {"the channel belongs to another VM (uuid differs)", C::peer_protocol};
    case Errc::channel_id_out_of_range:
      return {"channel id is not below the channel count: do both sides use the same number of channels?",
              C::peer_protocol, "id", "channels here"};
    case Errc::channel_count_mismatch:
      return {"the two sides use different numbers of channels: set the same on both", C::peer_protocol, "the peer's",
              "this side's"};
    case Errc::duplicate_channel_id: return {"two channels have the same id", C::peer_protocol};
    case Errc::too_many_channels:
      return {"the source opened more channels than expected: set the same number on both sides", C::peer_protocol};
    case Errc::block_list_mismatch:
      return {"the two sides have different RAM blocks: register the same names and sizes on both", C::peer_protocol,
              "the peer's", "this side's"};
    case Errc::too_many_pages: return {"packet announces more pages than it can hold", C::peer_protocol};
    case Errc::wrong_compression:
      return {"the peer compresses with another method than this side expects: set the same compression on both",
              C::peer_protocol, "flag bits"};
    case Errc::bad_block_name: return {"RAM block name is empty or not terminated", C::peer_protocol};
    case Errc::unknown_block: return {"RAM block is not known here", C::peer_protocol};
    case Errc::offset_misaligned:
      return {"page offset is not a multiple of the page size", C::peer_protocol, "offset", "page size"};
    case Errc::offset_past_block:
      return {"page offset lies past the end of its RAM block", C::peer_protocol, "offset", "of"};
    case Errc::duplicate_page: return {"the same page twice in one packet", C::peer_protocol, "offset", "of"};
    case Errc::bad_payload_size: return {"payload size does not fit the packet's pages", C::peer_protocol};
    case Errc::payload_too_large: return {"payload is larger than its bound", C::peer_protocol};
    case Errc::corrupt_payload: return {"compressed payload is corrupt", C::peer_protocol};
    case Errc::truncated_hello: return {"connection ended inside the initial packet", C::peer_protocol};
    case Errc::truncated_header: return {"connection ended inside a packet header", C::peer_protocol};
    case Errc::truncated_payload: return {"connection ended inside a packet's payload", C::peer_protocol};
    case Errc::device_state_refused: return {"device-state packet, which this side does not take", C::peer_protocol};
    case Errc::bad_device_state: return {"device-state packet with a broken header", C::peer_protocol};
    case Errc::data_before_sync: return {"data packet before the first SYNC", C::peer_protocol};
    case Errc::data_after_end: return {"data packet behind the last epoch", C::peer_protocol};
    case Errc::unsynced_end: return {"channel ended although a SYNC is owed", C::peer_protocol};
    case Errc::sync_mismatch: return {"channels sent different numbers of SYNCs", C::peer_protocol};
    case Errc::digest_mismatch: return {"page data differs from the digest it was sent with", C::peer_protocol};
    case Errc::bad_stream_magic:
      return {"not QEMU's migration stream (no QEVM in front): is the source a QEMU, and does TLS agree?",
              C::peer_protocol};
    case Errc::bad_stream_version: return {"migration stream is not of version 3", C::peer_protocol};
    case Errc::truncated_stream:
      return {"main stream ended in the middle: the source has the reason", C::peer_protocol};
    case Errc::stream_limit_exceeded:
      return {"length or count in the main stream is over this side's limit", C::peer_protocol, "announced", "limit"};
    case Errc::bad_configuration: return {"configuration section is malformed", C::peer_protocol};
    case Errc::unknown_capability:
      return {"source has a capability on that changes the stream in an unknown way: turn it off there",
              C::peer_protocol};
    case Errc::mapped_ram_refused:
      return {"source has mapped-ram on, which is for files only: turn that capability off", C::peer_protocol};
    case Errc::page_size_mismatch:
      return {"guest's page size differs between the two sides: set the source's", C::peer_protocol,
              "page size of the peer", "of this side"};
    case Errc::unknown_element:
      return {"main stream element of an unknown type: is multifd on at the source?", C::peer_protocol};
    case Errc::unexpected_element: return {"main stream element in a place where it has no meaning", C::peer_protocol};
    case Errc::unknown_command: return {"unknown command in the main stream", C::peer_protocol};
    case Errc::bad_command_length: return {"command of the main stream has a wrong length", C::peer_protocol};
    case Errc::postcopy_refused:
      return {"postcopy, which cannot pass here: do not start it, or turn postcopy-ram off at the source",
              C::peer_protocol};
    case Errc::colo_refused: return {"COLO, which cannot pass here: turn x-colo off at the source", C::peer_protocol};
    case Errc::unknown_section:
      return {
          "device that sends its state in rounds like RAM, in a format unknown here: unplug it, or turn its "
          "migration capability off",
          C::peer_protocol};
    case Errc::early_device_refused:
      return {"device that sends its state ahead of RAM (virtio-mem does), in a format unknown here: unplug it",
              C::peer_protocol};
    case Errc::unexpected_section:
      return {"section of the main stream out of order: RAM starts once, and ends once", C::peer_protocol};
    case Errc::wrong_section_id: return {"section id is not that of RAM", C::peer_protocol};
    case Errc::bad_ram_version: return {"RAM section is not of version 4", C::peer_protocol};
    case Errc::bad_footer: return {"section has no footer, or the footer of another section", C::peer_protocol};
    case Errc::bad_block_list: return {"RAM block list contradicts itself", C::peer_protocol};
    case Errc::repeated_block_name: return {"RAM block list has a name twice", C::peer_protocol};
    case Errc::bad_used_length:
      return {"RAM block's length is zero, not a whole number of pages, or more than is left of the total",
              C::peer_protocol};
    case Errc::obsolete_ram_record:
      return {"RAM record that multifd excludes: turn xbzrle, compress and RDMA off at the source", C::peer_protocol};
    case Errc::unknown_ram_record:
      return {"unknown RAM record: is the page size right, and multifd on at the source?", C::peer_protocol};
    case Errc::record_without_block:
      return {"RAM record for the block of the record before it, but there is none", C::peer_protocol};
    case Errc::bad_zero_fill: return {"zero page that is to be filled with something else", C::peer_protocol};
    case Errc::unknown_return_message:
      return {"message on the return path that is unknown, or comes after the last", C::peer_protocol};
    case Errc::bad_return_length: return {"message on the return path has a wrong length", C::peer_protocol};
    case Errc::tls_not_spoken:
      return {"the peer does not speak TLS: switch TLS on there, too, or off here", C::peer_protocol};
    case Errc::tls_no_common_ground:
      return {"the two sides share no way to do TLS: use certificates on both, or pre-shared keys on both",
              C::peer_protocol};
    case Errc::tls_no_certificate:
      return {"the peer has no certificate: give it client-cert.pem and client-key.pem", C::peer_protocol};
    case Errc::tls_untrusted_certificate:
      return {
          "the peer's certificate is not from this side's authority: give both sides the same ca-cert.pem, and "
          "certificates signed by it",
          C::peer_protocol};
    case Errc::tls_expired_certificate:
      return {"the peer's certificate has expired, or is not valid yet: renew it, and check both clocks",
              C::peer_protocol};
    case Errc::tls_revoked_certificate:
      return {"the peer's certificate is on this side's ca-crl.pem: give it a new one", C::peer_protocol};
    case Errc::tls_wrong_purpose:
      return {"the peer's certificate is for another purpose: a server needs one for servers, a client one for clients",
              C::peer_protocol};
    case Errc::tls_wrong_hostname:
      return {"the server's certificate is for another name: connect to a name that it has, or say which to expect",
              C::peer_protocol};
    case Errc::tls_wrong_key:
      return {"the two sides' pre-shared keys differ: give both the same user and the same key", C::peer_protocol};
    case Errc::tls_refused:
      return {"the peer refused this side over TLS: its own message says why (certificate, authority, key)",
              C::peer_protocol};
    case Errc::peer_closed: return {"the peer closed the connection", C::peer_gone};
    case Errc::peer_gave_up: return {"the receiver gave up", C::peer_gone};
    case Errc::unconfirmed: return {"the receiver ended, and has not confirmed that all arrived", C::peer_gone};
    case Errc::tls_truncated:
      return {"the TLS stream was cut without a close_notify: the peer failed, or somebody on the way cut it",
              C::peer_gone};
    case Errc::timed_out: return {"time limit passed", C::timed_out};
    case Errc::cancelled: return {"cancelled", C::cancelled};
    case Errc::bad_page_size: return {"page size is not a power of two from 1024 to 65536", C::misuse};
    case Errc::bad_block_size:
      return {"RAM block is empty or not a whole number of pages", C::misuse, "bytes", "page size"};
    case Errc::bad_block_idstr: return {"RAM block idstr must have 1 to 255 bytes and no NUL", C::misuse};
    case Errc::duplicate_block: return {"a RAM block of that idstr is already registered", C::misuse};
    case Errc::bad_channel_count: return {"channel count must be from 1 to 255", C::misuse};
    case Errc::bad_range: return {"page range is not inside its RAM block, or not page aligned", C::misuse, "at", "of"};
    case Errc::bad_address: return {"address must be tcp:HOST:PORT or unix:PATH", C::misuse};
    case Errc::bad_option: return {"option is out of its range", C::misuse};
    case Errc::read_only_block: return {"RAM block was registered read-only", C::misuse};
    case Errc::block_without_memory: return {"RAM block has no memory here", C::misuse};
    case Errc::peer_lacks_device_state:
      return {"this peer does not know device-state packets (PeerProfile)", C::misuse};
    case Errc::peer_lacks_zero_lists:
      return {"this peer drops zero pages listed in packets (QEMU before 9.0): use legacy or none", C::misuse};
    case Errc::peer_lacks_confirmation:
      return {
          "this peer or transport gives no confirmation: use close_channels(), and learn the end from your main stream",
          C::misuse};
    case Errc::unknown_policy: return {"no policy of that name is offered", C::misuse};
    case Errc::not_supported: return {"not supported by this stack", C::misuse};
    case Errc::already_closed: return {"already closed", C::misuse};
  }
  return {"unknown multifd error", C::local_io};
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

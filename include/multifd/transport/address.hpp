// SPDX-License-Identifier: MIT
//
// Where to connect or listen, in the form that every program takes: `tcp:HOST:PORT` or `unix:PATH`. Only the text:
// names are resolved in connect.hpp and listen.hpp.
#pragma once

#include <arpa/inet.h>
#include <netinet/in.h>
#include <sys/un.h>

#include <algorithm>
#include <charconv>
#include <cstdint>
#include <string>
#include <string_view>

#include "multifd/result.hpp"

namespace multifd {

enum class AddressKind : std::uint8_t { tcp, unix_socket };

/// Longest path of a UNIX socket in bytes; one more is kept for the NUL.
inline constexpr std::size_t max_unix_path = sizeof(sockaddr_un::sun_path) - 1;

/// One end of a connection.
struct Address {
  AddressKind kind = AddressKind::tcp;
  std::string host = {};   ///< tcp: name or number, IPv6 without brackets; empty: any (listen), loopback (connect)
  std::uint16_t port = 0;  ///< tcp: 0 lets the system choose (listen)
  std::string path = {};   ///< unix_socket: 1 to max_unix_path bytes

  friend bool operator==(const Address&, const Address&) = default;
};

namespace detail {

inline bool is_ipv6_number(std::string_view host) {
  const std::size_t zone = host.find('%');  // fe80::1%eth0: the zone is a name of this machine
  if (zone != host.npos && zone + 1 == host.size()) return false;
  in6_addr ignored;
  return ::inet_pton(AF_INET6, std::string(host.substr(0, zone)).c_str(), &ignored) == 1;
}

/// Whether the text has no blank, no control character (no NUL either), and no bracket, which belongs around a host.
inline bool is_host_text(std::string_view host) noexcept {
  return std::ranges::none_of(host, [](unsigned char c) { return c <= ' ' || c == 0x7f || c == '[' || c == ']'; });
}

}  // namespace detail

/// Reads `tcp:HOST:PORT` (`tcp::PORT` for any host, `tcp:[::1]:PORT` for IPv6) or `unix:PATH`.
/// Errors: `bad_address`, whose op names the part that is wrong.
[[nodiscard]] inline Result<Address> parse_address(std::string_view text) {
  const auto bad = [](const char* what) { return fail(Errc::bad_address, Stage::setup, what); };
  if (text.starts_with("unix:")) {
    const std::string_view path = text.substr(5);
    if (path.empty()) return bad("path is empty");
    if (path.size() > max_unix_path) return fail(Errc::bad_address, Stage::setup, "path is too long", path.size());
    if (path.find('\0') != path.npos) return bad("path has a NUL");
    return Address{.kind = AddressKind::unix_socket, .path = std::string(path)};
  }
  if (!text.starts_with("tcp:")) return bad("neither tcp: nor unix:");
  text.remove_prefix(4);

  std::string_view host;
  if (text.starts_with('[')) {
    const std::size_t end = text.find(']');
    if (end == text.npos) return bad("[ without ]");
    host = text.substr(1, end - 1);
    if (!detail::is_ipv6_number(host)) return bad("no IPv6 number in [ ]");
    text.remove_prefix(end + 1);
  } else {
    const std::size_t end = text.find(':');
    host = text.substr(0, end);
    text.remove_prefix(host.size());
  }
  if (host.size() > 255) return fail(Errc::bad_address, Stage::setup, "host is too long", host.size());
  if (!detail::is_host_text(host)) return bad("host has a character that no host has");
  if (!text.starts_with(':')) return bad("port is missing");
  text.remove_prefix(1);
  if (text.find(':') != text.npos) return bad("IPv6 needs [ ]");

  std::uint16_t port = 0;
  const auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), port);
  if (error != std::errc{} || end != text.data() + text.size()) return bad("port is not a number from 0 to 65535");
  return Address{.kind = AddressKind::tcp, .host = std::string(host), .port = port};
}

/// An address as the subject of an Error: the text that parse_address() reads. Allocates nothing.
inline Subject subject_of(const Address& address) noexcept {
  if (address.kind == AddressKind::unix_socket) return Subject("unix:").append(address.path);
  const bool brackets = address.host.contains(':');
  char port[8];
  const auto digits = std::to_chars(port, port + sizeof port, address.port);
  return Subject("tcp:")
      .append(brackets ? "[" : "")
      .append(address.host)
      .append(brackets ? "]:" : ":")
      .append({port, static_cast<std::size_t>(digits.ptr - port)});
}

/// Writes an address as parse_address() reads it.
inline std::string to_string(const Address& address) {
  if (address.kind == AddressKind::unix_socket) return "unix:" + address.path;
  const bool brackets = address.host.find(':') != std::string::npos;
  return "tcp:" + (brackets ? "[" + address.host + "]" : address.host) + ":" + std::to_string(address.port);
}

/// Whether an address can only be reached from this machine: UNIX, `localhost`, 127.0.0.0/8, ::1.
/// An empty host is not local: every machine can reach a listener there.
inline bool is_local(const Address& address) {
  if (address.kind == AddressKind::unix_socket || address.host == "localhost") return true;
  in_addr v4;
  if (::inet_pton(AF_INET, address.host.c_str(), &v4) == 1) return (ntohl(v4.s_addr) >> 24) == 127;
  in6_addr v6;
  if (::inet_pton(AF_INET6, address.host.c_str(), &v6) != 1) return false;
  return IN6_IS_ADDR_LOOPBACK(&v6) || (IN6_IS_ADDR_V4MAPPED(&v6) && v6.s6_addr[12] == 127);
}

}  // namespace multifd

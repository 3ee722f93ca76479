// SPDX-License-Identifier: MIT
//
// Path: one way to the destination, with the address or the network interface that it leaves this machine by, its
// channels and its cap. Only the text: connect_paths.hpp connects, Capped (capped.hpp) keeps the cap.
#pragma once

#include <net/if.h>

#include <charconv>
#include <cstdint>
#include <limits>
#include <string>
#include <string_view>
#include <system_error>
#include <utility>

#include "multifd/limits.hpp"
#include "multifd/result.hpp"
#include "multifd/transport/address.hpp"

namespace multifd {

/// One way to the destination.
struct Path {
  std::string local = {};  ///< source address as a number, IPv4 or IPv6 without brackets; empty: the system chooses
  Address remote = {};     ///< where the destination listens
  unsigned channels = 1;   ///< 1 to max_channels; of all paths together, too
  std::uint64_t bandwidth = 0;  ///< cap in bytes/s for all channels together; 0: none
  bool mptcp = false;           ///< SocketOptions::mptcp
  std::string device = {};      ///< network interface that packets leave by; empty: what the routes say

  friend bool operator==(const Path&, const Path&) = default;
};

namespace detail {

inline bool is_ipv4_number(std::string_view host) {
  in_addr ignored;
  return ::inet_pton(AF_INET, std::string(host).c_str(), &ignored) == 1;
}

/// A rate as the programs read sizes: digits, then nothing or one of K, M, G, T, P, E (of 1024), with B, i or iB behind
/// it or not, in either case. Whether it is one.
inline bool read_rate(std::string_view text, std::uint64_t& rate) noexcept {
  const auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), rate);
  if (error != std::errc{}) return false;
  text.remove_prefix(static_cast<std::size_t>(end - text.data()));
  const auto take = [&text](char lower) {
    if (text.empty() || (text[0] | 0x20) != lower) return false;
    text.remove_prefix(1);
    return true;
  };
  unsigned shift = 0;
  for (const char unit : std::string_view("kmgtpe")) {
    shift += 10;
    if (!take(unit)) continue;
    if (rate > std::numeric_limits<std::uint64_t>::max() >> shift) return false;
    rate <<= shift;
    take('i');
    break;
  }
  take('b');
  return text.empty();
}

/// Reads one of the options behind a path's addresses. Returns what is wrong, static text; null: nothing.
inline const char* read_path_option(std::string_view option, Path& path) noexcept {
  if (option == "mptcp") {
    path.mptcp = true;
  } else if (option.starts_with("channels=")) {
    option.remove_prefix(9);
    const auto [end, error] = std::from_chars(option.data(), option.data() + option.size(), path.channels);
    if (error != std::errc{} || end != option.data() + option.size() || path.channels < 1 ||
        path.channels > max_channels)
      return "channels= needs a number from 1 to 255";
  } else if (option.starts_with("cap=")) {
    if (!read_rate(option.substr(4), path.bandwidth))
      return "cap= needs bytes a second: a whole number of them, or of K, M, G or T";
  } else {
    return "unknown option of a path: there are channels=, cap= and mptcp";
  }
  return nullptr;
}

/// Reads what stands in front of the =. Returns as read_path_option().
inline const char* read_path_local(std::string_view local, Path& path) {
  if (local.starts_with("dev:")) {
    path.device = local.substr(4);
    if (path.device.empty() || path.device.size() >= IFNAMSIZ || path.device.contains('/') ||
        !is_host_text(path.device))
      return "dev: needs the name of a network interface";
    return nullptr;
  }
  const bool brackets = local.size() >= 2 && local.starts_with('[') && local.ends_with(']');
  if (brackets) local = local.substr(1, local.size() - 2);
  path.local = local;
  if (!is_host_text(local) || local.contains('\0') ||
      !(is_ipv6_number(local) || (!brackets && (local.empty() || is_ipv4_number(local)))))
    return "the local address is neither empty, an IP number, nor dev:NAME";
  return nullptr;
}

/// What of a path cannot go together, as read_path_option().
inline const char* path_contradiction(const Path& path) {
  if (path.remote.kind == AddressKind::unix_socket) {
    if (!path.local.empty() || !path.device.empty()) return "a path to a UNIX socket has nothing in front of the =";
    if (path.mptcp) return "mptcp is of TCP, not of a UNIX socket";
    return nullptr;
  }
  if (path.remote.port == 0) return "port 0 in the remote address";
  const bool from_ipv6 = is_ipv6_number(path.local);
  if ((from_ipv6 && is_ipv4_number(path.remote.host)) ||
      (!from_ipv6 && !path.local.empty() && is_ipv6_number(path.remote.host)))
    return "local and remote address are of different kinds: IPv4 and IPv6";
  return nullptr;
}

}  // namespace detail

/// Reads `LOCAL=REMOTE[,channels=N][,cap=RATE][,mptcp]`.
///
/// LOCAL: empty, the number of an address of this machine (IPv6 with or without [ ]), or `dev:NAME`. REMOTE: as
///   parse_address() reads it; a UNIX socket's path has no comma here. RATE: bytes a second, `100M` for instance, of
///   powers of 1024, as the programs read sizes; 0 is no cap.
/// Errors: `bad_address` for REMOTE, `bad_option` for all else; op says what is wrong, subject is the
///   part.
/// Example: `multifd::parse_path("192.0.2.1=tcp:192.0.2.7:4444,channels=2,cap=100M")`.
[[nodiscard]] inline Result<Path> parse_path(std::string_view text) {
  const auto bad = [](const char* what, std::string_view part) {
    return fail(Errc::bad_option, Stage::setup, what, 0, 0, Subject(part));
  };
  const std::size_t equals = text.find('=');
  if (equals == text.npos) return bad("no =: a path is LOCAL=REMOTE", text);
  Path path;
  const std::string_view local = text.substr(0, equals);
  if (const char* wrong = detail::read_path_local(local, path)) return bad(wrong, local);
  text.remove_prefix(equals + 1);
  std::size_t comma = text.find(',');
  const std::string_view remote = text.substr(0, comma);
  auto address = parse_address(remote);
  if (!address) {
    address.error().subject = Subject(remote);
    return std::unexpected(address.error());
  }
  path.remote = std::move(*address);
  while (comma != text.npos) {
    text.remove_prefix(comma + 1);
    comma = text.find(',');
    const std::string_view option = text.substr(0, comma);
    if (const char* wrong = detail::read_path_option(option, path)) return bad(wrong, option);
  }
  if (const char* wrong = detail::path_contradiction(path)) return bad(wrong, remote);
  return path;
}

/// A path as the subject of an Error: LOCAL=REMOTE, or REMOTE alone where the system chooses. Allocates nothing.
inline Subject subject_of(const Path& path) noexcept {
  Subject subject;
  if (!path.device.empty()) subject.append("dev:").append(path.device);
  subject.append(path.local);
  if (!path.device.empty() || !path.local.empty()) subject.append("=");
  return subject.append(subject_of(path.remote).view());
}

/// Writes a path as parse_path() reads it, without the options that have their default.
inline std::string to_string(const Path& path) {
  std::string text = path.device.empty() ? path.local : "dev:" + path.device;
  text += "=" + to_string(path.remote);
  if (path.channels != 1) text += ",channels=" + std::to_string(path.channels);
  if (path.bandwidth != 0) text += ",cap=" + std::to_string(path.bandwidth);
  if (path.mptcp) text += ",mptcp";
  return text;
}

}  // namespace multifd

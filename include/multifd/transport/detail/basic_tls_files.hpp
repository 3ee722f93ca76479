// SPDX-License-Identifier: MIT
//
// The files of TLS credentials, laid out as QEMU wants them (format/tls.md section 14): where they are, and which of
// them a role needs. Each library reads the certificates itself; the lines of pre-shared keys are read here.
#pragma once

#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <memory>
#include <string>
#include <string_view>

#include "multifd/result.hpp"
#include "multifd/transport/tls_options.hpp"

namespace multifd::detail {

/// Checks that a file can be read: the libraries themselves only say "error while reading file".
[[nodiscard]] inline Result<void> readable(const std::string& path, const char* name) noexcept {
  if (::access(path.c_str(), R_OK) != 0) return fail_errno(Stage::setup, name);
  return {};
}

/// The files of a directory of certificates that a role reads. Names are for errors.
struct TlsPaths {
  static constexpr const char* authority_name = "ca-cert.pem";
  static constexpr const char* revoked_name = "ca-crl.pem";
  std::string authority;
  std::string revoked;  ///< empty: there is none
  const char* certificate_name = nullptr;
  std::string certificate;  ///< empty, as `key`: a client without a certificate
  std::string key;

  /// Errors (stage `setup`, op: the file): errno.
  [[nodiscard]] static Result<TlsPaths> of(const std::string& directory, TlsRole role) {
    TlsPaths paths;
    paths.authority = directory + '/' + authority_name;
    if (auto there = readable(paths.authority, authority_name); !there) return std::unexpected(there.error());
    paths.revoked = directory + '/' + revoked_name;
    if (::access(paths.revoked.c_str(), F_OK) != 0) paths.revoked.clear();
    const bool server = role == TlsRole::server;
    paths.certificate_name = server ? "server-cert.pem" : "client-cert.pem";
    const char* const key_name = server ? "server-key.pem" : "client-key.pem";
    const std::string certificate = directory + '/' + paths.certificate_name;
    const std::string key = directory + '/' + key_name;
    if (!server && ::access(certificate.c_str(), F_OK) != 0 && ::access(key.c_str(), F_OK) != 0) return paths;
    if (auto there = readable(certificate, paths.certificate_name); !there) return std::unexpected(there.error());
    if (auto there = readable(key, key_name); !there) return std::unexpected(there.error());
    paths.certificate = certificate;
    paths.key = key;
    return paths;
  }
};

/// The whole text of a file of pre-shared keys. Errors (stage `setup`): errno.
[[nodiscard]] inline Result<std::string> read_keys(const std::string& path) {
  constexpr std::size_t most = 1 << 20;
  const std::unique_ptr<std::FILE, int (*)(std::FILE*)> file(std::fopen(path.c_str(), "re"), std::fclose);
  if (!file) return fail_errno(Stage::setup, "file of pre-shared keys");
  std::string text(most, '\0');
  text.resize(std::fread(text.data(), 1, text.size(), file.get()));
  if (std::ferror(file.get()) != 0) return fail_errno(Stage::setup, "file of pre-shared keys");
  return text;
}

/// The key in `user`'s line, or in the first valid line when `user` is empty; empty: there is none.
inline std::string_view key_of(std::string_view text, std::string_view user) noexcept {
  while (!text.empty()) {
    std::string_view line = text.substr(0, text.find('\n'));
    text.remove_prefix(std::min(text.size(), line.size() + 1));
    if (line.ends_with('\r')) line.remove_suffix(1);
    const std::size_t colon = line.find(':');
    if (colon == line.npos || colon == 0 || line.starts_with('#')) continue;
    if (user.empty() || line.substr(0, colon) == user) return line.substr(colon + 1);
  }
  return {};
}

/// The text of a file of pre-shared keys that has what a role needs: a client its user's line, a server any.
/// Errors (stage `setup`): errno; bad_option for a file without such a line, or a client without a user.
[[nodiscard]] inline Result<std::string> read_keys_for(const std::string& file, TlsRole role, const std::string& user) {
  if (role == TlsRole::client && user.empty())
    return fail(Errc::bad_option, Stage::setup, "pre-shared keys: a client needs a user");
  Result<std::string> text = read_keys(file);
  if (text && key_of(*text, role == TlsRole::client ? user : std::string()).empty())
    return fail(Errc::bad_option, Stage::setup,
                role == TlsRole::client ? "the file of pre-shared keys has no line USER:HEXKEY for this user"
                                        : "the file of pre-shared keys has no line USER:HEXKEY");
  return text;
}

}  // namespace multifd::detail

// SPDX-License-Identifier: MIT
//
// Certificates and keys for tests, made when they are needed: nothing of the kind lies in the repository. Each kind has
// a directory of its own, laid out as TlsCredentials and QEMU read it.
#pragma once

#include <unistd.h>

#include <cstdlib>
#include <ctime>
#include <filesystem>
#include <fstream>
#include <iterator>
#include <stdexcept>
#include <string>

#include "support/tls_certificate.hpp"
#if defined(MULTIFD_HAS_TLS)
#include "support/tls_signer_gnutls.hpp"
#else
#include "support/tls_signer_openssl.hpp"
#endif

namespace test {

/// An authority that signs certificates, and the directories to put them in.
class TlsAuthority {
 public:
  explicit TlsAuthority(const std::string& name) : signer_(name) {}

  void write_ca(const std::filesystem::path& directory) const {
    std::filesystem::create_directories(directory);
    write(directory / "ca-cert.pem", signer_.own());
  }

  /// Writes PREFIX-cert.pem and PREFIX-key.pem.
  void issue(const std::filesystem::path& directory, const std::string& prefix, const Certificate& wanted) const {
    const auto [certificate, key] = signer_.issue(wanted);
    write(directory / (prefix + "-cert.pem"), certificate);
    write(directory / (prefix + "-key.pem"), key);
  }

  /// Writes ca-crl.pem, which revokes what is in `directory` by PREFIX-cert.pem, or nothing for no prefix.
  /// Params `next_update`: from now.
  void revoke(const std::filesystem::path& directory, const std::string& prefix, std::time_t next_update) const {
    std::string revoked;
    if (!prefix.empty()) {
      std::ifstream file(directory / (prefix + "-cert.pem"), std::ios::binary);
      revoked.assign(std::istreambuf_iterator<char>(file), {});
    }
    write(directory / "ca-crl.pem", signer_.revoke(revoked, next_update));
  }

  /// A whole directory: both roles, the server for `localhost` and 127.0.0.1 or another name.
  void fill(const std::filesystem::path& directory, const std::string& server_name = "localhost",
            std::time_t valid_until = 30 * day_s) const {
    const std::time_t from = valid_until < 0 ? valid_until - day_s : -day_s;
    write_ca(directory);
    issue(directory, "server",
          {.common_name = server_name,
           .dns_name = server_name,
           .loopback_address = server_name == "localhost",
           .valid_from = from,
           .valid_until = valid_until});
    issue(directory, "client",
          {.common_name = "source", .purpose = for_clients, .valid_from = from, .valid_until = valid_until});
  }

  static void write(const std::filesystem::path& path, const std::string& text) {
    std::ofstream file(path, std::ios::binary);
    file << text;
    if (!file.flush()) throw std::runtime_error("cannot write " + path.string());
  }

 private:
  TlsSigner signer_;
};

/// Below `root`: good/, other/ (another authority), expired/, name/ (the server's is for another name), swapped/ (each
/// role has the other's purpose), bare/ (the client has no certificate), keys.psk, other.psk.
inline void make_tls_files(const std::filesystem::path& root) {
  const TlsAuthority ours("our authority"), theirs("another authority");
  ours.fill(root / "good");
  theirs.fill(root / "other");
  ours.fill(root / "expired", "localhost", -day_s);
  ours.fill(root / "name", "elsewhere.example");
  ours.write_ca(root / "bare");
  ours.write_ca(root / "swapped");
  ours.issue(root / "swapped", "server", {.common_name = "localhost", .dns_name = "localhost", .purpose = for_clients});
  ours.issue(root / "swapped", "client", {.common_name = "source", .purpose = for_servers});
  TlsAuthority::write(root / "keys.psk",
                      "# for tests\nsomebody:00112233445566778899aabbccddeeff\n"
                      "qemu:0f1e2d3c4b5a69788796a5b4c3d2e1f00f1e2d3c4b5a69788796a5b4c3d2e1f0\n");
  TlsAuthority::write(root / "other.psk", "qemu:ffffffffffffffffffffffffffffffffffffffffffffffffffffffffffffffff\n");
}

/// The same in a directory of its own, made once for a test program and removed at its end.
inline const std::string& tls_files() {
  struct Folder {
    std::string path = "/tmp/multifd-tls-XXXXXX";
    Folder() {
      if (::mkdtemp(path.data()) == nullptr) throw std::runtime_error("mkdtemp");
      make_tls_files(path);
    }
    ~Folder() {
      std::error_code ignored;
      std::filesystem::remove_all(path, ignored);
    }
  };
  static const Folder folder;
  return folder.path;
}

}  // namespace test

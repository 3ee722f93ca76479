// SPDX-License-Identifier: MIT
#include "common/tls.hpp"
#include "common/tell.hpp"

#include <fmt/format.h>
#include <sys/stat.h>

#include <CLI/CLI.hpp>

namespace program {

using multifd::Result;

void Tls::add_to(CLI::App& app, TlsSide side, const std::string& prefix) {
  side_ = side;
#if defined(MULTIFD_HAS_TLS)
  const std::string start = "--" + prefix + "tls-";
  const std::string who = side == TlsSide::client ? "client" : "server";
  auto* const directory =
      app.add_option(start + "dir", directory_,
                     "TLS with certificates: ca-cert.pem, " + who + "-cert.pem, " + who + "-key.pem in this folder");
  auto* const keys = app.add_option(start + "psk", keys_, "TLS with pre-shared keys: a file of lines USER:HEXKEY");
  directory->excludes(keys);
  app.add_option(start + "cipher", cipher_,
                 "The cipher that this side prefers; a server's choice decides. auto: aes where this CPU has "
                 "instructions for AES, else chacha20")
      ->check(CLI::IsMember({"auto", "aes", "chacha20"}))
      ->capture_default_str();
  if (side == TlsSide::server) return;
  app.add_option(start + "hostname", hostname_, "The name in the server's certificate (default: the host connected to)")
      ->needs(directory);
  app.add_option(start + "user", user_, "The user whose pre-shared key to use")->needs(keys)->capture_default_str();
#else
  (void)app;
  (void)prefix;
#endif
}

void Tls::prepare(const multifd::Address& address) {
  if (!on()) {
    if (!is_local(address))
      tell("not encrypted, and whoever connects is trusted: use --tls-dir or --tls-psk on {}\n", to_string(address));
    return;
  }
#if defined(MULTIFD_HAS_TLS)
  // Who opens a FIFO waits for its other end, and hears no signal.
  const auto refuse_fifo = [](const std::string& option, const std::string& path) {
    struct stat status{};
    if (::stat(path.c_str(), &status) == 0 && !S_ISREG(status.st_mode))
      throw Failure(fmt::format("{} {}: not a regular file", option, path));
  };
  if (!keys_.empty()) refuse_fifo("--tls-psk", keys_);
  for (const char* name : {"ca-cert", "ca-crl", "server-cert", "server-key", "client-cert", "client-key"})
    if (!directory_.empty()) refuse_fifo("--tls-dir", directory_ + "/" + name + ".pem");
  using multifd::TlsCredentials;
  const auto role = side_ == TlsSide::client ? multifd::TlsRole::client : multifd::TlsRole::server;
  credentials_ = std::make_shared<const TlsCredentials>(
      keys_.empty() ? need(TlsCredentials::x509(directory_, role), "--tls-dir " + directory_)
                    : need(TlsCredentials::psk(keys_, role, user_), "--tls-psk " + keys_));
  if (hostname_.empty()) hostname_ = address.host;
  if (hostname_.empty() && credentials_->verifies_hostname())
    throw Usage("--tls-hostname is needed: a UNIX socket has no name to compare with the server's certificate");
#endif
}

std::vector<std::string> Tls::arguments() const {
  if (!directory_.empty()) return {"--tls-dir", directory_, "--tls-cipher", cipher_};
  if (!keys_.empty()) return {"--tls-psk", keys_, "--tls-cipher", cipher_};
  return {};
}

#if defined(MULTIFD_HAS_TLS)
multifd::TlsOptions Tls::options() const {
  using multifd::TlsCipher;
  return {.hostname = hostname_,
          .end = bare_ends_ ? multifd::TlsEnd::fin : multifd::TlsEnd::close_notify,
          .cipher = cipher_ == "aes"        ? TlsCipher::aes
                    : cipher_ == "chacha20" ? TlsCipher::chacha20
                                            : TlsCipher::automatic};
}
#endif

TlsAcceptor Tls::acceptor(multifd::Listener& listener, std::chrono::milliseconds each) const {
  const auto tell_refused = [](const multifd::Error& error) { tell("closed a connection: {}\n", describe(error)); };
#if defined(MULTIFD_HAS_TLS)
  multifd::TlsOptions with_limit = options();
  with_limit.handshake_timeout = each;
  return need(TlsAcceptor::open(
      listener, {.credentials = credentials_.get(), .tls = std::move(with_limit), .on_refused = tell_refused}));
#else
  return need(TlsAcceptor::open(listener, {.first_bytes_timeout = each, .on_refused = tell_refused}));
#endif
}

Result<std::vector<Link>> Tls::secure(std::vector<multifd::FdTransport> links, const multifd::Interrupt& interrupt,
                                      std::chrono::milliseconds timeout) const {
#if defined(MULTIFD_HAS_TLS)
  if (credentials_) {
    multifd::TlsOptions with_limits = options();
    with_limits.handshake_timeout = timeout;
    with_limits.interrupt = &interrupt;
    auto secured = multifd::tls_handshakes(std::move(links), *credentials_, with_limits);
    if (!secured) return std::unexpected(secured.error());
    return Link::all_of(std::move(*secured));
  }
#endif
  (void)interrupt;
  (void)timeout;
  return Link::all_of(std::move(links));
}

Result<std::vector<Link>> Tls::secure_with_first_write(std::vector<multifd::FdTransport> links) const {
#if defined(MULTIFD_HAS_TLS)
  if (credentials_) {
    std::vector<Link> secured;
    for (multifd::FdTransport& link : links) {
      auto one = multifd::TlsTransport::on_first_write(std::move(link), *credentials_, options());
      if (!one) return std::unexpected(one.error());
      secured.emplace_back(std::move(*one));
    }
    return secured;
  }
#endif
  return Link::all_of(std::move(links));
}

Result<Link> Tls::secure(multifd::FdTransport link, const multifd::Interrupt& interrupt,
                         std::chrono::milliseconds timeout) const {
  std::vector<multifd::FdTransport> one;
  one.push_back(std::move(link));
  auto secured = secure(std::move(one), interrupt, timeout);
  if (secured) return std::move(secured->front());
  secured.error().channel = multifd::no_channel;
  return std::unexpected(secured.error());
}

std::string cipher_note(const std::string& cipher) { return cipher.empty() ? cipher : "; " + cipher; }

}  // namespace program

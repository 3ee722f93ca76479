// SPDX-License-Identifier: MIT
#include "common/tls.hpp"
#include "common/tell.hpp"

#include <fmt/format.h>
#include <sys/stat.h>

#include <CLI/CLI.hpp>
#include <concepts>
#include <type_traits>

namespace program {

using multifd::Result;

namespace {

// The libraries of this build, the faster one first.
const std::vector<std::string> libraries{
#if defined(MULTIFD_HAS_OPENSSL)
    "openssl",
#endif
#if defined(MULTIFD_HAS_TLS)
    "gnutls",
#endif
};

/// Calls `use` with the credentials, if TLS is on.
template <class R, class Use>
std::optional<R> with(const AnyCredentials& credentials, Use use) {
  return std::visit(
      [&]<class C>(const C& held) -> std::optional<R> {
        if constexpr (std::same_as<C, std::monostate>)
          return std::nullopt;
        else
          return use(held);
      },
      credentials);
}

}  // namespace

void Tls::add_to(CLI::App& app, TlsSide side, const std::string& prefix) {
  side_ = side;
  if (libraries.empty()) return;
  library_ = libraries.front();
  const std::string start = "--" + prefix + "tls-";
  const std::string who = side == TlsSide::client ? "client" : "server";
  auto* const directory =
      app.add_option(start + "dir", directory_,
                     "TLS with certificates: ca-cert.pem, " + who + "-cert.pem, " + who + "-key.pem in this folder");
  auto* const keys = app.add_option(start + "psk", keys_, "TLS with pre-shared keys: a file of lines USER:HEXKEY");
  directory->excludes(keys);
  app.add_option(start + "library", library_, "The library that makes TLS: the other side may have the other one")
      ->check(CLI::IsMember(libraries))
      ->capture_default_str();
  app.add_option(start + "cipher", cipher_,
                 "The cipher that this side prefers; a server's choice decides. auto: aes where this CPU is fast at it "
                 "(gnutls: has instructions for AES), else chacha20")
      ->check(CLI::IsMember({"auto", "aes", "chacha20"}))
      ->capture_default_str();
  app.add_option(
         start + "records-per-key", records_per_key_,
         "New keys after so many records (16 KiB each) that this side sends; a peer with GnuTLS, as a QEMU, takes "
         "eight in a second")
      ->check(CLI::Range(std::uint64_t{0}, records_per_key_))
      ->capture_default_str();
  if (side == TlsSide::server) return;
  app.add_option(start + "hostname", hostname_, "The name in the server's certificate (default: the host connected to)")
      ->needs(directory);
  app.add_option(start + "user", user_, "The user whose pre-shared key to use")->needs(keys)->capture_default_str();
}

void Tls::prepare(const multifd::Address& address) {
  if (!on()) {
    if (!is_local(address))
      tell("not encrypted, and whoever connects is trusted: use --tls-dir or --tls-psk on {}\n", to_string(address));
    return;
  }
  // Who opens a FIFO waits for its other end, and hears no signal.
  const auto refuse_fifo = [](const std::string& option, const std::string& path) {
    struct stat status{};
    if (::stat(path.c_str(), &status) == 0 && !S_ISREG(status.st_mode))
      throw Failure(fmt::format("{} {}: not a regular file", option, path));
  };
  if (!keys_.empty()) refuse_fifo("--tls-psk", keys_);
  for (const char* name : {"ca-cert", "ca-crl", "server-cert", "server-key", "client-cert", "client-key"})
    if (!directory_.empty()) refuse_fifo("--tls-dir", directory_ + "/" + name + ".pem");
  const auto role = side_ == TlsSide::client ? multifd::TlsRole::client : multifd::TlsRole::server;
  [[maybe_unused]] const auto read = [&]<class C>(std::type_identity<C>) {  // unless there is no library
    credentials_ = std::make_shared<const AnyCredentials>(
        keys_.empty() ? need(C::x509(directory_, role), "--tls-dir " + directory_)
                      : need(C::psk(keys_, role, user_), "--tls-psk " + keys_));
  };
#if defined(MULTIFD_HAS_TLS)
  if (library_ == "gnutls") read(std::type_identity<multifd::TlsCredentials>());
#endif
#if defined(MULTIFD_HAS_OPENSSL)
  if (library_ == "openssl") read(std::type_identity<multifd::OpensslCredentials>());
#endif
  if (hostname_.empty()) hostname_ = address.host;
  if (hostname_.empty() && with<bool>(*credentials_, [](const auto& held) { return held.verifies_hostname(); }) == true)
    throw Usage("--tls-hostname is needed: a UNIX socket has no name to compare with the server's certificate");
}

std::vector<std::string> Tls::arguments() const {
  if (!on()) return {};
  const bool keys = directory_.empty();
  return {keys ? "--tls-psk" : "--tls-dir",
          keys ? keys_ : directory_,
          "--tls-library",
          library_,
          "--tls-cipher",
          cipher_,
          "--tls-records-per-key",
          std::to_string(records_per_key_)};
}

multifd::TlsOptions Tls::options() const {
  using multifd::TlsCipher;
  return {.hostname = hostname_,
          .end = bare_ends_ ? multifd::TlsEnd::fin : multifd::TlsEnd::close_notify,
          .cipher = cipher_ == "aes"        ? TlsCipher::aes
                    : cipher_ == "chacha20" ? TlsCipher::chacha20
                                            : TlsCipher::automatic,
          .records_per_key = records_per_key_};
}

TlsAcceptor Tls::acceptor(multifd::Listener& listener, std::chrono::milliseconds each) const {
  const auto tell_refused = [](const multifd::Error& error) { tell("closed a connection: {}\n", describe(error)); };
  multifd::TlsOptions with_limit = options();
  with_limit.handshake_timeout = each;
  auto opened = with<TlsAcceptor>(*credentials_, [&]<class C>(const C& held) {
    return TlsAcceptor(need(multifd::TlsAcceptorOf<C>::open(
        listener, {.credentials = &held, .tls = with_limit, .on_refused = tell_refused})));
  });
  return std::move(opened.value());
}

Result<std::vector<Link>> Tls::secure(std::vector<multifd::FdTransport> links, const multifd::Interrupt& interrupt,
                                      std::chrono::milliseconds timeout) const {
  multifd::TlsOptions with_limits = options();
  with_limits.handshake_timeout = timeout;
  with_limits.interrupt = &interrupt;
  auto secured = with<Result<std::vector<Link>>>(*credentials_, [&](const auto& held) -> Result<std::vector<Link>> {
    auto made = multifd::tls_handshakes(std::move(links), held, with_limits);
    if (!made) return std::unexpected(made.error());
    return Link::all_of(std::move(*made));
  });
  return secured ? std::move(*secured) : Link::all_of(std::move(links));
}

Result<std::vector<Link>> Tls::secure_with_first_write(std::vector<multifd::FdTransport> links) const {
  auto secured =
      with<Result<std::vector<Link>>>(*credentials_, [&]<class C>(const C& held) -> Result<std::vector<Link>> {
        std::vector<Link> made;
        for (multifd::FdTransport& link : links) {
          auto one = multifd::TlsTransportOf<C>::on_first_write(std::move(link), held, options());
          if (!one) return std::unexpected(one.error());
          made.emplace_back(std::move(*one));
        }
        return made;
      });
  return secured ? std::move(*secured) : Link::all_of(std::move(links));
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

// SPDX-License-Identifier: MIT
#if defined(MULTIFD_HAS_TLS) || defined(MULTIFD_HAS_OPENSSL)
#include <doctest/doctest.h>
#include <sys/ioctl.h>

#include <filesystem>
#include <fstream>
#include <future>
#include <random>
#include <thread>

#include "multifd/transport/algorithms.hpp"
#include "support/tls_links.hpp"

using namespace multifd;
using namespace test;

namespace {

/// What each side says when handshakes with these credentials are tried; under TLS 1.3 a client learns of the server's
/// refusal only from the first bytes that it reads, or fails to write.
struct Outcome {
  std::error_code client, server;
  std::string client_text, server_text;
};

template <class Client, class Server>
Outcome attempt(const Client& client, const Server& server, const TlsOptions& options = {}) {
  auto [connected, served] = handshake_both(tcp_links(1), client, server, options);
  Outcome outcome{code_of(connected), code_of(served), text(connected), text(served)};
  if (connected && !served) {
    std::byte byte{};
    const iovec buffer = mutable_buffer(std::span(&byte, 1));
    const auto read = connected->front().read_some(std::span(&buffer, 1));
    outcome.client = code_of(read);
    outcome.client_text = text(read);
  }
  return outcome;
}

template <class P>
Outcome attempt(const char* client, const char* server, const TlsOptions& options = {}) {
  return attempt(credentials<typename P::Client>(client, TlsRole::client),
                 credentials<typename P::Server>(server, TlsRole::server), options);
}

template <class Transport>
Result<std::size_t> read_one(Transport& link) {
  std::byte byte{};
  const iovec buffer = mutable_buffer(std::span(&byte, 1));
  return link.read_some(std::span(&buffer, 1));
}

std::vector<std::byte> random_bytes(std::size_t size) {
  std::vector<std::byte> bytes(size);
  Rng rng(seed());
  for (std::byte& byte : bytes) byte = static_cast<std::byte>(rng());
  return bytes;
}

constexpr TlsCipher preferences[] = {TlsCipher::automatic, TlsCipher::aes, TlsCipher::chacha20};

/// What a library prefers.
template <class L>
const char* first_of(TlsCipher preference) {
  bool aes = preference == TlsCipher::aes;
#if defined(MULTIFD_HAS_TLS)
  if (preference == TlsCipher::automatic && std::same_as<L, Gnutls>) aes = multifd::detail::has_aes_instructions();
#endif
#if defined(MULTIFD_HAS_OPENSSL)
  if (preference == TlsCipher::automatic && std::same_as<L, Openssl>) aes = !multifd::detail::chacha20_is_far_faster();
#endif
  return aes ? "AES-128-GCM" : "CHACHA20-POLY1305";
}

#if defined(MULTIFD_HAS_TLS)
constexpr std::size_t said_bytes = 40'000;  // in several records

/// Sends back what a session's peer says. Under TLS 1.3 it asks for new keys first, and pads its records.
void send_back(gnutls_session_t session, std::size_t bytes) {
  std::vector<std::byte> said(bytes);
  const bool tls13 = ::gnutls_protocol_get_version(session) == GNUTLS_TLS1_3;
  for (std::size_t got = 0; got < bytes;) {
    const ssize_t count = ::gnutls_record_recv(session, said.data() + got, bytes - got);
    if (count <= 0 && ::gnutls_error_is_fatal(static_cast<int>(count)) == 0 && count != 0) continue;
    if (count <= 0) return;
    got += static_cast<std::size_t>(count);
  }
  if (tls13) CHECK(::gnutls_session_key_update(session, GNUTLS_KU_PEER) == 0);
  for (std::size_t sent = 0; sent < bytes;) {
    const std::size_t part = std::min<std::size_t>(bytes - sent, 9000);
    const ssize_t count = tls13 ? ::gnutls_record_send2(session, said.data() + sent, part, 300, 0)
                                : ::gnutls_record_send(session, said.data() + sent, part);
    if (count <= 0) return;
    sent += static_cast<std::size_t>(count);
  }
}

/// What `role`, of ours, agrees on with a peer that is GnuTLS by itself, in its own order, changed by `priorities`.
template <class L>
std::string agreed_with_stock_peer(const char* name, TlsRole role, TlsCipher ours, const std::string& priorities) {
  auto plain = tcp_links(1);
  auto peer = std::async([&] {
    const TlsRole peer_role = role == TlsRole::client ? TlsRole::server : TlsRole::client;
    const TlsCredentials theirs = credentials(name, peer_role);
    gnutls_session_t session = nullptr;
    REQUIRE(::gnutls_init(&session, peer_role == TlsRole::server ? GNUTLS_SERVER : GNUTLS_CLIENT) == 0);
    gnutls_datum_t ticket_key{};
    if (peer_role == TlsRole::server) {  // the client finds tickets behind the handshake
      REQUIRE(::gnutls_session_ticket_key_generate(&ticket_key) == 0);
      REQUIRE(::gnutls_session_ticket_enable_server(session, &ticket_key) == 0);
    }
    REQUIRE(theirs.apply(session, TlsCipher::automatic) == 0);
    const std::string all = "NORMAL:+ECDHE-PSK:+DHE-PSK:+PSK" + priorities;
    REQUIRE(::gnutls_priority_set_direct(session, all.c_str(), nullptr) == 0);
    ::gnutls_transport_set_int(session, plain.sender[0].native_handle());
    int code = 0;
    do code = ::gnutls_handshake(session);
    while (code < 0 && ::gnutls_error_is_fatal(code) == 0);
    std::string cipher = code < 0 ? ::gnutls_strerror(code) : ::gnutls_cipher_get_name(::gnutls_cipher_get(session));
    for (int i = 0; code >= 0 && i < 2; ++i) send_back(session, said_bytes);
    ::gnutls_free(ticket_key.data);
    ::gnutls_deinit(session);
    return cipher;
  });
  auto link = tls_handshake(std::move(plain.receiver[0]), credentials<L>(name, role),
                            {.hostname = "localhost", .cipher = ours});
  for (int i = 0; link && i < 2; ++i) {
    const auto said = random_bytes(said_bytes);
    CHECK(write_all(*link, std::span<const std::byte>(said)).has_value());
    std::vector<std::byte> answer(said.size());
    const auto answered = read_exact(*link, std::span<std::byte>(answer));
    CHECK_MESSAGE(answered.has_value(), text(answered));
    CHECK((said == answer));
  }
  const std::string theirs = peer.get();
  if (!link) return text(link);
  const std::string agreed = link->cipher();
  CHECK(agreed.ends_with(' ' + theirs));
  return agreed;
}
#endif

int unread_bytes(int fd) {
  int count = 0;
  REQUIRE(::ioctl(fd, FIONREAD, &count) == 0);
  return count;
}

}  // namespace

TEST_CASE_TEMPLATE("A certificate of another authority is refused, and both sides say so", P, TLS_SIDES) {
  const Watchdog watchdog("handshakes");
  const Outcome bad_server = attempt<P>("good", "other");
  CHECK_MESSAGE(bad_server.client == Errc::tls_untrusted_certificate, bad_server.client_text);
  CHECK_MESSAGE(bad_server.server == Errc::tls_refused, bad_server.server_text);

  // The client takes the server's certificate, and has one of an authority that the server does not know.
  constexpr auto again = std::filesystem::copy_options::overwrite_existing;
  const std::string mixed = tls_files() + "/mixed";
  std::filesystem::create_directories(mixed);
  for (const char* name : {"client-cert.pem", "client-key.pem"})
    std::filesystem::copy_file(tls_files() + "/other/" + name, mixed + "/" + name, again);
  std::filesystem::copy_file(tls_files() + "/good/ca-cert.pem", mixed + "/ca-cert.pem", again);
  const Outcome bad_client = attempt<P>("mixed", "good");
  CHECK_MESSAGE(bad_client.server == Errc::tls_untrusted_certificate, bad_client.server_text);
  CHECK_MESSAGE(bad_client.client == Errc::tls_refused, bad_client.client_text);
}

TEST_CASE_TEMPLATE("An expired certificate is refused on either side", P, TLS_SIDES) {
  const Watchdog watchdog("handshakes");
  const Outcome server = attempt<P>("good", "expired");
  CHECK_MESSAGE(server.client == Errc::tls_expired_certificate, server.client_text);
  CHECK_MESSAGE(server.server == Errc::tls_refused, server.server_text);
  const Outcome client = attempt<P>("expired", "good");
  CHECK_MESSAGE(client.server == Errc::tls_expired_certificate, client.server_text);
  CHECK_MESSAGE(client.client == Errc::tls_refused, client.client_text);
}

TEST_CASE_TEMPLATE("A revoked certificate is refused, also by a list that is out of date", P, TLS_SIDES) {
  constexpr std::time_t day = 24 * 60 * 60;
  const std::string root = tls_files() + "/revoked";
  std::filesystem::remove_all(root);
  const TlsAuthority authority("revoking"), stranger("another");
  authority.fill(root);
  const auto reached = [&](const TlsAuthority& lists, const char* revoked, std::time_t next_update) {
    lists.revoke(root, revoked, next_update);
    return attempt<P>("revoked", "revoked");
  };
  for (const std::time_t next_update : {day, -day}) {
    CAPTURE(next_update);
    CHECK(reached(authority, "client", next_update).server == Errc::tls_revoked_certificate);
    CHECK(reached(authority, "server", next_update).client == Errc::tls_revoked_certificate);
    const Outcome none = reached(authority, "", next_update);
    CHECK_MESSAGE(!none.client, none.client_text);
    CHECK_MESSAGE(!none.server, none.server_text);
  }
  // Of another authority: it has revoked nothing.
  const Outcome other = reached(stranger, "client", day);
  CHECK_MESSAGE(!other.client, other.client_text);
  CHECK_MESSAGE(!other.server, other.server_text);
}

TEST_CASE_TEMPLATE("A server's certificate must be for the name that the client expects", P, TLS_SIDES) {
  const Watchdog watchdog("handshakes");
  CHECK(attempt<P>("good", "name").client == Errc::tls_wrong_hostname);
  CHECK(attempt<P>("good", "name", {.hostname = "elsewhere.example"}).client == std::error_code{});
  CHECK(attempt<P>("good", "good", {.hostname = "127.0.0.1"}).client == std::error_code{});
  CHECK(attempt<P>("good", "good", {.hostname = "127.0.0.2"}).client == Errc::tls_wrong_hostname);
  const auto nameless = P::Client::Handshake::start(
      std::move(tcp_links(1).sender.front()), credentials<typename P::Client>("good", TlsRole::client), TlsOptions{});
  CHECK(code_of(nameless) == Errc::bad_option);
}

TEST_CASE_TEMPLATE("A certificate for clients does not make a server, nor the other way round", P, TLS_SIDES) {
  const Watchdog watchdog("handshakes");
  CHECK(attempt<P>("good", "swapped").client == Errc::tls_wrong_purpose);
  CHECK(attempt<P>("swapped", "good").server == Errc::tls_wrong_purpose);
}

TEST_CASE_TEMPLATE("A client without a certificate is refused", P, TLS_SIDES) {
  const Watchdog watchdog("handshakes");
  const Outcome outcome = attempt<P>("bare", "good");
  CHECK_MESSAGE(outcome.server == Errc::tls_no_certificate, outcome.server_text);
  CHECK_MESSAGE(outcome.client == Errc::tls_refused, outcome.client_text);
}

TEST_CASE_TEMPLATE("A wrong pre-shared key, and a wrong user, are named on both sides", P, TLS_SIDES) {
  const Watchdog watchdog("handshakes");
  const Outcome key = attempt<P>("other.psk", "keys.psk");
  CHECK_MESSAGE(key.client == Errc::tls_wrong_key, key.client_text);
  CHECK_MESSAGE(key.server == Errc::tls_wrong_key, key.server_text);
  TlsAuthority::write(tls_files() + "/stranger.psk", "stranger:00112233445566778899aabbccddeeff\n");
  const Outcome user = attempt(credentials<typename P::Client>("stranger.psk", TlsRole::client, "stranger"),
                               credentials<typename P::Server>("keys.psk", TlsRole::server));
  CHECK_MESSAGE(user.client == Errc::tls_wrong_key, user.client_text);
  CHECK_MESSAGE(user.server == Errc::tls_wrong_key, user.server_text);
  const Outcome other_user = attempt(credentials<typename P::Client>("keys.psk", TlsRole::client, "somebody"),
                                     credentials<typename P::Server>("keys.psk", TlsRole::server));
  CHECK_MESSAGE(other_user.server == std::error_code{}, other_user.server_text);
}

TEST_CASE_TEMPLATE("Certificates on one side and keys on the other have nothing in common", P, TLS_SIDES) {
  const Watchdog watchdog("handshakes");
  for (const auto& [client, server] : {std::pair("good", "keys.psk"), std::pair("keys.psk", "good")}) {
    const Outcome outcome = attempt<P>(client, server);
    CHECK_MESSAGE(outcome.client == Errc::tls_no_common_ground, outcome.client_text);
    CHECK_MESSAGE(outcome.server == Errc::tls_no_common_ground, outcome.server_text);
  }
}

TEST_CASE_TEMPLATE("A peer that speaks no TLS is named as that", L, TLS_LIBRARIES) {
  const Watchdog watchdog("handshakes");
  for (const TlsRole role : {TlsRole::server, TlsRole::client}) {
    CAPTURE(static_cast<int>(role));
    auto links = tcp_links(1);
    const auto hello = random_bytes(64);
    std::vector<std::byte> bytes(hello);
    bytes[0] = std::byte{0x11};  // a multifd channel's
    REQUIRE(write_all(links.sender.front(), std::span<const std::byte>(bytes)).has_value());
    const auto outcome =
        tls_handshake(std::move(links.receiver.front()), credentials<L>("good", role), {.hostname = "localhost"});
    CHECK_MESSAGE(code_of(outcome) == Errc::tls_not_spoken, text(outcome));
  }
}

TEST_CASE_TEMPLATE("A peer that closes during the handshake is not one that ends in order", L, TLS_LIBRARIES) {
  const Watchdog watchdog("handshakes");
  auto links = unix_links(1);
  links.sender.clear();
  const auto outcome = tls_handshake(std::move(links.receiver.front()), credentials<L>("good", TlsRole::server));
  CHECK_MESSAGE(code_of(outcome) == Errc::peer_closed, text(outcome));
  CHECK(text(outcome).find("is TLS on at the peer") != std::string::npos);
}

TEST_CASE_TEMPLATE("A silent peer ends a handshake at its time limit, an Interrupt ends it at once", L, TLS_LIBRARIES) {
  const Watchdog watchdog("handshakes");
  for (const TlsRole role : {TlsRole::server, TlsRole::client}) {
    auto links = tcp_links(3);
    const Stopwatch watch;
    const auto late = tls_handshakes(std::move(links.receiver), credentials<L>("good", role),
                                     {.hostname = "localhost", .handshake_timeout = 100ms});
    CHECK_MESSAGE(code_of(late) == Errc::timed_out, text(late));
    CHECK(late.error().stage == Stage::handshake);
    CHECK(watch.elapsed() >= 100ms);
    CHECK(watch.elapsed() < no_hang);
  }
  auto interrupt = Interrupt::create();
  REQUIRE(interrupt.has_value());
  auto links = tcp_links(1);
  Result<typename L::Transport> ended = std::unexpected(Error{});
  std::thread waiting([&] {
    ended = tls_handshake(std::move(links.receiver.front()), credentials<L>("good", TlsRole::server),
                          {.handshake_timeout = no_timeout, .interrupt = &*interrupt});
  });
  interrupt->trigger();
  waiting.join();
  CHECK_MESSAGE(code_of(ended) == Errc::cancelled, text(ended));
}

TEST_CASE_TEMPLATE("Many handshakes at once need no particular order, and are made in one thread", P, TLS_SIDES) {
  const Watchdog watchdog("handshakes");
  constexpr unsigned channels = 40;
  auto plain = tcp_links(channels);
  std::ranges::reverse(plain.receiver);
  auto links = tls_links_of<P>(std::move(plain));
  REQUIRE(links.sender.size() == channels);
  for (unsigned i = 0; i < channels; ++i) {
    const std::byte id{static_cast<unsigned char>(i)};
    REQUIRE(write_all(links.sender[i], std::span(&id, 1)).has_value());
    std::byte got{};
    REQUIRE(read_exact(links.receiver[channels - 1 - i], std::span(&got, 1)).has_value());
    CHECK(got == id);
  }
}

TEST_CASE_TEMPLATE("A first write makes the handshake, and shutdown() ends it", P, TLS_SIDES) {
  const Watchdog watchdog("first write");
  auto plain = tcp_links(2);
  std::vector<typename P::Client::Transport> clients;
  for (FdTransport& link : plain.sender) {
    auto made = P::Client::Transport::on_first_write(
        std::move(link), credentials<typename P::Client>("good", TlsRole::client), {.hostname = "localhost"});
    REQUIRE_MESSAGE(made.has_value(), text(made));
    clients.push_back(std::move(*made));
  }
  const std::byte byte{5};
  Result<void> written;
  std::thread writing([&] { written = write_all(clients[0], std::span(&byte, 1)); });
  auto server = tls_handshake(std::move(plain.receiver[0]), credentials<typename P::Server>("good", TlsRole::server));
  writing.join();
  REQUIRE_MESSAGE(server.has_value(), text(server));
  CHECK_MESSAGE(written.has_value(), text(written));
  CHECK(read_one(*server).value_or(9) == 1);

  std::thread blocked([&] { written = write_all(clients[1], std::span(&byte, 1)); });
  std::this_thread::sleep_for(20ms);  // nothing tells that a call blocks
  const Stopwatch watch;
  clients[1].shutdown();
  blocked.join();
  CHECK(watch.elapsed() < no_hang);
  CHECK_MESSAGE(code_of(written) == Errc::cancelled, text(written));
}

TEST_CASE_TEMPLATE("A handshake that a first write makes ends at its time limit, and by its Interrupt", P, TLS_SIDES) {
  const Watchdog watchdog("limits of a first write");
  auto plain = tcp_links(2);
  Interrupt interrupt = Interrupt::create().value();
  const std::byte byte{5};
  const auto write_to = [&](FdTransport link, const TlsOptions& options) {
    auto client = P::Client::Transport::on_first_write(
        std::move(link), credentials<typename P::Client>("good", TlsRole::client), options);
    REQUIRE_MESSAGE(client.has_value(), text(client));
    return write_all(*client, std::span(&byte, 1));
  };
  const Stopwatch watch;
  const auto late = write_to(std::move(plain.sender[0]), {.hostname = "localhost", .handshake_timeout = 50ms});
  CHECK_MESSAGE(code_of(late) == Errc::timed_out, text(late));
  interrupt.trigger();
  const auto ended = write_to(std::move(plain.sender[1]), {.hostname = "localhost", .interrupt = &interrupt});
  CHECK_MESSAGE(code_of(ended) == Errc::cancelled, text(ended));
  CHECK(watch.elapsed() < no_hang);
}

TEST_CASE_TEMPLATE("A server sends no session tickets: a source that never reads leaves nothing unread", P, TLS_SIDES) {
  for (const char* name : {"good", "keys.psk"}) {
    auto links = tls_links_of<P>(tcp_links(1), name);
    const std::byte byte{1};
    REQUIRE(write_all(links.sender.front(), std::span(&byte, 1)).has_value());
    REQUIRE(read_one(links.receiver.front()).has_value());  // the server is past its handshake
    CHECK(unread_bytes(links.sender.front().native_handle()) == 0);
  }
}

TEST_CASE_TEMPLATE("TLS 1.3 is what two of ours agree on", P, TLS_SIDES) {
  auto links = tls_links_of<P>(tcp_links(1));
  CHECK(links.sender.front().cipher().starts_with("TLS1.3 "));
}

#if defined(MULTIFD_HAS_TLS)
TEST_CASE("The CPU's instructions for AES are seen as the kernel sees them") {
  std::ifstream file("/proc/cpuinfo");
  bool aes = false, multiply = false;
  for (std::string word; file >> word && !(aes && multiply);) {
    aes = aes || word == "aes";
    multiply = multiply || word == "pclmulqdq" || word == "pmull";
  }
  CHECK(multifd::detail::has_aes_instructions() == (aes && multiply));
}
#endif

TEST_CASE_TEMPLATE("The server's preference decides the cipher, with both kinds of credentials", P, TLS_SIDES) {
  const Watchdog watchdog("preferences");
  for (const char* const name : {"keys.psk", "good"})
    for (const TlsCipher client : preferences)
      for (const TlsCipher server : preferences) {
        CAPTURE(name);
        CAPTURE(static_cast<int>(client));
        CAPTURE(static_cast<int>(server));
        auto plain = tcp_links(1);
        auto serving = std::async([&] {
          return tls_handshake(std::move(plain.receiver[0]), credentials<typename P::Server>(name, TlsRole::server),
                               {.cipher = server});
        });
        auto connected =
            tls_handshake(std::move(plain.sender[0]), credentials<typename P::Client>(name, TlsRole::client),
                          {.hostname = "localhost", .cipher = client});
        auto served = serving.get();
        REQUIRE_MESSAGE(connected.has_value(), text(connected));
        REQUIRE_MESSAGE(served.has_value(), text(served));
        CHECK(connected->cipher() == std::string("TLS1.3 ") + first_of<typename P::Server>(server));
        CHECK(served->cipher() == connected->cipher());
      }
}

#if defined(MULTIFD_HAS_TLS)
TEST_CASE_TEMPLATE("A peer with the order of GnuTLS gets the cipher that this side prefers, in both roles", L,
                   TLS_LIBRARIES) {
  const Watchdog watchdog("preferences");
  for (const char* const name : {"keys.psk", "good"})
    for (const TlsRole role : {TlsRole::client, TlsRole::server})
      for (const TlsCipher ours : preferences) {
        CAPTURE(name);
        CAPTURE(static_cast<int>(role));
        CAPTURE(static_cast<int>(ours));
        CHECK(agreed_with_stock_peer<L>(name, role, ours, "") == std::string("TLS1.3 ") + first_of<L>(ours));
      }
}

TEST_CASE_TEMPLATE("A peer that has only one cipher is served with that one, whatever this side prefers", L,
                   TLS_LIBRARIES) {
  const Watchdog watchdog("single ciphers");
  // A pre-shared key's hash rules AES-256-GCM out under TLS 1.3.
  struct Only {
    const char *credentials, *priorities, *wanted;
    bool everywhere = true;  // else GnuTLS alone has it
  };
  for (const Only only : {Only{"keys.psk", ":-CIPHER-ALL:+CHACHA20-POLY1305", "TLS1.3 CHACHA20-POLY1305"},
                          Only{"keys.psk", ":-CIPHER-ALL:+AES-128-CCM", "TLS1.3 AES-128-CCM", false},
                          Only{"keys.psk", ":-VERS-TLS1.3:-CIPHER-ALL:+AES-256-GCM", "TLS1.2 AES-256-GCM"},
                          Only{"keys.psk", ":-VERS-TLS1.3:-CIPHER-ALL:+CHACHA20-POLY1305", "TLS1.2 CHACHA20-POLY1305"},
                          Only{"good", ":-VERS-TLS1.3:-CIPHER-ALL:+AES-128-GCM", "TLS1.2 AES-128-GCM"},
                          Only{"good", ":-CIPHER-ALL:+CHACHA20-POLY1305", "TLS1.3 CHACHA20-POLY1305"},
                          Only{"good", ":-CIPHER-ALL:+AES-256-GCM", "TLS1.3 AES-256-GCM"},
                          Only{"good", ":-VERS-TLS1.3:-CIPHER-ALL:+AES-256-CBC", "TLS1.2 AES-256-CBC", false}})
    for (const TlsRole role : {TlsRole::client, TlsRole::server})
      for (const TlsCipher ours : preferences) {
        if (!only.everywhere && !std::same_as<L, Gnutls>) continue;
        CAPTURE(only.wanted);
        CAPTURE(static_cast<int>(role));
        CAPTURE(static_cast<int>(ours));
        CHECK(agreed_with_stock_peer<L>(only.credentials, role, ours, only.priorities) == only.wanted);
      }
}
#endif

TEST_CASE_TEMPLATE("write_now() does not wait for a handshake", L, TLS_LIBRARIES) {
  auto plain = unix_links(1);
  auto made = L::Transport::on_first_write(std::move(plain.sender[0]), credentials<L>("keys.psk", TlsRole::client),
                                           {.handshake_timeout = 0ms});
  REQUIRE_MESSAGE(made.has_value(), text(made));
  auto link = std::make_shared<typename L::Transport>(std::move(*made));
  auto writing = std::async(std::launch::async, [link] {
    const std::byte byte{1};
    const iovec buffer = const_buffer(std::span(&byte, 1));
    return link->write_now(std::span(&buffer, 1));
  });
  if (writing.wait_for(20s) != std::future_status::ready) {
    link->shutdown();
    FAIL("it waits");
  }
  const auto written = writing.get();
  REQUIRE_MESSAGE(written.has_value(), text(written));
  CHECK(*written == 0);
}

TEST_CASE_TEMPLATE(
    "A limit is one call's: a read without one, behind a limited read or write, waits as long as it takes", P,
    TLS_SIDES) {
  const Watchdog watchdog("limits of one call");
  auto links = tls_links_of<P>(unix_links(1));
  auto& link = links.receiver.front();
  std::byte byte{1};
  const iovec buffer = mutable_buffer(std::span(&byte, 1));
  {
    auto interrupt = Interrupt::create();
    REQUIRE(interrupt.has_value());
    CHECK(code_of(link.read_some(std::span(&buffer, 1), 20ms, &*interrupt)) == Errc::timed_out);
    CHECK(link.write_some(std::span(&buffer, 1), 20ms, &*interrupt).has_value());
    interrupt->trigger();
    CHECK(code_of(link.read_some(std::span(&buffer, 1), 1h, &*interrupt)) == Errc::cancelled);
  }
  auto reading = std::async(std::launch::async, [&] { return link.read_some(std::span(&buffer, 1)); });
  CHECK(reading.wait_for(60ms) == std::future_status::timeout);
  CHECK(write_all(links.sender.front(), std::span<const std::byte>(std::vector(1, std::byte{7}))).has_value());
  const auto got = reading.get();
  CHECK_MESSAGE(got.has_value(), text(got));
  CHECK(byte == std::byte{7});
}

TEST_CASE_TEMPLATE("No cipher is named ahead of the handshake", L, TLS_LIBRARIES) {
  auto plain = tcp_links(1);
  auto link = L::Transport::on_first_write(std::move(plain.sender[0]), credentials<L>("keys.psk", TlsRole::client), {});
  REQUIRE_MESSAGE(link.has_value(), text(link));
  CHECK(link->cipher().empty());
}

TEST_CASE_TEMPLATE("A cut without close_notify is an error of its own, however it happens", P, TLS_SIDES) {
  const Watchdog watchdog("cuts");
  const std::byte byte{1};
  // FIN without close_notify, as somebody on the way could send it.
  auto fin = tls_links_of<P>(tcp_links(1));
  REQUIRE(write_all(fin.sender.front(), std::span(&byte, 1)).has_value());
  REQUIRE(::shutdown(fin.sender.front().native_handle(), SHUT_WR) == 0);
  CHECK(read_one(fin.receiver.front()).has_value());
  for (int i = 0; i < 2; ++i) CHECK(code_of(read_one(fin.receiver.front())) == Errc::tls_truncated);
  // The process dies: an end over UNIX, a reset over TCP.
  auto dead = tls_links_of<P>(unix_links(1));
  dead.sender.clear();
  CHECK(code_of(read_one(dead.receiver.front())) == Errc::tls_truncated);
  CHECK(read_one(dead.receiver.front()).error().code == Condition::peer_gone);
  auto reset = tls_links_of<P>(tcp_links(1));
  reset.sender.clear();
  CHECK(read_one(reset.receiver.front()).error().code == Condition::peer_gone);
  // In the middle of a record.
  auto half = tls_links_of<P>(unix_links(1));
  const auto bytes = random_bytes(10000);
  REQUIRE(::send(half.sender.front().native_handle(), "\x17\x03\x03\x20\x00half", 9, MSG_NOSIGNAL) == 9);
  half.sender.clear();
  CHECK(code_of(read_one(half.receiver.front())) == Errc::tls_truncated);
}

TEST_CASE_TEMPLATE("A bare end is an orderly one when that was agreed on, but not in the middle of a record", P,
                   TLS_SIDES) {
  const Watchdog watchdog("ends");
  auto links = tls_links_of<P>(tcp_links(1), "good", {.end = TlsEnd::fin});
  const std::byte byte{1};
  REQUIRE(write_all(links.sender.front(), std::span(&byte, 1)).has_value());
  REQUIRE(::shutdown(links.sender.front().native_handle(), SHUT_WR) == 0);
  CHECK(read_one(links.receiver.front()).value_or(9) == 1);
  CHECK(read_one(links.receiver.front()).value_or(9) == 0);

  for (const char* half : {"\x17", "\x17\x03\x03\x20\x00half"}) {
    auto cut = tls_links_of<P>(unix_links(1), "good", {.end = TlsEnd::fin});
    REQUIRE(::send(cut.sender.front().native_handle(), half, half[1] == 0 ? 1 : 9, MSG_NOSIGNAL) > 0);
    cut.sender.clear();
    const auto read = read_one(cut.receiver.front());
    CHECK_MESSAGE(code_of(read) == Errc::tls_truncated, text(read));
  }
}

TEST_CASE_TEMPLATE("Bytes that are changed on the way are noticed", P, TLS_SIDES) {
  const Watchdog watchdog("changed bytes");
  auto links = tls_links_of<P>(unix_links(1));
  const char record[] = "\x17\x03\x03\x00\x20 this is no record of theirs ....";
  REQUIRE(::send(links.sender.front().native_handle(), record, 5 + 32, MSG_NOSIGNAL) == 37);
  const auto read = read_one(links.receiver.front());
  REQUIRE_FALSE(read.has_value());
  CHECK_MESSAGE(read.error().code == Condition::peer_protocol, text(read));
}

TEST_CASE_TEMPLATE("A header and its pages go out in full records, not in one for each", P, TLS_SIDES) {
  const Watchdog watchdog("records");
  auto links = tls_links_of<P>(unix_links(1));
  auto header = random_bytes(1344);
  auto pages = random_bytes(128 * 4096);
  std::vector<iovec> buffers{mutable_buffer(header)};
  for (std::size_t at = 0; at < pages.size(); at += 4096)
    buffers.push_back(mutable_buffer(std::span(pages).subspan(at, 4096)));
  std::thread writing([&] { CHECK(write_all(links.sender.front(), std::span(buffers)).has_value()); });
  // The records as they pass: read from the socket itself.
  FdTransport raw = adopt(::dup(links.receiver.front().native_handle()));
  std::size_t records = 0;
  for (std::size_t plain = 0; plain < header.size() + pages.size(); ++records) {
    std::byte head[5];
    REQUIRE(read_exact(raw, std::span<std::byte>(head)).has_value());
    const std::size_t size = std::to_integer<std::size_t>(head[3]) << 8 | std::to_integer<std::size_t>(head[4]);
    std::vector<std::byte> body(size);
    REQUIRE(read_exact(raw, std::span<std::byte>(body)).has_value());
    plain += size - 17;  // type and tag
  }
  writing.join();
  CHECK(records == (header.size() + pages.size() + 16383) / 16384);
}

TEST_CASE_TEMPLATE("The sender takes new keys when the old ones have served for long enough", L, TLS_LIBRARIES) {
  const Watchdog watchdog("new keys");
  auto links = tls_links<L>(unix_links(1), "keys.psk", {.records_per_key = 4});
  const auto bytes = random_bytes(10 * 16384);
  std::thread writing([&] { CHECK(write_all(links.sender.front(), std::span<const std::byte>(bytes)).has_value()); });
  FdTransport raw = adopt(::dup(links.receiver.front().native_handle()));
  std::vector<std::size_t> sizes;
  for (std::size_t data = 0; data < 10;) {
    std::byte head[5];
    REQUIRE(read_exact(raw, std::span<std::byte>(head)).has_value());
    sizes.push_back(std::to_integer<std::size_t>(head[3]) << 8 | std::to_integer<std::size_t>(head[4]));
    std::vector<std::byte> body(sizes.back());
    REQUIRE(read_exact(raw, std::span<std::byte>(body)).has_value());
    if (sizes.back() > 1000) ++data;
  }
  writing.join();
  CHECK(std::ranges::count(sizes, 5u + 17u) == 2);  // KeyUpdate
}

TEST_CASE_TEMPLATE("New keys lose nothing, in either direction", P, TLS_SIDES) {
  const Watchdog watchdog("new keys");
  auto links = tls_links_of<P>(tcp_links(1), "good", {.records_per_key = 60});
  const auto bytes = random_bytes(6 << 20);  // GnuTLS takes eight new keys in a second
  const auto move = [&](auto& from, auto& to) {
    std::thread writing([&] { CHECK(write_all(from, std::span<const std::byte>(bytes)).has_value()); });
    std::vector<std::byte> got(bytes.size());
    const auto all = read_exact(to, std::span<std::byte>(got));
    writing.join();
    CHECK_MESSAGE(all.has_value(), text(all));
    CHECK((got == bytes));
  };
  move(links.sender[0], links.receiver[0]);
  move(links.receiver[0], links.sender[0]);
}

#if defined(MULTIFD_HAS_OPENSSL)
TEST_CASE("New keys lose nothing with OpenSSL, in both directions at once") {
  const Watchdog watchdog("new keys");
  auto links = tls_links<Openssl>(tcp_links(1), "keys.psk", {.records_per_key = 3});
  const auto bytes = random_bytes(3 << 20);
  const auto write = [&](OpensslTransport& link) {
    CHECK(write_all(link, std::span<const std::byte>(bytes)).has_value());
    CHECK(link.finish().has_value());
  };
  const auto read = [&](OpensslTransport& link) {
    std::vector<std::byte> got(bytes.size());
    const auto all = read_exact(link, std::span<std::byte>(got));
    CHECK_MESSAGE(all.has_value(), text(all));
    CHECK((got == bytes));
    CHECK(read_one(link).value_or(9) == 0);
  };
  std::thread threads[] = {std::thread([&] { write(links.sender[0]); }), std::thread([&] { read(links.sender[0]); }),
                           std::thread([&] { write(links.receiver[0]); }),
                           std::thread([&] { read(links.receiver[0]); })};
  for (std::thread& thread : threads) thread.join();
}
#endif

TEST_CASE_TEMPLATE("One thread writes while another reads the same session", P, TLS_SIDES) {
  const Watchdog watchdog("both directions");
  auto links = tls_links_of<P>(tcp_links(1));
  const auto there = random_bytes(20 << 20);
  const auto back = random_bytes(17 << 20);
  const auto write = [](auto& link, const std::vector<std::byte>& bytes) {
    CHECK(write_all(link, std::span<const std::byte>(bytes)).has_value());
    CHECK(link.finish().has_value());
  };
  const auto read = [](auto& link, const std::vector<std::byte>& expected) {
    std::vector<std::byte> bytes(expected.size());
    CHECK(read_exact(link, std::span<std::byte>(bytes)).has_value());
    CHECK((bytes == expected));
    CHECK(read_one(link).value_or(9) == 0);
  };
  std::thread threads[] = {
      std::thread([&] { write(links.sender[0], there); }), std::thread([&] { read(links.sender[0], back); }),
      std::thread([&] { write(links.receiver[0], back); }), std::thread([&] { read(links.receiver[0], there); })};
  for (std::thread& thread : threads) thread.join();
}

TEST_CASE_TEMPLATE("A source that only writes learns why the server refused its certificate", P, TLS_SIDES) {
  const Watchdog watchdog("refused");
  auto [client, server] = handshake_both(tcp_links(1), credentials<typename P::Client>("expired", TlsRole::client),
                                         credentials<typename P::Server>("good", TlsRole::server));
  REQUIRE(client.has_value());
  REQUIRE_FALSE(server.has_value());
  const auto bytes = random_bytes(1 << 20);
  Result<void> written;
  while (written) written = write_all(client->front(), std::span<const std::byte>(bytes));
  CHECK_MESSAGE(code_of(written) == Errc::tls_refused, text(written));
  CHECK(text(written).find("expired") != std::string::npos);
}

TEST_CASE_TEMPLATE("shutdown() ends calls that block", P, TLS_SIDES) {
  const Watchdog watchdog("shutdown");
  for (const bool writer : {true, false}) {
    auto links = tls_links_of<P>(tcp_links(1));
    std::error_code code;
    std::atomic<bool> began = false;
    std::thread blocked([&] {
      const auto bytes = random_bytes(1 << 20);
      began = true;
      if (!writer) code = code_of(read_one(links.receiver[0]));
      for (Result<void> written; writer && written; code = code_of(written))
        written = write_all(links.sender[0], std::span<const std::byte>(bytes));
    });
    while (!began) std::this_thread::yield();
    std::this_thread::sleep_for(50ms);  // nothing tells that a call blocks
    const Stopwatch watch;
    writer ? links.sender[0].shutdown() : links.receiver[0].shutdown();
    blocked.join();
    CHECK(watch.elapsed() < no_hang);
    CHECK(code == Errc::cancelled);
    Result<std::size_t> other = 1;
    while (other && *other > 0) other = writer ? read_one(links.receiver[0]) : read_one(links.sender[0]);
    CHECK_MESSAGE(code_of(other) == Condition::peer_gone, text(other));
  }
}

TEST_CASE_TEMPLATE("peek_magic() looks at decrypted bytes and leaves them", P, TLS_SIDES) {
  const Watchdog watchdog("peek");
  auto links = tls_links_of<P>(tcp_links(1));
  CHECK(code_of(peek_magic(links.receiver[0], 20ms)) == Errc::timed_out);
  const auto bytes = random_bytes(100);
  REQUIRE(write_all(links.sender[0], std::span(bytes).first(3)).has_value());
  CHECK(code_of(peek_magic(links.receiver[0], 20ms)) == Errc::timed_out);
  REQUIRE(write_all(links.sender[0], std::span<const std::byte>(bytes).subspan(3)).has_value());
  const auto magic = peek_magic(links.receiver[0], 5s);
  REQUIRE_MESSAGE(magic.has_value(), text(magic));
  CHECK((*magic >> 24) == std::to_integer<std::uint32_t>(bytes[0]));
  CHECK((*magic & 0xff) == std::to_integer<std::uint32_t>(bytes[3]));
  std::vector<std::byte> got(bytes.size());
  REQUIRE(read_exact(links.receiver[0], std::span<std::byte>(got)).has_value());
  CHECK((got == bytes));
  REQUIRE(links.sender[0].finish().has_value());
  CHECK(code_of(peek_magic(links.receiver[0], 5s)) == Errc::peer_closed);
}

TEST_CASE_TEMPLATE("A message whose first bytes were looked at is read whole, in one call", P, TLS_SIDES) {
  const Watchdog watchdog("looked at");
  auto links = tls_links_of<P>(tcp_links(1));
  const auto bytes = random_bytes(128);
  REQUIRE(write_all(links.sender[0], std::span<const std::byte>(bytes)).has_value());
  REQUIRE(peek_magic(links.receiver[0], 5s).has_value());
  std::vector<std::byte> got(bytes.size());
  const iovec buffer = mutable_buffer(std::span<std::byte>(got));
  CHECK(links.receiver[0].read_now(std::span(&buffer, 1)).value_or(0) == bytes.size());
  CHECK((got == bytes));
}

TEST_CASE_TEMPLATE("Nothing can be read or ended in order ahead of the handshake, and that is no crash", L,
                   TLS_LIBRARIES) {
  const Watchdog watchdog("no handshake");
  auto plain = tcp_links(2);
  for (std::size_t i = 0; i < 2; ++i) {
    auto link =
        L::Transport::on_first_write(std::move(plain.sender[i]), credentials<L>("keys.psk", TlsRole::client), {});
    REQUIRE_MESSAGE(link.has_value(), text(link));
    if (i == 0) {
      static_cast<void>(link->finish());
      CHECK(read_one(plain.receiver[0]).value_or(9) == 0);
      continue;
    }
    std::vector<std::byte> record(5 + 100, std::byte{1});  // as one of data
    for (std::size_t at = 0; const int each : {23, 3, 3, 0, 100}) record[at++] = static_cast<std::byte>(each);
    REQUIRE(write_all(plain.receiver[1], std::span<const std::byte>(record)).has_value());
    CHECK(!read_one(*link).has_value());
  }
}

TEST_CASE_TEMPLATE("A limited read can be tried again", P, TLS_SIDES) {
  const Watchdog watchdog("limited read");
  auto links = tls_links_of<P>(tcp_links(1));
  std::byte byte{};
  const iovec buffer = mutable_buffer(std::span(&byte, 1));
  CHECK(code_of(links.receiver[0].read_some(std::span(&buffer, 1), 20ms, nullptr)) == Errc::timed_out);
  const std::byte sent{7};
  REQUIRE(write_all(links.sender[0], std::span(&sent, 1)).has_value());
  CHECK(links.receiver[0].read_some(std::span(&buffer, 1), 5s, nullptr).value_or(9) == 1);
  CHECK(byte == sent);
}

TEST_CASE_TEMPLATE("Credentials that cannot be used say which file is at fault", L, TLS_LIBRARIES) {
  const std::string root = tls_files();
  const auto missing = L::Credentials::x509(root + "/nowhere", TlsRole::server);
  CHECK(text(missing).find("ca-cert.pem") != std::string::npos);
  CHECK(code_of(missing) == std::errc::no_such_file_or_directory);
  const auto no_server = L::Credentials::x509(root + "/bare", TlsRole::server);
  CHECK(text(no_server).find("server-cert.pem") != std::string::npos);
  CHECK(L::Credentials::x509(root + "/bare", TlsRole::client).has_value());

  const std::string broken = root + "/broken";
  using Copy = std::filesystem::copy_options;
  std::filesystem::copy(root + "/good", broken, Copy::overwrite_existing | Copy::recursive);
  TlsAuthority::write(broken + "/client-cert.pem", "no certificate\n");
  const auto no_pem = L::Credentials::x509(broken, TlsRole::client);
  CHECK_MESSAGE(text(no_pem).find("client-cert.pem") != std::string::npos, text(no_pem));
  TlsAuthority::write(broken + "/ca-cert.pem", "no certificate\n");
  const auto no_ca = L::Credentials::x509(broken, TlsRole::server);
  CHECK_MESSAGE(text(no_ca).find("ca-cert.pem") != std::string::npos, text(no_ca));

  CHECK(code_of(L::Credentials::psk(root + "/none.psk", TlsRole::server)) == std::errc::no_such_file_or_directory);
  CHECK(code_of(L::Credentials::psk(root + "/keys.psk", TlsRole::client, "nobody")) == Errc::bad_option);
  CHECK(code_of(L::Credentials::psk(root + "/good/ca-cert.pem", TlsRole::server)) == Errc::bad_option);
  CHECK(code_of(L::Credentials::psk(tls_files() + "/keys.psk", TlsRole::client, "")) == Errc::bad_option);
  CHECK(L::Credentials::psk(tls_files() + "/keys.psk", TlsRole::server, "").has_value());
}

#else
#include <doctest/doctest.h>

TEST_CASE("TLS is not in this build") { MESSAGE("neither GnuTLS nor OpenSSL was found, or both are off"); }
#endif

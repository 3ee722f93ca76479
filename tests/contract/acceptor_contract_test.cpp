// SPDX-License-Identifier: MIT
//
// The models of the Acceptor concept keep its contract, and the check notices acceptors that do not.
#include "multifd/testing/acceptor_contract.hpp"

#include <doctest/doctest.h>

#include <poll.h>

#include <cstdlib>
#include <filesystem>
#include <string>

#include "exemplar/acceptor.hpp"
#include "support/links.hpp"
#if defined(MULTIFD_HAS_TLS) || defined(MULTIFD_HAS_OPENSSL)
#include "support/tls_links.hpp"
#endif

using namespace multifd;
using namespace test;

namespace {

FdTransport come(const Address& address, std::string_view says) {
  auto link = connect_to(address, {.connect_timeout = 20s});
  REQUIRE_MESSAGE(link.has_value(), text(link));
  REQUIRE(write_all(*link, std::as_bytes(std::span(says))).has_value());
  return std::move(*link);
}

struct Folder {
  Folder() { REQUIRE(::mkdtemp(name) != nullptr); }
  ~Folder() { std::filesystem::remove_all(name); }
  char name[32] = "/tmp/multifd-test-XXXXXX";
};

void check(const ContractReport& report) {
  CHECK_MESSAGE(report.ok(), report.text());
  for (const std::string& note : report.notes) MESSAGE(note);
}

constexpr auto open_plain = [](Listener& listener, AcceptorSetup setup) {
  return PlainAcceptor::open(listener, {.first_bytes_timeout = setup.limit, .on_refused = std::move(setup.on_refused)});
};

/// A PlainAcceptor with one fault.
enum class Fault {
  deaf,
  forgetful,
  never_pending,
  other_magic,
  ends_at_strangers,
  looks_away,
  takes_a_byte,
  backwards
};

template <Fault fault>
class Faulty {
 public:
  using Link = FdTransport;
  using Next = Result<std::optional<Arrival<FdTransport>>>;

  static Result<Faulty> open(Listener& listener, AcceptorSetup setup) {
    Faulty made(listener);
    auto next = open_plain(listener, std::move(setup));
    if (!next) return std::unexpected(next.error());
    made.next_.emplace(std::move(*next));
    return made;
  }

  Next next(std::chrono::steady_clock::time_point deadline, const Interrupt* interrupt) {
    static const Interrupt never = *Interrupt::create();
    if constexpr (fault == Fault::looks_away) {
      // As an acceptor that polls the listening descriptor itself.
      pollfd listening{.fd = listener_->native_handle(), .events = POLLIN, .revents = 0};
      while (::poll(&listening, 1, 1) == 0 && !next_->pending()) {
        if ((interrupt != nullptr ? interrupt : listener_->interrupt())->triggered())
          return fail(Errc::cancelled, Stage::accept, "accept");
        if (std::chrono::steady_clock::now() >= deadline) return fail(Errc::timed_out, Stage::accept, "accept");
      }
    }
    auto got = next_->next(deadline, fault == Fault::deaf ? &never : interrupt);
    if (!got || !*got) return got;
    Arrival<FdTransport>& arrival = **got;
    if (fault == Fault::other_magic && arrival.magic) arrival.magic = __builtin_bswap32(*arrival.magic);
    if (fault == Fault::backwards) arrival.number = 1000 - arrival.number;
    if (fault == Fault::ends_at_strangers && !arrival.magic) return fail(Errc::peer_closed, Stage::accept, "accept");
    if (fault == Fault::takes_a_byte) {
      std::byte byte{};
      (void)read_exact(arrival.link, std::span(&byte, 1));
    }
    return got;
  }
  Result<void> watch_end(const FdTransport& link, std::uint32_t events) {
    if (fault == Fault::forgetful) return {};
    return next_->watch_end(link, events);
  }
  bool pending() const { return fault != Fault::never_pending && next_->pending(); }

 private:
  explicit Faulty(Listener& listener) : listener_(&listener) {}
  Listener* listener_;
  std::optional<PlainAcceptor> next_{};
};

/// `patience`: long, so that a busy machine changes nothing; shorter for an acceptor whose fault is a wait that never ends.
template <Fault fault>
void check_noticed(std::string_view says, std::chrono::milliseconds patience = 20s) {
  static_assert(check_acceptor<Faulty<fault>>());
  const auto report = check_acceptor_contract<Faulty<fault>>(
      [](Listener& listener, AcceptorSetup setup) { return Faulty<fault>::open(listener, std::move(setup)); }, come,
      {.patience = patience});
  CHECK_MESSAGE(report.text().contains(says), report.text());
}

}  // namespace

TEST_CASE("PlainAcceptor keeps the Acceptor contract over TCP and over a UNIX socket") {
  const Watchdog watchdog("the plain acceptor's contract");
  check(check_acceptor_contract<PlainAcceptor>(open_plain, come, {.patience = 20s}));
  const Folder folder;
  check(check_acceptor_contract<PlainAcceptor>(
      open_plain, come,
      {.address = {.kind = AddressKind::unix_socket, .path = std::string(folder.name) + "/socket"}, .patience = 20s}));
}

TEST_CASE("The exemplar keeps the Acceptor contract") {
  const Watchdog watchdog("the exemplar's contract");
  using Counted = exemplar::Counted<PlainAcceptor>;
  check(check_acceptor_contract<Counted>(
      [](Listener& listener, AcceptorSetup setup) -> Result<Counted> {
        auto acceptor = open_plain(listener, std::move(setup));
        if (!acceptor) return std::unexpected(acceptor.error());
        return Counted{std::move(*acceptor)};
      },
      come, {.patience = 20s}));
}

#if defined(MULTIFD_HAS_TLS) || defined(MULTIFD_HAS_OPENSSL)
TEST_CASE_TEMPLATE("A TLS acceptor keeps the Acceptor contract with certificates and with pre-shared keys", L,
                   TLS_LIBRARIES) {
  using Secured = TlsAcceptorOf<typename L::Credentials>;
  const Watchdog watchdog("the TLS acceptor's contract");
  for (const char* const name : {"good", "keys.psk"}) {
    const auto server = credentials<L>(name, TlsRole::server);
    const auto client = credentials<L>(name, TlsRole::client);
    check(check_acceptor_contract<Secured>(
        [&](Listener& listener, AcceptorSetup setup) {
          return Secured::open(listener, {.credentials = &server,
                                          .tls = {.handshake_timeout = setup.limit},
                                          .on_refused = std::move(setup.on_refused)});
        },
        [&](const Address& address, std::string_view says) {
          auto link = connect_to(address, {.connect_timeout = 20s});
          REQUIRE_MESSAGE(link.has_value(), text(link));
          auto secured = tls_handshake(std::move(*link), client, {.hostname = "localhost", .handshake_timeout = 20s});
          REQUIRE_MESSAGE(secured.has_value(), text(secured));
          REQUIRE(write_all(*secured, std::as_bytes(std::span(says))).has_value());
          return std::move(*secured);
        },
        {.patience = 20s}));
  }
}
#endif

TEST_CASE("The check notices an acceptor that breaks a rule") {
  const Watchdog watchdog("acceptors with a fault");
  check_noticed<Fault::deaf>("does not end next()", 1s);
  check_noticed<Fault::forgetful>("watch_end: next() does not return none", 1s);
  check_noticed<Fault::never_pending>("pending: false");
  check_noticed<Fault::other_magic>("magic is not the first four bytes");
  check_noticed<Fault::ends_at_strangers>("a stranger: is an error of next()");
  check_noticed<Fault::looks_away>("a connection that the listener has looked at: not accepted", 1s);
  check_noticed<Fault::takes_a_byte>("the bytes that came are not there to be read", 1s);
  check_noticed<Fault::backwards>("number: does not grow");
}

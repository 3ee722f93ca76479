// SPDX-License-Identifier: MIT
#include "common/program.hpp"

#include <fmt/format.h>
#include <poll.h>
#include <unistd.h>
#include <CLI/CLI.hpp>

#include <array>
#include <csignal>
#include <cstdlib>
#include <iterator>
#include <optional>
#include <vector>

namespace program {
namespace {

std::string with_context(const multifd::Error& error, const std::string& context) {
  const std::string text = multifd::describe(error);
  return context.empty() ? text : context + ": " + text;
}

// How a stream looks that the peer tore down.
bool is_broken_stream(const std::error_code& code) {
  using multifd::Errc;
  return code == Errc::truncated_hello || code == Errc::truncated_header || code == Errc::truncated_payload ||
         code == Errc::unsynced_end;
}

// A signal handler reaches nothing but globals.
std::optional<multifd::Interrupt> signal_interrupt;
volatile std::sig_atomic_t signals_seen = 0;

void on_signal(int) {
  signals_seen = signals_seen + 1;
  if (signals_seen > 1) _exit(exit_failed);
  signal_interrupt->trigger();
}

}  // namespace

Failure::Failure(const multifd::Error& error, const std::string& context)
    : std::runtime_error(with_context(error, context)),
      may_be_echo_(error.code == multifd::Condition::peer_gone || is_broken_stream(error.code)) {}

Failure Failure::of_peer(const std::string& reason) {
  Failure failure("the other side gave up: " + reason);
  failure.from_peer_ = true;
  return failure;
}

int run(CLI::App& app, int argc, char** argv, const std::function<int()>& body) {
  try {
    app.parse(argc, argv);
  } catch (const CLI::ParseError& error) {
    return app.exit(error) == 0 ? exit_done : exit_usage;
  }
  try {
    return body();
  } catch (const Usage& error) {
    fmt::print(stderr, "{}: {}\nRun with --help for more information.\n", app.get_name(), error.what());
    return exit_usage;
  } catch (const std::exception& error) {
    fmt::print(stderr, "{}: {}\n", app.get_name(), error.what());
    return exit_failed;
  }
}

multifd::Interrupt& catch_signals() {
  signal_interrupt = need(multifd::Interrupt::create());
  struct sigaction action{};
  action.sa_handler = on_signal;
  sigaction(SIGINT, &action, nullptr);
  sigaction(SIGTERM, &action, nullptr);
  std::signal(SIGPIPE, SIG_IGN);
  return *signal_interrupt;
}

OnInterrupt::OnInterrupt(const multifd::Interrupt& interrupt, std::function<void()> action)
    : done_(need(multifd::Interrupt::create())) {
  thread_ = std::thread([&interrupt, this, action = std::move(action)] {
    std::array<pollfd, 2> events{{{interrupt.native_handle(), POLLIN, 0}, {done_.native_handle(), POLLIN, 0}}};
    while (::poll(events.data(), events.size(), -1) < 0 && errno == EINTR) {
    }
    if (events[0].revents != 0) action();
  });
}

OnInterrupt::~OnInterrupt() {
  done_.trigger();
  thread_.join();
}

CLI::Option* add_size(CLI::App& app, const std::string& name, std::uint64_t& bytes, const std::string& help) {
  return app.add_option(name, bytes, help)->transform(CLI::AsSizeValue(false))->type_name("SIZE");
}

std::string format_bytes(double bytes) {
  constexpr const char* units[] = {"B", "KiB", "MiB", "GiB", "TiB"};
  std::size_t unit = 0;
  while (bytes >= 1024 && unit + 1 < std::size(units)) {
    bytes /= 1024;
    ++unit;
  }
  return unit == 0 ? fmt::format("{:.0f} B", bytes) : fmt::format("{:.2f} {}", bytes, units[unit]);
}

multifd::Address address_of(const std::string& text, const char* option) {
  auto address = multifd::parse_address(text);
  if (!address) throw Usage(fmt::format("{} {}: {}", option, text, multifd::describe(address.error())));
  return std::move(*address);
}

}  // namespace program

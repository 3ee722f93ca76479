// SPDX-License-Identifier: MIT
#include "common/program.hpp"

#include <fmt/format.h>
#include <poll.h>
#include <unistd.h>
#include <CLI/CLI.hpp>

#include <array>
#include <cmath>
#include <csignal>
#include <cstdlib>
#include <iterator>
#include <map>
#include <mutex>
#include <set>
#include <vector>

#include "common/mapped_file.hpp"

namespace program {
namespace {

std::string with_context(multifd::Error error, const std::string& context) {
  if (context.contains(error.subject.view())) error.subject = {};  // it is named already
  std::string text = multifd::describe(error);
  // What the system says when nobody acknowledges what was sent; a time limit of our own has a code of ours.
  if (error.code == std::error_code(ETIMEDOUT, std::system_category()) && error.stage != multifd::Stage::connect)
    text += ": the other side's host does not answer any more (--peer-timeout)";
  return context.empty() ? text : context + ": " + text;
}

// How a stream looks that the peer tore down.
bool is_broken_stream(const std::error_code& code) {
  using multifd::Errc;
  return code == Errc::truncated_hello || code == Errc::truncated_header || code == Errc::truncated_payload ||
         code == Errc::unsynced_end;
}

// What a second signal removes.
struct Unfinished {
  std::mutex mutex;
  std::set<const std::string*> paths;
};

// Never destroyed, because a signal may come while the process ends.
Unfinished& unfinished() {
  static auto* const all = new Unfinished;
  return *all;
}

}  // namespace

Failure::Failure(const multifd::Error& error, const std::string& context)
    : std::runtime_error(with_context(error, context)),
      code_(error.code),
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

const multifd::Interrupt& catch_signals() {
  static auto* const interrupt = new multifd::Interrupt(need(multifd::Interrupt::create()));
  std::signal(SIGPIPE, SIG_IGN);
  std::signal(SIGXFSZ, SIG_IGN);  // EFBIG says it, and where
  watch_mapped_files(*interrupt);
  sigset_t signals;
  sigemptyset(&signals);
  for (const int signal : {SIGINT, SIGTERM}) {
    sigaddset(&signals, signal);
    std::signal(signal, SIG_DFL);  // a shell starts what is to run in the background with SIGINT ignored
  }
  pthread_sigmask(SIG_BLOCK, &signals, nullptr);
  unfinished();  // made here: that thread must not allocate, which waits for an madvise() of the others
  std::thread([signals] {
    pthread_setname_np(pthread_self(), "signals");
    int signal = 0;
    sigwait(&signals, &signal);
    interrupt->trigger();
    sigwait(&signals, &signal);
    const std::lock_guard lock(unfinished().mutex);
    for (const std::string* path : unfinished().paths) ::unlink(path->c_str());
    _exit(exit_failed);
  }).detach();
  return *interrupt;
}

RemovedBySignal::RemovedBySignal(std::string path) : path_(std::move(path)) {
  const std::lock_guard lock(unfinished().mutex);
  unfinished().paths.insert(&path_);
}

RemovedBySignal::~RemovedBySignal() {
  const std::lock_guard lock(unfinished().mutex);
  unfinished().paths.erase(&path_);
}

int RemovedBySignal::renamed_to(std::string path, const std::function<int()>& rename) {
  const std::lock_guard lock(unfinished().mutex);
  const int error = rename();
  if (error == 0) path_.swap(path);
  return error;
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

CLI::Option* add_duration(CLI::App& app, const std::string& name, std::chrono::milliseconds& time,
                          const std::string& help) {
  const std::map<std::string, double> units{{"ms", 0.001}, {"s", 1}, {"min", 60}, {"h", 3600}};
  // The library's rule (time_limit.hpp): 0 is no limit. What is less than a millisecond is none of these zeros.
  const auto take = [&time](double seconds) {
    time = std::chrono::milliseconds(seconds > 0 ? std::max(std::llround(seconds * 1000), 1LL) : 0);
  };
  return app.add_option_function<double>(name, take, help + "; 0: no limit")
      ->transform(CLI::AsNumberWithUnit(units).description(""))
      ->check(CLI::Range(0.0, 86'400.0).description(""))
      ->default_str(fmt::format("{:g}s", static_cast<double>(time.count()) / 1000))
      ->type_name("SECONDS");
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

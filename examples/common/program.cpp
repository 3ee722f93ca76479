// SPDX-License-Identifier: MIT
#include "common/program.hpp"

#include <fcntl.h>
#include <fmt/format.h>
#include <poll.h>
#include <unistd.h>
#include <CLI/CLI.hpp>

#include <algorithm>
#include <array>
#include <cctype>
#include <cerrno>
#include <charconv>
#include <cmath>
#include <csignal>
#include <cstdlib>
#include <iterator>
#include <limits>
#include <mutex>
#include <optional>
#include <set>
#include <string_view>
#include <vector>

#include "common/help.hpp"
#include "common/limits.hpp"
#include "common/mapped_file.hpp"
#include "common/tell.hpp"

namespace program {
namespace {

/// Whether a part of `context` (parts: between ": ") begins with that word.
bool begins_with_word(std::string_view context, std::string_view word) {
  while (!context.empty()) {
    if (context.starts_with(word) && (context.size() == word.size() || context[word.size()] == ' ')) return true;
    const std::size_t end = context.find(": ");
    context = end == context.npos ? "" : context.substr(end + 2);
  }
  return false;
}

/// describe() without what `context` says already: "connect to tcp:host:1: Connection refused" does not say "connect" again.
std::string describe_within(multifd::Error error, std::string_view context) {
  using multifd::Stage;
  const std::string_view op = error.op;
  const std::string_view verb = op.substr(0, op.find(' '));
  if (context.contains(error.subject.view())) error.subject = {};
  // These two are the system calls ahead of any accept().
  const bool listening = error.stage == Stage::accept && (verb == "bind" || verb == "listen");
  if (error.stage != Stage::none && (listening || begins_with_word(context, to_string(error.stage))))
    error.stage = Stage::none;
  if (!op.empty() && begins_with_word(context, verb)) {
    error.stage = Stage::none;
    // What is more than the verb is said nowhere else.
    error.op = verb.size() == op.size() ? "" : error.op + verb.size() + 1;
  }
  return multifd::describe(error);
}

std::string with_context(const multifd::Error& error, const std::string& context) {
  std::string text = describe_within(error, context);
  // What the system says when nobody acknowledges what was sent; a time limit of our own has a code of ours.
  if (error.code == std::error_code(ETIMEDOUT, std::system_category()) && error.stage != multifd::Stage::connect)
    text += ": the other side's host does not answer any more (--peer-timeout)";
  const bool of_system = error.code.category() == std::system_category();
  if (of_system && (error.code.value() != EAGAIN || error.stage == multifd::Stage::setup))
    text += limit_hint(error.code.value());
  return context.empty() ? text : context + ": " + text;
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

/// Digits, up to the unit behind them.
std::string_view digits_of(std::string_view text) {
  return text.substr(0, std::min(text.size(), text.find_first_not_of("0123456789")));
}

std::optional<std::uint64_t> parse_whole(std::string_view digits) {
  std::uint64_t number = 0;
  const auto [end, error] = std::from_chars(digits.data(), digits.data() + digits.size(), number);
  if (error != std::errc{} || end != digits.data() + digits.size()) return std::nullopt;
  return number;
}

std::optional<std::uint64_t> parse_size(std::string_view text) {
  const auto number = parse_whole(digits_of(text));
  std::string unit(text.substr(digits_of(text).size()));
  std::ranges::transform(unit, unit.begin(), [](unsigned char c) { return static_cast<char>(std::toupper(c)); });
  std::size_t power = 0;
  if (!unit.empty() && unit != "B") {
    power = std::string_view("KMGTPE").find(unit[0]) + 1;
    const std::string_view rest = std::string_view(unit).substr(1);
    if (power == 0 || (!rest.empty() && rest != "B" && rest != "I" && rest != "IB")) return std::nullopt;
  }
  if (!number || *number > ~std::uint64_t{0} >> 10 * power) return std::nullopt;
  return *number << 10 * power;
}

/// As users type it: "1G", "4096".
std::string size_text(std::uint64_t bytes) {
  constexpr std::string_view units = "KMGTPE";
  std::size_t power = 0;
  std::uint64_t number = bytes;
  for (; number != 0 && number % 1024 == 0 && power < units.size(); ++power) number /= 1024;
  return power == 0 ? std::to_string(bytes) : std::to_string(number) + units[power - 1];
}

/// Digits, with others behind a point or without.
bool is_decimal(std::string_view text) {
  const std::string_view whole = digits_of(text);
  const std::string_view rest = text.substr(whole.size());
  return !whole.empty() &&
         (rest.empty() || (rest.size() > 1 && rest[0] == '.' && digits_of(rest.substr(1)) == rest.substr(1)));
}

std::optional<double> parse_seconds(std::string_view text) {
  const std::size_t unit_at = std::min(text.size(), text.find_first_not_of("0123456789."));
  constexpr std::pair<std::string_view, double> units[] = {{"", 1},   {"ms", 0.001}, {"s", 1},
                                                           {"m", 60}, {"min", 60},   {"h", 3600}};
  const auto* const unit = std::ranges::find(units, text.substr(unit_at), &std::pair<std::string_view, double>::first);
  if (!is_decimal(text.substr(0, unit_at)) || unit == std::end(units)) return std::nullopt;
  return std::strtod(std::string(text.substr(0, unit_at)).c_str(), nullptr) * unit->second;
}

/// As people count; where others would take "010" for 8.
bool is_whole(std::string_view text) { return parse_whole(text).has_value() && (text.size() == 1 || text[0] != '0'); }

bool is_signed(std::string_view text) { return is_whole(text.substr(text.starts_with('-') ? 1 : 0)); }

/// The parser takes "010" for 8, "0x10" for 16, "" for 0, and what is too large for the largest: a number here is digits.
void check_numbers(CLI::App& app) {
  const auto check = [](CLI::Option* option, const char* what, bool (*good)(std::string_view)) {
    option->check(CLI::Validator(
        [=](std::string& text) { return good(text) ? std::string() : fmt::format("\"{}\" is no {}", text, what); }, "",
        "number"));
  };
  for (CLI::Option* option : app.get_options()) {
    const std::string type = option->get_type_name();
    if (type.starts_with("UINT")) check(option, "whole number", is_whole);
    if (type.starts_with("INT")) check(option, "whole number", is_signed);
    if (type.starts_with("FLOAT")) check(option, "number", is_decimal);
  }
}

/// Descriptors 0 to 2 that are closed would be given to the next socket or file, and what is said would go into that.
/// What is written to one from here fails, as on a closed one.
void fill_standard_descriptors() {
  for (int fd = STDIN_FILENO; fd <= STDERR_FILENO; ++fd)
    if (::fcntl(fd, F_GETFD) < 0 && errno == EBADF) (void)::open("/dev/null", O_RDONLY);  // the lowest that is free
}

}  // namespace

Failure::Failure(const multifd::Error& error, const std::string& context)
    : std::runtime_error(with_context(error, context)), code_(error.code) {}

Failure Failure::of_peer(const std::string& reason) { return Failure("the other side gave up: " + reason); }

int run(CLI::App& app, int argc, char** argv, const std::function<int()>& body) {
  fill_standard_descriptors();
  raise_limits();
  check_numbers(app);
  set_help(app);
  try {
    app.parse(argc, argv);
  } catch (const CLI::ParseError& error) {
    return app.exit(error) == 0 ? exit_done : exit_usage;
  }
  try {
    return body();
  } catch (const Usage& error) {
    tell("{}: {}\nRun with --help for more information.\n", app.get_name(), error.what());
    return exit_usage;
  } catch (const std::exception& error) {
    tell("{}: {}\n", app.get_name(), text_of(error));
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
  sigset_t blocked = signals;
  sigaddset(&blocked, SIGUSR1);  // for OnSignal
  pthread_sigmask(SIG_BLOCK, &blocked, nullptr);
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

OnSignal::OnSignal(int signal, std::function<void()> action)
    : thread_([this, signal, action = std::move(action)] {
        sigset_t only;
        sigemptyset(&only);
        sigaddset(&only, signal);
        while (!done_) {
          const timespec tick{.tv_sec = 0, .tv_nsec = 200'000'000};
          if (sigtimedwait(&only, nullptr, &tick) == signal) action();
        }
      }) {}

OnSignal::~OnSignal() {
  done_ = true;
  thread_.join();
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

bool wait_for(int fd, std::chrono::milliseconds limit, const multifd::Interrupt* interrupt) {
  using Clock = std::chrono::steady_clock;
  std::array<pollfd, 2> entries{{{.fd = fd, .events = POLLIN, .revents = 0},
                                 {.fd = interrupt ? interrupt->native_handle() : -1, .events = POLLIN, .revents = 0}}};
  for (const auto deadline = multifd::deadline_after(limit);;) {
    const std::int64_t left = std::chrono::ceil<std::chrono::milliseconds>(deadline - Clock::now()).count();
    const auto timeout = std::clamp<std::int64_t>(left, 0, std::numeric_limits<int>::max());
    const int ready = ::poll(entries.data(), entries.size(), static_cast<int>(timeout));
    if (ready > 0) return entries[0].revents != 0;
    if (ready < 0 && errno != EINTR) return false;
    if (ready == 0 && Clock::now() >= deadline) return false;
  }
}

CLI::Option* add_size(CLI::App& app, const std::string& name, std::uint64_t& bytes, const std::string& help) {
  const auto take = [](std::string& text) -> std::string {
    const auto size = parse_size(text);
    if (!size) return "\"" + text + "\" is no size: a whole number of bytes, or of K, M, G or T of them, below 16E";
    text = std::to_string(*size);
    return {};
  };
  return app.add_option(name, bytes, help)
      ->transform(CLI::Validator(take, "", "size"))
      ->type_name("SIZE")
      ->default_str(size_text(bytes));
}

CLI::Option* add_duration(CLI::App& app, const std::string& name, std::chrono::milliseconds& time,
                          const std::string& help) {
  const auto check = [](std::string& text) -> std::string {
    const auto seconds = parse_seconds(text);
    if (!seconds) return "\"" + text + "\" is no time: a number of seconds, or one with ms, s, m, min or h behind it";
    if (*seconds < 0 || *seconds > 86'400) return "\"" + text + "\" is not from 0 (no limit) to a day";
    return {};
  };
  // The library's rule (time_limit.hpp): 0 is no limit. What is less than a millisecond is none of these zeros.
  const auto take = [&time](const std::string& text) {
    const double seconds = parse_seconds(text).value_or(0);
    time = std::chrono::milliseconds(seconds > 0 ? std::max(std::llround(seconds * 1000), 1LL) : 0);
  };
  return app.add_option_function<std::string>(name, take, help + "; 0: no limit")
      ->check(CLI::Validator(check, "", "time"))
      ->default_str(fmt::format("{:g}s", static_cast<double>(time.count()) / 1000))
      ->type_name("SECONDS");
}

std::string format_time(std::chrono::milliseconds time) {
  return fmt::format("{:g} s", static_cast<double>(time.count()) / 1000);
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

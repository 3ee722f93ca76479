// SPDX-License-Identifier: MIT
//
// live_migration: a small VMM whose running guest moves to a second process. Without --listen and --connect the
// program starts that second process itself, on this machine.
#include <fmt/format.h>

#include <sys/wait.h>
#include <unistd.h>
#include <CLI/CLI.hpp>
#include <nlohmann/json.hpp>

#include <algorithm>
#include <array>
#include <cerrno>
#include <chrono>
#include <cmath>
#include <csignal>
#include <cstring>
#include <iterator>
#include <string>
#include <vector>

#include "common/limits.hpp"
#include "common/mapping.hpp"
#include "common/tell.hpp"
#include "common/uuid.hpp"
#include "live_migration/migration.hpp"

#include <multifd/migrate/downtime_ramp.hpp>
#include <multifd/migrate/fixed_downtime.hpp>
#include <multifd/migrate/priced_downtime.hpp>
#include <multifd/migrate/stall_detection.hpp>

namespace {

using program::Failure;
using program::need;

/// The destination as a child process: this program again, listening on a free port that it prints.
class Child {
 public:
  explicit Child(const std::vector<std::string>& arguments) {
    std::array<int, 2> out{};
    if (::pipe2(out.data(), O_CLOEXEC) != 0) throw Failure(fmt::format("pipe: {}", std::strerror(errno)));
    std::vector<char*> argv;
    for (const std::string& each : arguments) argv.push_back(const_cast<char*>(each.c_str()));
    argv.push_back(nullptr);
    pid_ = ::fork();
    if (pid_ == 0) {
      ::dup2(out[1], STDOUT_FILENO);
      ::execv("/proc/self/exe", argv.data());
      _exit(127);
    }
    ::close(out[1]);
    if (pid_ < 0) throw Failure(fmt::format("fork: {}", std::strerror(errno)));
    char byte = 0;
    while (::read(out[0], &byte, 1) == 1 && byte != '\n') address_ += byte;
    ::close(out[0]);
    if (address_.empty()) throw Failure("the destination process did not start");
  }
  ~Child() {
    if (pid_ <= 0) return;
    ::kill(pid_, SIGTERM);
    join();
  }
  Child(const Child&) = delete;
  Child& operator=(const Child&) = delete;

  const std::string& address() const { return address_; }
  /// The exit status.
  int join() {
    int status = 0;
    while (::waitpid(pid_, &status, 0) < 0 && errno == EINTR) {
    }
    pid_ = -1;
    return WIFEXITED(status) ? WEXITSTATUS(status) : program::exit_failed;
  }

 private:
  pid_t pid_ = -1;
  std::string address_;
};

}  // namespace

namespace {

/// The rule of --switch.
multifd::migrate::AnySwitchRule rule_of(const std::string& name, std::chrono::milliseconds max_downtime) {
  using namespace multifd::migrate;
  if (name == "fixed") return FixedDowntime({.max_downtime = max_downtime});
  if (name == "ramp")
    return DowntimeRamp({.first_downtime = std::min(max_downtime, DowntimeRampOptions{}.max_downtime)});
  if (name == "stall")
    return StallDetection({.first_downtime = std::min(max_downtime, StallDetectionOptions{}.max_downtime)});
  return PricedDowntime({.price = {.max_downtime = max_downtime}});
}

}  // namespace

int main(int argc, char** argv) {
  live::Settings settings;
  std::uint64_t memory = std::uint64_t{1} << 30;
  std::uint64_t working_set = std::uint64_t{64} << 20;
  std::uint64_t used = 0;
  std::uint64_t dirty_rate = std::uint64_t{64} << 20;
  double max_downtime_ms = 300;
  std::string rule = "priced";
  std::string postcopy = "never";
  bool throttle = false;
  std::string backend = "auto";
  std::string listen;
  std::string connect;
  double measure_s = 0;

  CLI::App app("Migrates a running guest to a second process over many channels.", "live_migration");
  program::add_size(app, "--memory", memory, "Guest memory; with --listen the most that is taken");
  auto* using_memory =
      program::add_size(app, "--used", used, "How much of it the guest has ever touched (default: 60 %)");
  settings.stack.add_to(app);
  program::add_size(app, "--working-set", working_set, "Memory that the guest keeps rewriting");
  program::add_size(app, "--dirty-rate", dirty_rate, "How much it rewrites per second (0: as fast as it goes)");
  app.add_option("--busy", settings.guest.quiet.busy_s, "Seconds that the guest is busy before it is quiet for --quiet")
      ->check(CLI::Range(0.0, 3600.0))
      ->capture_default_str();
  app.add_option("--quiet", settings.guest.quiet.quiet_s, "Seconds that it is quiet then, in turn; 0: never")
      ->check(CLI::Range(0.0, 3600.0))
      ->capture_default_str();
  program::add_size(app, "--quiet-rate", settings.guest.quiet.dirty_bytes_per_s,
                    "How much it rewrites per second then");
  app.add_option("--max-downtime", max_downtime_ms, "Milliseconds that the guest may stand still")
      ->check(CLI::PositiveNumber)
      ->capture_default_str();
  app.add_option(
         "--switch", rule,
         "When the guest is stopped. priced: while waiting costs more than it gains; fixed: when the downtime fits "
         "--max-downtime, as QEMU; ramp: as fixed, with a limit that grows; stall: at a low after a stall; "
         "benchmarks/simulate compares them")
      ->check(CLI::IsMember({"priced", "fixed", "ramp", "stall"}))
      ->capture_default_str();
  app.add_option("--postcopy", postcopy,
                 "Whether the guest may run there before its memory is there. fallback: where rounds do not converge, "
                 "it would be given up, or "
                 "stopped for longer than --max-downtime; at-once: without a round. Ending either side then ends the "
                 "guest, and memory that follows is not compared")
      ->check(CLI::IsMember({"never", "fallback", "at-once"}))
      ->capture_default_str();
  program::add_size(
      app, "--postcopy-bandwidth", settings.postcopy.bandwidth,
      "Bytes per second for memory that follows and nobody waits for (0: no cap; --bandwidth ends there)");
  app.add_flag("--throttle", throttle, "Slow a guest that dirties too much, more and more, as QEMU's auto-converge");
  program::add_duration(app, "--timeout", settings.converge.time_limit,
                        "Give up when the guest has not been stopped by then");
  app.add_option("--max-rounds", settings.converge.max_rounds,
                 "Give up when the guest has not been stopped by then; 0: no limit")
      ->check(CLI::Range(0u, 100'000u))
      ->capture_default_str();
  app.add_flag_callback(
      "--verify", [&] { settings.verify = multifd::migrate::Verify::required; },
      "Compare all memory, page by page, before the guest runs there (default, where the destination can); not part of "
      "the "
      "downtime that is reported");
  app.add_flag_callback("--no-verify", [&] { settings.verify = multifd::migrate::Verify::off; }, "Do not compare it");
  app.add_flag(
      "--skip-unchanged", settings.skip_unchanged,
      "Leave out pages that were written to and are as they were last sent; for guests that rewrite equal values");
  app.add_option("--run-before", settings.run_before_s, "Seconds the guest runs before it migrates")
      ->check(CLI::Range(0.0, 3600.0))
      ->capture_default_str();
  app.add_option("--run-after", settings.run_after_s, "Seconds it runs on the other side before the verdict")
      ->check(CLI::Range(0.0, 60.0))
      ->capture_default_str();
  app.add_option("--backend", backend, "What runs the guest: a KVM virtual machine or a thread of this process")
      ->check(CLI::IsMember({"auto", "kvm", "thread"}))
      ->capture_default_str();
  auto* measuring =
      app.add_option("--measure-dirty-rate", measure_s,
                     "Measure for so many seconds, one by one, what the guest dirties, and end: nothing is migrated")
          ->check(CLI::Range(0.001, 3600.0));
  app.add_option("--seed", settings.guest.seed, "Seed of the guest's memory")->capture_default_str();
  settings.limits.add_to_both(app);
  settings.tls.add_to(app, program::TlsSide::client);
  app.add_option("--json", settings.json_path, "Write one JSON object to a file, or to stdout for -");
  auto* listening = app.add_option(
      "--listen", listen,
      "Be the destination, and wait on tcp:HOST:PORT or unix:PATH; of the others --memory, --backend, --json, "
      "--path-timeout, --resume-timeout, --tls-psk and --tls-dir (server-cert.pem, server-key.pem) count here");
  app.add_option("--connect", connect, "Be the source, for a destination that listens there")
      ->excludes(listening)
      ->excludes(measuring);
  listening->excludes(measuring);
  settings.paths.add_to(app);
  settings.resume.add_to(app);
  app.get_option("--path")->excludes(listening)->excludes(measuring);

  return program::run(app, argc, argv, [&] {
    settings.guest.memory_bytes = memory;
    settings.guest.working_set_bytes = working_set;
    if (using_memory->count() > 0) {
      if (used > memory) throw program::Usage("--used: more than --memory");
      settings.guest.text_share = static_cast<double>(used) / static_cast<double>(memory) / 2;
      settings.guest.zero_share = 1 - 2 * settings.guest.text_share;
    }
    settings.guest.dirty_bytes_per_s = dirty_rate;
    settings.converge.max_downtime =
        std::chrono::milliseconds(std::max<std::int64_t>(1, std::llround(max_downtime_ms)));
    settings.converge.device_state = std::chrono::milliseconds(2);  // of a guest with one vCPU and no other device
    settings.converge.rule = rule_of(rule, settings.converge.max_downtime);
    settings.postcopy.strategy = postcopy == "fallback"  ? multifd::migrate::Postcopy::fallback
                                 : postcopy == "at-once" ? multifd::migrate::Postcopy::at_once
                                                         : multifd::migrate::Postcopy::never;
    if (throttle) settings.converge.throttle = multifd::migrate::AutoConverge();
    settings.backend = *live::parse_backend(backend);
    settings.stack.check();
    settings.stack.uuid = program::new_uuid();
    settings.stack.progress_timeout = settings.limits.progress;
    const multifd::Interrupt& interrupt = program::catch_signals();
    const auto migrate_to = [&](const std::string& to) {
      settings.paths.read(to, settings.stack.channels);
      const bool follows = settings.postcopy.strategy != multifd::migrate::Postcopy::never;
      program::need_descriptors((follows ? 2 : 1) * (settings.stack.channels + 1));
      settings.tls.prepare(settings.paths.address());
      return live::source(settings, interrupt);
    };
    const auto migrate = [&]() -> nlohmann::json {
      if (measure_s > 0)
        return live::dirty_rate(settings, std::chrono::milliseconds(std::llround(std::max(1.0, measure_s * 1000))),
                                interrupt);
      if (!listen.empty()) {
        const multifd::Address address = program::address_of(listen, "--listen");
        settings.tls.be_server();
        settings.tls.prepare(address);
        auto listener = need(multifd::Listener::listen(address, multifd::max_channels + 1u, settings.limits.socket()),
                             "listen on " + listen);
        program::say("{}\n", to_string(listener.local_address()));
        return live::destination(listener, settings, memory, interrupt);
      }
      if (!connect.empty() || settings.paths.given()) return migrate_to(connect);
      std::vector<std::string> arguments{
          app.get_name(), "--listen", "tcp:127.0.0.1:0", "--memory", std::to_string(memory), "--backend", backend};
      std::ranges::move(settings.tls.arguments(), std::back_inserter(arguments));
      std::ranges::move(settings.limits.arguments(), std::back_inserter(arguments));
      std::ranges::move(settings.resume.limit_arguments(), std::back_inserter(arguments));
      Child child(arguments);
      nlohmann::json report = migrate_to(child.address());
      if (const int status = child.join(); status != program::exit_done)
        throw Failure(fmt::format("the destination process ended with status {}", status));
      return report;
    };
    program::JsonFile json_file(settings.json_path);
    const program::Stopwatch watch;
    try {
      json_file.write(migrate());
      return program::exit_done;
    } catch (const std::exception& error) {
      json_file.write(program::failure_report(program::text_of(error), watch.seconds()));
      throw;
    }
  });
}

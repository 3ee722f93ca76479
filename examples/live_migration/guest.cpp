// SPDX-License-Identifier: MIT
#include "guest.hpp"

#include <fmt/format.h>

#include <chrono>
#include <stdexcept>
#include <thread>

#include "guest_memory.hpp"
#include "kvm_guest.hpp"
#include "thread_guest.hpp"

namespace live {
namespace {

/// Lets a small KVM guest run for a moment. A /dev/kvm that opens may still be one that cannot run this
/// program (nested, emulated), and "auto" should find out before a migration depends on it. Errors: throws
/// with the reason.
void try_kvm() {
  using namespace std::chrono_literals;
  GuestConfig config;
  config.memory_bytes = std::size_t{2} << 20;
  config.working_set_bytes = 16 * guest_page_size;
  const auto guest = make_kvm_guest(config);
  guest->boot();
  guest->start_dirty_log();
  guest->run();
  const auto deadline = std::chrono::steady_clock::now() + 2s;
  GuestReport report = guest->report();
  // There is no event for a guest's write to its memory, so this polls.
  while (report.sweeps < 2 && report.failure.empty() && std::chrono::steady_clock::now() < deadline) {
    std::this_thread::sleep_for(1ms);
    report = guest->report();
  }
  guest->stop();
  report = guest->report();
  if (!report.failure.empty()) throw std::runtime_error(report.failure);
  if (report.sweeps < 2) throw std::runtime_error("a trial guest made no progress in 2 s");
  if (report.errors != 0) throw std::runtime_error("a trial guest found its memory changed");
  std::vector<std::uint64_t> dirty(bitmap_words(config.memory_bytes));
  guest->fetch_dirty(dirty);
  for (std::uint64_t i = 0; i < report.working_set_pages; ++i) {
    const std::uint64_t page = report.working_set_first + i;
    if ((dirty[page / 64] >> (page % 64) & 1) == 0)
      throw std::runtime_error("the dirty log misses pages that a trial guest wrote");
  }
}

}  // namespace

std::optional<Backend> parse_backend(std::string_view name) {
  if (name == "auto") return Backend::automatic;
  if (name == "kvm") return Backend::kvm;
  if (name == "thread") return Backend::thread;
  return std::nullopt;
}

std::unique_ptr<Guest> make_guest(Backend backend, const GuestConfig& config, std::string* note) {
  check_config(config);
  const auto say = [note](std::string text) {
    if (note != nullptr) *note = std::move(text);
  };
  if (backend == Backend::automatic) {
    try {
      try_kvm();
      auto guest = make_kvm_guest(config);
      say("kvm: a KVM guest with one virtual CPU");
      return guest;
    } catch (const std::runtime_error& e) {
      auto guest = make_thread_guest(config);
      say(fmt::format("thread: a guest thread, because of KVM: {}", e.what()));
      return guest;
    }
  }
  if (backend == Backend::kvm) {
    auto guest = make_kvm_guest(config);
    say("kvm: a KVM guest with one virtual CPU");
    return guest;
  }
  auto guest = make_thread_guest(config);
  say("thread: a guest thread, its writes found by userfaultfd");
  return guest;
}

}  // namespace live

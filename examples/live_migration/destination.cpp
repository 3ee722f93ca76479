// SPDX-License-Identifier: MIT
#include <fmt/format.h>

#include <cstring>
#include <optional>

#include "common/accept_peer.hpp"
#include "common/control.hpp"
#include "common/limits.hpp"
#include "common/progress.hpp"
#include "common/receive.hpp"
#include "common/report.hpp"
#include "common/tell.hpp"
#include "live_migration/migration.hpp"

namespace live {
namespace {

using namespace multifd;
using nlohmann::json;
using program::Accepted;
using program::Failure;
using program::Message;
using program::MessageType;
using program::need;
using program::Received;

/// Throws when a page differs from what the source has.
std::uint64_t compare_pages(const std::vector<std::byte>& theirs, std::span<const std::byte> memory) {
  const std::vector<std::byte> ours = page_digests(memory);
  if (theirs.size() != ours.size()) throw Failure("the source compares another number of pages");
  std::uint64_t different = 0;
  std::uint64_t first = 0;
  for (std::size_t page = 0; page < ours.size() / 8; ++page) {
    if (std::memcmp(&ours[8 * page], &theirs[8 * page], 8) == 0) continue;
    if (different++ == 0) first = page;
  }
  if (different > 0)
    throw Failure(fmt::format("{} of {} pages differ, the first is page {}", different, ours.size() / 8, first));
  return ours.size() / 8;
}

}  // namespace

json destination(Listener& listener, const Settings& settings, std::uint64_t memory_limit, const Interrupt& interrupt) {
  Accepted source = program::accept_peer(listener, 0, interrupt, settings.limits, settings.tls);
  try {
    const auto bytes = program::field<std::uint64_t>(source.hello, "size");
    const auto backend = parse_backend(program::field<std::string>(source.hello, "backend"));
    const auto compression = program::field<std::string>(source.hello, "compression");
    const double run_after = std::clamp(program::field<double>(source.hello, "run_after"), 0.0, 60.0);
    if (bytes == 0 || bytes % guest_page_size != 0 || bytes > memory_limit)
      throw Failure(fmt::format("the source announces a guest of {} bytes; at most {} are taken here (--memory)", bytes,
                                memory_limit));
    if (!backend || (settings.backend != Backend::automatic && settings.backend != *backend))
      throw Failure("the source's guest runs on another backend");
    // Only the size is needed: working set and seed come with the memory itself.
    const auto guest = make_guest(*backend, {.memory_bytes = bytes, .working_set_bytes = guest_page_size});

    RamMap ram(guest_page_size);
    const BlockId block = need(ram.add("pc.ram", guest->memory()));
    const Received received = program::receive_ram(compression, source, ram, block, interrupt, settings.limits);
    guest->load_state(received.state);
    source.control.send_json(MessageType::ready, json::object());

    const Message digests = [&] {
      const program::Progress waiting(
          "the guest is loaded, waiting for the source's digests of all pages",
          "Is the source stopped (SIGSTOP, a debugger, its host paused), or its guest large? "
          "--result-timeout ends the wait",
          settings.limits.hint);
      return source.control.expect(MessageType::digests, bytes / guest_page_size * 8, settings.limits.result_limit());
    }();
    const std::uint64_t pages = [&] {
      const program::Step step("comparing all pages with the source's digests");
      return compare_pages(digests.payload, guest->memory());
    }();
    const GuestReport before = guest->report();
    std::optional<program::Step> step("the guest runs, for --run-after and two sweeps of its own check");
    guest->run();
    // The guest's own check sees every page of its working set within two sweeps; give it those, and a limit.
    const program::Stopwatch running;
    GuestReport now = before;
    while ((running.seconds() < run_after || now.sweeps < before.sweeps + 2) && running.seconds() < run_after + 30) {
      pollfd event{.fd = interrupt.native_handle(), .events = POLLIN, .revents = 0};
      if (::poll(&event, 1, 20) > 0) throw Failure(Error{.code = Errc::cancelled}, "live migration");
      now = guest->report();
      if (!now.failure.empty()) throw Failure("the guest died at the destination: " + now.failure);
    }
    guest->stop();
    step.reset();
    now = guest->report();
    if (now.errors > 0)
      throw Failure(fmt::format("the guest found {} errors in its memory at the destination, the first in page {}",
                                now.errors, now.first_error_page));
    // The guest runs here now, even if the source has gone before it got the result.
    const std::string verdict = json{
        {"pages_verified", pages},
        {"sweeps", now.sweeps},
        {"pages_written", now.pages_written},
        {"errors", now.errors}}.dump();
    if (!source.control.send_last(MessageType::result, std::as_bytes(std::span(verdict))))
      program::tell("the source has gone before it heard that the guest runs here\n");
    else if (const std::string why = source.control.why_unheard(); !why.empty())
      program::tell("the guest runs here, but the source may not have heard it: {}\n", why);
    const ChannelStats sum = total(received.stats.channels);
    json report = program::report(received.seconds,
                                  (sum.normal_pages + sum.zero_pages + received.main_zero_pages) * guest_page_size,
                                  received.main_zero_pages, received.stats.channels);
    report["backend"] = guest->backend();
    report["pages_verified"] = pages;
    report["tls_cipher"] = program::text_or_null(source.control.cipher());
    return report;
  } catch (const Failure& failure) {
    source.control.give_up(failure);  // may throw the source's own reason
  } catch (const std::exception& failure) {
    source.control.give_up(Failure(program::text_of(failure)));
  }
}

}  // namespace live

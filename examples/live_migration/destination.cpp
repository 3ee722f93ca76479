// SPDX-License-Identifier: MIT
#include <fmt/format.h>

#include <cstring>
#include <optional>

#include "common/control.hpp"
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

constexpr std::size_t largest_state = 1 << 20;

/// Receives all memory and returns the virtual CPU's state.
template <class C>
std::vector<std::byte> receive(Accepted& source, Guest& guest, const Interrupt& interrupt) {
  RamMap ram(guest_page_size);
  const BlockId block = need(ram.add("pc.ram", guest.memory()));
  Interrupt wake = need(Interrupt::create());
  auto receiver = need(Receiver<FdTransport, C>::open(ram, std::move(source.channels),
                                                      {.barrier = Barrier::manual,
                                                       .destination = DestinationMemory::zeroed,
                                                       .on_error = [&](const Error&) { wake.trigger(); }}));
  const program::OnInterrupt cancel(interrupt, [&] { receiver.cancel(); });
  source.control.set_interrupt(wake);
  std::vector<std::byte> state;
  try {
    for (bool more = true; more;) {
      Message message = source.control.receive(std::max<std::size_t>(largest_state, 1 << 20));
      switch (message.type) {
        case MessageType::zero_runs: program::apply_zero_runs(message, ram, block); break;
        case MessageType::round_end: need(receiver.sync()); break;
        case MessageType::state: state = std::move(message.payload); break;
        case MessageType::done: more = false; break;
        default: throw Failure("main connection: a message that does not belong here");
      }
    }
    need(receiver.finish());
  } catch (const Failure& failure) {
    source.control.set_interrupt(interrupt);
    // When a channel failed first, that is the reason; a receiver that is well answers misuse here.
    if (!std::string_view(failure.what()).starts_with("the other side")) {
      if (const auto first = receiver.sync(); !first && first.error().code != Condition::misuse)
        throw Failure(first.error());
    }
    throw;
  }
  source.control.set_interrupt(interrupt);
  return state;
}

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

void destination(Listener& listener, const Settings& settings, std::uint64_t memory_limit, const Interrupt& interrupt) {
  Accepted source = program::accept_source(listener, 0, interrupt);
  try {
    const auto bytes = source.hello.value("size", std::uint64_t{0});
    const auto backend = parse_backend(source.hello.value("backend", std::string()));
    const auto compression = source.hello.value("compression", std::string());
    const double run_after = std::clamp(source.hello.value("run_after", 1.0), 0.0, 60.0);
    if (bytes == 0 || bytes % guest_page_size != 0 || bytes > memory_limit)
      throw Failure(fmt::format("the source announces a guest of {} bytes; at most {} are taken here (--memory)", bytes,
                                memory_limit));
    if (!backend || (settings.backend != Backend::automatic && settings.backend != *backend))
      throw Failure("the source's guest runs on another backend");
    const auto guest = make_guest(*backend, {.memory_bytes = bytes});

    const std::vector<std::byte> state =
        need(with_policy(compression, program::Compressors{}, [&]<class C>() -> Result<std::vector<std::byte>> {
          return receive<C>(source, *guest, interrupt);
        }));
    guest->load_state(state);
    source.control.send_json(MessageType::ready, json::object());

    const Message digests = source.control.expect(MessageType::digests, bytes / guest_page_size * 8,
                                                  std::chrono::minutes(2));
    const std::uint64_t pages = compare_pages(digests.payload, guest->memory());
    const GuestReport before = guest->report();
    guest->run();
    // The guest's own check sees every page of its working set within two sweeps; give it those, and a limit.
    const auto begin = std::chrono::steady_clock::now();
    const auto elapsed = [&] { return std::chrono::duration<double>(std::chrono::steady_clock::now() - begin).count(); };
    GuestReport now = before;
    while ((elapsed() < run_after || now.sweeps < before.sweeps + 2) && elapsed() < run_after + 30) {
      pollfd event{.fd = interrupt.native_handle(), .events = POLLIN, .revents = 0};
      if (::poll(&event, 1, 20) > 0) throw Failure(Error{.code = Errc::cancelled}, "live migration");
      now = guest->report();
      if (!now.failure.empty()) throw Failure("the guest died at the destination: " + now.failure);
    }
    guest->stop();
    now = guest->report();
    if (now.errors > 0)
      throw Failure(fmt::format("the guest found {} errors in its memory at the destination, the first in page {}",
                                now.errors, now.first_error_page));
    source.control.send_json(MessageType::result, {{"pages_verified", pages},
                                                   {"sweeps", now.sweeps},
                                                   {"pages_written", now.pages_written},
                                                   {"errors", now.errors}});
  } catch (const std::exception& failure) {
    source.control.send_failed(failure.what());
    throw;
  }
}

}  // namespace live

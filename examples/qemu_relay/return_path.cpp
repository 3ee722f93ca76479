// SPDX-License-Identifier: MIT
#include "qemu_relay/return_path.hpp"

#include <linux/sockios.h>
#include <netinet/tcp.h>
#include <sys/ioctl.h>

#include "common/qemu_source.hpp"

namespace relay {

using namespace multifd;
using namespace std::chrono_literals;
using program::Failure;
using program::need;

namespace {

/// Whether a TCP connection that the other end has closed took the last bytes: false when it was reset, or does not
/// acknowledge them. True for other sockets, where a write without a reader fails at once.
bool took_all(int socket) {
  for (int tries = 0;; ++tries) {
    tcp_info info{};
    socklen_t size = sizeof info;
    if (::getsockopt(socket, IPPROTO_TCP, TCP_INFO, &info, &size) != 0) return true;
    int unsent = 0;
    if (info.tcpi_state == TCP_CLOSE) return false;
    if (::ioctl(socket, SIOCOUTQ, &unsent) != 0 || unsent == 0) return true;
    if (tries == 200) return false;
    std::this_thread::sleep_for(10ms);  // a peer that has gone answers with a reset, in a round trip
  }
}

}  // namespace

ReturnPath::ReturnPath(const program::Link& source, const Forwarded& forwarded, FirstFailure& failure)
    : source_(source),
      forwarded_(forwarded),
      failure_(failure),
      first_ponged_(need(Interrupt::create())),
      own_ponged_(need(Interrupt::create())),
      ended_(need(Interrupt::create())) {}

void ReturnPath::start(program::Link& destination, std::function<void()> on_silence) {
  thread_ = std::thread([this, &destination, on_silence = std::move(on_silence)] {
    try {
      run(destination, on_silence);
    } catch (const std::exception& error) {
      failure_.fail_with(error);
    }
    ended_.trigger();
  });
}

bool ReturnPath::ends(std::chrono::milliseconds limit, const Interrupt* interrupt) const {
  return program::wait_for(ended_.native_handle(), limit, interrupt);
}

void ReturnPath::join() {
  if (thread_.joinable()) thread_.join();
}

Answer ReturnPath::answer() const {
  if (refused_) return Answer::refused;
  if (!confirmed_) return Answer::none;
  if (!failure_.guest_moved() || !took_all(source_.native_handle())) return Answer::confirmed;
  return forwarded_.source_ended ? Answer::taken : Answer::passed_on;
}

bool ReturnPath::note_ping(std::uint32_t value) noexcept {
  if (pinged_.load() != Clock::time_point{}) return false;
  ping_value_ = value;
  pinged_ = Clock::now();
  return true;
}

void ReturnPath::wait_for_first_pong(std::chrono::milliseconds limit) const {
  if (pinged_.load() != Clock::time_point{}) program::wait_for(first_ponged_.native_handle(), limit, &ended_);
}

bool ReturnPath::wait_for_own_pong(std::chrono::milliseconds limit) const {
  return program::wait_for(own_ponged_.native_handle(), limit, &ended_);
}

void ReturnPath::run(program::Link& destination, const std::function<void()>& on_silence) {
  constexpr auto slice = 500ms;
  qemu::ReturnPathParser parser;
  for (;;) {
    const auto message = need(parser.next(), "destination: return path");
    if (message) {
      take(*message);
      continue;
    }
    const iovec buffer = mutable_buffer(parser.room());
    const auto read = destination.read_some(std::span(&buffer, 1), slice, nullptr);
    if (!read && read.error().code == Errc::timed_out) {
      on_silence();
      continue;
    }
    if (!read && confirmed_) return;
    const bool gone = !read && read.error().code == Condition::peer_gone;
    // A QEMU leaves the end of our TLS session unread, so its system makes a reset of its end.
    const bool ended = gone && expect_end_ && destination.secured() && !forwarded_.return_path_open;
    if (gone && !ended) throw destination_lost();
    const std::size_t got = ended ? 0 : need(read, "destination: main connection");
    if (got == 0) {
      destination_ended_ = true;
      // One that is to confirm, and goes without, has failed.
      if (confirmed_ || (forwarded_.all && !forwarded_.return_path_open)) return;
      throw destination_lost();
    }
    parser.commit(got);
  }
}

void ReturnPath::take(const qemu::ReturnMessage& message) {
  if (message.type == qemu::return_pong && message.value == own_ping) {
    own_ponged_.trigger();
    return;
  }
  heard_ = true;
  if (message.type == qemu::return_pong && message.value == ping_value_ && pinged_.load() != Clock::time_point{} &&
      !first_ponged_.triggered()) {
    round_trip_ = Clock::now() - pinged_.load();
    first_ponged_.trigger();
  }
  if (message.type == qemu::return_shut) {
    // Not sent on: the source learns it from its connections, which are about to be reset.
    if (message.value != 0) {
      refused_ = true;
      throw destination_lost(message.value);
    }
    if (!forwarded_.all) throw Failure("destination: confirmed before it had everything");
    confirmed_ = true;  // before the source gets it, because the source may close its connections at once
    failure_.check();
    if (forwarded_.source_ended)
      throw program::source_lost("main connection: closed before the destination had confirmed");
  }
  failure_.pass_on(message);
}

}  // namespace relay

// SPDX-License-Identifier: MIT
#include "qemu_relay/destination.hpp"

#include <sys/socket.h>

namespace relay {

using namespace multifd;
using namespace std::chrono_literals;
using program::need;

/// Main first, and established, before the channels: QEMU up to 7.2 tells them apart by that (section 1.2).
void Destination::connect(std::function<void()> on_silence) {
  const std::string whom = "destination " + settings_.out_paths.text();
  const std::chrono::milliseconds limit = settings_.source.timeout;
  SocketOptions options = settings_.source.limits.socket(&interrupt_);
  options.connect_timeout = limit;
  // A peer that takes no byte for so long will not take any.
  const auto limit_writes = [&](const FdTransport& link) {
    const timeval limit_value{.tv_sec = limit.count() / 1000, .tv_usec = limit.count() % 1000 * 1000};  // 0: no limit
    ::setsockopt(link.native_handle(), SOL_SOCKET, SO_SNDTIMEO, &limit_value, sizeof limit_value);
  };
  auto main = connections_.main(options, whom);
  limit_writes(main);
  main_ = connections_.on_path(need(settings_.out_tls.secure(std::move(main), interrupt_, limit), "destination"));
  writer_.emplace(*main_);
  failure_.add(*main_);
  auto channels = connections_.channels(options, whom);
  for (const FdTransport& link : channels) limit_writes(link);
  channels_ =
      connections_.on_paths(need(settings_.out_tls.secure_with_first_write(std::move(channels)), "destination"));
  connected_ = true;
  return_path_.start(*main_, std::move(on_silence));
}

void Destination::wrote(const Result<void>& written) {
  if (written) return;
  lose(written.error());
  failure_.check();
}

void Destination::lose(const Error& error) noexcept {
  if (error.code != Condition::peer_gone) {
    failure_.fail(destination_failure(error));
    return;
  }
  // The connections of one that dies break one after the other, and what it said is on the main one. Meanwhile it gets
  // nothing more: behind a record that closes an epoch it would wait for a channel that has gone. Without a return path
  // it says nothing, and its source must not come to its end meanwhile.
  losing_ = true;
  if (forwarded_.return_path_open || forwarded_.all) return_path_.ends(1000ms, &interrupt_);
  // It has loaded everything and closes.
  const bool over = return_path_.destination_ended() && forwarded_.all && !forwarded_.return_path_open;
  if (!over) failure_.fail(destination_lost());
  losing_ = false;
  losing_.notify_all();
}

}  // namespace relay

// SPDX-License-Identifier: MIT
#include "common/time_limits.hpp"

#include <fmt/format.h>

#include <CLI/CLI.hpp>

#include <algorithm>

namespace program {

using namespace std::chrono_literals;

std::string Limit::text() const {
  return *option == 0 ? format_time(time) : fmt::format("{} ({})", format_time(time), option);
}

void TimeLimits::add_connecting(CLI::App& app) {
  add_duration(app, "--connect-timeout", connect, "Give up connecting after that long");
  add_duration(app, "--result-timeout", result, "Give up when the other side has not confirmed by then");
}

void TimeLimits::add_accepting(CLI::App& app) {
  add_duration(
      app, "--accept-timeout", accept,
      "Give up when a source has connected, and not all its channels by then; a first connection is waited for "
      "without end");
  add_duration(app, "--hello-timeout", hello, "Give up when a channel's hello has not come by then");
}

void TimeLimits::add_peer(CLI::App& app) {
  add_duration(app, "--peer-timeout", peer,
               "TCP: give up when the other side's host has acknowledged nothing for that long. Longer than the other "
               "side may stand still, because a full one counts as well");
  add_duration(
      app, "--hint-after", hint,
      "Print likely causes on stderr when nothing has moved for that long, or when sending changed pages again "
      "takes longer than this and than everything before it; ends nothing");
}

void TimeLimits::add_to_sender(CLI::App& app) {
  add_connecting(app);
  add_duration(app, "--progress-timeout", progress, "Give up when the receiver has taken no byte for that long");
  add_peer(app);
}

void TimeLimits::add_to_receiver(CLI::App& app) {
  add_accepting(app);
  progress = multifd::ReceiverOptions<multifd::NoComp>{}.progress_timeout;
  add_duration(app, "--progress-timeout", progress, "Give up when nothing has arrived for that long");
  add_peer(app);
}

void TimeLimits::add_to_both(CLI::App& app) {
  add_connecting(app);
  add_accepting(app);
  add_duration(app, "--progress-timeout", progress, "Give up when no byte has moved for that long");
  add_peer(app);
}

std::vector<std::string> TimeLimits::arguments() const {
  std::vector<std::string> all;
  for (const auto& [option, time] :
       {std::pair("--connect-timeout", connect), std::pair("--result-timeout", result),
        std::pair("--accept-timeout", accept), std::pair("--hello-timeout", hello),
        std::pair("--progress-timeout", progress), std::pair("--peer-timeout", peer), std::pair("--hint-after", hint)})
    all.insert(all.end(), {option, fmt::format("{}ms", time.count())});
  return all;
}

multifd::SocketOptions TimeLimits::socket(const multifd::Interrupt* interrupt) const {
  multifd::SocketOptions options;
  options.connect_timeout = connect;
  options.interrupt = interrupt;
  options.keepalive = peer.count() > 0;
  // An idle connection is asked early enough for the answer to be missed in time.
  const auto seconds = std::chrono::ceil<std::chrono::seconds>(peer);
  options.user_timeout = peer;
  options.keepalive_idle = std::clamp(seconds / 2, std::chrono::seconds(1), options.keepalive_idle);
  options.keepalive_interval = std::clamp(seconds / 6, std::chrono::seconds(1), options.keepalive_interval);
  return options;
}

}  // namespace program

// SPDX-License-Identifier: MIT
#include "common/paths.hpp"

#include <fmt/format.h>
#include <sys/socket.h>

#include <CLI/CLI.hpp>
#include <nlohmann/json.hpp>

#include <algorithm>
#include <utility>

#include "common/tell.hpp"

namespace program {

using namespace multifd;
using nlohmann::json;

namespace {

/// Warns of a path that is down. Returns why it is.
std::string tell_left_out(const PathOptions& options, std::size_t path, Error error) {
  error.subject = {};  // the path, which is said anyway
  const std::string why = describe(error);
  tell("warning: {} is down, and left out ({} makes it an error): {}\n", to_string(options.paths()[path]),
       options.name() == "--path" ? "--insist" : "--out-insist", why);
  return why;
}

bool splices(const FdTransport& link, Way way) {
  if (way != Way::automatic) return way == Way::spliced;
  int domain = 0;
  socklen_t size = sizeof domain;
  return ::getsockopt(link.native_handle(), SOL_SOCKET, SO_DOMAIN, &domain, &size) == 0 && domain == AF_UNIX;
}

}  // namespace

void PathOptions::add_to(CLI::App& app, const std::string& prefix) {
  name_ = "--" + prefix + "path";
  connect_ = app.get_option("--connect");
  channels_ = app.get_option("--" + prefix + "channels");
  auto* const path =
      app.add_option(
             name_, texts_,
             "One of several ways to the destination, in place of --connect: "
             "LOCAL=REMOTE[,channels=N][,cap=RATE][,mptcp]. LOCAL: an address of this machine, dev:NAME for a "
             "network interface, or nothing; REMOTE: as --connect; RATE: a second, as 100M. Repeat it for each; "
             "the main connection goes over the first that is up, and one that is down is left out")
          ->allow_extra_args(false)
          ->type_name("PATH");
  app.add_flag("--" + prefix + "insist", insist_, "Fail when a " + name_ + " is down, instead of going on without it")
      ->needs(path);
}

void PathOptions::read(const std::string& connect, unsigned& channels) {
  if (!given()) {
    if (connect.empty()) throw Usage("--connect is needed, or " + name_);
    paths_ = {{.remote = address_of(connect, "--connect"), .channels = channels}};
    return;
  }
  for (const CLI::Option* other : {connect_, channels_})
    if (other->count() > 0)
      throw Usage(fmt::format("{} with {}: {}", other->get_name(), name_,
                              other == connect_ ? "a path has its own address" : "say channels=N of each path"));
  std::uint64_t sum = 0;
  paths_.clear();
  for (const std::string& text : texts_) {
    auto path = parse_path(text);
    if (!path) throw Usage(fmt::format("{} {}: {}", name_, text, describe(path.error())));
    sum += path->channels;
    paths_.push_back(std::move(*path));
  }
  if (sum > max_channels)
    throw Usage(fmt::format("{}: {} channels together, and there may be {}", name_, sum, max_channels));
  channels = static_cast<unsigned>(sum);
}

const Address& PathOptions::address() const {
  const auto remote = std::ranges::find_if(paths_, [](const Path& path) { return !is_local(path.remote); });
  return remote == paths_.end() ? paths_.front().remote : remote->remote;
}

std::string PathOptions::text() const {
  std::string text;
  for (const Path& path : paths_) {
    const std::string address = to_string(path.remote);
    if (!text.contains(address)) text += (text.empty() ? "" : ", ") + address;
  }
  return text;
}

void ResumeOptions::add_to(CLI::App& app) {
  app.add_flag(
      "--resume", automatic_,
      "Go on when connections are lost: make them again, and send again what was lost with them. Without it the "
      "first lost connection is the end");
  app.add_flag("--resume-on-signal", by_signal_,
               "The same, but when none is left nothing is tried before SIGUSR1 comes (kill -USR1)");
  add_limits_to(app);
}

void ResumeOptions::add_limits_to(CLI::App& app) {
  add_duration(app, "--path-timeout", options_.path_timeout,
               "With --resume: how long a connection may be silent until it counts as lost, 1 s at least");
  add_duration(app, "--resume-timeout", options_.timeout,
               "With --resume: how long there may be no connection at all until it is given up");
}

migrate::ResumeOptions ResumeOptions::options() const {
  migrate::ResumeOptions options = options_;
  options.enabled = automatic_ || by_signal_;
  options.automatic = !by_signal_;
  if (options.path_timeout < std::chrono::milliseconds(1000)) throw Usage("--path-timeout: 1s at least");
  return options;
}

std::vector<std::string> ResumeOptions::limit_arguments() const {
  return {"--path-timeout", fmt::format("{}ms", options_.path_timeout.count()), "--resume-timeout",
          fmt::format("{}ms", options_.timeout.count())};
}

std::function<Result<Link>(FdTransport, const Interrupt&)> Securing::function() {
  return [this](FdTransport plain, const Interrupt& interrupt) -> Result<Link> {
    auto link = tls_.secure(std::move(plain), interrupt, limit_);
    const std::lock_guard held(mutex_);
    if (link && !cipher_) cipher_ = link->cipher();
    if (auto* const socket = link ? link->get_if<FdTransport>() : nullptr; socket && splices(*socket, way_))
      return Link(SpliceTransport(std::move(*socket)));
    return link;
  };
}

std::string Securing::cipher() const {
  const std::lock_guard held(mutex_);
  return cipher_.value_or("");
}

std::function<void(const migrate::PathEvent&)> PathLog::hook() {
  return [this](const migrate::PathEvent& event) {
    const std::string what = event.main ? "main connection" : fmt::format("channel {}", event.channel);
    const std::string where =
        options_.given() ? fmt::format(" over {}", subject_of(options_.paths()[event.path]).view()) : std::string();
    if (event.left_out) {
      const std::string why = tell_left_out(options_, event.path, *event.lost);
      const std::lock_guard held(mutex_);
      left_out_[event.path] = why;
    } else if (event.lost != nullptr) {
      tell("{}{} to the {} is lost: {}\n", what, where, name_, describe(*event.lost));
    } else {
      tell("{}{} to the {} is back\n", what, where, name_);
    }
  };
}

namespace {

json json_of(const Path& path, const std::string* error, unsigned channels, std::uint64_t cap, std::uint64_t written,
             std::uint64_t read) {
  return {{"path", to_string(path)},
          {"up", error == nullptr},
          {"error", error == nullptr ? json() : json(*error)},
          {"channels", channels},
          {"cap", cap},
          {"written_bytes", written},
          {"read_bytes", read}};
}

std::string note_of(bool first, const Path& path, bool up, std::uint64_t written) {
  return fmt::format("{} {} {}", first ? "; by path:" : ",", subject_of(path).view(),
                     up ? format_bytes(static_cast<double>(written)) : std::string("down"));
}

}  // namespace

void PathLog::add_to(json& report, const std::vector<migrate::PathProgress>& paths,
                     const migrate::LostConnections& lost) const {
  report["lost_connections"] = lost.times;
  report["resent_pages"] = lost.resent_pages;
  if (!options_.given()) return;
  const std::lock_guard held(mutex_);
  json& list = report["paths"] = json::array();
  for (std::size_t i = 0; i < paths.size(); ++i) {
    const migrate::PathProgress& path = paths[i];
    const auto why = left_out_.find(i);
    list.push_back(json_of(options_.paths()[i], why == left_out_.end() ? nullptr : &why->second, path.channels,
                           path.bandwidth, path.written_bytes, path.read_bytes));
    list.back()["lost_connections"] = path.lost;
  }
}

std::string PathLog::note(const std::vector<migrate::PathProgress>& paths, const migrate::LostConnections& lost) const {
  std::string text;
  for (std::size_t i = 0; options_.given() && i < paths.size(); ++i)
    text += note_of(text.empty(), options_.paths()[i], !paths[i].left_out, paths[i].written_bytes);
  if (lost.times > 0)
    text += fmt::format("; {} connections were lost, {} pages sent again", lost.times, lost.resent_pages);
  return text;
}

Connections::Connections(const PathOptions& options, PathsNeeded missing) : options_(options), missing_(missing) {
  for (const Path& path : options.paths()) states_.push_back({.shared = std::make_shared<PathShared>(path.bandwidth)});
}

PathsNeeded Connections::needed() const noexcept { return options_.insist() ? PathsNeeded::all : missing_; }

/// Of several paths the error's subject says which.
Failure Connections::failure_of(const Error& error, const std::string& whom) const {
  return options_.given() ? Failure(error, options_.name()) : Failure(error, whom);
}

void Connections::tell_of(const std::vector<PathLeftOut>& left_out) {
  for (const auto& [path, error] : left_out) {
    if (!states_[path].error.empty()) continue;
    states_[path].error = tell_left_out(options_, path, error);
  }
}

FdTransport Connections::main(const SocketOptions& options, const std::string& whom) {
  auto connected = connect_main(options_.paths(), options, needed());
  if (!connected) throw failure_of(connected.error(), whom);
  tell_of(connected->left_out);
  main_path_ = connected->main.path;
  down_ = std::move(connected->left_out);
  return std::move(connected->main.link);
}

std::vector<FdTransport> Connections::channels(const SocketOptions& options, const std::string& whom) {
  if (!options_.given()) {
    const Path& only = options_.paths().front();
    auto links = connect_channels(only.remote, only.channels, options);
    if (!links) throw Failure(links.error(), whom);
    return std::move(*links);
  }
  auto connected = connect_paths(options_.paths(), options, needed(), down_);
  if (!connected) throw failure_of(connected.error(), whom);
  tell_of(connected->left_out);
  std::vector<FdTransport> links;
  for (PathLink& each : connected->links) {
    ++states_[each.path].channels;
    channel_paths_.push_back(each.path);
    links.push_back(std::move(each.link));
  }
  return links;
}

Link Connections::on_path(Link main) const {
  if (!options_.given()) return main;
  return AllTransports::put_on(std::move(main), states_[main_path_].shared);
}

std::vector<Link> Connections::on_paths(std::vector<Link> channels) const {
  if (!options_.given()) return channels;
  std::vector<Link> links;
  for (std::size_t i = 0; i < channels.size(); ++i)
    links.push_back(AllTransports::put_on(std::move(channels[i]), states_[channel_paths_[i]].shared));
  return links;
}

void Connections::add_to(json& report) const {
  if (!options_.given()) return;
  json& list = report["paths"] = json::array();
  for (std::size_t i = 0; i < states_.size(); ++i) {
    const PathState& state = states_[i];
    list.push_back(json_of(options_.paths()[i], state.error.empty() ? nullptr : &state.error, state.channels,
                           state.shared->rate(), state.shared->written_bytes(), state.shared->read_bytes()));
  }
}

std::string Connections::note() const {
  if (!options_.given()) return {};
  std::string text;
  for (std::size_t i = 0; i < states_.size(); ++i)
    text += note_of(text.empty(), options_.paths()[i], states_[i].error.empty(), states_[i].shared->written_bytes());
  return text;
}

}  // namespace program

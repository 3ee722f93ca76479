// SPDX-License-Identifier: MIT
#include "multifd_pager/pager.hpp"

#include <fmt/format.h>
#include <poll.h>
#include <sys/eventfd.h>
#include <sys/socket.h>
#include <unistd.h>
#include <multifd/transport/listen.hpp>

#include <array>
#include <bit>
#include <cerrno>
#include <nlohmann/json.hpp>
#include <utility>

#include "common/limits.hpp"
#include "common/program.hpp"
#include "common/report.hpp"
#include "common/tell.hpp"

namespace pager {
namespace {

using namespace multifd;
using program::Descriptor;
using program::Failure;

constexpr std::size_t most_reports = 1000;  // a daemon may run for years

}  // namespace

Pager::Pager(const Settings& settings, const Address& address, const Interrupt& interrupt)
    : settings_(settings),
      interrupt_(interrupt),
      source_(settings.source),
      memory_(source_.blocks()),
      recorder_(settings.prefetch, settings.record, source_.blocks(), source_.page_bytes()),
      shared_{.source = source_,
              .memory = memory_,
              .recorder = recorder_,
              .interrupt = interrupt,
              .protocol = settings.protocol,
              .fault_threads = settings.fault_threads,
              .workers = settings.workers,
              .handshake_timeout = settings.handshake_timeout,
              .quiet = settings.json_path == "-"},
      address_(address),
      changed_(::eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK)) {
  if (changed_.get() < 0) throw Failure("eventfd: " + program::error_text(errno));
}

Pager::~Pager() { reap(true); }

nlohmann::json Pager::run() {
  const program::Stopwatch watch;
  accept_all();
  reap(true);
  return report(watch.seconds());
}

void Pager::accept_all() {
  const Listener listener = program::need(Listener::listen(address_, 128), "--listen " + settings_.listen);
  program::tell("listening on {}\n", settings_.listen);
  for (bool full = false;;) {
    // Without descriptors left a connection stays readable: then the next session that ends makes room.
    std::array<pollfd, 3> events{{{interrupt_.native_handle(), POLLIN, 0},
                                  {changed_.get(), POLLIN, 0},
                                  {full ? -1 : listener.native_handle(), POLLIN, 0}}};
    if (::poll(events.data(), events.size(), full ? 1000 : -1) < 0 && errno != EINTR)
      throw Failure("poll: " + program::error_text(errno));
    if (events[0].revents != 0) return;
    full = false;
    if (events[1].revents != 0) {
      std::uint64_t count = 0;
      (void)::read(changed_.get(), &count, sizeof count);
      reap(false);
      const std::lock_guard lock(mutex_);
      if (settings_.guests != 0 && over_ >= settings_.guests) return;
    }
    if (events[2].revents == 0) continue;
    Descriptor socket(::accept4(listener.native_handle(), nullptr, nullptr, SOCK_CLOEXEC | SOCK_NONBLOCK));
    if (socket.get() >= 0) {
      start(std::move(socket));
    } else if (errno == EMFILE || errno == ENFILE || errno == ENOMEM || errno == ENOBUFS) {
      full = true;
      refuse();
    }
  }
}

void Pager::start(Descriptor socket) {
  reap(false);
  const auto number = static_cast<unsigned>(++connections_);
  const std::lock_guard lock(mutex_);
  if (sessions_.size() >= settings_.max_guests) return refuse();
  sessions_.emplace_back();
  Session& session = sessions_.back();
  try {
    session.thread = std::thread([this, &session, number, socket = std::move(socket)]() mutable {
      pthread_setname_np(pthread_self(), "guest");
      end(session, serve_guest(std::move(socket), number, shared_));
    });
  } catch (const std::system_error&) {  // no thread: as many guests as the system can
    sessions_.pop_back();
    refuse();
  }
}

void Pager::refuse() noexcept {
  // A flood of connections is no flood of lines.
  if (std::has_single_bit(++refused_))
    program::tell(
        "multifd_pager: {} connections were refused: {} guests at once, descriptors or threads do not allow more "
        "(--max-guests)\n",
        refused_, settings_.max_guests);
}

void Pager::end(Session& session, GuestReport report) noexcept {
  const std::lock_guard lock(mutex_);
  session.over = true;
  over_ += report.accepted;
  failed_ += !report.error.empty();
  const auto& stats = report.stats;
  normal_pages_ += stats.urgent_pages + stats.background_pages;
  zero_pages_ += stats.zero_pages;
  faults_ += stats.faults;
  ram_bytes_ += report.complete ? report.bytes : 0;
  ignore_bad_alloc([&] {
    if (reports_.size() == most_reports) reports_.erase(reports_.begin());
    reports_.push_back(std::move(report));
  });
  const std::uint64_t one = 1;
  (void)!::write(changed_.get(), &one, sizeof one);
}

void Pager::reap(bool all) {
  std::list<Session> ended;
  {
    const std::lock_guard lock(mutex_);
    for (auto each = sessions_.begin(); each != sessions_.end();) {
      const auto next = std::next(each);
      if (all || each->over) ended.splice(ended.end(), sessions_, each);
      each = next;
    }
  }
  for (Session& each : ended) each.thread.join();
}

nlohmann::json Pager::report(double seconds) const {
  const std::lock_guard lock(mutex_);
  nlohmann::json object = program::report(seconds, ram_bytes_, 0, {});
  object["normal_pages"] = normal_pages_;
  object["zero_pages"] = zero_pages_;
  object["faults"] = faults_;
  object["guests"] = over_;
  object["failed"] = failed_;
  object["refused"] = refused_;
  object["sessions"] = nlohmann::json::array();
  for (const GuestReport& each : reports_) object["sessions"].push_back(json_of(each));
  return object;
}

}  // namespace pager

// SPDX-License-Identifier: MIT
#include "support/migrate_ends.hpp"

#include <netinet/in.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>

#include "multifd/compress/zlib.hpp"
#include "multifd/migrate/destination.hpp"
#include "multifd/migrate/source.hpp"
#include "multifd/multifd.hpp"

namespace test {

namespace {

struct Stacks {
  using Link = WatchedLink;
  using Compressors = multifd::PolicyList<multifd::NoComp, multifd::Zlib>;
  using ZeroPages = multifd::PolicyList<multifd::ZeroPagesNone, multifd::ZeroPagesLegacy, multifd::ZeroPagesMultifd>;
};

std::atomic<Script*> current = nullptr;

std::uint16_t own_port(int fd) noexcept {
  sockaddr_in address{};
  socklen_t bytes = sizeof address;
  ::getsockname(fd, reinterpret_cast<sockaddr*>(&address), &bytes);
  return ntohs(address.sin_port);
}

}  // namespace

Script::Script(std::uint16_t port, std::uint64_t at, std::function<void()> then, bool behind_write)
    : port_(port), at_(at), then_(std::move(then)), behind_write_(behind_write) {
  current = this;
}
Script::~Script() { current = nullptr; }

void Script::break_links(std::optional<unsigned> number, bool reset) noexcept {
  const std::scoped_lock lock(mutex_);
  for (const auto& [made, fd] : open_) {
    if (number && made != *number) continue;
    const sockaddr nowhere{.sa_family = AF_UNSPEC, .sa_data = {}};
    // Not connect(): ThreadSanitizer takes that for the making of a descriptor, and every use elsewhere for a race with it.
    if (!reset || ::syscall(SYS_connect, fd, &nowhere, sizeof nowhere) != 0) ::shutdown(fd, SHUT_RDWR);
  }
}

WatchedLink::Open::Open(multifd::FdTransport from) : link(std::move(from)), script(current) {
  if (script == nullptr || own_port(link.native_handle()) == script->port_) return;
  const std::scoped_lock lock(script->mutex_);
  is_main = script->made_ == 0;
  script->open_.emplace_back(script->made_++, link.native_handle());
}

WatchedLink::Open::~Open() {
  if (script == nullptr) return;
  const std::scoped_lock lock(script->mutex_);
  std::erase_if(script->open_, [this](const auto& each) { return each.second == link.native_handle(); });
}

WatchedLink::WatchedLink(multifd::FdTransport link) : open_(std::make_unique<Open>(std::move(link))) {}

bool WatchedLink::step(bool is_write) noexcept {
  Script* const script = open_->script;
  if (script == nullptr) return false;
  if (script->behind_write_) return is_write && open_->is_main && script->operations_.fetch_add(1) == script->at_;
  if (script->operations_.fetch_add(1) == script->at_) script->then_();
  return false;
}

multifd::Result<multifd::migrate::MigrationReport> send_guest(MigratingGuest& guest, const multifd::Address& address,
                                                              const multifd::migrate::SourceOptions& options) {
  return multifd::migrate::migrate_to<Stacks>(guest, address, options);
}

multifd::Result<multifd::migrate::MigrationReport> send_guest(MigratingGuest& guest,
                                                              std::span<const multifd::Path> paths,
                                                              const multifd::migrate::SourceOptions& options,
                                                              const std::function<multifd::Result<void>()>& down) {
  const auto secure = [&](multifd::FdTransport link, const multifd::Interrupt&) -> multifd::Result<WatchedLink> {
    MULTIFD_TRY(down());
    return WatchedLink(std::move(link));
  };
  return multifd::migrate::migrate_to<Stacks>(guest, paths, options, secure);
}

multifd::Result<multifd::migrate::ArrivalReport> take_guest(MigratingGuest& guest, multifd::Listener& listener,
                                                            const multifd::migrate::DestinationOptions& options) {
  return multifd::migrate::migrate_from<Stacks>(guest, listener, options);
}

}  // namespace test

// SPDX-License-Identifier: MIT
//
// A page server that can be stopped and started anew, and connections to it that can be cut.
#pragma once

#include <doctest/doctest.h>
#include <sys/socket.h>
#include <unistd.h>

#include <algorithm>
#include <memory>
#include <mutex>
#include <optional>
#include <thread>
#include <utility>
#include <vector>

#include "multifd/postcopy/page_server.hpp"
#include "multifd/transport/socket.hpp"
#include "support/page_ends.hpp"

namespace test {

using multifd::Address;
using multifd::Interrupt;
using multifd::Listener;
using multifd::postcopy::PageServerOptions;

inline unsigned wanted_moments() { return how_often("MULTIFD_MOMENTS", quick() ? 4 : 10); }

/// A page server at an address, which can be stopped and started.
template <multifd::Compressor C>
class Source {
 public:
  Source(PageStore& store, GuestPages* guest, Address at) : store_(store), guest_(guest), at_(std::move(at)) {
    start();
  }
  ~Source() { stop(); }

  void start() {
    auto opened = guest_ != nullptr ? PageServer<FdTransport, C>::open(*guest_, options())
                                    : PageServer<FdTransport, C>::open(store_, options());
    REQUIRE_MESSAGE(opened.has_value(), text(opened));
    server_ = std::move(*opened);
    stop_.emplace(*Interrupt::create());
    // The address of a server that has just gone may be taken for a moment.
    REQUIRE(eventually([&] {
      auto listener = Listener::listen(at_);
      if (listener) listener_.emplace(std::move(*listener));
      return listener.has_value();
    }));
    at_ = listener_->local_address();
    acceptor_ = std::thread([this] {
      while (auto link = listener_->accept(multifd::no_timeout, &*stop_)) (void)server_->add(std::move(*link));
    });
  }

  void stop() {
    if (!server_) return;
    stop_->trigger();
    acceptor_.join();
    listener_.reset();
    server_->cancel();
    server_.reset();
  }

  const Address& address() const { return at_; }
  bool whole() const { return server_ && server_->whole(); }

 private:
  static PageServerOptions<C> options() { return {.session = session_of(9)}; }

  PageStore& store_;
  GuestPages* guest_;
  Address at_;
  std::unique_ptr<PageServer<FdTransport, C>> server_;
  std::optional<Listener> listener_;
  std::optional<Interrupt> stop_;
  std::thread acceptor_;
};

/// Connects, and can cut what it has connected.
class Cutter {
 public:
  Result<FdTransport> connect(const Address& address, const Interrupt& interrupt) {
    auto link = multifd::connect_to(address, {.interrupt = &interrupt});
    if (!link) return link;
    const std::scoped_lock lock(mutex_);
    copies_.push_back(::dup(link->native_handle()));
    return link;
  }
  void cut(Rng& rng, bool all) {
    const std::scoped_lock lock(mutex_);
    // The youngest ones live.
    const std::size_t live = std::min<std::size_t>(copies_.size(), 3);
    for (std::size_t i = 0; i < live; ++i)
      if (all || i == below(rng, live)) ::shutdown(copies_[copies_.size() - 1 - i], SHUT_RDWR);
  }
  ~Cutter() {
    for (const int fd : copies_) ::close(fd);
  }

 private:
  std::mutex mutex_;
  std::vector<int> copies_;
};

}  // namespace test

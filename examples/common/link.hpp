// SPDX-License-Identifier: MIT
//
// One connection of a program, plain or under TLS, decided at run time: one type for the stacks, so that each is
// compiled once. A call moves whole packets, so the look at what it is costs nothing.
#pragma once

#include <multifd/transport/listen.hpp>
#if defined(MULTIFD_HAS_TLS)  // set by CMake where the component exists
#include <multifd/transport/tls.hpp>
#endif

#include <chrono>
#include <iterator>
#include <string>
#include <type_traits>
#include <utility>
#include <variant>
#include <vector>

namespace program {

class Link {
 public:
  Link(multifd::FdTransport plain) : link_(std::move(plain)) {}
#if defined(MULTIFD_HAS_TLS)
  Link(multifd::TlsTransport secured) : link_(std::move(secured)) {}
#endif

  // The Transport policy: see there.
  multifd::Result<std::size_t> write_some(multifd::ConstBuffers buffers) noexcept {
    return std::visit([&](auto& link) { return link.write_some(buffers); }, link_);
  }
  multifd::Result<std::size_t> read_some(multifd::MutableBuffers buffers) noexcept {
    return std::visit([&](auto& link) { return link.read_some(buffers); }, link_);
  }
  /// Plain: waits until all buffers are full. TLS: a record at a time, more would gain nothing.
  multifd::Result<std::size_t> read_full(multifd::MutableBuffers buffers) noexcept {
    return std::visit(
        [&](auto& link) {
          if constexpr (multifd::HasReadFull<std::remove_reference_t<decltype(link)>>)
            return link.read_full(buffers);
          else
            return link.read_some(buffers);
        },
        link_);
  }
  multifd::Result<void> finish() noexcept {
    return std::visit([](auto& link) { return link.finish(); }, link_);
  }
  void shutdown() noexcept {
    std::visit([](auto& link) { link.shutdown(); }, link_);
  }

  bool is_two_way() const noexcept {
    return std::visit([](const auto& link) { return link.is_two_way(); }, link_);
  }
  multifd::Result<std::size_t> write_now(multifd::ConstBuffers buffers) noexcept {
    return std::visit([&](auto& link) { return link.write_now(buffers); }, link_);
  }
  multifd::Result<std::size_t> read_now(multifd::MutableBuffers buffers) noexcept {
    return std::visit([&](auto& link) { return link.read_now(buffers); }, link_);
  }

  int native_handle() const noexcept {
    return std::visit([](const auto& link) { return link.native_handle(); }, link_);
  }

  /// Whether the socket carries TLS records, which only read_some() and write_some() can make anything of.
  bool secured() const noexcept { return link_.index() != 0; }

  /// "TLS1.3 AES-128-GCM"; empty when plain.
  std::string cipher() const {
#if defined(MULTIFD_HAS_TLS)
    if (const auto* link = std::get_if<multifd::TlsTransport>(&link_)) return link->cipher();
#endif
    return {};
  }

  /// Under TLS: with a time limit and an Interrupt. Plain: without, because there poll() can be asked before.
  multifd::Result<std::size_t> write_some(multifd::ConstBuffers buffers, std::chrono::milliseconds timeout,
                                          const multifd::Interrupt* interrupt) noexcept {
    return std::visit(
        [&](auto& link) {
          if constexpr (requires { link.write_some(buffers, timeout, interrupt); })
            return link.write_some(buffers, timeout, interrupt);
          else
            return link.write_some(buffers);
        },
        link_);
  }
  multifd::Result<std::size_t> read_some(multifd::MutableBuffers buffers, std::chrono::milliseconds timeout,
                                         const multifd::Interrupt* interrupt) noexcept {
    return std::visit(
        [&](auto& link) {
          if constexpr (requires { link.read_some(buffers, timeout, interrupt); })
            return link.read_some(buffers, timeout, interrupt);
          else
            return link.read_some(buffers);
        },
        link_);
  }

  /// multifd::peek_magic().
  multifd::Result<std::uint32_t> peek_magic(std::chrono::milliseconds timeout,
                                            const multifd::Interrupt* interrupt) noexcept {
    return std::visit([&](auto& link) { return multifd::peek_magic(link, timeout, interrupt); }, link_);
  }

 private:
#if defined(MULTIFD_HAS_TLS)
  std::variant<multifd::FdTransport, multifd::TlsTransport> link_;
#else
  std::variant<multifd::FdTransport> link_;
#endif
};

static_assert(multifd::check_transport<Link>());

/// Connections that are not under TLS.
inline std::vector<Link> plain_links(std::vector<multifd::FdTransport> links) {
  return {std::make_move_iterator(links.begin()), std::make_move_iterator(links.end())};
}

}  // namespace program

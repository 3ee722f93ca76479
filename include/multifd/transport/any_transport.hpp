// SPDX-License-Identifier: MIT
//
// AnyTransport: one of several transports, chosen at run time for each connection, so that a stack is compiled once for
// all of them. This header names no transport: a program with TLS writes AnyTransport<FdTransport, TlsTransport> and
// includes transport/tls.hpp itself, a program without TLS AnyTransport<FdTransport>.
#pragma once

#include <chrono>
#include <concepts>
#include <cstddef>
#include <cstdint>
#include <iterator>
#include <string>
#include <type_traits>
#include <utility>
#include <variant>
#include <vector>

#include "multifd/buffers.hpp"
#include "multifd/result.hpp"
#include "multifd/transport/interrupt.hpp"
#include "multifd/transport/policy.hpp"

namespace multifd {

namespace detail {

template <class T>
concept HasDescriptor = requires(const T& transport) {
  { transport.native_handle() } noexcept -> std::same_as<int>;
};

}  // namespace detail

/// A Transport that is one of `Ts`: what the constructor got.
///
/// Optional parts: HasAnswers and HasTimeLimits if all of `Ts` have them; HasReadFull and HasPinnedWrites if any has it.
///   The others then return what one read_some() brings, which the loops of algorithms.hpp allow, and copy.
/// Errors, threads: those of the transport inside.
/// Cost: one branch per call, which moves whole packets. Nothing is allocated. As large as the largest of `Ts`.
/// Example:
///
///     using Link = multifd::AnyTransport<multifd::FdTransport, multifd::TlsTransport>;
///     std::vector<Link> links = Link::all_of(std::move(*connected));  // or of what tls_handshakes() has made of them
///     auto tx = multifd::Sender<Link, multifd::Zstd, multifd::ZeroPagesMultifd>::open(ram, std::move(links));
template <Transport... Ts>
  requires(sizeof...(Ts) > 0 && (std::is_nothrow_move_constructible_v<Ts> && ...))
class AnyTransport {
  template <class T>
  static constexpr bool is_one = (std::same_as<T, Ts> || ...);

 public:
  /// Holds `transport`. Not explicit, because each of `Ts` is an AnyTransport.
  template <class T>
    requires is_one<T>
  AnyTransport(T transport) noexcept : held_(std::move(transport)) {}

  /// An AnyTransport for each of `transports`, in the same order.
  template <class T>
    requires is_one<T>
  static std::vector<AnyTransport> all_of(std::vector<T> transports) {
    return {std::make_move_iterator(transports.begin()), std::make_move_iterator(transports.end())};
  }

  /// The transport inside, if that is a T; else null.
  template <class T>
    requires is_one<T>
  T* get_if() noexcept {
    return std::get_if<T>(&held_);
  }
  template <class T>
    requires is_one<T>
  const T* get_if() const noexcept {
    return std::get_if<T>(&held_);
  }

  // The Transport policy, and its optional parts: policy.hpp.

  [[nodiscard]] Result<std::size_t> write_some(ConstBuffers buffers) noexcept {
    return std::visit([&](auto& held) { return held.write_some(buffers); }, held_);
  }
  [[nodiscard]] Result<std::size_t> write_pinned(ConstBuffers buffers) noexcept
    requires(HasPinnedWrites<Ts> || ...)
  {
    return std::visit(
        [&](auto& held) {
          if constexpr (HasPinnedWrites<std::remove_reference_t<decltype(held)>>)
            return held.write_pinned(buffers);
          else
            return held.write_some(buffers);
        },
        held_);
  }
  bool pins() const noexcept
    requires(HasPinnedWrites<Ts> || ...)
  {
    return std::visit([](const auto& held) { return multifd::pins(held); }, held_);
  }
  [[nodiscard]] Result<std::size_t> read_some(MutableBuffers buffers) noexcept {
    return std::visit([&](auto& held) { return held.read_some(buffers); }, held_);
  }
  [[nodiscard]] Result<std::size_t> read_full(MutableBuffers buffers) noexcept
    requires(HasReadFull<Ts> || ...)
  {
    return std::visit(
        [&](auto& held) {
          if constexpr (HasReadFull<std::remove_reference_t<decltype(held)>>)
            return held.read_full(buffers);
          else
            return held.read_some(buffers);
        },
        held_);
  }
  [[nodiscard]] Result<void> finish() noexcept {
    return std::visit([](auto& held) { return held.finish(); }, held_);
  }
  void shutdown() noexcept {
    std::visit([](auto& held) { held.shutdown(); }, held_);
  }

  bool is_two_way() const noexcept
    requires(HasAnswers<Ts> && ...)
  {
    return std::visit([](const auto& held) { return held.is_two_way(); }, held_);
  }
  [[nodiscard]] Result<std::size_t> write_now(ConstBuffers buffers) noexcept
    requires(HasAnswers<Ts> && ...)
  {
    return std::visit([&](auto& held) { return held.write_now(buffers); }, held_);
  }
  [[nodiscard]] Result<std::size_t> read_now(MutableBuffers buffers) noexcept
    requires(HasAnswers<Ts> && ...)
  {
    return std::visit([&](auto& held) { return held.read_now(buffers); }, held_);
  }

  [[nodiscard]] Result<std::size_t> write_some(ConstBuffers buffers, std::chrono::milliseconds timeout,
                                               const Interrupt* interrupt) noexcept
    requires(HasTimeLimits<Ts> && ...)
  {
    return std::visit([&](auto& held) { return held.write_some(buffers, timeout, interrupt); }, held_);
  }
  [[nodiscard]] Result<std::size_t> read_some(MutableBuffers buffers, std::chrono::milliseconds timeout,
                                              const Interrupt* interrupt) noexcept
    requires(HasTimeLimits<Ts> && ...)
  {
    return std::visit([&](auto& held) { return held.read_some(buffers, timeout, interrupt); }, held_);
  }

  /// The descriptor, still owned by the transport. Under TLS a readable descriptor does not mean readable data: see
  /// secured().
  int native_handle() const noexcept
    requires(detail::HasDescriptor<Ts> && ...)
  {
    return std::visit([](const auto& held) { return held.native_handle(); }, held_);
  }

  /// Whether the descriptor carries TLS records, which only read_some() and write_some() understand. Then poll() and
  /// MSG_PEEK on it show nothing of the stream.
  bool secured() const noexcept {
    return std::visit(
        [](const auto& held) {
          if constexpr (requires { held.secured(); })
            return held.secured();
          else
            return false;
        },
        held_);
  }

  /// Protocol and cipher of a connection under TLS, as TlsTransport::cipher() has them; empty for a plain connection.
  std::string cipher() const {
    return std::visit(
        [](const auto& held) {
          if constexpr (requires { held.cipher(); })
            return held.cipher();
          else
            return std::string();
        },
        held_);
  }

  /// peek_magic() of the transport inside: listen.hpp, tls.hpp.
  [[nodiscard]] friend Result<std::uint32_t> peek_magic(AnyTransport& transport, std::chrono::milliseconds timeout,
                                                        const Interrupt* interrupt = nullptr) noexcept {
    return std::visit([&](auto& held) { return peek_magic(held, timeout, interrupt); }, transport.held_);
  }

 private:
  std::variant<Ts...> held_;
};

}  // namespace multifd

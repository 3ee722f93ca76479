// SPDX-License-Identifier: MIT
//
// One connection of a program: plain, its pages copied or not, or under TLS of one of the libraries, and on a path with a cap of its own or not, as
// its options say.
#pragma once

#include <multifd/transport/any_transport.hpp>
#include <multifd/transport/capped.hpp>
#include <multifd/transport/listen.hpp>
#include <multifd/transport/splice.hpp>
#if defined(MULTIFD_HAS_TLS)  // set by CMake where the component exists
#include <multifd/transport/tls.hpp>
#endif
#if defined(MULTIFD_HAS_OPENSSL)
#include <multifd/transport/openssl.hpp>
#endif

#include <memory>
#include <utility>

namespace program {

/// The transports of a program, each with and without a cap.
template <class... Ts>
struct Transports {
  using Link = multifd::AnyTransport<Ts..., multifd::Capped<Ts>...>;

  /// Puts a link without a cap on a path.
  static Link put_on(Link link, const std::shared_ptr<multifd::PathShared>& path) {
    const auto capped = [&]<class T>(T* held) {
      if (held != nullptr) link = Link(multifd::Capped<T>(T(std::move(*held)), path));
      return held != nullptr;
    };
    static_cast<void>((capped(link.template get_if<Ts>()) || ...));
    return link;
  }
};

// clang-format off
using AllTransports = Transports<multifd::FdTransport, multifd::SpliceTransport
#if defined(MULTIFD_HAS_TLS)
                                 , multifd::TlsTransport
#endif
#if defined(MULTIFD_HAS_OPENSSL)
                                 , multifd::OpensslTransport
#endif
                                 >;
// clang-format on
using Link = AllTransports::Link;

}  // namespace program

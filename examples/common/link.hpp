// SPDX-License-Identifier: MIT
//
// One connection of a program: plain or under TLS, and on a path with a cap of its own or not, as its options say.
#pragma once

#include <multifd/transport/any_transport.hpp>
#include <multifd/transport/capped.hpp>
#include <multifd/transport/listen.hpp>
#if defined(MULTIFD_HAS_TLS)  // set by CMake where the component exists
#include <multifd/transport/tls.hpp>
#endif

namespace program {

#if defined(MULTIFD_HAS_TLS)
using Link = multifd::AnyTransport<multifd::FdTransport, multifd::TlsTransport, multifd::Capped<multifd::FdTransport>,
                                   multifd::Capped<multifd::TlsTransport>>;
#else
using Link = multifd::AnyTransport<multifd::FdTransport, multifd::Capped<multifd::FdTransport>>;
#endif

}  // namespace program

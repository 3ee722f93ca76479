// SPDX-License-Identifier: MIT
//
// One connection of a program: plain or under TLS, as its options say.
#pragma once

#include <multifd/transport/any_transport.hpp>
#include <multifd/transport/listen.hpp>
#if defined(MULTIFD_HAS_TLS)  // set by CMake where the component exists
#include <multifd/transport/tls.hpp>
#endif

namespace program {

#if defined(MULTIFD_HAS_TLS)
using Link = multifd::AnyTransport<multifd::FdTransport, multifd::TlsTransport>;
#else
using Link = multifd::AnyTransport<multifd::FdTransport>;
#endif

}  // namespace program

// SPDX-License-Identifier: MIT
//
// Backend "kvm": the guest as a virtual machine with one virtual CPU in 64-bit mode. KVM itself keeps the
// dirty log.
#pragma once

#include <memory>

#include "guest.hpp"

namespace live {

/// Errors: throws when /dev/kvm does not open or lacks something, and on other CPUs than x86-64.
std::unique_ptr<Guest> make_kvm_guest(const GuestConfig& config);

}  // namespace live

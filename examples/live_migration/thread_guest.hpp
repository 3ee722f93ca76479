// SPDX-License-Identifier: MIT
//
// Backend "thread", for hosts without KVM: a thread plays the virtual CPU, and userfaultfd write-protection
// finds the pages it writes.
#pragma once

#include <memory>

#include "guest.hpp"

namespace live {

std::unique_ptr<Guest> make_thread_guest(const GuestConfig& config);

}  // namespace live

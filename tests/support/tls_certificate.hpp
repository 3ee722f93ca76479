// SPDX-License-Identifier: MIT
//
// What a certificate for tests is made with, whichever library makes it.
#pragma once

#include <ctime>
#include <string>

namespace test {

inline constexpr std::time_t day_s = 24 * 60 * 60;
inline constexpr const char* for_servers = "1.3.6.1.5.5.7.3.1";  // id-kp-serverAuth
inline constexpr const char* for_clients = "1.3.6.1.5.5.7.3.2";  // id-kp-clientAuth

struct Certificate {
  std::string common_name;
  std::string dns_name = {};
  bool loopback_address = false;  ///< 127.0.0.1 as a subject, too
  const char* purpose = for_servers;
  std::time_t valid_from = -day_s;  ///< from now
  std::time_t valid_until = 30 * day_s;
};

}  // namespace test

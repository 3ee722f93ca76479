// SPDX-License-Identifier: MIT
//
// What the connections of one page server share.
#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <span>
#include <utility>
#include <vector>

#include "multifd/compress/policy.hpp"
#include "multifd/engine/monitor.hpp"
#include "multifd/engine/rate_limiter.hpp"
#include "multifd/format/page_requests.hpp"
#include "multifd/packets/outlet.hpp"
#include "multifd/postcopy/detail/link_watch.hpp"
#include "multifd/postcopy/guest_pages.hpp"
#include "multifd/postcopy/page_server_options.hpp"
#include "multifd/postcopy/page_store.hpp"
#include "multifd/postcopy/placement_gate.hpp"

namespace multifd::postcopy::detail {

template <Compressor C>
struct PageServerShared {
  /// `guest_pages`: null unless `from` is it.
  PageServerShared(PageStore& from, const GuestPages* guest_pages, PageServerOptions<C> chosen)
      : options(std::move(chosen)),
        store(from),
        guest(guest_pages),
        outlets(from.page_bytes(), options.session, options.digest) {}

  const PageServerOptions<C> options;
  PageStore& store;
  const GuestPages* const guest;
  std::vector<RamBlock> blocks{};  ///< the store's, as outlets want them
  packets::OutletShared outlets;
  engine::RateLimiter limiter{options.bandwidth};  ///< of the background
  engine::RateLimiter uncapped{0};
  UrgentGate gate{};
  LinkWatch watch{};

  std::atomic<std::uint64_t> requests{0}, urgent_requests{0}, normal_pages{0}, zero_pages{0}, payload_bytes{0},
      wire_bytes{0}, seen{0}, failed{0};
  std::atomic<unsigned> serving{0};

  engine::Monitor end{};  ///< guards `whole`
  bool whole = false;
};

}  // namespace multifd::postcopy::detail

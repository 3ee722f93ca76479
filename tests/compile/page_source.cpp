// SPDX-License-Identifier: MIT
// WITHOUT_GUEST: PageSource: needs  static constexpr bool guest
// WITHOUT_COPIES: PageSource: needs  static constexpr bool copies
// WITH_VARIABLE_COPIES: PageSource: needs  static constexpr bool copies
// WITHOUT_PAGE: PageSource: needs  static std::byte* page(const RamBlock&, const PageBatch&, std::size_t i
// WITH_THROWING_PAGE: PageSource: needs  static std::byte* page(const RamBlock&, const PageBatch&, std::size_t i
#include "multifd/ends/page_source.hpp"

struct Shadow {
#ifndef WITHOUT_GUEST
  static constexpr bool guest = true;
#endif
#if defined(WITH_VARIABLE_COPIES)
  static bool copies;  // decides at compile time what a Sender offers
#elif !defined(WITHOUT_COPIES)
  static constexpr bool copies = false;
#endif
#if defined(WITH_THROWING_PAGE)
  static std::byte* page(const multifd::RamBlock&, const multifd::PageBatch&, std::size_t, std::size_t) {
    return nullptr;
  }
#elif !defined(WITHOUT_PAGE)
  static std::byte* page(const multifd::RamBlock&, const multifd::PageBatch&, std::size_t, std::size_t) noexcept {
    return nullptr;
  }
#endif
};
static_assert(multifd::check_page_source<Shadow>());

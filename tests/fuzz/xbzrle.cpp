// SPDX-License-Identifier: MIT
//
// An XBZRLE record's changes. Input: u8 options (bits 0-1: page size), be16 length of the changes, the changes, the page
// (what is missing is 0).
#include "multifd/qemu/xbzrle.hpp"

#include <memory>

#include "fuzz/fuzz.hpp"

namespace {

using namespace fuzz;
using namespace multifd;

void test(Span input) {
  Reader in(input);
  const std::size_t page_bytes = page_bytes_of(in.u8() & 3);
  const std::size_t length = in.number(2);
  const auto given = in.take(length);
  // Of their own on the heap, so that one byte too far is seen.
  const auto changes = std::make_unique<std::byte[]>(given.size());
  std::ranges::copy(given, changes.get());
  const auto page = std::make_unique<std::byte[]>(page_bytes);
  const auto other = std::make_unique<std::byte[]>(page_bytes);
  const auto before = in.rest();
  std::ranges::copy(before.first(std::min(before.size(), page_bytes)), page.get());
  for (std::size_t i = 0; i < page_bytes; ++i) other[i] = ~page[i];

  const Span said(changes.get(), given.size());
  const auto applied = qemu::apply_xbzrle(said, {page.get(), page_bytes});
  const auto again = qemu::apply_xbzrle(said, {other.get(), page_bytes});
  require(applied.has_value() == again.has_value(), "the page plays no part in what is refused");
  if (!applied) {
    require(applied.error().code == Errc::bad_xbzrle && applied.error().detail < given.size(),
            "refused with the place in the record");
    return;
  }
  // A byte is the record's, the same in both pages, or it stayed as it was.
  std::size_t changed = 0;
  for (std::size_t i = 0; i < page_bytes; ++i) changed += page[i] == other[i] ? 1U : 0U;
  require(changed <= given.size(), "no more bytes change than the record has");
  const Bytes once(page.get(), page.get() + page_bytes);
  require(qemu::apply_xbzrle(said, {page.get(), page_bytes}) && std::ranges::equal(once, Span(page.get(), page_bytes)),
          "applied twice it changes nothing more");
}

const Register registered({.name = "xbzrle", .test = test});

}  // namespace

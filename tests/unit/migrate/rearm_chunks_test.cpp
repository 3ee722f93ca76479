// SPDX-License-Identifier: MIT
#include "multifd/migrate/dirty/rearm_chunks.hpp"

#include <doctest/doctest.h>

#include <cerrno>
#include <cstdint>
#include <span>
#include <string>
#include <vector>

#include "support/basics.hpp"

using namespace multifd;
using namespace multifd::migrate;
using test::code_of;

namespace {

/// Writes down what happens to it.
struct Recorder {
  static constexpr DirtyFetch fetches = DirtyFetch::complete;

  Result<void> start() noexcept { return {}; }
  Result<void> fetch(BlockId, std::span<std::uint64_t>) noexcept { return {}; }
  Result<void> rearm(BlockId block, std::uint64_t first_page, std::span<const std::uint64_t> bitmap) noexcept {
    if (first_page == fails_at) return fail_errno(Stage::none, "rearm", EIO);
    log += "clear " + std::to_string(index(block)) + ":" + std::to_string(first_page) + "+" +
           std::to_string(bitmap.size()) + " ";
    return {};
  }
  bool needs_rearm() const noexcept { return needed; }
  Result<void> stop() noexcept { return {}; }
  std::size_t page_bytes() const noexcept { return 4096; }

  Result<void> send(const std::vector<std::uint64_t>& bitmap, std::uint64_t chunk_pages) {
    return rearm_chunks(*this, BlockId{7}, bitmap, chunk_pages,
                        [&](std::uint64_t first_page, std::span<const std::uint64_t> chunk) -> Result<void> {
                          if (first_page == refused_at) return fail(Errc::cancelled, Stage::none);
                          log += "send " + std::to_string(first_page) + "+" + std::to_string(chunk.size()) + " ";
                          return {};
                        });
  }

  bool needed = true;
  std::uint64_t fails_at = 1, refused_at = 1;
  std::string log;
};

}  // namespace

TEST_CASE("Each chunk is cleared before it is sent, and not before the chunk ahead of it has been sent") {
  Recorder source;
  CHECK(source.send({1, 0, 0, 2, 0, 0, 4}, 128).has_value());
  CHECK(source.log == "clear 7:0+2 send 0+2 clear 7:128+2 send 128+2 clear 7:384+1 send 384+1 ");
}

TEST_CASE("A source that needs no re-arm is sent at once, and nothing is cleared") {
  Recorder source;
  source.needed = false;
  CHECK(source.send({1, 0, 0, 2, 0, 0, 4}, 128).has_value());
  CHECK(source.log == "send 0+7 ");
  source.log.clear();
  CHECK(source.send({0, 0}, 64).has_value());
  CHECK(source.send({}, 64).has_value());
  CHECK(source.log == "");
}

TEST_CASE("The first error ends it: a chunk that cannot be cleared is not sent") {
  Recorder source;
  source.fails_at = 64;
  CHECK(code_of(source.send({1, 1, 1}, 64)) == std::error_code(EIO, std::system_category()));
  CHECK(source.log == "clear 7:0+1 send 0+1 ");
  source = {};
  source.refused_at = 64;
  CHECK(code_of(source.send({1, 1, 1}, 64)) == Errc::cancelled);
  CHECK(source.log == "clear 7:0+1 send 0+1 clear 7:64+1 ");
  CHECK(code_of(source.send({1}, 0)) == Errc::bad_option);
  CHECK(code_of(source.send({1}, 65)) == Errc::bad_option);
}

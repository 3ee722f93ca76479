// SPDX-License-Identifier: MIT
#include "multifd/postcopy/image_pages.hpp"

#include <doctest/doctest.h>

#include <algorithm>
#include <atomic>
#include <cstring>
#include <functional>
#include <string>
#include <thread>
#include <vector>

#include "multifd/image/mapped_ram_writer.hpp"
#include "multifd/image/seekable_zstd.hpp"
#include "multifd/image/seekable_zstd_writer.hpp"
#include "support/basics.hpp"
#include "support/image_file.hpp"
#include "support/memory.hpp"

using namespace multifd;
using namespace multifd::postcopy;
using namespace test;

namespace {

template <class T>
T need(Result<T> result) {
  REQUIRE_MESSAGE(result.has_value(), describe(result.error()));
  if constexpr (!std::is_void_v<T>) return std::move(*result);
}

constexpr std::size_t page_bytes = 4096;
constexpr std::size_t frame_bytes = 64 * 1024;

/// Two blocks with pages of every kind.
struct Guest {
  Guest() : map(page_bytes) {
    Rng rng(seed());
    for (const auto& [idstr, pages] : {std::pair{"pc.ram", 1000}, {"vga.vram", 65}}) {
      blocks.emplace_back(static_cast<std::size_t>(pages) * page_bytes);
      need(map.add(idstr, blocks.back().bytes()));
      for (std::size_t page = 0; page < static_cast<std::size_t>(pages); ++page)
        if ((page < 300 || page > 500) && below(rng, 3) != 0)
          fill_page(blocks.back().page(page, page_bytes), static_cast<Fill>(below(rng, 4)), rng);
    }
  }

  image::File saved() const {
    image::File file = image_file();
    auto writer = need(image::MappedRamWriter<>::open(file, map, {.machine_type = "pc-q35-10.0"}));
    for (std::uint32_t block = 0; block < map.blocks().size(); ++block)
      need(writer.queue_range(BlockId{block}, 0, map.blocks()[block].bytes));
    need(writer.end_ram());
    need(writer.end(R"({"page_size": 4096, "devices": []})"));
    return file;
  }

  std::vector<Block> blocks;
  RamMap map;
};

/// The answer, written out as memory; checks its form.
std::vector<std::byte> answer(PageFetcher& fetcher, const PageRange& range) {
  need(fetcher.ask(range));
  const FetchedPages pages = need(fetcher.take());
  CHECK(pages.range == range);
  REQUIRE(pages.bytes.size() == pages.offsets.size() * page_bytes);
  std::vector<std::byte> memory(range.bytes);
  bool good = true;
  for (std::size_t i = 0; i < pages.offsets.size(); ++i) {
    const std::uint64_t offset = pages.offsets[i];
    const auto page = pages.bytes.subspan(i * page_bytes, page_bytes);
    good = good && offset >= range.offset && offset < range.end() && offset % page_bytes == 0 &&
           (i == 0 || offset > pages.offsets[i - 1]) && !buffer_is_zero(page.data(), page.size());
    if (good) std::memcpy(&memory[offset - range.offset], page.data(), page.size());
  }
  CHECK(good);
  return memory;
}

bool same(std::span<const std::byte> a, std::span<const std::byte> b) {
  return a.size() == b.size() && std::memcmp(a.data(), b.data(), a.size()) == 0;
}

PageRange any_range(Rng& rng, const StoreBlock& block, std::uint32_t id) {
  const std::size_t pages = block.bytes / page_bytes;
  const std::size_t first = below(rng, pages);
  const std::size_t most = std::min(pages - first, batch_bytes / page_bytes);
  const std::size_t count = below(rng, 3) == 0 ? most : 1 + below(rng, most);
  return {BlockId{id}, first * page_bytes, count * page_bytes};
}

void check_all(PageStore& store, const Guest& guest) {
  REQUIRE(store.page_bytes() == page_bytes);
  const std::unique_ptr<PageFetcher> background = need(store.open(FetchKind::background));
  const std::unique_ptr<PageFetcher> urgent = need(store.open(FetchKind::urgent));
  CHECK(background->window() == 1);
  Rng rng(seed());
  for (std::uint32_t id = 0; id < store.blocks().size(); ++id) {
    const StoreBlock& block = store.blocks()[id];
    const auto& memory = guest.blocks[id];
    CHECK(block.bytes == memory.size());
    for (int i = 0; i < 100; ++i) {
      const PageRange range = any_range(rng, block, id);
      CHECK(same(answer(*background, range), memory.bytes().subspan(range.offset, range.bytes)));
      const PageRange one{BlockId{id}, range.offset, page_bytes};
      CHECK(same(answer(*urgent, one), memory.bytes().subspan(one.offset, one.bytes)));
    }
  }
}

/// What comes with any page: it among them, whole pages of its block, as much as one request takes. Returns the most.
std::uint64_t check_together(PageStore& store) {
  const std::unique_ptr<PageFetcher> fetcher = need(store.open(FetchKind::urgent));
  Rng rng(seed());
  std::uint64_t most = 0;
  for (std::uint32_t id = 0; id < store.blocks().size(); ++id) {
    const std::uint64_t bytes = store.blocks()[id].bytes;
    for (std::uint64_t at = 0; at < bytes; at += (1 + below(rng, 7)) * page_bytes) {
      const PageRange page{BlockId{id}, at, page_bytes};
      (void)answer(*fetcher, page);
      const PageRange together = fetcher->fetched_together(page);
      CHECK(together.block == page.block);
      CHECK(together.offset <= at);
      CHECK(together.end() >= page.end());
      CHECK(together.end() <= bytes);
      CHECK(together.offset % page_bytes == 0);
      CHECK(together.bytes % page_bytes == 0);
      CHECK(together.bytes <= batch_bytes);
      most = std::max(most, together.bytes);
    }
  }
  return most;
}

/// Counts the bytes that are read of a file.
class Counted final : public image::RandomAccess {
 public:
  explicit Counted(const image::RandomAccess& file) : file_(&file) {}
  std::uint64_t bytes() const noexcept override { return file_->bytes(); }
  mutable std::atomic<std::uint64_t> read_bytes = 0;
  std::function<void(std::uint64_t offset, std::size_t bytes)> on_read;

 private:
  Result<void> do_read(std::uint64_t offset, std::span<std::byte> to) const noexcept override {
    read_bytes += to.size();
    if (on_read) on_read(offset, to.size());
    return file_->read(offset, to);
  }
  Result<image::Extent> do_next_data(std::uint64_t from) const noexcept override { return file_->next_data(from); }

  const image::RandomAccess* file_;
};

}  // namespace

TEST_CASE("ImagePages: any range of a mapped-ram image is what the guest had") {
  const Guest guest;
  const image::File file = guest.saved();
  const auto reader = need(image::MappedRamReader::open(file));
  const auto store = need(ImagePages::of_image(reader));
  REQUIRE(store->blocks().size() == 2);
  CHECK(store->blocks()[0].idstr == reader.blocks()[0].idstr);
  check_all(*store, guest);
  CHECK(check_together(*store) == 64 * 1024);
}

TEST_CASE(
    "ImagePages: any range of a compressed image is what the guest had, and no frame is decompressed for its "
    "neighbour") {
  const Guest guest;
  const image::File file = guest.saved();
  image::File packed = image_file();
  need(image::write_seekable_zstd(file, packed, {.frame_bytes = frame_bytes}));
  const Counted counted(packed);
  const auto whole = need(image::SeekableZstd::open(counted));
  const auto reader = need(image::MappedRamReader::open(whole));
  const auto store = need(ImagePages::of_image(reader));
  check_all(*store, guest);
  CHECK(check_together(*store) == frame_bytes);
  // Of a frame that is more than a request takes a part.
  image::File large = image_file();
  need(image::write_seekable_zstd(file, large, {.frame_bytes = 2 * batch_bytes}));
  const auto large_whole = need(image::SeekableZstd::open(large));
  const auto large_reader = need(image::MappedRamReader::open(large_whole));
  CHECK(check_together(*need(ImagePages::of_image(large_reader))) == batch_bytes);

  // One page after the other: each frame is read once.
  const auto fetcher = need(store->open(FetchKind::background));
  counted.read_bytes = 0;
  std::uint64_t frames = 0;
  for (std::uint64_t i = 0; i < whole.table().frames(); ++i)
    if (!whole.table().zero(i) && whole.table().content(i).offset >= reader.blocks()[0].pages_offset &&
        whole.table().content(i).offset < reader.blocks()[0].pages_offset + store->blocks()[0].bytes)
      frames += whole.table().place(i).bytes;
  for (std::uint64_t at = 0; at < store->blocks()[0].bytes; at += page_bytes)
    (void)answer(*fetcher, {BlockId{0}, at, page_bytes});
  CHECK(counted.read_bytes > 0);
  CHECK(counted.read_bytes <= frames);
}

TEST_CASE("ImagePages: many threads fetch at once, each with what is its own") {
  const Guest guest;
  const image::File file = guest.saved();
  image::File packed = image_file();
  need(image::write_seekable_zstd(file, packed, {.frame_bytes = frame_bytes}));
  const auto whole = need(image::SeekableZstd::open(packed));
  const auto reader = need(image::MappedRamReader::open(whole));
  const auto store = need(ImagePages::of_image(reader));
  std::atomic<int> wrong = 0;
  std::vector<std::thread> threads;
  for (unsigned i = 0; i < 4; ++i)
    threads.emplace_back([&, i] {
      const auto fetcher = store->open(i % 2 == 0 ? FetchKind::urgent : FetchKind::background);
      Rng rng(seed() + i);
      for (int n = 0; n < 200; ++n) {
        const PageRange range = any_range(rng, store->blocks()[0], 0);
        if (!(*fetcher)->ask(range)) ++wrong;
        const auto pages = (*fetcher)->take();
        if (!pages) {
          ++wrong;
          continue;
        }
        for (std::size_t at = 0; at < pages->offsets.size(); ++at)
          if (!same(pages->bytes.subspan(at * page_bytes, page_bytes),
                    guest.blocks[0].bytes().subspan(pages->offsets[at], page_bytes)))
            ++wrong;
      }
    });
  for (std::thread& thread : threads) thread.join();
  CHECK(wrong == 0);
}

TEST_CASE("ImagePages: of a mapped-ram image no page is read whose bit is not set") {
  const Guest guest;
  const image::File file = guest.saved();
  const auto plain = need(image::MappedRamReader::open(file));
  Counted counted(file);
  const auto reader = need(image::MappedRamReader::open(counted));
  const auto store = need(ImagePages::of_image(reader));
  counted.read_bytes = 0;
  const auto fetcher = need(store->open(FetchKind::background));
  for (std::uint64_t at = 0; at + batch_bytes <= store->blocks()[0].bytes; at += batch_bytes)
    (void)answer(*fetcher, {BlockId{0}, at, batch_bytes});
  std::uint64_t held = 0;
  const std::uint64_t pages = store->blocks()[0].bytes / batch_bytes * (batch_bytes / page_bytes);
  need(plain.for_each_run(0, 0, pages, [&](std::uint64_t, std::uint64_t bytes) -> Result<void> {
    held += bytes;
    return {};
  }));
  CHECK(held > 0);
  CHECK(counted.read_bytes == held);
}

TEST_CASE("ImagePages: a raw file is one block; its holes are not read, its zeros are zero") {
  const Guest guest;
  image::File file = image_file();
  const std::span<const std::byte> memory = guest.blocks[0].bytes();
  need(file.resize(memory.size()));
  need(file.write(0, memory.first(300 * page_bytes)));
  need(file.write(501 * page_bytes, memory.subspan(501 * page_bytes)));
  Counted counted(file);
  std::uint64_t in_hole = 0;
  counted.on_read = [&](std::uint64_t offset, std::size_t bytes) {
    const std::uint64_t begin = std::max<std::uint64_t>(offset, 300 * page_bytes);
    const std::uint64_t end = std::min<std::uint64_t>(offset + bytes, 501 * page_bytes);
    if (bytes > page_bytes && begin < end) in_hole += end - begin;
  };
  const auto store = need(ImagePages::of_raw(counted, page_bytes, "ram"));
  REQUIRE(store->blocks().size() == 1);
  CHECK(store->blocks()[0].idstr == "ram");
  check_all(*store, guest);
  CHECK(in_hole == 0);
}

TEST_CASE("ImagePages: what cannot be served is refused at once") {
  const image::File odd = image_file(std::vector<std::byte>(page_bytes + 1));
  CHECK(code_of(ImagePages::of_raw(odd, page_bytes, "ram")) == Errc::page_size_mismatch);
  const image::File none = image_file();
  CHECK(code_of(ImagePages::of_raw(none, page_bytes, "ram")) == Errc::page_size_mismatch);
  const image::File good = image_file(std::vector<std::byte>(3 * page_bytes));
  for (const std::size_t bytes : {std::size_t{0}, std::size_t{3}, std::size_t{2 * batch_bytes}})
    CHECK(code_of(ImagePages::of_raw(good, bytes, "ram")) == Errc::page_size_mismatch);
  CHECK(code_of(ImagePages::of_raw(good, page_bytes, "ram", {.urgent_frames = 0})) == Errc::bad_option);
}

TEST_CASE("ImagePages: a file that has become shorter is an error, and final") {
  image::File file = image_file(std::vector<std::byte>(8 * page_bytes, std::byte{1}));
  const auto store = need(ImagePages::of_raw(file, page_bytes, "ram"));
  const auto fetcher = need(store->open(FetchKind::urgent));
  CHECK(answer(*fetcher, {BlockId{0}, 7 * page_bytes, page_bytes}).front() == std::byte{1});
  need(file.resize(4 * page_bytes));
  need(fetcher->ask({BlockId{0}, 7 * page_bytes, page_bytes}));
  const auto gone = fetcher->take();
  REQUIRE_FALSE(gone.has_value());
  CHECK(gone.error().code == Errc::truncated_image);
  CHECK_FALSE(store->may_return(gone.error()));
}

TEST_CASE("ImagePages: cancelled is cancelled, now and later") {
  const image::File file = image_file(std::vector<std::byte>(8 * page_bytes, std::byte{1}));
  const auto store = need(ImagePages::of_raw(file, page_bytes, "ram"));
  const auto fetcher = need(store->open(FetchKind::urgent));
  need(fetcher->ask({BlockId{0}, 0, page_bytes}));
  fetcher->cancel();
  CHECK(code_of(fetcher->take()) == Errc::cancelled);
  CHECK(code_of(fetcher->ask({BlockId{0}, 0, page_bytes})) == Errc::cancelled);
  const auto other = need(store->open(FetchKind::background));
  const auto guest = need(store->for_another_guest());
  store->cancel();
  CHECK(code_of(store->open(FetchKind::urgent)) == Errc::cancelled);
  const auto untouched = need(guest->open(FetchKind::urgent));
  CHECK(answer(*untouched, {BlockId{0}, page_bytes, page_bytes}).front() == std::byte{1});
  CHECK(answer(*other, {BlockId{0}, 0, page_bytes}).front() == std::byte{1});
}

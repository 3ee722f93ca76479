// SPDX-License-Identifier: MIT
#include "multifd/image/seekable_zstd.hpp"

#include <doctest/doctest.h>
#include <zstd.h>

#include <algorithm>
#include <array>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <string>
#include <thread>
#include <vector>

#include "multifd/image/seekable_zstd_verify.hpp"
#include "multifd/image/seekable_zstd_writer.hpp"
#include "support/allocation_count.hpp"
#include "support/basics.hpp"
#include "support/format_vector.hpp"
#include "support/image_file.hpp"
#include "support/memory.hpp"
#include "support/skip.hpp"

using namespace multifd;
using namespace multifd::image;
using test::below;
using test::code_of;
using test::Rng;

namespace {

using Bytes = std::vector<std::byte>;
constexpr std::size_t frame_bytes = 64 * 1024;
constexpr std::size_t header_at = wire::skippable_header_bytes;  // in the image frame

/// A file whose bytes a test changes.
class Memory final : public RandomAccess {
 public:
  explicit Memory(Bytes bytes) : all(std::move(bytes)) {}
  std::uint64_t bytes() const noexcept override { return all.size(); }
  Result<void> do_read(std::uint64_t offset, std::span<std::byte> to) const noexcept override {
    ++reads;
    if (offset > all.size() || to.size() > all.size() - offset)
      return fail(Errc::truncated_image, Stage::read, "memory");
    if (!to.empty()) std::memcpy(to.data(), &all[offset], to.size());
    return {};
  }
  Result<Extent> do_next_data(std::uint64_t from) const noexcept override {
    return Extent{.offset = from, .bytes = all.size() - std::min<std::uint64_t>(from, all.size())};
  }

  Bytes all;
  mutable std::atomic<unsigned> reads{0};
};

/// Pages of all kinds, and a run of zeros that is longer than a frame.
Bytes content(std::size_t bytes, std::uint64_t more = 0) {
  Rng rng(test::seed() + more);
  Bytes all(bytes);
  for (std::size_t at = 0; at < bytes; at += 4096)
    if (at < 200'000 || at > 500'000)
      test::fill_page(std::span(all).subspan(at, std::min<std::size_t>(4096, bytes - at)), test::any_fill(rng), rng);
  return all;
}

SeekableZstdWriteOptions options(unsigned threads = 2, const SeekableZstd* base = nullptr) {
  return {.work = {.threads = threads}, .frame_bytes = frame_bytes, .base = base};
}

Bytes compressed(const RandomAccess& from, const SeekableZstdWriteOptions& how = options()) {
  File to = test::image_file();
  const auto written = write_seekable_zstd(from, to, how);
  INFO(test::text(written));
  REQUIRE(written.has_value());
  CHECK(written->image_bytes == from.bytes());
  CHECK(written->file_bytes == to.bytes());
  return test::bytes_of(to);
}
Bytes compressed(const Bytes& from, const SeekableZstdWriteOptions& how = options()) {
  return compressed(Memory(from), how);
}

SeekableZstd opened(const RandomAccess& file, const SeekableZstd* base = nullptr) {
  auto image = SeekableZstd::open(file, {}, base);
  INFO(test::text(image));
  REQUIRE(image.has_value());
  return std::move(*image);
}

Bytes all_of(const RandomAccess& from) {
  Bytes all(from.bytes(), std::byte{0xee});
  const auto done = from.read(0, all);
  INFO(test::text(done));
  REQUIRE(done.has_value());
  return all;
}

std::error_code open_and_verify(const RandomAccess& file) {
  auto image = SeekableZstd::open(file, {.without_base = WithoutBase::tables_only});
  if (!image) return image.error().code;
  return code_of(verify(*image, {.threads = 1}));
}

std::uint32_t get32(const Bytes& bytes, std::size_t at) { return wire::load_le<std::uint32_t>(&bytes[at]); }
void put32(Bytes& bytes, std::size_t at, std::uint32_t value) { wire::store_le(&bytes[at], value); }
void put64(Bytes& bytes, std::size_t at, std::uint64_t value) { wire::store_le(&bytes[at], value); }

/// Where what lies in one of our files.
struct Places {
  explicit Places(const Bytes& file) : entries(get32(file, file.size() - 9)) {
    table = file.size() - 9 - 12 * std::size_t{entries} - 8;
    image = table - get32(file, file.size() - 9 - 12);
  }
  std::size_t entry(std::size_t i) const { return table + 8 + 12 * i; }
  std::size_t header() const { return image + header_at; }
  std::size_t trailer() const { return table - 16; }
  std::uint32_t entries;
  std::size_t table;
  std::size_t image;
};

/// Mends the digest of the tables, so that a lie is looked at for itself.
void seal_tables(Bytes& file) {
  const Places at(file);
  auto digest = PageDigest::create();
  digest->begin();
  digest->add(std::span(file).subspan(at.image, at.trailer() - at.image));
  digest->add(std::span(file).subspan(at.table));
  put64(file, at.trailer(), digest->value());
}

/// Also that of the image.
void seal(Bytes& file) {
  const Places at(file);
  const wire::ImageHeader header{.frame_bytes = get32(file, at.header() + 16),
                                 .image_bytes = wire::load_le<std::uint64_t>(&file[at.header() + 24])};
  Bytes covered(16);
  std::ranges::copy(wire::encode_digest_head(header), covered.begin());
  if (header.frame_bytes != 0 && header.frames() * 16 < at.trailer() - at.header() - 64) {
    const auto digests = std::span(file).subspan(at.header() + 64, header.frames() * 16);
    covered.insert(covered.end(), digests.begin(), digests.end());
  }
  std::ranges::copy(wire::encode_digest128(digest128_of(covered)), &file[at.header() + 32]);
  seal_tables(file);
}

/// Another program's file: frames of any size, without content size in them if wanted, and no image frame.
Bytes foreign(const Bytes& all, const std::vector<std::size_t>& sizes, bool checksums, bool content_size) {
  Bytes file;
  Bytes table;
  const auto put = [](Bytes& to, std::uint32_t value) {
    to.resize(to.size() + 4);
    put32(to, to.size() - 4, value);
  };
  std::size_t at = 0;
  for (const std::size_t size : sizes) {
    const auto content = std::span(all).subspan(at, size);
    Bytes frame(ZSTD_compressBound(size) + 16);
    std::size_t bytes = 0;
    if (size == 0) {
      put32(frame, 0, 0x184d2a50);
      put32(frame, 4, 3);
      bytes = 11;
    } else {
      ZSTD_CCtx* const context = ZSTD_createCCtx();
      ZSTD_CCtx_setParameter(context, ZSTD_c_contentSizeFlag, content_size);
      bytes = ZSTD_compress2(context, frame.data(), frame.size(), content.data(), size);
      ZSTD_freeCCtx(context);
    }
    file.insert(file.end(), frame.begin(), frame.begin() + static_cast<std::ptrdiff_t>(bytes));
    put(table, static_cast<std::uint32_t>(bytes));
    put(table, static_cast<std::uint32_t>(size));
    if (checksums) put(table, zstd_checksum_of(content));
    at += size;
  }
  put(file, 0x184d2a5e);
  put(file, static_cast<std::uint32_t>(table.size() + 9));
  file.insert(file.end(), table.begin(), table.end());
  put(file, static_cast<std::uint32_t>(sizes.size()));
  file.push_back(checksums ? std::byte{0x80} : std::byte{0});
  put(file, 0x8f92eab1);
  return file;
}

}  // namespace

TEST_CASE("An image of any size comes back, through reads of any size, at any place") {
  Rng rng(test::seed());
  for (const std::size_t bytes : {0uz, 1uz, 4096uz, frame_bytes - 1, frame_bytes, frame_bytes + 1, 4 * frame_bytes,
                                  16 * frame_bytes, 20 * frame_bytes + 12345}) {
    CAPTURE(bytes);
    const Bytes all = content(bytes);
    const Memory file(compressed(all));
    const SeekableZstd image = opened(file);
    REQUIRE(image.bytes() == bytes);
    CHECK(all_of(image) == all);
    CHECK(code_of(verify(image)) == std::error_code{});
    for (int i = 0; i < 50 && bytes > 0; ++i) {
      const std::size_t at = below(rng, bytes);
      Bytes part(1 + below(rng, std::min<std::size_t>(bytes - at, i % 2 == 0 ? 5000 : 3 * frame_bytes)));
      REQUIRE(image.read(at, part).has_value());
      CHECK(test::same_bytes(part, std::span(all).subspan(at, part.size())));
    }
    Bytes beyond(2);
    CHECK(code_of(image.read(bytes, std::span(beyond).first(1))) == Errc::truncated_image);
    CHECK(code_of(image.read(~std::uint64_t{0}, beyond)) == Errc::truncated_image);
    CHECK(image.read(bytes, {}).has_value());
    if (bytes > 0) CHECK(code_of(image.read(bytes - 1, beyond)) == Errc::truncated_image);
  }
}

TEST_CASE("Each frame size and level gives the image back; others are refused") {
  const Memory all(content(3'000'000));
  for (const std::size_t size : {64uz * 1024, 256uz * 1024, 1024uz * 1024})
    for (const int level : {-5, 1, 3, 12}) {
      CAPTURE(size);
      CAPTURE(level);
      const Memory file(compressed(all, {.level = level, .frame_bytes = size}));
      const SeekableZstd image = opened(file);
      CHECK(image.table().header().frame_bytes == size);
      CHECK(all_of(image) == all.all);
    }
  File to = test::image_file();
  for (const std::size_t size : {0uz, 32uz * 1024, 96uz * 1024, 2048uz * 1024})
    CHECK(code_of(write_seekable_zstd(all, to, {.frame_bytes = size})) == Errc::bad_option);
  CHECK(code_of(write_seekable_zstd(all, to, {.level = 100})) == Errc::bad_option);
  CHECK(code_of(write_seekable_zstd(all, to, {.work = {.threads = 0}})) == Errc::bad_channel_count);
  const Memory file(compressed(all));
  CHECK(code_of(SeekableZstd::open(file, {.decoders = 0})) == Errc::bad_option);
}

TEST_CASE("One, two and eight threads write the same file") {
  const Bytes all = content(30'000'000);
  const Bytes one = compressed(all, options(1));
  CHECK(compressed(all, options(2)) == one);
  CHECK(compressed(all, options(8)) == one);
}

TEST_CASE("Holes of the source and frames of zeros are holes of the image, and hardly take room") {
  constexpr std::uint64_t bytes = std::uint64_t{1} << 32;
  File from = test::image_file();
  REQUIRE(from.resize(bytes).has_value());
  const Bytes page(5000, std::byte{7});
  const Bytes zeros(3 * frame_bytes);
  constexpr std::uint64_t places[] = {frame_bytes - 100, 1'000'000'000, bytes - 5000};
  for (const std::uint64_t at : places) REQUIRE(from.write(at, page).has_value());
  REQUIRE(from.write(2'000'000'000, zeros).has_value());
  File to = test::image_file();
  const auto written = write_seekable_zstd(from, to, {.frame_bytes = frame_bytes});
  REQUIRE(written.has_value());
  CHECK(written->frames == bytes / frame_bytes);
  CHECK(written->zero_frames == bytes / frame_bytes - 4);
  CHECK(written->file_bytes < written->frames * 64);
  const SeekableZstd image = opened(to);
  CHECK(code_of(verify(image)) == std::error_code{});

  const auto frame_of = [](std::uint64_t at) { return at / frame_bytes * frame_bytes; };
  CHECK(*image.next_data(0) == Extent{0, 2 * frame_bytes});
  CHECK(*image.next_data(100) == Extent{100, 2 * frame_bytes - 100});
  CHECK(*image.next_data(2 * frame_bytes) == Extent{frame_of(places[1]), frame_bytes});
  CHECK(*image.next_data(places[1] + 5) == Extent{places[1] + 5, frame_of(places[1]) + frame_bytes - places[1] - 5});
  CHECK(*image.next_data(frame_of(places[1]) + frame_bytes) == Extent{bytes - frame_bytes, frame_bytes});
  CHECK(*image.next_data(bytes) == Extent{bytes, 0});
  CHECK(*image.next_data(~std::uint64_t{0}) == Extent{bytes, 0});
  Bytes part(20'000);
  REQUIRE(image.read(places[1] - 10'000, part).has_value());
  CHECK(std::ranges::count(part, std::byte{7}) == 5000);
}

TEST_CASE("A zero frame is read without a read of the file, and an image that ends in a part of one has a hole there") {
  const Memory file(compressed(Bytes(3 * frame_bytes + 10)));
  const SeekableZstd image = opened(file);
  const unsigned reads = file.reads;
  CHECK(all_of(image) == Bytes(3 * frame_bytes + 10));
  CHECK(image.next_data(0)->bytes == 0);
  CHECK(file.reads == reads);
}

TEST_CASE("Small reads in a row decompress a frame once, also of several threads; nothing is allocated then") {
  const Bytes all = content(8 * frame_bytes);
  const Memory file(compressed(all));
  const SeekableZstd image = opened(file);
  Bytes page(4096);
  const auto read_frame = [&](std::size_t frame) {
    for (std::size_t at = 0; at < frame_bytes; at += page.size())
      REQUIRE(image.read(frame * frame_bytes + at, page).has_value());
  };
  const unsigned opened_reads = file.reads;
  read_frame(0);
  read_frame(1);
  read_frame(0);
  CHECK(file.reads == opened_reads + 2);
  for (std::size_t i = 0; i < 8; ++i) read_frame(i);
  const std::uint64_t before = test::allocations();
  for (std::size_t i = 8; i-- > 0;) read_frame(i);
  CHECK(image.read(0, page).has_value());
  CHECK(test::allocations() == before);
}

TEST_CASE("More threads than decoders read at once") {
  const Bytes all = content(40 * frame_bytes);
  const Memory file(compressed(all));
  const auto image = SeekableZstd::open(file, {.decoders = 2});
  REQUIRE(image.has_value());
  std::vector<std::thread> threads;
  std::atomic<unsigned> wrong{0};
  for (unsigned t = 0; t < 6; ++t)
    threads.emplace_back([&, t] {
      Rng rng(test::seed() + t);
      Bytes part(frame_bytes + 1000);
      for (int i = 0; i < 200; ++i) {
        const std::size_t at = below(rng, all.size() - part.size());
        const auto to = std::span(part).first(i % 3 == 0 ? part.size() : 4096);
        if (!image->read(at, to) || !test::same_bytes(to, std::span(all).subspan(at, to.size()))) ++wrong;
      }
    });
  for (std::thread& thread : threads) thread.join();
  CHECK(wrong == 0);
}

TEST_CASE("The program zstd lists and tests the file, and gives the image back") {
  if (std::system("zstd --version >/dev/null 2>&1") != 0) return test::skip("there is no zstd program");
  for (const std::size_t bytes : {0uz, 1uz, 9 * frame_bytes + 77}) {
    CAPTURE(bytes);
    const Bytes all = content(bytes);
    std::string folder = "/tmp/multifd_zst_XXXXXX";
    REQUIRE(::mkdtemp(folder.data()) != nullptr);
    const std::string name = folder + "/image.zst";
    const Bytes file = compressed(all);
    std::FILE* out = std::fopen(name.c_str(), "wb");
    REQUIRE(out != nullptr);
    CHECK(std::fwrite(file.data(), 1, file.size(), out) == file.size());
    std::fclose(out);
    const auto run = [&](const std::string& command) { return std::system((command + " >/dev/null 2>&1").c_str()); };
    CHECK(run("zstd -l " + name) == 0);
    CHECK(run("zstd -t " + name) == 0);
    CHECK(run("zstd -d -f " + name + " -o " + folder + "/image") == 0);
    Bytes back(bytes + 1);
    std::FILE* in = std::fopen((folder + "/image").c_str(), "rb");
    REQUIRE(in != nullptr);
    CHECK(std::fread(back.data(), 1, back.size(), in) == bytes);
    std::fclose(in);
    back.resize(bytes);
    CHECK(back == all);
    CHECK(run("rm -r " + folder) == 0);
  }
}

TEST_CASE(
    "The examples of the format's text are read as the text says, and written the same but for zstd's own bytes") {
  Bytes all(frame_bytes + 4096);
  for (std::size_t i = frame_bytes; i < all.size(); i += 4) all[i] = std::byte{0x2a};
  const Memory file(test::format_vector("seekable_zstd.md", "compressed_image"));
  const SeekableZstd image = opened(file);
  CHECK(all_of(image) == all);
  CHECK(code_of(verify(image)) == std::error_code{});
  const Memory again(compressed(all));
  CHECK(SeekableZstdTable::read(again)->header() == image.table().header());
  const Memory more(test::format_vector("seekable_zstd.md", "compressed_image_incremental"));
  const SeekableZstd incremental = opened(more, &image);
  for (std::size_t i = 0; i < frame_bytes; i += 4) all[i] = std::byte{7};
  CHECK(all_of(incremental) == all);
  CHECK(code_of(verify(incremental)) == std::error_code{});
}

TEST_CASE("A file that was cut, anywhere, is not opened") {
  const Bytes whole = compressed(content(2 * frame_bytes + 100));
  Memory file({});
  for (std::size_t bytes = 0; bytes < whole.size(); bytes += bytes + 2000 < whole.size() && bytes > 2000 ? 97u : 1u) {
    file.all.assign(whole.begin(), whole.begin() + static_cast<std::ptrdiff_t>(bytes));
    const auto image = SeekableZstd::open(file);
    CAPTURE(bytes);
    REQUIRE_FALSE(image.has_value());
    REQUIRE(image.error().code == Condition::bad_file);
  }
  file.all.assign(whole.begin() + 1, whole.end());
  CHECK(code_of(SeekableZstd::open(file)) == Errc::bad_seek_table);
}

TEST_CASE("Every byte that is not as it was written is found") {
  Bytes all(3 * frame_bytes + 100);  // two zero frames, and two with little in them
  for (std::size_t i = 0; i < 300; ++i) all[i] = all[all.size() - 100 + i % 100] = std::byte(i * i);
  Bytes changed = all;
  changed[frame_bytes] = std::byte{1};
  const Memory base_file(compressed(all));
  const SeekableZstd base = opened(base_file);
  Rng rng(test::seed());
  for (const Bytes& whole : {base_file.all, compressed(changed, options(2, &base))}) {
    Memory file(whole);
    REQUIRE(open_and_verify(file) == std::error_code{});
    for (std::size_t at = 0; at < whole.size(); ++at) {
      CAPTURE(at);
      for (unsigned bit = 0; bit < 9; ++bit) {
        file.all[at] = whole[at] ^ (bit < 8 ? std::byte(1u << bit) : std::byte(1 + below(rng, 255)));
        const std::error_code found = open_and_verify(file);
        REQUIRE(found == Condition::bad_file);
      }
      file.all[at] = whole[at];
    }
  }
}

TEST_CASE("A reader finds what it reads to be damaged, and says where") {
  const Bytes all = content(10 * frame_bytes);
  Memory file(compressed(all));
  const SeekableZstd image = opened(file);
  const Extent place = image.table().place(1);
  file.all[place.offset + place.bytes - 1] ^= std::byte{1};  // the frame's own checksum
  Bytes page(4096);
  for (int i = 0; i < 2; ++i) {
    const auto read = image.read(frame_bytes, page);
    REQUIRE_FALSE(read.has_value());
    CHECK(read.error().code == Condition::bad_file);
    CHECK(read.error().detail == place.offset);
  }
  REQUIRE(image.read(0, page).has_value());
  CHECK(test::same_bytes(page, std::span(all).first(page.size())));
  // Another frame in its place, which is a good one.
  const Extent other = image.table().place(0);
  Memory swapped(compressed(Bytes(2 * frame_bytes, std::byte{5})));
  const SeekableZstd same = opened(swapped);
  Memory three(compressed(Bytes(2 * frame_bytes, std::byte{6})));
  const SeekableZstd third = opened(three);
  REQUIRE(same.table().place(1) == third.table().place(1));
  std::copy_n(three.all.begin(), other.bytes == 0 ? 0 : static_cast<std::ptrdiff_t>(same.table().place(0).bytes),
              swapped.all.begin());
  const auto read = same.read(0, page);
  REQUIRE_FALSE(read.has_value());
  CHECK(read.error().code == Errc::frame_mismatch);
  CHECK(code_of(verify(same)) == Errc::corrupt_frame);  // the digest of the frame comes first
}

TEST_CASE("Tables that lie are refused, each for its lie") {
  const Bytes good = compressed(content(4 * frame_bytes + 5));
  const Places at(good);
  const std::size_t header = at.header();
  struct Lie {
    const char* what;
    std::function<void(Bytes&)> tell;
    Errc code;
  };
  const Lie lies[] = {
      {"no magic", [&](Bytes& f) { f.back() ^= std::byte{1}; }, Errc::not_seekable},
      {"reserved bit", [&](Bytes& f) { f[f.size() - 5] |= std::byte{4}; }, Errc::bad_seek_table},
      {"entries beyond the file", [&](Bytes& f) { put32(f, f.size() - 9, 1u << 27); }, Errc::bad_seek_table},
      {"all entries there are", [&](Bytes& f) { put32(f, f.size() - 9, 0xffffffff); }, Errc::bad_seek_table},
      {"sizes that wrap 32 bits", [&](Bytes& f) { put32(f, f.size() - 9, 0x15555556); }, Errc::bad_seek_table},
      {"no entries", [&](Bytes& f) { put32(f, f.size() - 9, 0); }, Errc::bad_seek_table},
      {"no checksums", [&](Bytes& f) { f[f.size() - 5] = std::byte{0}; }, Errc::bad_seek_table},
      {"size of the table",
       [&](Bytes& f) {
         put32(f, at.table + 4, 1);
         seal(f);
       },
       Errc::bad_seek_table},
      {"a frame too long",
       [&](Bytes& f) {
         put32(f, at.entry(0), get32(f, at.entry(0)) + 1);
         seal(f);
       },
       Errc::bad_seek_table},
      {"two that cancel out",
       [&](Bytes& f) {
         put32(f, at.entry(0), get32(f, at.entry(0)) + 1);
         put32(f, at.entry(1), get32(f, at.entry(1)) - 1);
         seal(f);
       },
       Errc::corrupt_frame},
      {"a frame of no bytes",
       [&](Bytes& f) {
         put32(f, at.entry(0), 0);
         seal(f);
       },
       Errc::bad_seek_table},
      {"a huge frame",
       [&](Bytes& f) {
         put32(f, at.entry(0), 0xfffffff0);
         seal(f);
       },
       Errc::bad_seek_table},
      {"a huge last frame", [&](Bytes& f) { put32(f, at.entry(at.entries - 1), 0xfffffff0); }, Errc::bad_seek_table},
      {"a huge content",
       [&](Bytes& f) {
         put32(f, at.entry(1) + 4, 0xffffffff);
         seal(f);
       },
       Errc::bad_seek_table},
      {"a short content",
       [&](Bytes& f) {
         put32(f, at.entry(1) + 4, 1);
         seal(f);
       },
       Errc::bad_seek_table},
      {"content in the image frame",
       [&](Bytes& f) {
         put32(f, at.entry(at.entries - 1) + 4, 1);
         seal(f);
       },
       Errc::bad_seek_table},
      {"another checksum",
       [&](Bytes& f) {
         put32(f, at.entry(1) + 8, 1);
         seal(f);
       },
       Errc::frame_mismatch},
      {"another digest of a frame",
       [&](Bytes& f) {
         put32(f, header + 64 + 5 * 16, 1);
         seal(f);
       },
       Errc::corrupt_frame},
      {"another digest of a content",
       [&](Bytes& f) {
         put32(f, header + 64, 1);
         seal(f);
       },
       Errc::frame_mismatch},
      {"front mark", [&](Bytes& f) { f[header] = std::byte{0}; }, Errc::bad_seek_table},
      {"back mark", [&](Bytes& f) { f[at.table - 1] = std::byte{0}; }, Errc::bad_seek_table},
      {"magic of the image frame",
       [&](Bytes& f) {
         put32(f, at.image, 0x184d2a50);
         seal(f);
       },
       Errc::bad_seek_table},
      {"size of the image frame",
       [&](Bytes& f) {
         put32(f, at.image + 4, 80);
         seal(f);
       },
       Errc::bad_seek_table},
      {"version",
       [&](Bytes& f) {
         put32(f, header + 8, 2);
         seal(f);
       },
       Errc::bad_seek_table},
      {"flags",
       [&](Bytes& f) {
         put32(f, header + 12, 2);
         seal(f);
       },
       Errc::bad_seek_table},
      {"incremental, without a bitmap",
       [&](Bytes& f) {
         put32(f, header + 12, 1);
         seal(f);
       },
       Errc::bad_seek_table},
      {"frame size 0",
       [&](Bytes& f) {
         put32(f, header + 16, 0);
         seal(f);
       },
       Errc::bad_seek_table},
      {"frame size",
       [&](Bytes& f) {
         put32(f, header + 16, 128 * 1024);
         seal(f);
       },
       Errc::bad_seek_table},
      {"reserved",
       [&](Bytes& f) {
         put32(f, header + 20, 1);
         seal(f);
       },
       Errc::bad_seek_table},
      {"image of all bytes", [&](Bytes& f) { put64(f, header + 24, ~std::uint64_t{0}); }, Errc::bad_seek_table},
      {"image one frame longer",
       [&](Bytes& f) {
         put64(f, header + 24, 6 * frame_bytes);
         seal(f);
       },
       Errc::bad_seek_table},
      {"image a byte longer",
       [&](Bytes& f) {
         put64(f, header + 24, 4 * frame_bytes + 6);
         seal(f);
       },
       Errc::bad_seek_table},
      {"digest of the image",
       [&](Bytes& f) {
         put32(f, header + 32, 1);
         seal_tables(f);
       },
       Errc::bad_seek_table},
      {"base without the flag",
       [&](Bytes& f) {
         put32(f, header + 48, 1);
         seal(f);
       },
       Errc::bad_seek_table},
      {"digest of the tables", [&](Bytes& f) { put64(f, at.trailer(), 1); }, Errc::bad_seek_table},
  };
  for (const Lie& lie : lies) {
    CAPTURE(lie.what);
    Memory file(good);
    lie.tell(file.all);
    CHECK(open_and_verify(file) == lie.code);
  }
  Memory sealed(good);
  seal(sealed.all);
  CHECK(sealed.all == good);
  const SeekableZstdOptions few{.limits = {.max_frames = 4}};
  CHECK(code_of(SeekableZstd::open(sealed, few)) == Errc::bad_seek_table);
  CHECK(SeekableZstd::open(sealed, {.limits = {.max_frames = 5}}).has_value());
}

TEST_CASE("Tables of other kinds of files that lie are refused, too") {
  const Bytes first = content(70 * frame_bytes);
  const Memory base_file(compressed(first));
  const SeekableZstd base = opened(base_file);
  Bytes second = first;
  second[3] ^= std::byte{1};
  second[69 * frame_bytes] ^= std::byte{1};
  const Bytes good = compressed(second, options(2, &base));
  const Places at(good);
  const std::size_t bitmap = at.trailer() - 16;
  Memory file(good);
  seal(file.all);
  REQUIRE(file.all == good);
  for (const std::size_t bit :
       {1uz, 6uz}) {  // one more than there are frames; and instead of another, past the last one
    file.all = good;
    file.all[bitmap] ^= std::byte(1u << bit);
    seal(file.all);
    CHECK(open_and_verify(file) == Errc::bad_seek_table);
  }
  file.all = good;
  file.all[bitmap + 8] = std::byte{0x40};  // frame 70
  seal(file.all);
  CHECK(open_and_verify(file) == Errc::bad_seek_table);

  file.all = foreign(first, {first.size()}, true, true);
  file.all[file.all.size() - 5] |= std::byte{3};  // nobody's
  CHECK(open_and_verify(file) == std::error_code{});
  file.all[file.all.size() - 5] |= std::byte{4};
  CHECK(open_and_verify(file) == Errc::bad_seek_table);

  // Frames of the same bytes are decompressed once, and still looked at each.
  file.all = compressed(Bytes(4 * frame_bytes));
  put32(file.all, Places(file.all).header() + 64 + 2 * 16, 1);
  seal(file.all);
  CHECK(open_and_verify(file) == Errc::frame_mismatch);
  file.all = foreign(Bytes(8192), {4096, 4096}, false, false);
  put32(file.all, file.all.size() - 9 - 4, 5000);
  CHECK(open_and_verify(file) == Errc::corrupt_frame);
}

TEST_CASE("A frame that cannot be read spoils no other one's content") {
  const Bytes all = content(3 * frame_bytes);
  Memory file(compressed(all));
  const auto image = SeekableZstd::open(file, {.decoders = 1});
  REQUIRE(image.has_value());
  put32(file.all, image->table().place(2).offset - 4, 0);  // the checksum of frame 1: it comes last
  Bytes part(frame_bytes - 1);
  for (int i = 0; i < 2; ++i) {
    REQUIRE(image->read(1, part).has_value());
    CHECK(test::same_bytes(part, std::span(all).subspan(1, part.size())));
    CHECK_FALSE(image->read(frame_bytes, part).has_value());
  }
}

TEST_CASE("What the source says is a hole is not read") {
  class Holes final : public RandomAccess {
   public:
    std::uint64_t bytes() const noexcept override { return 100 * frame_bytes + 100; }
    Result<void> do_read(std::uint64_t offset, std::span<std::byte> to) const noexcept override {
      if (offset >= frame_bytes) return fail_errno(Stage::read, "a hole was read", EIO);
      std::ranges::fill(to, std::byte{1});
      return {};
    }
    Result<Extent> do_next_data(std::uint64_t from) const noexcept override {
      return from < frame_bytes ? Extent{from, frame_bytes - from} : Extent{bytes(), 0};
    }
  };
  const Memory file(compressed(Holes(), options(1)));
  const SeekableZstd image = opened(file);
  Bytes want(image.bytes());
  std::fill_n(want.begin(), frame_bytes, std::byte{1});
  CHECK(all_of(image) == want);
  CHECK(code_of(verify(image)) == std::error_code{});
}

TEST_CASE("Opening takes no more memory than the tables in the file, whatever they say") {
  const Bytes good = compressed(Bytes(100 * frame_bytes));
  const Places at(good);
  Memory file(good);
  const auto peak = [&] {
    test::restart_peak();
    const std::int64_t before = test::live_bytes();
    static_cast<void>(SeekableZstd::open(file));
    return test::peak_bytes() - before;
  };
  CHECK(peak() < 100 * 60 + 80 * 1024);  // and a frame of zeros
  for (const std::uint32_t entries : {0xffffffffu, 1u << 27, 1u << 20}) {
    put32(file.all, good.size() - 9, entries);
    CHECK(peak() < 1000);
  }
  file.all = good;
  put64(file.all, at.header() + 24, std::uint64_t{1} << 60);
  CHECK(peak() < 1000);
  put32(file.all, at.header() + 12, 1);  // incremental: nearly all of it in the base
  put64(file.all, at.header() + 24, std::uint64_t{1} << 36);
  CHECK(peak() < 1000);
}

TEST_CASE("An incremental image holds what differs, and takes the rest from its base, through a chain") {
  const Bytes first = content(20 * frame_bytes + 100);
  Bytes second = first;
  second[5 * frame_bytes + 3] ^= std::byte{1};
  std::fill_n(second.begin() + 7 * frame_bytes, frame_bytes, std::byte{0});
  second.resize(22 * frame_bytes, std::byte{9});
  Bytes third = second;
  third[0] ^= std::byte{1};
  third.resize(21 * frame_bytes);

  const Memory file1(compressed(first));
  const SeekableZstd image1 = opened(file1);
  const Memory file2(compressed(second, options(2, &image1)));
  CHECK(file2.all == compressed(second, options(8, &image1)));
  CHECK(image1.table().stored_count() == 21);
  const SeekableZstd image2 = opened(file2, &image1);
  CHECK(image2.table().stored_count() <= 4);
  const Memory file3(compressed(third, options(2, &image2)));
  const SeekableZstd image3 = opened(file3, &image2);
  CHECK(image3.table().stored_count() == 1);

  CHECK(all_of(image1) == first);
  CHECK(all_of(image2) == second);
  CHECK(all_of(image3) == third);
  for (const SeekableZstd* image : {&image1, &image2, &image3}) CHECK(code_of(verify(*image)) == std::error_code{});
  CHECK(image2.next_data(7 * frame_bytes)->offset == 8 * frame_bytes);
  // The same image is the same digest, whole or not.
  const Memory whole(compressed(image3));
  CHECK(opened(whole).table().header().digest == image3.table().header().digest);
  CHECK(SeekableZstd::open(whole, {}, &image1).has_value());

  CHECK(code_of(SeekableZstd::open(file2)) == Errc::needs_base);
  CHECK(code_of(SeekableZstd::open(file2, {}, &image2)) == Errc::wrong_base);
  CHECK(code_of(SeekableZstd::open(file3, {}, &image1)) == Errc::wrong_base);
  const Memory others(foreign(first, {first.size()}, true, true));
  const SeekableZstd foreign_base = opened(others);
  CHECK(code_of(SeekableZstd::open(file2, {}, &foreign_base)) == Errc::wrong_base);
  File to = test::image_file();
  CHECK(code_of(write_seekable_zstd(file1, to, options(1, &foreign_base))) == Errc::wrong_base);
  CHECK(code_of(write_seekable_zstd(file1, to, {.base = &image1})) == Errc::bad_option);

  // Without the base its tables are there, for the next one of the chain and to be verified.
  const auto tables = SeekableZstd::open(file2, {.without_base = WithoutBase::tables_only});
  REQUIRE(tables.has_value());
  CHECK(compressed(third, options(2, &*tables)) == file3.all);
  CHECK(code_of(verify(*tables)) == std::error_code{});
  Bytes page(4096);
  CHECK(tables->read(5 * frame_bytes, page).has_value());
  CHECK(code_of(tables->read(0, page)) == Errc::needs_base);
}

TEST_CASE("An incremental image of many frames finds each of its own") {
  Bytes all(300 * frame_bytes);
  for (std::size_t i = 0; i < 300; ++i) all[i * frame_bytes] = std::byte(1 + i % 200);
  const Memory file1(compressed(all));
  const SeekableZstd base = opened(file1);
  for (const std::size_t i : {0uz, 1uz, 63uz, 64uz, 65uz, 130uz, 192uz, 255uz, 298uz, 299uz})
    all[i * frame_bytes + 1] = std::byte{1};
  const Memory file2(compressed(all, options(2, &base)));
  const SeekableZstd image = opened(file2, &base);
  CHECK(image.table().stored_count() == 10);
  CHECK(all_of(image) == all);
  CHECK(code_of(verify(image)) == std::error_code{});
}

TEST_CASE("A base whose digest is right, and whose frames are not those that were left out, is refused") {
  const Bytes first = content(5 * frame_bytes);
  const Memory file1(compressed(first));
  const SeekableZstd image1 = opened(file1);
  Memory file2(compressed(first, options(2, &image1)));
  put32(file2.all, Places(file2.all).header() + 64 + 16, 1);  // the digest of frame 1
  seal(file2.all);
  CHECK(code_of(SeekableZstd::open(file2, {}, &image1)) == Errc::wrong_base);
}

TEST_CASE("Other programs' files are read: frames of any size, with and without sizes in them and checksums") {
  const Bytes all = content(700'000);
  std::vector<std::size_t> sizes = {100'000, 0, 1, 99'999, 290'000, 10'000, 200'000, 0};
  for (const bool checksums : {true, false})
    for (const bool content_size : {true, false}) {
      CAPTURE(checksums);
      CAPTURE(content_size);
      Memory file(foreign(all, sizes, checksums, content_size));
      const SeekableZstd image = opened(file);
      CHECK_FALSE(image.table().has_digests());
      CHECK(all_of(image) == all);
      CHECK(code_of(verify(image)) == std::error_code{});
      Bytes part(3);
      REQUIRE(image.read(99'999, part).has_value());
      CHECK(test::same_bytes(part, std::span(all).subspan(99'999, 3)));
      Bytes again;
      for (auto data = image.next_data(0); data->bytes > 0; data = image.next_data(data->end())) {
        again.resize(data->end());
        REQUIRE(image.read(data->offset, std::span(again).subspan(data->offset, data->bytes)).has_value());
      }
      again.resize(all.size());
      CHECK(again == all);
      const SeekableZstdOptions small{.limits = {.max_frame_bytes = 200'000}};
      CHECK(code_of(SeekableZstd::open(file, small)) == Errc::bad_seek_table);
      file.all[100] ^= std::byte{1};
      if (checksums) CHECK(open_and_verify(file) == Condition::bad_file);
    }
  const Memory empty(foreign({}, {}, true, true));
  CHECK(opened(empty).bytes() == 0);
  CHECK(opened(empty).next_data(0)->bytes == 0);
  const Bytes zeros(100'000);
  const Memory file(foreign(zeros, {50'000, 50'000}, true, true));
  CHECK(opened(file).next_data(0)->bytes == 0);
}

TEST_CASE("A foreign frame that holds more or less than the table says writes nothing beside its place") {
  const Bytes all = content(3 * 4096);
  for (const bool content_size : {true, false})
    for (const int more : {-1, 1}) {
      Memory file(foreign(all, {4096, 8192}, false, content_size));
      const std::size_t entry = file.all.size() - 9 - 16 + 4;
      put32(file.all, entry, static_cast<std::uint32_t>(4096 + more));
      const SeekableZstd image = opened(file);
      test::Block block(4096);
      CHECK(code_of(image.read(0, block.bytes().first(4095))) == Errc::corrupt_frame);
      CHECK(code_of(verify(image)) == Errc::corrupt_frame);
    }
}

TEST_CASE("Writing stops when it is told to, or the source fails, whatever the others wait for") {
  const test::Watchdog watchdog("writing a compressed image");
  const Memory all(content(30'000'000));
  for (const unsigned threads : {1u, 4u}) {
    std::atomic<unsigned> asked{0};
    auto how = options(threads);
    how.work.interrupted = [&] { return ++asked > 3; };
    File to = test::image_file();
    CHECK(code_of(write_seekable_zstd(all, to, how)) == Errc::cancelled);
    CHECK_FALSE(SeekableZstd::open(to).has_value());
  }
  class Breaks final : public RandomAccess {
   public:
    std::uint64_t bytes() const noexcept override { return 100'000'000; }
    Result<void> do_read(std::uint64_t offset, std::span<std::byte>) const noexcept override {
      if (offset < 40'000'000 || offset >= 40'000'000 + 2 * frame_bytes) return {};
      std::this_thread::sleep_for(test::no_hang / 100);  // the others wait for their turn then
      return fail_errno(Stage::read, "breaks", EIO);
    }
    Result<Extent> do_next_data(std::uint64_t from) const noexcept override { return Extent{from, bytes() - from}; }
  };
  for (const unsigned threads : {1u, 4u}) {
    File to = test::image_file();
    const auto written = write_seekable_zstd(Breaks(), to, options(threads));
    CHECK(code_of(written) == std::error_code(EIO, std::system_category()));
  }
}

TEST_CASE("Progress adds up, and writing allocates nothing per frame") {
  const Memory all(content(20'000'001));
  std::atomic<std::uint64_t> done{0};
  auto how = options(2);
  how.work.on_progress = [&](std::uint64_t bytes) { done += bytes; };
  const Memory file(compressed(all, how));
  CHECK(done == all.bytes());
  const SeekableZstd image = opened(file);
  done = 0;
  REQUIRE(verify(image, how.work).has_value());
  CHECK(done == all.bytes());

  const auto allocations = [&](std::size_t bytes) {
    const Memory from(content(bytes));
    File to = test::image_file();
    const std::uint64_t before = test::allocations();
    REQUIRE(write_seekable_zstd(from, to, options(1)).has_value());
    return test::allocations() - before;
  };
  CHECK(allocations(20'000'000) == allocations(5'000'000));
}

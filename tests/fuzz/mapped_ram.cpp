// SPDX-License-Identifier: MIT
//
// A mapped-ram file. Input: u8 options (bits 0-1: page size), u24 size of the file (at most 2 MiB), then what lies in it: u24 offset, u16
// length, bytes; all else is a hole.
#include <cstring>
#include <string>

#include "fuzz/fuzz.hpp"
#include "multifd/image/load.hpp"
#include "multifd/image/mapped_ram_reader.hpp"

namespace {

using namespace fuzz;
using namespace multifd;

/// A file in memory that knows where its data lies.
class Sparse final : public image::RandomAccess {
 public:
  explicit Sparse(std::size_t bytes) : bytes_(bytes), data_(bytes) {}

  void put(std::size_t offset, Span bytes) {
    if (offset >= bytes_.size()) return;
    bytes = bytes.first(std::min(bytes.size(), bytes_.size() - offset));
    std::ranges::copy(bytes, bytes_.begin() + static_cast<std::ptrdiff_t>(offset));
    std::fill_n(data_.begin() + static_cast<std::ptrdiff_t>(offset), bytes.size(), true);
  }

  std::uint64_t bytes() const noexcept override { return bytes_.size(); }
  Result<void> do_read(std::uint64_t offset, std::span<std::byte> to) const noexcept override {
    if (offset > bytes_.size() || to.size() > bytes_.size() - offset)
      return fail(Errc::truncated_image, Stage::read, "image", offset, bytes_.size());
    std::copy_n(bytes_.begin() + static_cast<std::ptrdiff_t>(offset), to.size(), to.begin());
    return {};
  }
  Result<image::Extent> do_next_data(std::uint64_t from) const noexcept override {
    std::size_t begin = std::min<std::uint64_t>(from, data_.size());
    while (begin < data_.size() && !data_[begin]) ++begin;
    std::size_t end = begin;
    while (end < data_.size() && data_[end]) ++end;
    return image::Extent{.offset = begin, .bytes = end - begin};
  }

 private:
  Bytes bytes_;
  std::vector<bool> data_;
};

/// Whether the bitmap has a page, looked at bit by bit.
bool has_page(const Sparse& file, const qemu::BlockInfo& block, std::uint64_t page) {
  std::byte byte{};
  require(file.read(block.bitmap_offset + page / 8, std::span(&byte, 1)).has_value(), "the bitmap is in the file");
  return (std::to_integer<unsigned>(byte) >> page % 8 & 1) != 0;
}

void test(Span input) {
  Reader in(input);
  const std::size_t page_bytes = page_bytes_of(in.u8() & 3);
  Sparse file(std::min<std::size_t>(in.number(3), 2 << 20));
  while (!in.empty()) {
    const std::size_t offset = in.number(3);
    file.put(offset, in.take(in.number(2)));
  }
  const auto reader = image::MappedRamReader::open(
      file, {.stream = {.page_bytes = page_bytes, .max_blocks = 64, .max_ram_bytes = 4 << 20}});
  if (!reader) {
    require(reader.error().code == Condition::bad_file || reader.error().code == Condition::peer_protocol,
            "a refused file is to blame");
    return;
  }
  require(reader->devices().end() == file.bytes(), "the stream goes to the file's end");
  RamMap map(page_bytes);
  std::vector<Bytes> memory;
  for (std::size_t i = 0; i < reader->blocks().size(); ++i) {
    const qemu::BlockInfo& block = reader->blocks()[i];
    memory.emplace_back(block.used_length, std::byte{0xaa});
    require(map.add(block.idstr, memory.back()).has_value(), "a block can be registered");
    if (block.pages_offset == 0) continue;
    require(block.pages_offset % page_bytes == 0 && block.used_length <= file.bytes() &&
                block.pages_offset <= file.bytes() - block.used_length,
            "a block's pages lie in the file");
    std::uint64_t next = 0;
    const auto walked = reader->for_each_run(i, [&](std::uint64_t offset, std::uint64_t bytes) -> Result<void> {
      require(offset % page_bytes == 0 && bytes % page_bytes == 0 && bytes > 0, "a run is pages");
      require(offset <= block.used_length && bytes <= block.used_length - offset, "a run lies in its block");
      for (; next < offset / page_bytes; ++next)
        require(!has_page(file, block, next), "a page that is left out is clear");
      for (; next < (offset + bytes) / page_bytes; ++next)
        require(has_page(file, block, next), "a page of a run is set");
      return {};
    });
    require(walked.has_value(), "the bitmap can be read");
    for (; next < block.used_length / page_bytes; ++next)
      require(!has_page(file, block, next), "a page behind the last run is clear");
  }
  const auto loaded =
      image::load_ram(*reader, map, {.work = {.threads = 1}, .destination = DestinationMemory::unknown});
  require(loaded.has_value(), "what is sound can be loaded");
  for (std::size_t i = 0; i < memory.size(); ++i) {
    const qemu::BlockInfo& block = reader->blocks()[i];
    if (block.pages_offset == 0) continue;
    for (std::uint64_t page = 0; page < block.used_length / page_bytes; ++page) {
      Bytes wanted(page_bytes);
      if (has_page(file, block, page))
        require(file.read(block.pages_offset + page * page_bytes, wanted).has_value(), "a page is in the file");
      require(std::memcmp(wanted.data(), memory[i].data() + page * page_bytes, page_bytes) == 0,
              "memory is the file's");
    }
  }
}

const Register registered({.name = "mapped_ram", .test = test});

}  // namespace

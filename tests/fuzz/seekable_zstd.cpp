// SPDX-License-Identifier: MIT
//
// A compressed image. Input: u8 options (bit 0: the digests over the tables are mended first, so that what they cover is
// looked at for itself; bit 1: as an incremental image without its base), then the file.
#include <algorithm>
#include <vector>

#include "fuzz/fuzz.hpp"
#include "multifd/image/seekable_zstd.hpp"
#include "multifd/image/seekable_zstd_verify.hpp"

namespace {

using namespace fuzz;
using namespace multifd;
using namespace multifd::image;

class Memory final : public RandomAccess {
 public:
  explicit Memory(Span bytes) : all_(bytes) {}
  std::uint64_t bytes() const noexcept override { return all_.size(); }
  Result<void> do_read(std::uint64_t offset, std::span<std::byte> to) const noexcept override {
    require(offset <= all_.size() && to.size() <= all_.size() - offset, "reads lie inside the file");
    std::ranges::copy(all_.subspan(offset, to.size()), to.begin());
    return {};
  }
  Result<Extent> do_next_data(std::uint64_t from) const noexcept override {
    return Extent{.offset = from, .bytes = all_.size() - from};
  }

 private:
  Span all_;
};

/// As far as the file has what they are about.
void mend(Bytes& file) {
  constexpr std::size_t least = 8 + wire::image_header_bytes + wire::image_trailer_bytes + 8 + 12 + 9;
  if (file.size() < least) return;
  const auto get = [&](std::size_t at) { return wire::load_le<std::uint32_t>(&file[at]); };
  const std::uint64_t table_bytes = 8 + 12 * std::uint64_t{get(file.size() - 9)} + 9;
  if (table_bytes > file.size()) return;
  const std::size_t table = file.size() - static_cast<std::size_t>(table_bytes);
  const std::size_t image_bytes = get(file.size() - 21);
  if (image_bytes > table || image_bytes < 8 + wire::image_header_bytes + wire::image_trailer_bytes) return;
  const std::size_t image = table - image_bytes;
  const std::size_t trailer = table - wire::image_trailer_bytes;
  const wire::ImageHeader header{.frame_bytes = get(image + 24),
                                 .image_bytes = wire::load_le<std::uint64_t>(&file[image + 32])};
  auto digest = PageDigest::create();
  if (!digest || header.frame_bytes == 0) return;
  digest->begin128();
  digest->add128(wire::encode_digest_head(header));
  if (header.frames() <= (trailer - image - 72) / 16)
    digest->add128(std::span(file).subspan(image + 72, 16 * static_cast<std::size_t>(header.frames())));
  std::ranges::copy(wire::encode_digest128(digest->value128()), &file[image + 40]);
  digest->begin();
  digest->add(std::span(file).subspan(image, trailer - image));
  digest->add(std::span(file).subspan(table));
  wire::store_le(&file[trailer], digest->value());
}

void test(Span input) {
  Reader in(input);
  const unsigned options = in.u8();
  const Span rest = in.rest();
  Bytes bytes(rest.begin(), rest.end());  // on the heap, so that one byte too far is seen
  if ((options & 1) != 0) mend(bytes);
  const Memory file(bytes);
  // Of a file of 64 KiB: 64 MiB at most, so that time is bounded.
  const auto image =
      SeekableZstd::open(file, {.limits = {.max_frames = 64, .max_frame_bytes = 256 * 1024},
                                .decoders = 2,
                                .without_base = (options & 2) != 0 ? WithoutBase::tables_only : WithoutBase::refuse});
  if (!image) {
    require(image.error().code == Condition::bad_file, "a refused file is at fault");
    return;
  }
  const SeekableZstdTable& table = image->table();
  require(table.frames() <= 64, "the limits hold");
  std::uint64_t end = 0;
  for (std::uint64_t i = 0; i < table.frames(); ++i) {
    const Extent content = table.content(i);
    require(content.offset == end && content.bytes <= table.most_content_bytes(), "frames lie one behind the other");
    if (content.bytes > 0) require(table.frame_at(content.offset) == i, "a frame is found");
    end = content.end();
    if (const auto stored = table.stored(i)) {
      require(*stored < table.stored_count(), "a stored frame has its number");
      require(table.place(*stored).end() <= bytes.size(), "a frame lies in the file");
    }
  }
  require(end == image->bytes(), "all frames are the image");

  // All of it in three ways: frame by frame, in odd pieces, and by the extents of data.
  Bytes whole(table.most_content_bytes());
  Bytes piece(70'001);
  bool good = true;
  for (std::uint64_t i = 0; i < table.frames(); ++i) {
    const Extent content = table.content(i);
    const auto to = std::span(whole).first(static_cast<std::size_t>(content.bytes));
    const auto read = image->read(content.offset, to);
    good = good && read.has_value();
    if (!read) require(read.error().code == Condition::bad_file, "a frame that cannot be read is at fault");
    const auto data = image->next_data(content.offset);
    require(data.has_value() && data->offset >= content.offset && data->end() <= image->bytes(),
            "data lies in the image, and not behind");
    if (!read || to.empty()) continue;
    if (data->bytes == 0 || data->offset >= content.end())
      require(std::ranges::all_of(to, [](std::byte byte) { return byte == std::byte{0}; }), "a hole is zeros");
    for (std::size_t at = 0; at < to.size(); at += piece.size()) {
      const auto part = std::span(piece).first(std::min(piece.size(), to.size() - at));
      require(image->read(content.offset + at, part).has_value(), "a frame that was read once is read again");
      require(std::ranges::equal(part, to.subspan(at, part.size())), "the pieces do not matter");
    }
  }
  std::uint64_t from = 0;
  for (std::size_t steps = 0;; ++steps) {
    require(steps <= table.frames(), "the walk ends");
    const auto data = image->next_data(from);
    if (data->bytes == 0) break;
    from = data->end();
  }
  const auto verified = verify(*image, {.threads = 1});
  if (verified) require(good || table.incremental(), "what is verified can be read");
  if (!verified) require(verified.error().code == Condition::bad_file, "what is not verified is at fault");
}

const Register registered({.name = "seekable_zstd", .test = test});

}  // namespace

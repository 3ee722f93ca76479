// SPDX-License-Identifier: MIT
#include "ram_image/diff.hpp"

#include <fmt/format.h>
#include <multifd/image/pieces.hpp>
#include <multifd/zero/buffer_is_zero.hpp>

#include <algorithm>
#include <cstring>
#include <mutex>
#include <nlohmann/json.hpp>
#include <vector>

#include "common/qemu_source.hpp"
#include "common/tell.hpp"

namespace ram_image {

using namespace multifd;
using nlohmann::json;
using program::Failure;
using program::ImageFile;
using program::need;

namespace {

constexpr std::size_t most_offsets = 16;  ///< that are named for each block

/// One image's pages in a window of a block: zeros where it holds none.
class Window {
 public:
  static constexpr std::size_t bytes = 1024 * 1024;

  explicit Window(const image::MappedRamReader& ram) : ram_(&ram) {}

  /// Fills the buffer; false: all pages are zero, and the buffer means nothing.
  Result<bool> read(std::size_t block, std::uint64_t offset, std::size_t length) {
    const std::size_t page_bytes = ram_->page_bytes();
    any_ = false;
    MULTIFD_TRY(ram_->for_each_run(block, offset / page_bytes, length / page_bytes,
                                   [&](std::uint64_t at, std::uint64_t run) -> Result<void> {
                                     if (!any_) bytes_.assign(length, std::byte{});
                                     any_ = true;
                                     return ram_->file().read(ram_->blocks()[block].pages_offset + at,
                                                              std::span(bytes_).subspan(at - offset, run));
                                   }));
    return any_;
  }
  /// The page at `at` of the buffer; none: zero.
  const std::byte* page(std::size_t at) const { return any_ ? bytes_.data() + at : nullptr; }

 private:
  const image::MappedRamReader* ram_;
  std::vector<std::byte> bytes_;
  bool any_ = false;
};

bool same(const std::byte* a, const std::byte* b, std::size_t bytes) {
  if (a == nullptr && b == nullptr) return true;
  if (a != nullptr && b != nullptr) return std::memcmp(a, b, bytes) == 0;
  return buffer_is_zero(a != nullptr ? a : b, bytes);
}

struct Found {
  std::uint64_t pages = 0;
  std::vector<std::uint64_t> offsets;  ///< not sorted
};

}  // namespace

json diff(const ImageFile& a, const ImageFile& b, unsigned threads, const Interrupt& interrupt) {
  const auto &in_a = a.ram(), &in_b = b.ram();
  const std::size_t page_bytes = in_a.page_bytes();
  std::vector<std::size_t> partners;
  for (const qemu::BlockInfo& block : in_a.blocks()) {
    const auto partner = std::ranges::find(in_b.blocks(), block.idstr, &qemu::BlockInfo::idstr);
    if (partner == in_b.blocks().end() || partner->used_length != block.used_length)
      throw Failure(fmt::format("{}: has no RAM block {} of {} bytes, as {} has", b.path(),
                                program::printable(block.idstr), block.used_length, a.path()));
    partners.push_back(static_cast<std::size_t>(partner - in_b.blocks().begin()));
  }
  if (in_a.blocks().size() != in_b.blocks().size())
    throw Failure(fmt::format("{}: has RAM blocks that {} does not have", b.path(), a.path()));

  const image::RamPieces pieces = need(image::RamPieces::create(in_a.blocks(), page_bytes));
  std::vector<Found> found(in_a.blocks().size());
  std::mutex mutex;
  program::ImageWork work("comparing", in_a.ram_bytes(), threads, interrupt);
  const auto options = work.options();
  const auto compare = [&](const image::RamPiece& piece) -> Result<void> {
    Window of_a(in_a), of_b(in_b);
    Found here;
    const std::uint64_t end = (piece.first_page + piece.pages) * page_bytes;
    for (std::uint64_t at = piece.first_page * page_bytes; at < end; at += Window::bytes) {
      const std::size_t length = std::min<std::uint64_t>(Window::bytes, end - at);
      MULTIFD_TRY_ASSIGN(const bool any_a, of_a.read(piece.block, at, length));
      MULTIFD_TRY_ASSIGN(const bool any_b, of_b.read(partners[piece.block], at, length));
      if (!any_a && !any_b) continue;
      for (std::size_t page = 0; page < length; page += page_bytes)
        if (!same(of_a.page(page), of_b.page(page), page_bytes)) {
          ++here.pages;
          if (here.offsets.size() < most_offsets) here.offsets.push_back(at + page);
        }
    }
    const std::lock_guard lock(mutex);
    found[piece.block].pages += here.pages;
    auto& offsets = found[piece.block].offsets;
    offsets.insert(offsets.end(), here.offsets.begin(), here.offsets.end());
    std::ranges::sort(offsets);
    if (offsets.size() > most_offsets) offsets.resize(most_offsets);
    options.on_progress(piece.pages * page_bytes);
    return {};
  };
  work.need(image::in_threads(options, pieces.count(),
                              [&](std::uint64_t number, unsigned) {
                                return catch_bad_alloc(Stage::setup, "image: diff",
                                                       [&] { return compare(pieces.at(number)); });
                              }),
            a.path() + ", " + b.path());

  json report{{"input", a.path()}, {"other", b.path()}, {"differ", false}, {"blocks", json::array()}};
  for (std::size_t i = 0; i < found.size(); ++i) {
    if (found[i].pages > 0) report["differ"] = true;
    report["blocks"].push_back({{"name", program::printable(in_a.blocks()[i].idstr)},
                                {"pages", in_a.blocks()[i].used_length / page_bytes},
                                {"differing_pages", found[i].pages},
                                {"first_offsets", found[i].offsets}});
  }
  return report;
}

void print_diff(const json& report) {
  if (!report["differ"].get<bool>()) {
    program::say("{} and {} hold the same memory\n", report["input"].get<std::string>(),
                 report["other"].get<std::string>());
    return;
  }
  for (const json& block : report["blocks"]) {
    if (block["differing_pages"] == 0) continue;
    std::string offsets;
    for (const json& offset : block["first_offsets"]) offsets += fmt::format(" {:#x}", offset.get<std::uint64_t>());
    program::say("{}: {} of {} pages differ:{}{}\n", block["name"].get<std::string>(),
                 block["differing_pages"].get<std::uint64_t>(), block["pages"].get<std::uint64_t>(), offsets,
                 block["differing_pages"].get<std::uint64_t>() > block["first_offsets"].size() ? " ..." : "");
  }
}

}  // namespace ram_image

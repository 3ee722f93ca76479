// SPDX-License-Identifier: MIT
#include "qemu_load/input.hpp"

#include <fcntl.h>
#include <fmt/format.h>
#include <multifd/image/file.hpp>

#include <algorithm>
#include <filesystem>
#include <fstream>
#include <nlohmann/json.hpp>
#include <utility>
#include <vector>

#include "common/images.hpp"
#include "common/part_file.hpp"
#include "common/uuid.hpp"

namespace load {
namespace {

using namespace multifd;
using nlohmann::json;
using program::Failure;
using program::need;

class ImageInput final : public Input {
 public:
  ImageInput(const std::string& path, const std::string& base, std::uint64_t page_bytes, std::uint64_t offset)
      : image_(path, base, page_bytes, offset) {
    for (const qemu::BlockInfo& block : image_.ram().blocks())
      if (block.pages_offset == 0)
        throw Failure(
            fmt::format("{}: does not hold the memory of {}, which is shared (x-ignore-shared): only a QEMU that "
                        "has that memory can load it",
                        path, block.idstr));
  }

  std::size_t page_bytes() const override { return image_.ram().page_bytes(); }
  std::string machine_type() const override { return std::string(image_.ram().stream().machine_type()); }
  std::optional<Uuid> uuid() const override { return image_.ram().stream().uuid(); }
  std::span<const qemu::BlockInfo> blocks() const override { return image_.ram().blocks(); }
  Result<void> for_each_run(std::size_t block, std::uint64_t first_page, std::uint64_t pages,
                            const OnRun& on_run) const override {
    return image_.ram().for_each_run(block, first_page, pages, on_run);
  }
  Result<void> read(std::size_t block, std::uint64_t offset, std::span<std::byte> to) const override {
    return image_.bytes().read(blocks()[block].pages_offset + offset, to);
  }
  Devices devices() const override { return {image_.bytes(), image_.ram().devices()}; }

 private:
  program::ImageFile image_;
};

class FolderInput final : public Input {
 public:
  explicit FolderInput(const std::string& path) {
    const std::string name = path + "/manifest.json";
    std::ifstream in(name);
    if (!in) throw Failure(name + ": cannot be read: is this a folder that qemu_dump has finished?");
    try {
      read_manifest(path, json::parse(in));
    } catch (const json::exception& error) {
      throw Failure(fmt::format("{}: {}", name, error.what()));
    }
    const std::string state = path + "/device-state.bin";
    if (!std::filesystem::exists(state))
      throw Failure(state +
                    ": missing: the dump holds memory only, as those of older versions do, and no guest can go on from "
                    "it");
    devices_.push_back(open(state));
  }

  std::size_t page_bytes() const override { return page_bytes_; }
  std::string machine_type() const override { return machine_type_; }
  std::optional<Uuid> uuid() const override { return uuid_; }
  std::span<const qemu::BlockInfo> blocks() const override { return blocks_; }
  Result<void> for_each_run(std::size_t block, std::uint64_t first_page, std::uint64_t pages,
                            const OnRun& on_run) const override {
    const std::uint64_t end = (first_page + pages) * page_bytes_;
    for (std::uint64_t at = first_page * page_bytes_; at < end;) {
      const auto data = files_[block].next_data(at);
      if (!data) return std::unexpected(data.error());
      // A hole's edge need not be a page's.
      const std::uint64_t from = std::max(at, data->offset / page_bytes_ * page_bytes_);
      const std::uint64_t to = std::min(end, (data->end() + page_bytes_ - 1) / page_bytes_ * page_bytes_);
      if (data->bytes == 0 || from >= end) break;
      MULTIFD_TRY(on_run(from, to - from));
      at = to;
    }
    return {};
  }
  Result<void> read(std::size_t block, std::uint64_t offset, std::span<std::byte> to) const override {
    return files_[block].read(offset, to);
  }
  Devices devices() const override { return {devices_[0], {0, devices_[0].bytes()}}; }

 private:
  static image::File open(const std::string& path) {
    program::Descriptor file = program::open_regular(path, O_RDONLY);
    return need(image::File::adopt(file.release()), path);
  }

  void read_manifest(const std::string& path, const json& manifest) {
    machine_type_ = manifest.at("machine").get<std::string>();
    page_bytes_ = manifest.at("page_size").get<std::size_t>();
    if (!valid_page_bytes(page_bytes_))
      throw Failure(fmt::format("{}: page size {} in its manifest", path, page_bytes_));
    const auto& blocks = manifest.at("blocks");
    names_.reserve(blocks.size());  // the views into it stay
    for (const json& block : blocks) {
      const auto file = block.at("file").get<std::string>();
      const auto bytes = block.at("size").get<std::uint64_t>();
      // Nothing outside the folder, whoever has written the manifest.
      if (file.empty() || file.contains('/'))
        throw Failure(fmt::format("{}: file name {} in its manifest", path, file));
      files_.push_back(open(path + "/" + file));
      if (bytes == 0 || bytes % page_bytes_ != 0 || files_.back().bytes() != bytes)
        throw Failure(fmt::format("{}/{}: has {} bytes, and the manifest says {}: it was cut or replaced", path, file,
                                  files_.back().bytes(), bytes));
      names_.push_back(block.at("name").get<std::string>());
      if (names_.back().empty() || names_.back().size() > max_idstr_length || names_.back().contains('\0'))
        throw Failure(fmt::format("{}: RAM block's name in its manifest", path));
      blocks_.push_back({.idstr = names_.back(), .used_length = bytes});
    }
    if (blocks_.empty()) throw Failure(path + ": no RAM block in its manifest");
  }

  std::size_t page_bytes_ = 4096;
  std::string machine_type_;
  std::optional<Uuid> uuid_;
  std::vector<std::string> names_;
  std::vector<qemu::BlockInfo> blocks_;
  std::vector<image::File> files_;
  std::vector<image::File> devices_;
};

}  // namespace

std::unique_ptr<Input> Input::open(const std::string& path, const std::string& base, std::uint64_t page_bytes,
                                   std::uint64_t offset) {
  if (std::filesystem::is_directory(path)) return std::make_unique<FolderInput>(path);
  return std::make_unique<ImageInput>(path, base, page_bytes, offset);
}

}  // namespace load

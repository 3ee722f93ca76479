// SPDX-License-Identifier: MIT
#include "qemu_dump/output.hpp"

#include <fmt/format.h>

#include <filesystem>

#include "common/report.hpp"

namespace dump {

using nlohmann::json;
using program::Failure;

namespace {

constexpr const char* manifest_name = "manifest.json";

/// A file name for a block: idstrs come from the network and contain '/'.
std::string file_name_of(std::string_view idstr, std::map<std::string, int>& taken) {
  std::string name;
  for (const char c : idstr.substr(0, 100)) {
    const bool plain = (c >= '0' && c <= '9') || (c >= 'A' && c <= 'Z') || (c >= 'a' && c <= 'z') || c == '-' ||
                       c == '_' || (c == '.' && !name.empty());
    name += plain ? c : '_';
  }
  const int before = taken[name]++;
  // '+' is in no name made above, so a number never makes two names one.
  return before == 0 ? name + ".ram" : fmt::format("{}+{}.ram", name, before);
}

}  // namespace

Output::Output(std::string path) : path_(std::move(path)) {
  std::error_code error;
  std::filesystem::create_directories(path_, error);
  if (error) throw Failure(fmt::format("{}: {}", path_, error.message()));
  const std::string name = path_ + "/" + manifest_name;
  if (std::filesystem::exists(name, error))
    throw Failure(path_ + ": holds a dump already; choose another --output or remove it");
  manifest_ = std::make_unique<program::PartFile>(name);
  for (const auto& entry : std::filesystem::directory_iterator(path_, error))
    if (entry.path().extension() == ".ram")
      throw Failure(entry.path().string() + ": is no part of this dump; choose another --output or remove it");
  if (error) throw Failure(fmt::format("{}: {}", path_, error.message()));
  manifest_->check_writes();
}

std::span<std::byte> Output::add(std::string_view idstr, std::uint64_t bytes) {
  Block block{.idstr = std::string(idstr), .file_name = file_name_of(idstr, taken_), .file = nullptr};
  block.file = std::make_unique<program::NewFile>(path_ + "/" + block.file_name, bytes);
  blocks_.push_back(std::move(block));
  return blocks_.back().file->mapping().bytes();
}

json Output::make_sparse(std::size_t page_bytes) {
  json blocks = json::array();
  for (const Block& block : blocks_) {
    const std::uint64_t bytes = block.file->mapping().bytes().size();
    const auto summary = block.file->make_sparse(page_bytes);
    ++looked_through_;
    blocks.push_back({{"name", block.idstr},
                      {"file", block.file_name},
                      {"size", bytes},
                      {"xxh3", summary.digest},
                      {"pages", bytes / page_bytes},
                      {"zero_pages", summary.zero_pages}});
  }
  return blocks;
}

void Output::write(const json& manifest) {
  program::write_text(manifest_->fd(), program::json_text(manifest), manifest_->part());
  for (const Block& block : blocks_) {
    block.file->sync();
    ++synced_;
  }
  manifest_->sync();
}

void Output::keep() {
  const auto keep_all = [&] {
    for (const Block& block : blocks_) block.file->release();
    manifest_->release();
  };
  try {
    for (const Block& block : blocks_) block.file->rename();
    manifest_->rename();
    keep_all();
  } catch (const Failure& failure) {
    keep_all();  // all bytes are on the disk: the user can rename the files
    throw Failure(
        fmt::format("{}; the rest of the dump is whole, and stays in {}: once that name is free, rename every "
                    "NAME.part there to NAME, {} last",
                    failure.what(), path_, manifest_name));
  }
}

}  // namespace dump

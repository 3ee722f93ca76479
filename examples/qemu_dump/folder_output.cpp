// SPDX-License-Identifier: MIT
#include "qemu_dump/folder_output.hpp"

#include <fmt/format.h>

#include <algorithm>
#include <cstring>
#include <filesystem>
#include <nlohmann/json.hpp>

#include "common/qemu_source.hpp"
#include "common/report.hpp"
#include "common/vm_description.hpp"

namespace dump {

using namespace multifd;
using nlohmann::json;
using program::Failure;
using program::need;

namespace {

constexpr const char* manifest_name = "manifest.json";
constexpr const char* devices_name = "device-state.bin";
constexpr const char* description_name = "vmdesc.json";

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

FolderOutput::FolderOutput(std::string path) : path_(std::move(path)) {
  std::error_code error;
  std::filesystem::create_directories(path_, error);
  if (error) throw Failure(fmt::format("{}: {}", path_, error.message()));
  const std::string name = path_ + "/" + manifest_name;
  if (std::filesystem::exists(name, error))
    throw Failure(path_ + ": holds a dump already; choose another --output or remove it");
  manifest_ = std::make_unique<program::PartFile>(name);
  for (const auto& entry : std::filesystem::directory_iterator(path_, error))
    if (entry.path().extension() == ".ram" || entry.path().filename() == devices_name ||
        entry.path().filename() == description_name)
      throw Failure(entry.path().string() + ": is no part of this dump; choose another --output or remove it");
  if (error) throw Failure(fmt::format("{}: {}", path_, error.message()));
  manifest_->check_writes();
}

void FolderOutput::open(const qemu::MainStreamParser& stream, RamMap& ram) {
  ram_ = &ram;
  for (const qemu::BlockInfo& block : stream.blocks()) {
    Block made{.idstr = std::string(block.idstr), .file_name = file_name_of(block.idstr, taken_), .file = nullptr};
    made.file = std::make_unique<program::NewFile>(path_ + "/" + made.file_name, block.used_length);
    blocks_.push_back(std::move(made));
    need(ram.add(block.idstr, blocks_.back().file->mapping().bytes()), "RAM block " + program::printable(block.idstr));
  }
  devices_ = std::make_unique<program::PartFile>(path_ + "/" + devices_name);
}

Result<void> FolderOutput::page(program::AnyReceiver* receiver, BlockId block, std::uint64_t offset,
                                std::span<const std::byte> bytes) {
  if (receiver != nullptr)
    return bytes.empty() ? receiver->apply_zero(block, offset) : receiver->apply_page(block, offset, bytes);
  Block& to = blocks_[index(block)];
  const std::size_t page_bytes = ram_->page_bytes();
  to.received.resize(to.file->mapping().bytes().size() / page_bytes);
  std::byte* const memory = to.file->mapping().bytes().data() + offset;
  auto received = to.received[offset / page_bytes];
  if (!bytes.empty())
    std::memcpy(memory, bytes.data(), bytes.size());
  else if (received)  // else it is a hole, and stays one
    std::memset(memory, 0, page_bytes);
  received = true;
  return {};
}

Result<void> FolderOutput::read_page(BlockId block, std::uint64_t offset, std::span<std::byte> to) {
  std::memcpy(to.data(), blocks_[index(block)].file->mapping().bytes().data() + offset, to.size());
  return {};
}

std::uint64_t FolderOutput::received_pages(const program::AnyReceiver* receiver, BlockId block) const {
  if (receiver == nullptr) return static_cast<std::uint64_t>(std::ranges::count(blocks_[index(block)].received, true));
  std::uint64_t received = 0;
  for (std::uint64_t at = 0; at < ram_->block(block).bytes; at += ram_->page_bytes())
    if (receiver->received(block, at)) ++received;
  return received;
}

void FolderOutput::devices(std::span<const std::byte> bytes) {
  program::write_text(devices_->fd(), {reinterpret_cast<const char*>(bytes.data()), bytes.size()}, devices_->part());
}

void FolderOutput::write_description() {
  const std::string text = program::description_of(devices_->fd(), devices_->part());
  if (text.empty()) return;
  description_ = std::make_unique<program::PartFile>(path_ + "/" + description_name);
  program::write_text(description_->fd(), text, description_->part());
}

json FolderOutput::finish(const program::AnyReceiver* receiver) {
  write_description();
  const std::size_t page_bytes = ram_->page_bytes();
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
                      {"zero_pages", summary.zero_pages},
                      {"received_pages", received_pages(receiver, need(ram_->find(block.idstr)))}});
  }
  return blocks;
}

void FolderOutput::write(const json& manifest) {
  program::write_text(manifest_->fd(), program::json_text(manifest), manifest_->part());
  for (const Block& block : blocks_) {
    block.file->sync();
    ++synced_;
  }
  devices_->sync();
  if (description_) description_->sync();
  manifest_->sync();
}

void FolderOutput::keep() {
  const auto keep_all = [&] {
    for (const Block& block : blocks_) block.file->release();
    devices_->release();
    if (description_) description_->release();
    manifest_->release();
  };
  try {
    for (const Block& block : blocks_) block.file->rename();
    devices_->rename();
    if (description_) description_->rename();
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

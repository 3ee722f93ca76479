// SPDX-License-Identifier: MIT
//
// The format "blocks": a folder with a sparse file per RAM block, the devices' state and its description, and a manifest
// that gets its name last.
#pragma once

#include <atomic>
#include <deque>
#include <map>
#include <memory>
#include <string_view>
#include <vector>

#include "common/mapping.hpp"
#include "common/part_file.hpp"
#include "qemu_dump/output.hpp"

namespace dump {

class FolderOutput final : public Output {
 public:
  /// Opens the folder: creates it, or takes one that has no dump in it. Keeps other dumps out from then on, whatever
  /// path they use for the folder. Throws Failure.
  explicit FolderOutput(std::string path);

  const std::string& path() const noexcept override { return path_; }
  void open(const multifd::qemu::MainStreamParser& stream, multifd::RamMap& ram) override;
  multifd::Result<void> page(program::AnyReceiver* receiver, multifd::BlockId block, std::uint64_t offset,
                             std::span<const std::byte> bytes) override;
  multifd::Result<void> read_page(multifd::BlockId block, std::uint64_t offset, std::span<std::byte> to) override;
  std::uint64_t received_pages(const program::AnyReceiver* receiver, multifd::BlockId block) const override;
  void devices(std::span<const std::byte> bytes) override;
  /// Gives the files holes where pages are zero.
  nlohmann::json finish(const program::AnyReceiver* receiver) override;
  void write(const nlohmann::json& manifest) override;
  void keep() override;
  Progress progress() const noexcept override { return {blocks_.size(), looked_through_, synced_}; }

 private:
  struct Block {
    std::string idstr;
    std::string file_name;
    std::unique_ptr<program::NewFile> file;
    std::vector<bool> received{};  ///< pages, where there is no receiver that knows
  };

  /// Copies the VM description, which stands at the end of the devices' state, to a file of its own.
  void write_description();

  const std::string path_;
  std::unique_ptr<program::PartFile> manifest_;
  std::unique_ptr<program::PartFile> devices_;
  std::unique_ptr<program::PartFile> description_;  ///< none where the source wrote none
  std::deque<Block> blocks_;
  std::map<std::string, int> taken_;  ///< names of files, so that none comes twice
  const multifd::RamMap* ram_ = nullptr;
  std::atomic<std::size_t> looked_through_ = 0, synced_ = 0;
};

}  // namespace dump

// SPDX-License-Identifier: MIT
//
// All formats but "blocks": the guest lands in a mapped-ram file, page by page as it comes. Another format is made of that
// file when the source has its answer, so that the guest does not stand still for it.
#pragma once

#include <multifd/image/mapped_ram_sink.hpp>

#include <atomic>
#include <memory>
#include <optional>

#include "common/images.hpp"
#include "common/part_file.hpp"
#include "qemu_dump/output.hpp"

namespace dump {

class ImageOutput final : public Output {
 public:
  /// Reserves the names. Throws Failure.
  ImageOutput(std::string path, program::ImageFormat format, program::ConvertOptions options,
              const multifd::Interrupt& interrupt);

  const std::string& path() const noexcept override { return path_; }
  void open(const multifd::qemu::MainStreamParser& stream, multifd::RamMap& ram) override;
  multifd::PacketHook packets() override;
  multifd::Result<void> page(program::AnyReceiver* receiver, multifd::BlockId block, std::uint64_t offset,
                             std::span<const std::byte> bytes) override;
  multifd::Result<void> read_page(multifd::BlockId block, std::uint64_t offset, std::span<std::byte> to) override;
  std::uint64_t received_pages(const program::AnyReceiver* receiver, multifd::BlockId block) const override;
  void devices(std::span<const std::byte> bytes) override;
  nlohmann::json finish(const program::AnyReceiver* receiver) override;
  void write(const nlohmann::json& manifest) override;
  void keep() override;
  void convert() override;
  Progress progress() const noexcept override { return {1, looked_through_, synced_}; }

 private:
  bool converts() const noexcept { return format_ != program::ImageFormat::mapped_ram; }
  void end_ram();

  const std::string path_;
  const program::ImageFormat format_;
  const program::ConvertOptions options_;
  const multifd::Interrupt& interrupt_;
  std::unique_ptr<program::PartFile> converted_;  ///< reserves the name, where another format is made
  std::unique_ptr<program::PartFile> part_;       ///< the mapped-ram file
  std::optional<multifd::image::File> file_;
  std::optional<multifd::image::MappedRamSink> sink_;
  const multifd::RamMap* ram_ = nullptr;
  std::unique_ptr<std::atomic<std::uint64_t>[]> received_;  ///< pages, by block
  bool ram_ended_ = false;
  std::atomic<std::size_t> looked_through_ = 0, synced_ = 0;
};

}  // namespace dump

// SPDX-License-Identifier: MIT
#include "qemu_dump/image_output.hpp"

#include <fcntl.h>
#include <fmt/format.h>
#include <unistd.h>

#include <nlohmann/json.hpp>
#include <utility>

#include "common/limits.hpp"
#include "common/qemu_source.hpp"

namespace dump {

using namespace multifd;
using nlohmann::json;
using program::Failure;
using program::need;

ImageOutput::ImageOutput(std::string path, program::ImageFormat format, program::ConvertOptions options,
                         const Interrupt& interrupt)
    : path_(std::move(path)), format_(format), options_(std::move(options)), interrupt_(interrupt) {
  if (converts()) converted_ = std::make_unique<program::PartFile>(path_);
  part_ = std::make_unique<program::PartFile>(converts() ? path_ + ".mapped-ram" : path_);
  part_->check_writes();
  file_ = need(image::File::adopt(::fcntl(part_->fd(), F_DUPFD_CLOEXEC, 0)), part_->part());
}

void ImageOutput::open(const qemu::MainStreamParser& stream, RamMap& ram) {
  ram_ = &ram;
  for (const qemu::BlockInfo& block : stream.blocks())
    need(ram.add_elsewhere(block.idstr, block.used_length), "RAM block " + program::printable(block.idstr));
  received_ = std::make_unique<std::atomic<std::uint64_t>[]>(stream.blocks().size());
  if (stream.machine_type().empty())
    throw Failure(
        "source: its machine type is older than 2.4 and says no name, which the format needs: use --format blocks");
  sink_ = need(image::MappedRamSink::create(*file_, {.machine_type = stream.machine_type(), .uuid = stream.uuid()},
                                            stream.blocks(), stream.page_bytes()),
               part_->part());
}

PacketHook ImageOutput::packets() {
  return [this](ReceivedPacket& packet) -> Result<void> {
    received_[index(packet.block)].fetch_add(packet.offsets.size(),
                                             std::memory_order_relaxed);  // a sum, read at the end
    return sink_->take(packet);
  };
}

Result<void> ImageOutput::page(program::AnyReceiver*, BlockId block, std::uint64_t offset,
                               std::span<const std::byte> bytes) {
  received_[index(block)].fetch_add(1, std::memory_order_relaxed);
  if (!bytes.empty()) return sink_->page(block, offset, bytes);
  sink_->zero(block, offset);
  return {};
}

Result<void> ImageOutput::read_page(BlockId block, std::uint64_t offset, std::span<std::byte> to) {
  return sink_->read(block, offset, to);
}

std::uint64_t ImageOutput::received_pages(const program::AnyReceiver*, BlockId block) const {
  return received_[index(block)].load(std::memory_order_relaxed);
}

void ImageOutput::end_ram() {
  if (!std::exchange(ram_ended_, true)) need(sink_->end_ram(), part_->part());
}

void ImageOutput::devices(std::span<const std::byte> bytes) {
  end_ram();
  need(sink_->stream().raw(bytes), part_->part());
}

json ImageOutput::finish(const program::AnyReceiver*) {
  end_ram();
  need(sink_->end(), part_->part());
  ++looked_through_;
  json blocks = json::array();
  for (const RamBlock& block : ram_->blocks())
    blocks.push_back({{"name", block.idstr},
                      {"size", block.bytes},
                      {"pages", block.bytes / ram_->page_bytes()},
                      {"received_pages", received_[index(need(ram_->find(block.idstr)))].load()}});
  return blocks;
}

void ImageOutput::write(const json&) {
  part_->sync();
  ++synced_;
}

void ImageOutput::keep() {
  part_->rename();
  part_->release();
}

void ImageOutput::convert() {
  if (!converts()) return;
  const std::string whole = part_->path();
  try {
    const program::ImageFile from(whole);
    program::convert(from, format_, *converted_, options_, interrupt_);
    converted_->sync();
    converted_->rename();
    converted_->release();
  } catch (const std::exception& failure) {
    throw Failure(fmt::format("{}; the dump itself is whole, and stays as {}, which ram_image convert can read",
                              program::text_of(failure), whole));
  }
  ::unlink(whole.c_str());
}

}  // namespace dump

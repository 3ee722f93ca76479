// SPDX-License-Identifier: MIT
#include "qemu_relay/main_writer.hpp"

#include <multifd/qemu/ram_records.hpp>
#include <multifd/transport/algorithms.hpp>

#include <array>

#include "common/program.hpp"

namespace relay {

using namespace multifd;

void MainWriter::zero_page(std::string_view idstr, std::uint64_t offset) {
  std::array<std::byte, qemu::max_zero_record_bytes> record;
  append(std::span(record).first(qemu::encode_zero_record(record, offset, name_for(idstr))));
}

void MainWriter::page(std::string_view idstr, std::uint64_t offset, std::span<const std::byte> bytes) {
  std::array<std::byte, qemu::max_ram_record_header_bytes> header;
  append(std::span(header).first(qemu::encode_page_header(header, offset, name_for(idstr))));
  append(bytes);
}

void MainWriter::flush() {
  if (buffer_.empty()) return;
  program::need(write_all(link_, std::span<const std::byte>(buffer_)), "destination: main stream");
  buffer_.clear();
}

void MainWriter::append(std::span<const std::byte> bytes) {
  constexpr std::size_t many = 64 * 1024;
  buffer_.insert(buffer_.end(), bytes.begin(), bytes.end());
  if (buffer_.size() >= many) flush();
}

std::string_view MainWriter::name_for(std::string_view idstr) {
  if (block_ == idstr) return {};
  block_ = idstr;
  return idstr;
}

}  // namespace relay

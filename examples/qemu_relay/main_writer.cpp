// SPDX-License-Identifier: MIT
#include "qemu_relay/main_writer.hpp"

#include <multifd/qemu/ram_records.hpp>
#include <multifd/transport/algorithms.hpp>

#include <array>

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
  const auto written = write_all(link_, std::span<const std::byte>(buffer_));
  buffer_.clear();
  if (!written) on_error_(written.error());
}

void MainWriter::footer(std::uint32_t section_id) {
  std::array<std::byte, 5> bytes{std::byte{qemu::element_footer}};
  wire::store_be<std::uint32_t>(&bytes[1], section_id);
  append(bytes);
}

void MainWriter::ping(std::uint32_t value) {
  std::array<std::byte, 9> command;
  command[0] = std::byte{qemu::element_command};
  wire::store_be<std::uint16_t>(&command[1], qemu::command_ping);
  wire::store_be<std::uint16_t>(&command[3], sizeof value);
  wire::store_be<std::uint32_t>(&command[5], value);
  append(command);
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

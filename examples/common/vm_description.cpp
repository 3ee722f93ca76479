// SPDX-License-Identifier: MIT
#include "common/vm_description.hpp"

#include <fcntl.h>
#include <multifd/format/byte_order.hpp>
#include <multifd/format/main_stream.hpp>
#include <multifd/image/file.hpp>

#include <algorithm>
#include <vector>

#include "common/part_file.hpp"

namespace program {

using namespace multifd;

std::optional<std::size_t> find_description(std::span<const std::byte> end) {
  constexpr std::size_t head = description_header_bytes;
  // The text is JSON, without a byte below 0x20: so the last place that looks like its header is its header.
  for (std::size_t text = end.size() + 1; text-- > head;)
    if (end[text - head] == std::byte{qemu::element_eof} && end[text - 5] == std::byte{qemu::element_vm_description} &&
        wire::load_be<std::uint32_t>(&end[text - 4]) == end.size() - text)
      return text;
  return std::nullopt;
}

std::string description_of(int fd, const std::string& path) {
  const auto file = need(image::File::adopt(::fcntl(fd, F_DUPFD_CLOEXEC, 0)), path);
  std::vector<std::byte> end(std::min<std::uint64_t>(file.bytes(), most_description_bytes + description_header_bytes));
  need(file.read(file.bytes() - end.size(), end), path);
  const auto text = find_description(end);
  return text ? std::string(reinterpret_cast<const char*>(end.data()) + *text, end.size() - *text) : "";
}

}  // namespace program

// SPDX-License-Identifier: MIT
//
// The relay's main stream towards the destination: the source's elements byte for byte, except for the records of pages,
// which are written anew. Some go, some come (zero pages change their way), and CONTINUE means "the block of the record
// before", which is another one then (format/main_stream.md section 9.6, format/roles.md section 11 step 9).
#pragma once

#include <multifd/qemu/element.hpp>

#include <functional>
#include <string>
#include <vector>

#include "common/link.hpp"

namespace relay {

/// Collects bytes and writes them when there are many, or when flush() is called. `on_error` is told why that failed, and
/// throws.
///
/// Threads: one.
class MainWriter {
 public:
  using OnError = std::function<void(const multifd::Error&)>;
  MainWriter(program::Link& link, OnError on_error) : link_(link), on_error_(std::move(on_error)) {}

  /// Any element that is no page.
  void forward(const multifd::qemu::Element& element) { append(element.bytes); }
  /// A ZERO record, only inside a RAM section, ahead of the record that closes it.
  void zero_page(std::string_view idstr, std::uint64_t offset);
  void page(std::string_view idstr, std::uint64_t offset, std::span<const std::byte> bytes);
  void footer(std::uint32_t section_id);
  /// A PING command, only between sections, and where the return path is open.
  void ping(std::uint32_t value);
  void flush();

 private:
  void append(std::span<const std::byte> bytes);
  /// The name that a record needs: none if it is the block of the record before.
  std::string_view name_for(std::string_view idstr);

  program::Link& link_;
  const OnError on_error_;
  std::vector<std::byte> buffer_;
  std::string block_;  ///< of the last record that was written
};

}  // namespace relay

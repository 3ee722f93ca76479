// SPDX-License-Identifier: MIT
//
// A small VMDESCRIPTION (format/main_stream.md section 9.10) for a VMM that has none: the devices by name, each with
// its state as one buffer, so that a tool that knows only QEMU's stream finds every section's end.
//
//   {"page_size": 4096, "devices": [
//     {"name": "timer", "instance_id": 0, "vmsd_name": "timer", "version": 2,
//      "fields": [{"name": "state", "type": "buffer", "size": 24}]}]}
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <string_view>

#include "multifd/qemu/element.hpp"
#include "multifd/result.hpp"

namespace multifd::qemu {

/// Gathers the text while the sections are written.
///
/// Threads: one.
/// Cost: one string, which grows by some 150 bytes a device.
class VmDescription {
 public:
  /// Params `page_bytes`: the guest's page size.
  explicit VmDescription(std::size_t page_bytes = 4096) : page_bytes_(page_bytes) {}

  /// Adds a device, in the order of the sections. Params `bytes`: of its state.
  /// Errors: ENOMEM; the device is missing then.
  [[nodiscard]] Result<void> add(const DeviceSection& device, std::uint64_t bytes) {
    return catch_bad_alloc(Stage::produce, "VM description", [&]() -> Result<void> {
      std::string entry = devices_.empty() ? "" : ", ";
      entry += "{\"name\": ";
      append_text(entry, device.idstr);
      entry += ", \"instance_id\": " + std::to_string(device.instance_id) + ", \"vmsd_name\": ";
      append_text(entry, device.idstr);
      entry += ", \"version\": " + std::to_string(device.version_id);
      entry += ", \"fields\": [{\"name\": \"state\", \"type\": \"buffer\", \"size\": " + std::to_string(bytes) + "}]}";
      devices_ += entry;
      return {};
    });
  }

  /// The text, for MainStreamWriter::end_stream(). Errors: ENOMEM.
  [[nodiscard]] Result<std::string> text() const {
    return catch_bad_alloc(Stage::produce, "VM description", [&]() -> Result<std::string> {
      return "{\"page_size\": " + std::to_string(page_bytes_) + ", \"devices\": [" + devices_ + "]}";
    });
  }

 private:
  /// Appends a JSON string. What is no printable ASCII becomes an escape of its byte's number: names have no encoding.
  static void append_text(std::string& to, std::string_view text) {
    constexpr char digits[] = "0123456789abcdef";
    to += '"';
    for (const char c : text) {
      const auto byte = static_cast<unsigned char>(c);
      if (c == '"' || c == '\\')
        to += {'\\', c};
      else if (c >= ' ' && c <= '~')
        to += c;
      else
        to += {'\\', 'u', '0', '0', digits[byte >> 4], digits[byte & 15]};
    }
    to += '"';
  }

  std::size_t page_bytes_;
  std::string devices_;
};

}  // namespace multifd::qemu

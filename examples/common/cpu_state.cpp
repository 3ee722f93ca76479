// SPDX-License-Identifier: MIT
#include "common/cpu_state.hpp"

#include <multifd/format/byte_order.hpp>

#include <fmt/format.h>

#include <algorithm>
#include <array>
#include <cstdint>
#include <nlohmann/json.hpp>
#include <string>
#include <string_view>

#include "common/program.hpp"
#include "common/vm_description.hpp"

namespace program {
namespace {

using multifd::image::SegmentRegister;
using multifd::image::VcpuRegisters;
using multifd::wire::load_be;
using nlohmann::json;

constexpr std::size_t most_device_bytes = 256 * 1024 * 1024;
constexpr int most_levels = 32;

/// Names come from a file: nothing but printable ASCII is shown, and not much of it.
std::string printable(std::string_view name) {
  std::string shown;
  for (const char c : name.substr(0, 80)) shown += c >= ' ' && c <= '~' ? c : '?';
  return shown;
}

[[noreturn]] void refuse(std::string_view device, std::string_view why) {
  throw Failure(fmt::format("VM description: device \"{}\": {}", printable(device), why));
}

std::string_view text(const json& object, const char* key) {
  const auto found = object.is_object() ? object.find(key) : object.end();
  return found != object.end() && found->is_string() ? std::string_view(found->get_ref<const std::string&>())
                                                     : std::string_view{};
}

/// An array's elements; nothing where there is no array.
const json& list(const json& object, const char* key) {
  static const json none = json::array();
  const auto found = object.is_object() ? object.find(key) : object.end();
  return found != object.end() && found->is_array() ? *found : none;
}

std::optional<std::uint64_t> number(const json& object, const char* key) {
  const auto found = object.is_object() ? object.find(key) : object.end();
  if (found == object.end() || !found->is_number_unsigned()) return std::nullopt;
  return found->get<std::uint64_t>();
}

/// A device's bytes, taken from the front.
class Section {
 public:
  Section(std::string_view device, std::span<const std::byte> bytes) : device_(device), left_(bytes) {}

  std::span<const std::byte> take(std::uint64_t bytes) {
    if (bytes > left_.size()) refuse(device_, "is longer than the stream");
    const auto taken = left_.first(static_cast<std::size_t>(bytes));
    left_ = left_.subspan(taken.size());
    return taken;
  }
  std::uint64_t take_number(std::size_t bytes) {
    std::uint64_t value = 0;
    for (const std::byte each : take(bytes)) value = value << 8 | std::to_integer<std::uint64_t>(each);
    return value;
  }
  /// A name behind its length of one byte.
  std::string_view take_name() {
    const auto name = take(take_number(1));
    return {reinterpret_cast<const char*>(name.data()), name.size()};
  }
  std::string_view device() const noexcept { return device_; }
  std::size_t left() const noexcept { return left_.size(); }

 private:
  std::string_view device_;
  std::span<const std::byte> left_;
};

struct Field {
  const json* description;
  std::uint64_t element_bytes;
  std::span<const std::byte> bytes;
};

/// Calls `on_field(Field)` for each field. What is in a structure counts for the structure's size.
template <class OnField>
void walk(const json& fields, Section& section, OnField&& on_field) {
  for (const json& field : fields) {
    const auto bytes = number(field, "size");
    if (!bytes)
      refuse(section.device(),
             fmt::format("does not say how long its field \"{}\" is", printable(text(field, "name"))));
    const std::uint64_t elements = field.contains("array_len") ? number(field, "array_len").value_or(0) : 1;
    if (elements > section.left() || *bytes > section.left()) refuse(section.device(), "is longer than the stream");
    on_field(Field{&field, *bytes, section.take(*bytes * elements)});
  }
}

/// Reads past the subsections that stand behind a device's fields.
void skip_subsections(const json& device, Section& section, int level) {
  if (level == most_levels) refuse(section.device(), "has subsections in subsections without end");
  for (const json& each : list(device, "subsections")) {
    if (section.take_number(1) != 5 || section.take_name() != text(each, "vmsd_name"))
      refuse(section.device(),
             fmt::format("has no subsection \"{}\" in its place", printable(text(each, "vmsd_name"))));
    section.take(4);  // version
    walk(list(each, "fields"), section, [](const Field&) {});
    skip_subsections(each, section, level + 1);
  }
}

/// The fields of a device, or of a structure, by name.
class Fields {
 public:
  Fields(std::string_view device, const json& fields, std::span<const std::byte> bytes) : device_(device) {
    Section section(device, bytes);
    walk(fields, section, [&](const Field& field) { all_.push_back(field); });
  }

  /// The elements of an array, or the only one; those of a field that comes several times, one behind the other.
  std::vector<Field> elements(std::string_view name) const {
    std::vector<Field> found;
    for (const Field& each : all_) {
      if (text(*each.description, "name") != name || each.element_bytes == 0) continue;
      for (std::size_t at = 0; at < each.bytes.size(); at += each.element_bytes) {
        if (found.size() == most_elements) refuse(device_, "has an array that is too long");
        found.push_back({each.description, each.element_bytes, each.bytes.subspan(at, each.element_bytes)});
      }
    }
    return found;
  }

  /// An integer of up to 8 bytes. Throws Failure: none of that name.
  std::uint64_t value(std::string_view name) const { return value(name, elements(name)); }
  std::uint64_t value(std::string_view name, std::span<const Field> found) const {
    if (found.size() != 1 || found.front().bytes.size() > 8)
      refuse(device_, fmt::format("has no number \"{}\"", printable(name)));
    Section section(device_, found.front().bytes);
    return section.take_number(found.front().bytes.size());
  }

  Fields inside(const Field& of) const {
    const auto structure = of.description->find("struct");
    if (structure == of.description->end()) refuse(device_, "has another kind of field than expected");
    return {device_, list(*structure, "fields"), of.bytes};
  }

  std::string_view device() const noexcept { return device_; }

 private:
  static constexpr std::size_t most_elements = 64;

  std::string_view device_;
  std::vector<Field> all_;
};

SegmentRegister segment(const Fields& fields, std::span<const Field> found) {
  if (found.size() != 1) refuse(fields.device(), "has not the segment registers of x86");
  const Fields inside = fields.inside(found.front());
  return {.selector = static_cast<std::uint32_t>(inside.value("selector")),
          .limit = static_cast<std::uint32_t>(inside.value("limit")),
          .flags = static_cast<std::uint32_t>(inside.value("flags")),
          .base = inside.value("base")};
}

VcpuRegisters registers(const Fields& fields) {
  VcpuRegisters vcpu;
  const std::vector<Field> general = fields.elements("env.regs");
  const std::vector<Field> segments = fields.elements("env.segs");
  // qemu-system-i386 has eight.
  if ((general.size() != 8 && general.size() != vcpu.general.size()) || segments.size() != vcpu.segments.size())
    refuse(fields.device(), "has not the registers of x86");
  for (std::size_t i = 0; i < general.size(); ++i)
    vcpu.general[i] = fields.value("env.regs", std::span(general).subspan(i, 1));
  for (std::size_t i = 0; i < segments.size(); ++i)
    vcpu.segments[i] = segment(fields, std::span(segments).subspan(i, 1));
  vcpu.rip = fields.value("env.eip");
  vcpu.rflags = fields.value("env.eflags");
  vcpu.ldt = segment(fields, fields.elements("env.ldt"));
  vcpu.tr = segment(fields, fields.elements("env.tr"));
  vcpu.gdt = segment(fields, fields.elements("env.gdt"));
  vcpu.idt = segment(fields, fields.elements("env.idt"));
  vcpu.cr = {fields.value("env.cr[0]"), 0, fields.value("env.cr[2]"), fields.value("env.cr[3]"),
             fields.value("env.cr[4]")};
  if (!fields.elements("env.kernelgsbase").empty()) vcpu.kernel_gs_base = fields.value("env.kernelgsbase");
  return vcpu;
}

multifd::image::MemorySizes told_sizes(std::span<const std::byte> cmos) {
  const auto at = [&](std::size_t i) { return std::to_integer<std::uint64_t>(cmos[i]); };
  constexpr std::uint64_t unit = 64 * 1024, sixteen_mib = 16 * 1024 * 1024, kib = 1024;
  const std::uint64_t high = at(0x34) | at(0x35) << 8;
  // A guest of up to 16 MiB: what is above 1 MiB, in KiB.
  const std::uint64_t below = high != 0 ? sixteen_mib + high * unit : 1024 * kib + (at(0x30) | at(0x31) << 8) * kib;
  return {.below_4g = below, .above_4g = (at(0x5b) | at(0x5c) << 8 | at(0x5d) << 16) * unit};
}

/// What is of interest in one device.
void add_device(MachineState& state, std::string_view name, const Fields& fields) {
  if (name == "cpu") {
    if (fields.elements("env.regs").empty()) return;  // not x86
    state.vcpus.push_back(registers(fields));
  } else if (name == "mc146818rtc") {
    const std::vector<Field> cmos = fields.elements("cmos_data");
    if (cmos.size() == 1 && cmos.front().bytes.size() == 128) state.told = told_sizes(cmos.front().bytes);
  } else if (const bool q35 = name.ends_with("/mch"); q35 || name.ends_with("/I440FX")) {
    const std::vector<Field> parent = fields.elements("parent_obj");
    if (parent.size() != 1) return;
    const Fields inside = fields.inside(parent.front());
    const std::vector<Field> config = inside.elements("config[0]");
    if (config.size() != 1 || config.front().bytes.size() < 256) return;
    std::ranges::transform(config.front().bytes.subspan(q35 ? 0x90 : 0x59, 7), state.shadow.emplace().begin(),
                           [](std::byte each) { return std::to_integer<std::uint8_t>(each); });
  }
}

/// The description at the stream's end, which `devices` loses.
json description(std::span<const std::byte>& devices) {
  const auto end = devices.last(std::min(devices.size(), most_description_bytes + description_header_bytes));
  const auto text = find_description(end);
  if (!text) throw Failure("no VM description behind the devices, so their sections cannot be read");
  const auto* begin = reinterpret_cast<const char*>(end.data());
  // What is nested deeper than any device is left out: it would cost much memory.
  const auto keep = [](int depth, json::parse_event_t, json&) { return depth < 2 * most_levels; };
  json parsed = json::parse(begin + *text, begin + end.size(), keep, false);
  if (!parsed.is_object()) throw Failure("VM description: not a JSON object");
  devices = devices.first(devices.size() - (end.size() - *text) - description_header_bytes);
  return parsed;
}

}  // namespace

MachineState read_machine_state(std::span<const std::byte> devices) {
  MachineState state;
  const json all = description(devices);
  Section stream("", devices);
  for (const json& device : list(all, "devices")) {
    const std::string_view name = text(device, "name");
    // Kind, id, name, instance, version; the state; a footer.
    Section section(name, stream.take(stream.left()));
    const std::uint64_t kind = section.take_number(1);
    const std::uint64_t id = section.take_number(4);
    if (kind != 4 || section.take_name() != name ||
        section.take_number(4) != number(device, "instance_id").value_or(~std::uint64_t{0}))
      refuse(name, "is not where its section should be: the device before it, or this one, is not as described");
    section.take(4);
    const std::size_t before = section.left();
    Section reads = section;
    walk(list(device, "fields"), section, [](const Field&) {});
    const std::uint64_t bytes = before - section.left();
    const Fields fields(name, list(device, "fields"), reads.take(bytes));
    skip_subsections(device, section, 0);
    if (section.take_number(1) != 0x7e || section.take_number(4) != id)
      refuse(name, "is longer or shorter than described: it has fields whose length is not in the description");
    add_device(state, name, fields);
    stream = Section("", section.take(section.left()));
  }
  if (stream.left() != 0) throw Failure("VM description: the stream has more devices than it describes");
  return state;
}

MachineState read_machine_state(const multifd::image::MappedRamReader& image) {
  const multifd::image::Extent extent = image.devices();
  if (extent.bytes > most_device_bytes)
    throw Failure(fmt::format("device sections of {} bytes, more than {}", extent.bytes, most_device_bytes));
  std::vector<std::byte> devices(static_cast<std::size_t>(extent.bytes));
  if (auto read = image.file().read(extent.offset, devices); !read)
    throw Failure("device sections: " + multifd::describe(read.error()));
  return read_machine_state(devices);
}

}  // namespace program

// SPDX-License-Identifier: MIT
//
// A guest's registers out of its device sections, by the VM description; and that neither is believed. QEMU's own
// sections are read in tests/interop/analysis.py.
#include "common/cpu_state.hpp"

#include <doctest/doctest.h>

#include <cstdint>
#include <functional>
#include <nlohmann/json.hpp>
#include <random>
#include <string>
#include <string_view>
#include <vector>

#include "common/program.hpp"

using nlohmann::json;
using program::MachineState;

namespace {

using Bytes = std::vector<std::byte>;

/// Device sections and their description, as QEMU makes them.
class Devices {
 public:
  Bytes bytes;
  json description = {{"page_size", 4096}, {"devices", json::array()}};

  Devices& be(std::size_t size, std::uint64_t value) {
    for (std::size_t i = 0; i < size; ++i)
      bytes.push_back(static_cast<std::byte>(value >> (8 * (size - 1 - i)) & 0xff));
    return *this;
  }
  Devices& text(std::string_view text) {
    for (const char c : text) bytes.push_back(static_cast<std::byte>(c));
    return *this;
  }
  Devices& begin(std::string_view name, std::uint32_t instance, json fields) {
    description["devices"].push_back({{"name", name},
                                      {"instance_id", instance},
                                      {"vmsd_name", name},
                                      {"version", 1},
                                      {"fields", std::move(fields)}});
    return be(1, 4).be(4, ++id_).be(1, name.size()).text(name).be(4, instance).be(4, 1);
  }
  Devices& end() { return be(1, 0x7e).be(4, id_); }

  Devices& cpu(std::uint32_t instance, std::uint64_t mark) {
    begin("cpu", instance, cpu_fields());
    for (std::uint64_t i = 0; i < 16; ++i) be(8, mark + i);
    be(8, mark + 100).be(8, 0x246);
    for (std::uint64_t i = 0; i < 10; ++i) be(4, 0x10 + i).be(8, mark + 200 + i).be(4, 0xffff).be(4, 0x9300);
    for (std::uint64_t i = 0; i < 4; ++i) be(8, mark + 300 + i);
    be(8, mark + 400);
    // A subsection, and one in it.
    const json more = {{"vmsd_name", "cpu/more"}, {"version", 1}, {"fields", json::array({number("env.more", 4)})}};
    description["devices"].back()["subsections"] = json::array({{{"vmsd_name", "cpu/poll"},
                                                                 {"version", 1},
                                                                 {"fields", json::array({number("env.poll", 8)})},
                                                                 {"subsections", json::array({more})}}});
    be(1, 5).be(1, 8).text("cpu/poll").be(4, 1).be(8, 1);
    be(1, 5).be(1, 8).text("cpu/more").be(4, 1).be(4, 2);
    return end();
  }
  Devices& cmos(std::uint64_t above_16m, std::uint64_t above_4g) {
    begin("mc146818rtc", 0, {{{"name", "cmos_data"}, {"type", "buffer"}, {"size", 128}}, number("cmos_index", 1)});
    const std::size_t at = bytes.size();
    be(8, 0).be(8, 0).be(8, 0).be(8, 0).be(8, 0).be(8, 0).be(8, 0).be(8, 0).be(8, 0).be(8, 0).be(8, 0).be(8, 0);
    be(8, 0).be(8, 0).be(8, 0).be(8, 0).be(1, 0);
    for (std::size_t i = 0; i < 2; ++i) bytes[at + 0x34 + i] = static_cast<std::byte>(above_16m >> (8 * i) & 0xff);
    for (std::size_t i = 0; i < 3; ++i) bytes[at + 0x5b + i] = static_cast<std::byte>(above_4g >> (8 * i) & 0xff);
    return end();
  }
  Devices& chipset(std::string_view name, std::size_t pam_at) {
    const json config = {{"name", "config[0]"}, {"type", "pci config"}, {"size", 256}};
    const json inside = {{"vmsd_name", "PCIDevice"}, {"version", 2}, {"fields", {number("version_id", 4), config}}};
    begin(name, 0, json::array({{{"name", "parent_obj"}, {"type", "struct"}, {"size", 260}, {"struct", inside}}}));
    be(4, 2);
    for (std::size_t i = 0; i < 256; ++i) be(1, i >= pam_at && i < pam_at + 7 ? 0x30 + (i - pam_at) : 0xff);
    return end();
  }

  Bytes done() const { return done(description.dump()); }
  Bytes done(const std::string& text) const {
    Devices all = *this;
    return all.be(1, 0).be(1, 6).be(4, text.size()).text(text).bytes;
  }

  static json number(std::string_view name, unsigned size) {
    return {{"name", name}, {"type", "uint"}, {"size", size}};
  }
  static json cpu_fields() {
    const json inside = {number("selector", 4), number("base", 8), number("limit", 4), number("flags", 4)};
    const auto segment = [&](std::string_view name) {
      return json{{"name", name},
                  {"type", "struct"},
                  {"size", 20},
                  {"struct", {{"vmsd_name", "segment"}, {"version", 1}, {"fields", inside}}}};
    };
    json general = number("env.regs", 8), segments = segment("env.segs");
    general["array_len"] = 16;
    segments["array_len"] = 6;
    return {general,
            number("env.eip", 8),
            number("env.eflags", 8),
            segments,
            segment("env.ldt"),
            segment("env.tr"),
            segment("env.gdt"),
            segment("env.idt"),
            number("env.cr[0]", 8),
            number("env.cr[2]", 8),
            number("env.cr[3]", 8),
            number("env.cr[4]", 8),
            number("env.kernelgsbase", 8)};
  }

 private:
  std::uint32_t id_ = 0;
};

Devices machine() {
  Devices devices;
  devices.begin("timer", 0, json::array({Devices::number("ticks", 8)})).be(8, 5).end();
  devices.cpu(0, 1000).cpu(1, 2000).chipset("0000:00:00.0/mch", 0x90);
  return devices.cmos(0x7f00, 0x10000);
}

std::string refusal(const Bytes& bytes) {
  try {
    program::read_machine_state(bytes);
    return "";
  } catch (const program::Failure& failure) {
    return failure.what();
  }
}

}  // namespace

TEST_CASE("Registers, memory sizes and the chipset's registers are read by the description") {
  const MachineState state = program::read_machine_state(machine().done());
  REQUIRE(state.vcpus.size() == 2);
  const auto& vcpu = state.vcpus[1];
  CHECK(vcpu.general[0] == 2000);
  CHECK(vcpu.general[15] == 2015);
  CHECK(vcpu.rip == 2100);
  CHECK(vcpu.rflags == 0x246);
  CHECK(vcpu.segments[5] == multifd::image::SegmentRegister{0x15, 0xffff, 0x9300, 2205});
  CHECK(vcpu.idt == multifd::image::SegmentRegister{0x19, 0xffff, 0x9300, 2209});
  CHECK(vcpu.cr == std::array<std::uint64_t, 5>{2300, 0, 2301, 2302, 2303});
  CHECK(vcpu.kernel_gs_base == 2400);
  REQUIRE(state.told.has_value());
  CHECK(state.told->below_4g == std::uint64_t{2} << 30);
  CHECK(state.told->above_4g == std::uint64_t{4} << 30);
  REQUIRE(state.shadow.has_value());
  CHECK(*state.shadow == multifd::image::ShadowRegisters{0x30, 0x31, 0x32, 0x33, 0x34, 0x35, 0x36});
  Devices i440fx;
  CHECK(program::read_machine_state(i440fx.chipset("0000:00:00.0/I440FX", 0x59).done()).shadow == state.shadow);
}

TEST_CASE("A guest of up to 16 MiB has its size in KiB") {
  Devices devices = Devices().cmos(0, 0);
  const std::size_t at = devices.bytes.size() - 5 - 1 - 128;
  devices.bytes[at + 0x31] = std::byte{0x3c};
  CHECK(program::read_machine_state(devices.done()).told->below_4g == 16 << 20);
}

TEST_CASE("A machine without x86's devices has none of these") {
  const MachineState state = program::read_machine_state(
      Devices().begin("cpu", 0, json::array({Devices::number("pc", 8)})).be(8, 1).end().done());
  CHECK(state.vcpus.empty());
  CHECK_FALSE(state.told.has_value());
  CHECK_FALSE(state.shadow.has_value());
  CHECK(program::read_machine_state(Devices().done()).vcpus.empty());
}

TEST_CASE("What does not fit is refused with the device's name") {
  struct Row {
    const char* what;
    std::function<void(Devices&)> change;
    const char* text;
  };
  const auto device = [](Devices& of, std::size_t i) -> json& { return of.description["devices"][i]; };
  for (const Row& row : std::vector<Row>{
           {"size unknown", [&](Devices& d) { device(d, 1)["fields"][2].erase("size"); },
            "\"cpu\": does not say how long"},
           {"size negative", [&](Devices& d) { device(d, 1)["fields"][2]["size"] = -8; },
            "\"cpu\": does not say how long"},
           {"size a float", [&](Devices& d) { device(d, 1)["fields"][2]["size"] = 8.0; },
            "\"cpu\": does not say how long"},
           {"size huge", [&](Devices& d) { device(d, 1)["fields"][2]["size"] = ~0ull; }, "\"cpu\": is longer"},
           {"array huge", [&](Devices& d) { device(d, 1)["fields"][0]["array_len"] = ~0ull; }, "\"cpu\": is longer"},
           {"array wraps", [&](Devices& d) { device(d, 1)["fields"][0]["array_len"] = 1ull << 61; },
            "\"cpu\": is longer"},
           {"field a number", [&](Devices& d) { device(d, 1)["fields"][0] = 7; }, "\"cpu\": does not say how long"},
           {"one field less", [&](Devices& d) { device(d, 0)["fields"] = json::array(); },
            "\"timer\": is longer or shorter"},
           {"one field more", [&](Devices& d) { device(d, 0)["fields"].push_back(Devices::number("x", 1)); },
            "\"timer\": is longer or shorter"},
           {"no subsection", [&](Devices& d) { device(d, 1).erase("subsections"); }, "\"cpu\": is longer or shorter"},
           {"another subsection", [&](Devices& d) { device(d, 1)["subsections"][0]["vmsd_name"] = "cpu/x"; },
            "\"cpu\": has no subsection \"cpu/x\""},
           {"another name", [&](Devices& d) { device(d, 3)["name"] = "pch"; }, "\"pch\": is not where"},
           {"another instance", [&](Devices& d) { device(d, 2)["instance_id"] = 7; }, "\"cpu\": is not where"},
           {"device missing", [&](Devices& d) { d.description["devices"].erase(4); }, "more devices than it describes"},
           {"no devices", [&](Devices& d) { d.description.erase("devices"); }, "more devices than it describes"},
           {"device a number", [&](Devices& d) { d.description["devices"][0] = 1; }, "\"\": is not where"},
           {"name for a terminal", [&](Devices& d) { device(d, 0)["name"] = "\x1b[2J"; }, "\"?[2J\": is not where"},
           {"no rip", [&](Devices& d) { device(d, 1)["fields"][1]["name"] = "x"; },
            "\"cpu\": has no number \"env.eip\""},
           {"fewer registers",
            [&](Devices& d) { device(d, 1)["fields"][0]["array_len"] = 4, device(d, 1)["fields"][0]["size"] = 32; },
            "\"cpu\": has not the registers"},
           {"segments of numbers", [&](Devices& d) { device(d, 1)["fields"][3].erase("struct"); },
            "\"cpu\": has another kind of field"},
           {"segments without base",
            [&](Devices& d) { device(d, 1)["fields"][3]["struct"]["fields"][1]["name"] = "x"; },
            "\"cpu\": has no number \"base\""},
           {"many elements",
            [&](Devices& d) { device(d, 1)["fields"][0]["array_len"] = 128, device(d, 1)["fields"][0]["size"] = 1; },
            "\"cpu\": has an array that is too long"},
       }) {
    CAPTURE(row.what);
    Devices devices = machine();
    row.change(devices);
    const std::string said = refusal(devices.done());
    CAPTURE(said);
    CHECK(said.find(row.text) != said.npos);
  }
  CHECK(refusal({}).starts_with("no VM description"));
  CHECK(refusal(machine().done("{\"devices\": [")) == "VM description: not a JSON object");
  CHECK(refusal(machine().done("[]")) == "VM description: not a JSON object");
  CHECK(refusal(machine().done(std::string(4'000'000, '['))) == "VM description: not a JSON object");
}

TEST_CASE("Cut anywhere, or with any byte changed, it is read or refused") {
  const Bytes whole = machine().done();
  const std::size_t sections = machine().bytes.size();
  for (std::size_t bytes = 0; bytes < whole.size(); bytes += bytes < sections ? 1 : 37) {
    CAPTURE(bytes);
    CHECK(refusal(Bytes(whole.begin(), whole.begin() + static_cast<std::ptrdiff_t>(bytes))) != "");
    // Without its beginning.
    if (bytes > 0) refusal(Bytes(whole.begin() + static_cast<std::ptrdiff_t>(bytes), whole.end()));
  }
  std::mt19937_64 rng(1);
  for (int i = 0; i < 1'000; ++i) {
    Bytes changed = whole;
    for (std::uint64_t n = 1 + rng() % 3; n > 0; --n) changed[rng() % changed.size()] = static_cast<std::byte>(rng());
    refusal(changed);
  }
}

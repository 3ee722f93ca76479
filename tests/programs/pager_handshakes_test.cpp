// SPDX-License-Identifier: MIT
//
// What multifd_pager makes of a VMM's handshake: every protocol's, and whatever else may come on its socket.
#include <doctest/doctest.h>
#include <fcntl.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <unistd.h>
#include <multifd/format/byte_order.hpp>

#include <dirent.h>
#include <array>
#include <cstring>
#include <memory>
#include <optional>
#include <string>
#include <thread>
#include <vector>

#include "common/program.hpp"
#include "multifd_pager/handshake.hpp"
#include "multifd_pager/memory_file.hpp"

using namespace pager;
using multifd::BlockId;
using program::Descriptor;

namespace {

const multifd::Interrupt& never() {
  static const auto interrupt = program::need(multifd::Interrupt::create());
  return interrupt;
}

std::size_t open_descriptors() {
  std::size_t count = 0;
  DIR* const folder = ::opendir("/proc/self/fd");
  while (::readdir(folder) != nullptr) ++count;
  ::closedir(folder);
  return count;
}

/// Both ends of a connection.
struct Connection {
  Connection() {
    std::array<int, 2> ends{};
    REQUIRE(::socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, ends.data()) == 0);
    vmm = Descriptor(ends[0]);
    pager = Descriptor(ends[1]);
  }
  /// Sends bytes with that many descriptors, of anything.
  void send(const std::string& text, std::size_t descriptors = 0) const {
    std::vector<Descriptor> owned;
    std::vector<int> fds;
    for (std::size_t i = 0; i < descriptors; ++i) {
      owned.emplace_back(::memfd_create("any", MFD_CLOEXEC));
      fds.push_back(owned.back().get());
    }
    std::vector<char> control(CMSG_SPACE(fds.size() * sizeof(int)));
    iovec bytes{.iov_base = const_cast<char*>(text.data()), .iov_len = text.size()};
    msghdr message{};
    message.msg_iov = &bytes;
    message.msg_iovlen = 1;
    if (!fds.empty()) {
      message.msg_control = control.data();
      message.msg_controllen = control.size();
      cmsghdr* const header = CMSG_FIRSTHDR(&message);
      header->cmsg_level = SOL_SOCKET;
      header->cmsg_type = SCM_RIGHTS;
      header->cmsg_len = CMSG_LEN(fds.size() * sizeof(int));
      std::memcpy(CMSG_DATA(header), fds.data(), fds.size() * sizeof(int));
    }
    REQUIRE(::sendmsg(vmm.get(), &message, MSG_NOSIGNAL) == static_cast<ssize_t>(text.size()));
  }
  Descriptor vmm, pager;
};

struct Outcome {
  std::optional<Handshake> said;
  std::string error;
};

Outcome receive(const Connection& link, ProtocolName name, std::chrono::milliseconds limit = std::chrono::seconds(10)) {
  const auto protocol = make_protocol(name);
  Incoming in(link.pager.get(), protocol->descriptors(), limit, never());
  Outcome outcome;
  try {
    outcome.said = protocol->receive(in);
  } catch (const program::Failure& failure) {
    outcome.error = failure.what();
  }
  return outcome;
}

/// What a VMM is told that sends this, and then nothing more.
std::string refusal(ProtocolName name, const std::string& text, std::size_t descriptors = 1) {
  const std::size_t before = open_descriptors();
  std::string error;
  {
    const Connection link;
    link.send(text, descriptors);
    ::shutdown(link.vmm.get(), SHUT_WR);
    Outcome outcome = receive(link, name);
    REQUIRE_FALSE(outcome.said.has_value());
    error = outcome.error;
  }
  CHECK(open_descriptors() == before);
  return error;
}

std::string region(const std::string& more = "") {
  return R"({"base_host_virt_addr": 140000000000000, "size": 4096, "offset": 8192)" + more + "}";
}

template <class T>
void put(std::string& text, T value) {
  std::array<std::byte, sizeof value> bytes;
  multifd::wire::store_le(bytes.data(), value);
  text.append(reinterpret_cast<const char*>(bytes.data()), bytes.size());
}

std::string cloud_hypervisor(std::uint16_t count, std::uint64_t length, std::uint8_t flags = 1,
                             std::uint8_t modes = 1) {
  std::string text;
  put<std::uint16_t>(text, 1), put<std::uint16_t>(text, 1), put(text, flags), put(text, modes), put(text, count),
      put(text, length);
  return text;
}

std::string cloud_hypervisor_region(std::uint64_t address, std::uint64_t bytes, std::uint64_t offset,
                                    std::uint64_t fault_bytes = 4096, std::uint32_t flags = 0) {
  std::string text;
  put(text, address), put(text, bytes), put(text, offset), put(text, fault_bytes), put<std::uint32_t>(text, 3),
      put(text, flags), put<std::uint64_t>(text, 0);
  return text;
}

}  // namespace

TEST_CASE("Firecracker: the list of regions, whatever it is cut into") {
  const std::string text = " [" + region(R"(, "page_size": 4096, "page_size_kib": 4096)") + ",\n" +
                           region(R"(, "page_size_kib": 2097152, "name": "a \"] b")") + "," +
                           region(R"(, "page_size_kib": 2048)") + "," + region() + "]";
  for (const std::size_t cut : {std::size_t{0}, std::size_t{1}, text.size() / 2, text.size() - 1}) {
    const Connection link;
    std::thread vmm([&] {
      if (cut > 0) link.send(text.substr(0, cut));
      link.send(text.substr(cut), 1);
    });
    const Outcome outcome = receive(link, ProtocolName::firecracker);
    vmm.join();
    INFO(outcome.error);
    REQUIRE(outcome.said.has_value());
    REQUIRE(outcome.said->regions.size() == 4);
    CHECK(outcome.said->regions[0].address == 140000000000000);
    CHECK(outcome.said->regions[0].bytes == 4096);
    CHECK(outcome.said->regions[0].offset == 8192);
    CHECK(outcome.said->regions[0].unit_bytes == 4096);
    CHECK(outcome.said->regions[1].unit_bytes == 2097152);
    CHECK(outcome.said->regions[2].unit_bytes == 2097152);
    CHECK(outcome.said->regions[3].unit_bytes == 0);
    CHECK(outcome.said->descriptors.size() == 1);
  }
}

TEST_CASE("Firecracker: what is no such list is refused with the reason") {
  const auto said = [](const std::string& text, std::size_t descriptors = 1) {
    return refusal(ProtocolName::firecracker, text, descriptors);
  };
  const std::string good = "[" + region() + "]";
  CHECK(said(good, 0).contains("0 descriptors"));
  CHECK(said(good, 2).contains("2 descriptors"));
  CHECK(said(good, 200).contains("200 descriptors"));
  CHECK(said("[]").contains("no region"));
  CHECK(said("{}").contains("does not begin with ["));
  CHECK(said("GET / HTTP/1.0\r\n\r\n").contains("does not begin with ["));
  CHECK(said("[[[[[[").contains("nested too deeply"));
  CHECK(said("[1]").contains("region 0 is no object"));
  CHECK(said("[" + region() + "x]").contains("not JSON"));
  CHECK(said("[" + region()).contains("in the middle"));
  CHECK(said("[{}]").contains("base_host_virt_addr is missing"));
  for (const char* const value : {"-1", "1.5", "\"1\"", "null", "[1]", "1e3", "18446744073709551616"})
    CHECK(said(R"([{"base_host_virt_addr": 4096, "size": )" + std::string(value) + R"(, "offset": 0}])")
              .contains("size is no whole number"));
  std::string many = "[" + region();
  for (std::size_t i = 0; i < max_regions; ++i) many += "," + region();
  CHECK(said(many + "]").contains("more than 1024 regions"));
}

TEST_CASE("A text that does not end, or does not come, ends the handshake") {
  const Connection endless;
  std::thread vmm([&] {
    const std::string text(64 * 1024, ' ');
    endless.send("[");
    while (::send(endless.vmm.get(), text.data(), text.size(), MSG_NOSIGNAL) > 0) {
    }
  });
  const Outcome outcome = receive(endless, ProtocolName::firecracker);
  ::shutdown(endless.pager.get(), SHUT_RDWR);
  vmm.join();
  CHECK(outcome.error.contains("more than 262144 bytes"));
  const Connection silent;
  silent.send("[");
  CHECK(
      receive(silent, ProtocolName::firecracker, std::chrono::milliseconds(20)).error.contains("--handshake-timeout"));
}

TEST_CASE("Cloud Hypervisor: the handshake's regions; a fault size binds where the memory has huge pages") {
  const Connection link;
  constexpr std::uint32_t map_hugetlb = 0x40000;
  link.send(cloud_hypervisor(2, 96) + cloud_hypervisor_region(0x7f0000000000, 65536, 4096, 65536) +
                cloud_hypervisor_region(0x7f1000000000, 2 << 20, 2 << 20, 2 << 20, map_hugetlb),
            3);
  const Outcome outcome = receive(link, ProtocolName::cloud_hypervisor);
  INFO(outcome.error);
  REQUIRE(outcome.said.has_value());
  REQUIRE(outcome.said->regions.size() == 2);
  CHECK(outcome.said->regions[0].address == 0x7f0000000000);
  CHECK(outcome.said->regions[0].bytes == 65536);
  CHECK(outcome.said->regions[0].offset == 4096);
  CHECK(outcome.said->regions[0].unit_bytes == 0);
  CHECK(outcome.said->regions[1].unit_bytes == 2 << 20);
  CHECK(outcome.said->descriptors.size() == 1);
}

TEST_CASE("Cloud Hypervisor: an acknowledgement where it is asked for, and errors for commands that are not served") {
  for (const bool asked : {false, true}) {
    const Connection link;
    link.send(cloud_hypervisor(1, 48, asked ? 5 : 1) + cloud_hypervisor_region(4096, 4096, 0), 1);
    const auto protocol = make_cloud_hypervisor();
    Incoming in(link.pager.get(), 1, std::chrono::seconds(10), never());
    (void)protocol->receive(in);
    protocol->accepted(link.pager.get(), 1);
    std::array<unsigned char, 32> bytes{};
    if (asked) {
      CHECK(::recv(link.vmm.get(), bytes.data(), bytes.size(), MSG_DONTWAIT) == 16);
      CHECK(bytes == std::array<unsigned char, 32>{});
    }
    CHECK(::recv(link.vmm.get(), bytes.data(), bytes.size(), MSG_DONTWAIT) < 0);
    std::string add;
    put<std::uint16_t>(add, 2), put<std::uint16_t>(add, 0), put<std::uint32_t>(add, 0), put<std::uint64_t>(add, 48);
    link.send(add + std::string(48, 'x'), 1);
    protocol->next(in, link.pager.get());
    REQUIRE(::recv(link.vmm.get(), bytes.data(), bytes.size(), MSG_DONTWAIT) == 16);
    CHECK(bytes[0] == EOPNOTSUPP);
  }
}

TEST_CASE("Cloud Hypervisor: what is no handshake is refused with the reason") {
  const auto said = [](const std::string& text, std::size_t descriptors = 1) {
    return refusal(ProtocolName::cloud_hypervisor, text, descriptors);
  };
  const std::string one = cloud_hypervisor_region(4096, 4096, 0);
  CHECK(said(cloud_hypervisor(0, 0)).contains("no region"));
  CHECK(said(cloud_hypervisor(65535, 65535 * 48)).contains("more than 1024 regions"));
  CHECK(said(cloud_hypervisor(1, ~std::uint64_t{0}) + one).contains("where 1 regions have 48"));
  CHECK(said(cloud_hypervisor(1, 47) + one).contains("47 bytes"));
  CHECK(said(cloud_hypervisor(1, 48, 1, 2) + one).contains("without MISSING"));
  CHECK(said(cloud_hypervisor(2, 96) + one).contains("in the middle"));
  CHECK(said(cloud_hypervisor(1, 48) + one, 0).contains("0 descriptors"));
  CHECK(said(cloud_hypervisor(1, 48) + one, 3).contains("3 descriptors"));
  CHECK(said("x").contains("in the middle"));
}

TEST_CASE("ours: regions by RAM block, memory, and what was dropped") {
  const Connection link;
  link.send(R"({"version": 1, "later": {"more": 1}, "regions": [
      {"address": 4096, "bytes": 8192, "offset": 0, "idstr": "pc.ram", "memory": 1, "memory_offset": 4096},
      {"address": 65536, "bytes": 4096, "offset": 4096, "page_bytes": 4096}],
      "dropped": [{"idstr": "pc.ram", "offset": 4096, "bytes": 4096}]})",
            2);
  const Outcome outcome = receive(link, ProtocolName::multifd);
  INFO(outcome.error);
  REQUIRE(outcome.said.has_value());
  REQUIRE(outcome.said->regions.size() == 2);
  CHECK(outcome.said->regions[0].idstr == "pc.ram");
  CHECK(outcome.said->regions[0].memory == 1);
  CHECK(outcome.said->regions[0].memory_offset == 4096);
  CHECK(outcome.said->regions[1].idstr.empty());
  CHECK(outcome.said->regions[1].unit_bytes == 4096);
  REQUIRE(outcome.said->dropped.size() == 1);
  CHECK(outcome.said->dropped[0].bytes == 4096);
  CHECK(outcome.said->descriptors.size() == 2);
}

TEST_CASE("ours: what is no such handshake is refused with the reason") {
  const auto said = [](const std::string& text, std::size_t descriptors = 1) {
    return refusal(ProtocolName::multifd, text, descriptors);
  };
  const auto object = [](const std::string& more) { return R"({"version": 1)" + more + "}"; };
  const std::string one = R"(, "regions": [{"address": 4096, "bytes": 4096, "offset": 0)";
  CHECK(said("{}").contains("version is missing"));
  CHECK(said(R"({"version": 2})").contains("version 2"));
  CHECK(said(object("")).contains("no region"));
  CHECK(said(object(R"(, "regions": 7)")).contains("regions is no list"));
  CHECK(said(object(R"(, "regions": [7])")).contains("no object"));
  CHECK(said(object(one + "}]"), 0).contains("no descriptor"));
  CHECK(said(object(one + "}]"), 2).contains("2 descriptors came with it, and 1 are used"));
  CHECK(said(object(one + "}]"), 66).contains("more than 65 descriptors"));
  CHECK(said(object(one + R"(, "memory": 1}])")).contains("memory 1 of 1 descriptors"));
  CHECK(said(object(one + R"(, "idstr": 1}])")).contains("idstr is no text"));
  CHECK(said(object(one + R"(, "idstr": ""}])")).contains("idstr has 0 bytes"));
  CHECK(said(object(one + R"(, "idstr": ")" + std::string(256, 'x') + "\"}]")).contains("idstr has 256 bytes"));
  CHECK(said(object(one + R"(}], "dropped": [{"offset": 0}])")).contains("dropped 0: bytes is missing"));
}

TEST_CASE("memory file: main memory's blocks one behind the other, and nothing past their end") {
  constexpr std::uint64_t mib = 1 << 20;
  const std::vector<multifd::postcopy::StoreBlock> blocks{
      {"ram0", 128 * mib}, {"vga.vram", 16 * mib}, {"ram1", 256 * mib}};
  const MemoryFile memory(blocks);
  CHECK(memory.bytes() == 384 * mib);
  const auto two = memory.regions_of({.address = 1 << 30, .bytes = 16 * mib, .offset = 120 * mib, .unit_bytes = 0});
  REQUIRE(two.size() == 2);
  CHECK(two[0].block == BlockId{0});
  CHECK(two[0].offset == 120 * mib);
  CHECK(two[0].bytes == 8 * mib);
  CHECK(two[0].unit_bytes == 4096);
  CHECK(two[1].block == BlockId{2});
  CHECK(two[1].offset == 0);
  CHECK(two[1].address == (1 << 30) + 8 * mib);
  const auto named = memory.regions_of({.address = 4096, .bytes = mib, .offset = mib, .idstr = "vga.vram"});
  REQUIRE(named.size() == 1);
  CHECK(named[0].block == BlockId{1});
  constexpr std::uint64_t most = ~std::uint64_t{0};
  for (const Region& wrong :
       {Region{.address = 0, .bytes = mib, .offset = 384 * mib}, Region{.bytes = 384 * mib + 1}, Region{.bytes = 0},
        Region{.bytes = most, .offset = mib}, Region{.bytes = mib, .offset = most},
        Region{.bytes = 17 * mib, .idstr = "vga.vram"}, Region{.bytes = mib, .idstr = "ram2"}})
    CHECK_THROWS_AS((void)memory.regions_of(wrong), program::Failure);
  std::vector<std::vector<std::uint64_t>> missing;
  memory.drop({.offset = 128 * mib - 4096, .bytes = 8192}, 4096, missing);
  REQUIRE(missing.size() == 3);
  CHECK(missing[0][511] == ~std::uint64_t{0} >> 1);
  CHECK(missing[1].empty());
  CHECK(missing[2][0] == ~std::uint64_t{1});
  CHECK_THROWS_AS(memory.drop({.offset = 1, .bytes = 4096}, 4096, missing), program::Failure);
  CHECK_THROWS_AS(memory.drop({.offset = most - 4095, .bytes = 4096}, 4096, missing), program::Failure);
}

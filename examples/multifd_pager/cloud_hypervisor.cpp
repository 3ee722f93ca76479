// SPDX-License-Identifier: MIT
//
// Cloud Hypervisor's handshake (its document "External userfaultfd backend"): little-endian messages, each with a header of 16 bytes.
//
//   request    0 le 2: command   2: 6 bytes of the command's own   8 le 8: bytes behind the header
//   Handshake  2 le 2: version   4: flags   5: userfaultfd modes   6 le 2: number of regions of 48 bytes each
//   region     0 le 8: address   8 le 8: size   16 le 8: offset   24 le 8: fault size   32 le 4: prot   36 le 4: mmap flags
//              40 le 8: offset in the region's backing descriptor
//   response   0 le 2: status    2 le 2: reply type, and 4 bytes of its own   8 le 8: bytes behind the header
//
// The text gives no numbers for commands, flags, modes and types; see README.md of this folder for what is taken for them.
#include <fmt/format.h>
#include <sys/mman.h>
#include <multifd/format/byte_order.hpp>

#include <array>
#include <cerrno>

#include "common/program.hpp"
#include "multifd_pager/handshake.hpp"

namespace pager {
namespace {

using multifd::wire::load_le;
using multifd::wire::store_le;
using program::Failure;

constexpr std::size_t header_bytes = 16;
constexpr std::size_t region_bytes = 48;
// In the order of the text, from bit 0 on.
constexpr unsigned flag_ack_required = 4;
constexpr unsigned mode_missing = 1;

const std::byte* at(const std::string& text, std::size_t offset) {
  return reinterpret_cast<const std::byte*>(text.data()) + offset;
}

/// Reads until `text` has that many bytes.
void fill(Incoming& in, std::string& text, std::size_t bytes) {
  while (text.size() < bytes) in.read(text, bytes - text.size());
}

class CloudHypervisor final : public Protocol {
 public:
  std::size_t descriptors() const noexcept override { return 1; }

  Handshake receive(Incoming& in) override {
    // Whatever its command's number: a session begins with the Handshake.
    std::string text;
    fill(in, text, header_bytes);
    const auto flags = std::to_integer<unsigned>(*at(text, 4));
    const auto modes = std::to_integer<unsigned>(*at(text, 5));
    const std::size_t count = load_le<std::uint16_t>(at(text, 6));
    const auto length = load_le<std::uint64_t>(at(text, 8));
    acknowledge_ = (flags & flag_ack_required) != 0;
    if (count == 0) throw Failure("handshake: no region");
    if (count > max_regions) throw Failure(fmt::format("handshake: more than {} regions", max_regions));
    if (length != count * region_bytes)
      throw Failure(fmt::format("handshake: {} bytes behind the header, where {} regions have {}", length, count,
                                count * region_bytes));
    if ((modes & mode_missing) == 0)
      throw Failure(fmt::format("handshake: userfaultfd modes {:#x} without MISSING: no fault would come", modes));
    fill(in, text, header_bytes + count * region_bytes);
    Handshake said;
    for (std::size_t i = 0; i < count; ++i) {
      const std::size_t begin = header_bytes + i * region_bytes;
      Region region{.address = load_le<std::uint64_t>(at(text, begin)),
                    .bytes = load_le<std::uint64_t>(at(text, begin + 8)),
                    .offset = load_le<std::uint64_t>(at(text, begin + 16))};
      // What the VMM prefers binds only where the memory is made of such pages.
      if ((load_le<std::uint32_t>(at(text, begin + 36)) & MAP_HUGETLB) != 0)
        region.unit_bytes = load_le<std::uint64_t>(at(text, begin + 24));
      said.regions.push_back(std::move(region));
    }
    said.descriptors = in.take_descriptors();
    // The others are the regions' backing files, which nothing is written to here.
    if (in.descriptors_seen() != 1 && in.descriptors_seen() != 1 + count)
      throw Failure(fmt::format("handshake: {} descriptors with {} regions: the userfaultfd, or one more for each",
                                in.descriptors_seen(), count));
    return said;
  }

  void accepted(int socket, unsigned) override {
    if (acknowledge_) answer(socket, legacy(0));
  }
  void refused(int socket, const std::string&) override {
    if (acknowledge_) answer(socket, legacy(EINVAL));
  }
  bool says_more() const noexcept override { return true; }

  /// AddRegion, RemoveRegion: this pager's guests keep the memory they began with.
  void next(Incoming& in, int socket) override {
    std::string text;
    fill(in, text, header_bytes);
    const auto length = load_le<std::uint64_t>(at(text, 8));
    if (length > max_handshake_bytes) throw Failure("a command that is too long");
    fill(in, text, header_bytes + static_cast<std::size_t>(length));
    answer(socket, legacy(EOPNOTSUPP));
  }

 private:
  /// Type 0, nothing behind it.
  static std::string legacy(std::uint16_t status) {
    std::array<std::byte, header_bytes> bytes{};
    store_le(bytes.data(), status);
    return {reinterpret_cast<const char*>(bytes.data()), bytes.size()};
  }

  bool acknowledge_ = false;
};

}  // namespace

std::unique_ptr<Protocol> make_cloud_hypervisor() { return std::make_unique<CloudHypervisor>(); }

}  // namespace pager

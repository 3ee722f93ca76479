// SPDX-License-Identifier: MIT
//
// Firecracker's handshake (its document "Handling snapshot memory loading"): a JSON list of regions with
// the userfaultfd, and nothing more in either direction.
#include <fmt/format.h>

#include <nlohmann/json.hpp>

#include "common/program.hpp"
#include "multifd_pager/handshake.hpp"
#include "multifd_pager/json_text.hpp"

namespace pager {
namespace {

using nlohmann::json;
using program::Failure;

class Firecracker final : public Protocol {
 public:
  std::size_t descriptors() const noexcept override { return 1; }

  Handshake receive(Incoming& in) override {
    const json list = read_json(in, '[');
    if (list.empty()) throw Failure("handshake: no region");
    if (list.size() > max_regions) throw Failure(fmt::format("handshake: more than {} regions", max_regions));
    Handshake said;
    for (const json& each : list) {
      const std::string where = fmt::format("region {}", said.regions.size());
      if (!each.is_object()) throw Failure(fmt::format("handshake: {} is no object", where));
      said.regions.push_back({.address = number_of(each, "base_host_virt_addr", where),
                              .bytes = number_of(each, "size", where),
                              .offset = number_of(each, "offset", where),
                              .unit_bytes = unit_of(each, where)});
    }
    said.descriptors = in.take_descriptors();
    if (in.descriptors_seen() != 1)
      throw Failure(
          fmt::format("handshake: {} descriptors came with it, where the userfaultfd belongs", in.descriptors_seen()));
    return said;
  }

 private:
  /// `page_size` is bytes. `page_size_kib`, which it replaces, has been bytes as well, whatever its name says; no page has
  /// less than 4 KiB, and none that faults are served in more than 4 MiB, so the two cannot be confused.
  static std::uint64_t unit_of(const json& region, const std::string& where) {
    if (const auto bytes = number_if_there(region, "page_size", where)) return *bytes;
    const auto bytes_or_kib = number_if_there(region, "page_size_kib", where).value_or(0);
    return bytes_or_kib != 0 && bytes_or_kib < 4096 ? bytes_or_kib * 1024 : bytes_or_kib;
  }
};

}  // namespace

std::unique_ptr<Protocol> make_firecracker() { return std::make_unique<Firecracker>(); }

}  // namespace pager

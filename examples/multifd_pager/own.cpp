// SPDX-License-Identifier: MIT
//
// Our own handshake: a JSON object with the regions by RAM block, the userfaultfd, and shared memory where faults are
// minor. Answers are lines of JSON. A VMM that keeps its userfaultfd may hand it over again, to a pager that was started
// anew: README.md of this folder says what it has to tell then.
#include <fmt/format.h>

#include <nlohmann/json.hpp>

#include "common/program.hpp"
#include "multifd_pager/handshake.hpp"
#include "multifd_pager/json_text.hpp"

namespace pager {
namespace {

using nlohmann::json;
using program::Failure;

const json& list_of(const json& object, const char* key) {
  static const json none = json::array();
  const auto found = object.find(key);
  if (found == object.end()) return none;
  if (!found->is_array()) throw Failure(fmt::format("handshake: {} is no list", key));
  for (const json& each : *found)
    if (!each.is_object()) throw Failure(fmt::format("handshake: {}: an entry is no object", key));
  return *found;
}

class Own final : public Protocol {
 public:
  std::size_t descriptors() const noexcept override { return 1 + max_memory_descriptors; }

  Handshake receive(Incoming& in) override {
    const json object = read_json(in, '{');
    if (const std::uint64_t version = number_of(object, "version", "object"); version != 1)
      throw Failure(fmt::format("handshake: version {}, where this pager knows 1", version));
    Handshake said;
    said.descriptors = in.take_descriptors();
    if (said.descriptors.empty()) throw Failure("handshake: no descriptor came with it, where the userfaultfd belongs");
    if (in.descriptors_seen() > said.descriptors.size())
      throw Failure(fmt::format("handshake: more than {} descriptors", said.descriptors.size()));
    std::size_t used = 0;
    for (const json& each : list_of(object, "regions")) {
      const std::string where = fmt::format("region {}", said.regions.size());
      if (said.regions.size() == max_regions)
        throw Failure(fmt::format("handshake: more than {} regions", max_regions));
      said.regions.push_back({.address = number_of(each, "address", where),
                              .bytes = number_of(each, "bytes", where),
                              .offset = number_of(each, "offset", where),
                              .unit_bytes = number_if_there(each, "page_bytes", where).value_or(0),
                              .idstr = text_of(each, "idstr", where),
                              .memory = number_if_there(each, "memory", where).value_or(0),
                              .memory_offset = number_if_there(each, "memory_offset", where).value_or(0)});
      const std::size_t memory = said.regions.back().memory;
      if (memory >= said.descriptors.size())
        throw Failure(
            fmt::format("handshake: {}: memory {} of {} descriptors", where, memory, said.descriptors.size()));
      used = std::max(used, memory);
    }
    if (said.regions.empty()) throw Failure("handshake: no region");
    if (used + 1 != said.descriptors.size())
      throw Failure(
          fmt::format("handshake: {} descriptors came with it, and {} are used", said.descriptors.size(), used + 1));
    for (const json& each : list_of(object, "dropped")) {
      const std::string where = fmt::format("dropped {}", said.dropped.size());
      said.dropped.push_back({.idstr = text_of(each, "idstr", where),
                              .offset = number_of(each, "offset", where),
                              .bytes = number_of(each, "bytes", where)});
    }
    return said;
  }

  void accepted(int socket, unsigned guest) override {
    answer(socket, fmt::format("{{\"ok\":true,\"guest\":{}}}\n", guest));
  }
  void refused(int socket, const std::string& why) override {
    answer(socket, json({{"ok", false}, {"error", why}}).dump(-1, ' ', true, json::error_handler_t::replace) + "\n");
  }
  void completed(int socket) override { answer(socket, "{\"complete\":true}\n"); }
};

}  // namespace

std::unique_ptr<Protocol> make_own() { return std::make_unique<Own>(); }

std::unique_ptr<Protocol> make_protocol(ProtocolName name) {
  switch (name) {
    case ProtocolName::firecracker: return make_firecracker();
    case ProtocolName::cloud_hypervisor: return make_cloud_hypervisor();
    case ProtocolName::multifd: return make_own();
  }
  return nullptr;
}

}  // namespace pager

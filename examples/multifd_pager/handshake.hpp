// SPDX-License-Identifier: MIT
//
// The protocols by which a VMM hands over its userfaultfd, and says where its guest's memory is. README.md of this folder has
// their texts, and what they leave open.
#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "common/descriptor.hpp"
#include "multifd_pager/incoming.hpp"

namespace pager {

/// No handshake has more of them.
inline constexpr std::size_t max_regions = 1024;
/// Of text, as JSON or as records.
inline constexpr std::size_t max_handshake_bytes = 256 * 1024;
/// Descriptors of shared memory, beside the userfaultfd.
inline constexpr std::size_t max_memory_descriptors = 64;

/// Adjacent addresses of the guest's memory, as the VMM says.
struct Region {
  std::uint64_t address = 0;
  std::uint64_t bytes = 0;
  std::uint64_t offset = 0;         ///< in the block; without idstr in the memory file (MemoryFile)
  std::uint64_t unit_bytes = 0;     ///< what is placed at once; 0: the host's page
  std::string idstr{};              ///< may be empty
  std::size_t memory = 0;           ///< which descriptor is its shared memory; 0: none, pages are copied in
  std::uint64_t memory_offset = 0;  ///< where it begins in that
};

/// Memory that the guest has given back: zero, whatever the image has.
struct Dropped {
  std::string idstr{};
  std::uint64_t offset = 0;
  std::uint64_t bytes = 0;
};

/// All that a VMM has said.
struct Handshake {
  std::vector<Region> regions;
  std::vector<Dropped> dropped;
  std::vector<program::Descriptor> descriptors;  ///< the userfaultfd, and shared memory behind it
};

/// How one kind of VMM speaks. One object for each connection.
class Protocol {
 public:
  Protocol() = default;
  Protocol(const Protocol&) = delete;
  Protocol& operator=(const Protocol&) = delete;
  virtual ~Protocol() = default;

  /// How many descriptors are of use.
  virtual std::size_t descriptors() const noexcept = 0;
  /// Throws Failure: what is wrong with it.
  virtual Handshake receive(Incoming& in) = 0;
  /// Faults are served from here on.
  virtual void accepted(int /*socket*/, unsigned /*guest*/) {}
  /// They are not, or no more.
  virtual void refused(int /*socket*/, const std::string& /*why*/) {}
  /// All memory is there: the VMM does not need the pager any more.
  virtual void completed(int /*socket*/) {}
  /// Whether the VMM may say more behind its handshake. Then next() reads, and answers it.
  virtual bool says_more() const noexcept { return false; }
  /// Throws Failure at the end of the connection, or where it cannot be understood any more.
  virtual void next(Incoming& /*in*/, int /*socket*/) {}
};

enum class ProtocolName : std::uint8_t { firecracker, cloud_hypervisor, multifd };

std::unique_ptr<Protocol> make_firecracker();
std::unique_ptr<Protocol> make_cloud_hypervisor();
std::unique_ptr<Protocol> make_own();
std::unique_ptr<Protocol> make_protocol(ProtocolName name);

}  // namespace pager

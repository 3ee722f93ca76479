// SPDX-License-Identifier: MIT
//
// The stacks that the programs offer: what the library's any.hpp is told of, so that each stack is compiled once.
#pragma once

#if defined(MULTIFD_HAS_IGZIP)  // set by CMake where the component exists
#include <multifd/compress/igzip.hpp>
#endif
#include <multifd/any.hpp>
#include <multifd/compress/nocomp.hpp>
#include <multifd/compress/zlib.hpp>
#include <multifd/compress/zstd.hpp>
#include <multifd/multifd.hpp>

#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "common/link.hpp"
#include "common/program.hpp"
#include "common/time_limits.hpp"

namespace multifd::migrate {
struct SourceOptions;
}

namespace program {

using multifd::AnyReceiver;
using multifd::AnySender;

/// The policies that the programs offer.
#if defined(MULTIFD_HAS_IGZIP)
using Compressors = multifd::PolicyList<multifd::NoComp, multifd::Zlib, multifd::Igzip, multifd::Zstd>;
#else
using Compressors = multifd::PolicyList<multifd::NoComp, multifd::Zlib, multifd::Zstd>;
#endif
using ZeroPolicies = multifd::PolicyList<multifd::ZeroPagesNone, multifd::ZeroPagesLegacy, multifd::ZeroPagesMultifd>;

/// The same for multifd::migrate.
struct Stacks {
  using Link = program::Link;
  using Compressors = program::Compressors;
  using ZeroPages = program::ZeroPolicies;
};

/// The least that an option --channels takes: a program that also does without multifd takes none.
enum class FewestChannels : unsigned { none = 0, one = 1 };

/// Options that choose a sender's stack.
struct StackOptions {
  unsigned channels = 4;
  std::string compression = "none";
  int level = 1;
  std::string zero_pages = "multifd";
  std::uint64_t bandwidth = 0;
  multifd::PeerProfile peer = multifd::peer_multifd;
  multifd::Digest digest = multifd::Digest::off;
  // For relays.
  unsigned depth = 0;
  multifd::Uuid uuid{};
  multifd::ErrorHook on_error{};
  std::chrono::milliseconds progress_timeout = TimeLimits{}.progress;

  /// `option_prefix`: "" or "out-", for the options that a program has twice.
  void add_to(CLI::App& app, const std::string& option_prefix = {}, FewestChannels fewest = FewestChannels::one);
  /// What the option parser cannot see: throws Usage for a level that the compressor does not have, and for
  /// zero lists towards a peer that drops them.
  void check() const;
  /// These options for the library. Valid as long as this object.
  multifd::AnySenderOptions for_library() const;
  /// The same for migrate_to(), but for `channels`, which the caller connects.
  multifd::migrate::SourceOptions for_migration() const;

 private:
  std::string prefix_ = "--";
};

/// The names of --compression.
std::vector<std::string> compressor_names();

/// multifd::Sender::open() for the stack that the options name, for a relay: its pages come by queue_copies(). Throws
/// Failure.
std::unique_ptr<AnySender> open_relay_sender(const StackOptions& options, const multifd::RamMap& ram,
                                             std::vector<Link> links);

/// What the programs set of multifd::ReceiverOptions; the barrier is manual, the memory fresh.
struct ReceiveOptions {
  multifd::UuidCheck uuid{};
  multifd::FirstPacket first_packet = multifd::FirstPacket::any;
  std::chrono::milliseconds hello_timeout = TimeLimits{}.hello;
  std::chrono::milliseconds progress_timeout = multifd::ReceiverOptions<multifd::NoComp>{}.progress_timeout;
  const multifd::Interrupt* interrupt = nullptr;  ///< ends the wait for the hellos; who has the receiver can cancel it
  multifd::PacketHook on_packet{};                ///< for relays: takes the pages, in place of memory
  multifd::DeviceStateHook on_device_state{};
  multifd::ErrorHook on_error{};
};

/// multifd::Receiver::open().
multifd::Result<std::unique_ptr<AnyReceiver>> open_receiver(const std::string& compression, const multifd::RamMap& ram,
                                                            std::vector<Link> links, ReceiveOptions options);

}  // namespace program

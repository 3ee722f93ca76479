// SPDX-License-Identifier: MIT
//
// Guest: all that a migration asks of a VMM. One class can be both halves.
#pragma once

#include <concepts>
#include <cstddef>
#include <cstdint>
#include <optional>
#include <span>
#include <string_view>
#include <type_traits>

#include "multifd/memory/ram_map.hpp"
#include "multifd/migrate/dirty_source.hpp"
#include "multifd/options.hpp"
#include "multifd/qemu/block_list.hpp"
#include "multifd/qemu/element.hpp"
#include "multifd/result.hpp"

namespace multifd::migrate {

/// Takes the state of the guest's devices, each with its name, from SourceGuest::save().
///
/// Threads: the migration's.
class StateWriter {
 public:
  /// Writes one device's state. Params `device`: its name (1 to 255 bytes), which one of that name, the version of the
  /// state's format. `state`: any bytes; copied or written before the call returns.
  /// Errors: Errc::bad_option (the name's length); those of the connection; sticky.
  [[nodiscard]] Result<void> device(const qemu::DeviceSection& device, std::span<const std::byte> state) {
    return do_device(device, state);
  }

 protected:
  ~StateWriter() = default;

 private:
  [[nodiscard]] virtual Result<void> do_device(const qemu::DeviceSection& device, std::span<const std::byte> state) = 0;
};

/// The state of one device, as the source has written it.
struct SavedDevice {
  qemu::DeviceSection device;
  std::span<const std::byte> state;
};

/// Gives DestinationGuest::load() the devices' states, in the order in which the source has written them.
///
/// Threads: the migration's.
class StateReader {
 public:
  /// The next device; none behind the last one, and only then are the guest's memory and state whole. What it refers to is
  /// valid until the next call. A name is the source's, and may be any bytes.
  ///
  /// Errors: those of the main stream and of the connection; sticky. Return them from load().
  [[nodiscard]] Result<std::optional<SavedDevice>> next() { return do_next(); }

 protected:
  ~StateReader() = default;

 private:
  [[nodiscard]] virtual Result<std::optional<SavedDevice>> do_next() = 0;
};

/// What a source announces of its guest, before any memory has to be there. Valid during the call that gets it.
struct Announcement {
  std::span<const qemu::BlockInfo>
      blocks;                     ///< in the source's order; their sum is at most DestinationOptions::max_ram_bytes
  std::string_view machine_type;  ///< as the source's VMM says
  std::size_t page_bytes = 0;
  unsigned channels = 0;            ///< all of them are connected
  std::span<const std::byte> user;  ///< SourceOptions::user, empty without one
  std::optional<Uuid> uuid;         ///< of the VM
};

template <class G>
concept HasRam = requires(G& guest) {
  { guest.ram() } -> std::same_as<Result<RamMap>>;
};

template <class G>
concept HasDirtySource =
    requires(G& guest) { requires DirtySource<std::remove_cvref_t<decltype(guest.dirty_source())>>; };

template <class G>
concept HasPause = requires(G& guest) {
  { guest.pause() } -> std::same_as<Result<void>>;
};

template <class G>
concept HasResume = requires(G& guest) {
  { guest.resume() } -> std::same_as<Result<void>>;
};

template <class G>
concept HasSave = requires(G& guest, StateWriter& to) {
  { guest.save(to) } -> std::same_as<Result<void>>;
};

template <class G>
concept HasThrottle = requires(G& guest, unsigned percent) { guest.throttle(percent); };

template <class G>
concept HasKnownZeros = requires(G& guest, BlockId block, std::span<std::uint64_t> bitmap) {
  { guest.known_zeros(block, bitmap) } -> std::same_as<Result<void>>;
};

template <class G>
concept HasPrepare = requires(G& guest, const Announcement& announced) {
  { guest.prepare(announced) } -> std::same_as<Result<RamMap>>;
};

template <class G>
concept HasLoad = requires(G& guest, StateReader& from) {
  { guest.load(from) } -> std::same_as<Result<void>>;
};

/// A guest that is migrated away.
///
/// Semantics:
///   `ram()`: the blocks of its memory; called once. The memory stays where it is until migrate_to() returns.
///   `dirty_source()`: a reference to the guest's DirtySource, of the same map. The driver starts and stops it.
///   `pause()`: stops all vCPUs, and what else writes memory. When it returns nobody writes any more.
///   `resume()`: the guest runs on, after a pause() whose migration came to nothing.
///   `save(StateWriter&)`: writes the state of the stopped guest's devices, vCPUs among them.
///   `known_zeros(block, bitmap)`: optional: sets the bit of each page that is zero as the VMM knows without reading it:
///     a balloon's, holes of a file that UntouchedPages does not know. Bitmaps as DirtySource has them; other bits that are
///     set stay so. Called ahead of each round; a write that comes later must be reported by a later fetch. Those pages are
///     not read. Memory that was never touched the driver finds by itself, once (SourceOptions::find_untouched).
///   `throttle(percent)`: optional: holds each vCPU for that share of its time, 0 to 99; 0 takes the throttle off.
/// Errors: what a call returns is the migration's first error; the guest runs on at the source, which is what resume()
///   is called for then.
/// Threads: the thread that called migrate_to().
/// Cost: pause(), save() and the last DirtySource::fetch() are part of the downtime.
/// Models: live::SourceVm (examples/live_migration/vm.hpp), and the whole VMM in examples/vmm_in_sixty_lines.cpp.
///   Exemplar: tests/exemplar/guest.hpp. Contract: multifd/testing/guest_contract.hpp.
template <class G>
concept SourceGuest = HasRam<G> && HasDirtySource<G> && HasPause<G> && HasResume<G> && HasSave<G>;

/// A guest that is taken in.
///
/// Semantics:
///   `prepare(announced)`: the blocks into which the source's memory goes, with the same names and sizes, in any order.
///     Called once. A VMM that builds its machine beforehand looks at nothing; another one allocates by what is announced.
///   `load(StateReader&)`: reads all devices' states, and makes the guest ready to run. Must read up to the end.
///   `resume()`: the guest runs. Called once, and only when the source has given the guest away. When it returns an error,
///     or throws std::bad_alloc, nothing of the guest may run: the source is told so, and runs it.
///   Where memory follows (DestinationOptions::postcopy), it is not all there in load() and resume(). What they touch of it
///   comes, as it does for the guest's threads; so resume() had better not touch much of it: should the source be lost for
///   good, it would not return.
/// Errors: what prepare() and load() return is told to the source, whose guest runs on. A resume() that fails is told as
///   well: nobody runs then, and both sides have the whole guest.
/// Threads: the thread that called migrate_from().
/// Cost: load() and resume() are part of the downtime.
/// Models: live::DestinationVm (examples/live_migration/vm.hpp), and the whole VMM in examples/vmm_in_sixty_lines.cpp.
///   Exemplar: tests/exemplar/guest.hpp. Contract: multifd/testing/guest_contract.hpp.
template <class G>
concept DestinationGuest = HasPrepare<G> && HasLoad<G> && HasResume<G>;

/// Fails to compile with a message that says which member to write.
template <class G>
consteval bool check_source_guest() {
  static_assert(HasRam<G>, "SourceGuest: needs  Result<RamMap> ram()");
  static_assert(HasDirtySource<G>, "SourceGuest: needs  S& dirty_source()  with a DirtySource S");
  static_assert(HasPause<G>, "SourceGuest: needs  Result<void> pause()");
  static_assert(HasResume<G>, "SourceGuest: needs  Result<void> resume()");
  static_assert(HasSave<G>, "SourceGuest: needs  Result<void> save(StateWriter&)");
  return SourceGuest<G>;
}

/// Fails to compile with a message that says which member to write.
template <class G>
consteval bool check_destination_guest() {
  static_assert(HasPrepare<G>, "DestinationGuest: needs  Result<RamMap> prepare(const Announcement&)");
  static_assert(HasLoad<G>, "DestinationGuest: needs  Result<void> load(StateReader&)");
  static_assert(HasResume<G>, "DestinationGuest: needs  Result<void> resume()");
  return DestinationGuest<G>;
}

}  // namespace multifd::migrate

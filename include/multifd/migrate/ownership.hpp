// SPDX-License-Identifier: MIT
//
// Which side may run the guest. Each side decides from what it has sent and read, and nothing else, so that at every
// moment at which the peer or the network can vanish at most one guest runs, and a side that may not run says where the
// whole guest is.
//
// Between two ends of ours the main stream carries these messages behind the guest's state (format/extension.md section
// 19.7):
//
//   source                                destination
//   stops the guest, sends the rest
//                                  <----  LOADED     everything is here and loaded; the guest does not run
//   HAND_OVER                      ---->             from its first byte on the source never runs it unasked
//                                  <----  RUNNING    the guest runs here; or FAILED: it does not, and never will
//
//   what was lost                               source                       destination
//   anything before HAND_OVER is written        runs the guest again         never has HAND_OVER: does not run
//   HAND_OVER, or the peer before it has it     stands still: "unknown"      never has HAND_OVER: does not run
//   RUNNING, or the source behind HAND_OVER     stands still: "unknown"      runs the guest
//   FAILED behind HAND_OVER                     stands still: "unknown"      does not run
//   nothing: RUNNING is read                    is done                      runs the guest
//   nothing: FAILED is read                     runs the guest again         does not run
//
// "unknown" is the only state in which nobody may run though a whole guest exists. The text then says that both sides hold
// it whole, and that whoever looks at the destination knows which one may be started.
//
// Where the memory follows (MEMORY_FOLLOWS, format/extension.md section 19.9) all this is the same. But behind RUNNING the
// guest is not whole anywhere: what it has written is at the destination, what it has not got yet at the source.
//
//   the memory follows, and what was lost        source                       destination
//   the main connection, at any moment above     as above                     as above
//   the main connection behind RUNNING           goes on giving pages         runs the guest
//   all connections                              waits for the destination    runs the guest on what it has
//   the source, or it has given up               is lost                      stands still where a page is missing
//   nothing: all pages are there                 is done                      runs the guest
//
// "unknown" then gives pages, too: the destination may run the guest. Its word that it has all pages is RUNNING.
//
// A QEMU knows neither LOADED nor HAND_OVER: it runs the guest when it has read the stream's end, and its SHUT(0) is
// RUNNING, SHUT of another status is FAILED. So towards a QEMU the stream's end is HAND_OVER. From a QEMU, the stream's end
// is HAND_OVER as well, but the QEMU runs its guest again unless it has read SHUT(0): `Peer::qemu` at a destination may run
// only when the source has closed the connection in order behind SHUT(0).
#pragma once

#include <cstdint>
#include <string_view>

namespace multifd::migrate {

/// What the peer can say about the guest.
enum class Peer : std::uint8_t {
  own,   ///< LOADED, HAND_OVER, RUNNING, FAILED
  qemu,  ///< the stream's end, SHUT
};

/// Where the guest is, as one side knows it.
enum class Owner : std::uint8_t {
  source,       ///< only the source may run it
  destination,  ///< only the destination may run it
  unknown,      ///< both hold it whole; only the destination can say whether it runs there
};

constexpr std::string_view to_string(Owner owner) noexcept {
  constexpr std::string_view names[] = {"source", "destination", "unknown"};
  return names[static_cast<unsigned>(owner)];
}

namespace detail {

/// Where the rest of the memory is of a guest that was handed over.
enum class Memory : std::uint8_t { there, follows, lost };

}  // namespace detail

/// The source's half. Every call says what has happened; the order is the caller's, and calls out of order change
/// nothing.
///
/// Threads: one at a time.
class SourceOwnership {
 public:
  /// Called before the first byte of what lets the destination run is written: HAND_OVER, or the stream's end to a QEMU. Even a
  /// write that fails may have arrived.
  void hand_over() noexcept {
    if (owner_ == Owner::source) owner_ = Owner::unknown;
  }
  /// RUNNING, or SHUT(0), was read.
  void running_there() noexcept {
    if (owner_ == Owner::unknown) owner_ = Owner::destination;
  }
  /// MEMORY_FOLLOWS is about to be written: the destination gets the guest before it has all pages.
  void memory_follows() noexcept {
    if (owner_ == Owner::source) memory_ = Memory::follows;
  }
  /// The destination has said that it has all pages. It says so of a guest that it runs.
  void memory_there() noexcept {
    if (owner_ == Owner::source || memory_ == Memory::lost) return;
    owner_ = Owner::destination;
    memory_ = Memory::there;
  }
  /// This side gives no more pages.
  void memory_lost() noexcept {
    if (owner_ == Owner::destination && memory_ == Memory::follows) memory_ = Memory::lost;
  }
  /// FAILED, or SHUT of another status, was read. Before hand_over() it changes nothing: the guest is here.
  void refused() noexcept {
    if (owner_ == Owner::unknown) owner_ = Owner::source;
  }

  Owner owner() const noexcept { return owner_; }
  /// Whether the guest may run here.
  bool may_run() const noexcept { return owner_ == Owner::source; }

  /// What a person has to know when the migration has ended here: one line, static text.
  std::string_view text() const noexcept {
    switch (owner_) {
      case Owner::source: return "the guest is at the source, and runs there; the destination has not started it";
      case Owner::destination:
        if (memory_ == Memory::there) return "the guest runs at the destination";
        if (memory_ == Memory::lost)
          return "the guest runs at the destination without the rest of its memory, which the source has given up: "
                 "nobody has all of the guest any more";
        return "the guest runs at the destination, and needs the source until all of its memory is there";
      case Owner::unknown: break;
    }
    return "the guest stands still at the source, and the destination has been told to run it: look there. If it does "
           "not "
           "run there and never will, it may be resumed at the source";
  }

 private:
  using Memory = detail::Memory;
  Owner owner_ = Owner::source;
  Memory memory_ = Memory::there;
};

/// The destination's half.
///
/// Threads: one at a time.
class DestinationOwnership {
 public:
  explicit DestinationOwnership(Peer peer) noexcept : peer_(peer) {}

  /// Everything has arrived and is loaded. Called before LOADED is written.
  void loaded() noexcept {
    if (place_ == Place::empty) place_ = Place::loaded;
  }
  /// The stream's end from a QEMU, whose SHUT(0) is about to be written; from a QEMU only.
  void confirming() noexcept {
    if (peer_ == Peer::qemu && place_ == Place::loaded) place_ = Place::confirmed;
  }
  /// MEMORY_FOLLOWS was read.
  void memory_follows() noexcept {
    if (place_ == Place::empty) memory_ = Memory::follows;
  }
  /// All pages are there. Called before the source is told.
  void memory_there() noexcept {
    if (memory_ == Memory::follows) memory_ = Memory::there;
  }
  /// No page comes any more.
  void memory_lost() noexcept {
    if (memory_ == Memory::follows) memory_ = Memory::lost;
  }
  /// HAND_OVER was read; from a QEMU: the connection was closed in order behind our SHUT(0). Called before the guest is
  /// started.
  void run_allowed() noexcept {
    if (place_ == (peer_ == Peer::own ? Place::loaded : Place::confirmed)) place_ = Place::allowed;
  }
  /// The guest was started. Called before RUNNING is written.
  void running() noexcept {
    if (place_ == Place::allowed) place_ = Place::running;
  }
  /// This side has not started the guest, and never will. Called before FAILED, or SHUT of another status, is written.
  void refuse() noexcept {
    if (place_ != Place::running) place_ = Place::refused;
  }

  /// Whether it was started here.
  bool runs() const noexcept { return place_ == Place::running; }
  /// Whether the guest may run here.
  bool may_run() const noexcept { return place_ == Place::allowed || place_ == Place::running; }

  Owner owner() const noexcept {
    if (may_run()) return Owner::destination;
    return place_ == Place::confirmed ? Owner::unknown : Owner::source;
  }

  /// As SourceOwnership::text().
  std::string_view text() const noexcept {
    switch (place_) {
      case Place::empty: return "not all of the guest has arrived; it is at the source";
      case Place::loaded:
        if (memory_ != Memory::there) return "not all of the guest's memory has arrived; it is at the source";
        return "all of the guest has arrived, and the source has not let go of it: it is the source's; look there "
               "before "
               "it is started here by hand";
      case Place::confirmed:
        return "all of the guest has arrived, and the source may not have read that: look there. If it does not run "
               "there, "
               "it may be started here";
      case Place::allowed: return "the guest is at the destination, which is about to start it";
      case Place::running:
        if (memory_ == Memory::there) return "the guest runs at the destination";
        if (memory_ == Memory::lost)
          return "the rest of the guest's memory is lost: it stands still at the destination where it needs that, and "
                 "nobody has all of it any more; end it";
        return "the guest runs at the destination, and the rest of its memory is at the source";
      case Place::refused: break;
    }
    return "the destination could not start the guest; it is at the source";
  }

 private:
  using Memory = detail::Memory;
  enum class Place : std::uint8_t { empty, loaded, confirmed, allowed, running, refused };
  Peer peer_;
  Place place_ = Place::empty;
  Memory memory_ = Memory::there;
};

}  // namespace multifd::migrate

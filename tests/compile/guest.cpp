// SPDX-License-Identifier: MIT
// WITHOUT_RAM: SourceGuest: needs  Result<RamMap> ram()
// WITHOUT_DIRTY_SOURCE: SourceGuest: needs  S& dirty_source()  with a DirtySource S
// WITHOUT_PAUSE: SourceGuest: needs  Result<void> pause()
// WITH_SILENT_PAUSE: SourceGuest: needs  Result<void> pause()
// WITHOUT_RESUME: SourceGuest: needs  Result<void> resume()
// WITHOUT_SAVE: SourceGuest: needs  Result<void> save(StateWriter&)
// WITHOUT_PREPARE: DestinationGuest: needs  Result<RamMap> prepare(const Announcement&)
// WITHOUT_LOAD: DestinationGuest: needs  Result<void> load(StateReader&)
#include "multifd/migrate/guest.hpp"
#include "multifd/migrate/dirty/dirty_hooks.hpp"

using multifd::RamMap;
using multifd::Result;

struct Idle {
#ifndef WITHOUT_RAM
  Result<RamMap> ram() { return RamMap(4096); }
#endif
#ifndef WITHOUT_DIRTY_SOURCE
  multifd::migrate::DirtyFromHooks& dirty_source();
#endif
#if defined(WITH_SILENT_PAUSE)
  void pause() {}  // and the driver goes on with a guest that runs
#elif !defined(WITHOUT_PAUSE)
  Result<void> pause() { return {}; }
#endif
#ifndef WITHOUT_RESUME
  Result<void> resume() { return {}; }
#endif
#ifndef WITHOUT_SAVE
  Result<void> save(multifd::migrate::StateWriter&) { return {}; }
#endif
#ifndef WITHOUT_PREPARE
  Result<RamMap> prepare(const multifd::migrate::Announcement&) { return RamMap(4096); }
#endif
#ifndef WITHOUT_LOAD
  Result<void> load(multifd::migrate::StateReader&) { return {}; }
#endif
};
static_assert(multifd::migrate::check_source_guest<Idle>());
static_assert(multifd::migrate::check_destination_guest<Idle>());

// SPDX-License-Identifier: MIT
// WITHOUT_WRITES_MEMORY: PageSink: needs  static constexpr bool writes_memory
// WITHOUT_CREATE: PageSink: needs  struct Sink { static Result<std::unique_ptr<Sink>> create(
// WITHOUT_STOP: PageSink: needs  void Sink::stop() noexcept
// WITHOUT_CHANNEL: PageSink: needs  struct Sink::Channel { static Result<Channel> create(Sink&)
// WITHOUT_PLACE: PageSink: needs  Result<void> Sink::Channel::place(const ArrivingPages&, PageRuns&) noexcept
// WITHOUT_BEGIN: PageSink: needs  void Sink::Channel::begin(const ArrivingPages&) noexcept
// WITHOUT_ARRIVED: PageSink: needs  Result<void> Sink::Channel::arrived(const ArrivingPages&)
#include "multifd/ends/page_sink.hpp"

struct IntoNothing {
#ifndef WITHOUT_WRITES_MEMORY
  static constexpr bool writes_memory = false;
#endif
  struct Sink {
    struct Channel {
#ifndef WITHOUT_CHANNEL
      static multifd::Result<Channel> create(Sink&) { return Channel{}; }
#endif
#ifndef WITHOUT_PLACE
      multifd::Result<void> place(const multifd::ArrivingPages&, multifd::PageRuns&) noexcept { return {}; }
#endif
#ifndef WITHOUT_BEGIN
      void begin(const multifd::ArrivingPages&) noexcept {}
#endif
#ifndef WITHOUT_ARRIVED
      multifd::Result<void> arrived(const multifd::ArrivingPages&) { return {}; }
#endif
    };
#ifndef WITHOUT_CREATE
    static multifd::Result<std::unique_ptr<Sink>> create(const multifd::RamMap&, IntoNothing&,
                                                         const multifd::ThreadHook&) {
      return std::make_unique<Sink>();
    }
#endif
#ifndef WITHOUT_STOP
    void stop() noexcept {}
#endif
  };
};
static_assert(multifd::check_page_sink<IntoNothing>());

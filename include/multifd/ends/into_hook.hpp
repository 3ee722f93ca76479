// SPDX-License-Identifier: MIT
//
// A receiver's pages go to a callable, packet by packet: for a relay. The map's blocks need no memory.
#pragma once

#include <cstddef>
#include <memory>
#include <new>
#include <utility>

#include "multifd/ends/page_sink.hpp"

namespace multifd {

/// Hands each packet's pages to `on_packet`. A model of PageSink.
struct IntoHook {
  static constexpr bool writes_memory = false;

  /// Takes the pages. Must be set, otherwise Receiver::open() fails. A hook that leaves no buffer in
  /// ReceivedPacket::pages ends the migration with Errc::bad_option, whose subject is the packet's RAM block.
  PacketHook on_packet{};

  class Sink;
};

class IntoHook::Sink {
 public:
  /// Owns the buffer that a channel reads pages into. The hook may swap that buffer for another.
  class Channel {
   public:
    [[nodiscard]] static Result<Channel> create(Sink& sink) {
      auto buffer = PageBuffer::create();
      if (!buffer) return std::unexpected(buffer.error());
      return Channel(sink, std::move(*buffer));
    }

    [[nodiscard]] Result<void> place(const ArrivingPages& pages, PageRuns& runs) noexcept {
      for (const std::uint64_t offset : pages.offsets)
        if (auto checked = sink_->map_.check(pages.block, offset); !checked) return checked;
      if (pages.normal_pages > 0) runs.add(pages_.data(), pages.normal_pages * sink_->map_.page_bytes());
      return {};
    }
    void begin(const ArrivingPages&) noexcept {}
    [[nodiscard]] Result<void> arrived(const ArrivingPages& pages) {
      ReceivedPacket packet{.channel = pages.channel,
                            .block = pages.block,
                            .offsets = pages.offsets,
                            .normal_pages = pages.normal_pages,
                            .pages = pages_};
      if (auto taken = sink_->on_packet_(packet); !taken) return taken;
      if (pages_.data() == nullptr)  // the next pages would be read into nothing
        return fail(Errc::bad_option, Stage::read, "IntoHook::on_packet left no buffer in ReceivedPacket::pages", 0, 0,
                    sink_->map_.block(pages.block).idstr);
      return {};
    }

   private:
    Channel(Sink& sink, PageBuffer buffer) noexcept : sink_(&sink), pages_(std::move(buffer)) {}
    Sink* sink_;
    PageBuffer pages_;
  };

  /// Params: `map`: must outlive the sink. Errors: Errc::bad_option: no hook; out of memory.
  [[nodiscard]] static Result<std::unique_ptr<Sink>> create(const RamMap& map, IntoHook& settings, const ThreadHook&) {
    if (!settings.on_packet) return fail(Errc::bad_option, Stage::setup, "IntoHook::on_packet is empty");
    return std::unique_ptr<Sink>(new Sink(map, std::move(settings.on_packet)));
  }
  void stop() noexcept {}

 private:
  Sink(const RamMap& map, PacketHook hook) noexcept : map_(map), on_packet_(std::move(hook)) {}
  const RamMap& map_;
  const PacketHook on_packet_;
};

}  // namespace multifd

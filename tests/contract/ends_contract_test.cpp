// SPDX-License-Identifier: MIT
//
// Every PageSource, PageSink and Outlet through its contract, the exemplars among them; and some with one fault each, to
// see that the contract notices.
#include <doctest/doctest.h>
#include <sys/mman.h>
#include <unistd.h>

#include <atomic>
#include <cstring>
#include <future>
#include <map>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "exemplar/file_outlet.hpp"
#include "exemplar/page_sink.hpp"
#include "exemplar/page_source.hpp"
#include "multifd/compress/nocomp.hpp"
#include "multifd/compress/zlib.hpp"
#include "multifd/ends/into_hook.hpp"
#include "multifd/ends/into_memory.hpp"
#include "multifd/packets/outlet.hpp"
#include "multifd/receiver.hpp"
#include "multifd/testing/memory_transport.hpp"
#include "multifd/testing/outlet_contract.hpp"
#include "multifd/testing/page_sink_contract.hpp"
#include "multifd/testing/page_source_contract.hpp"
#include "multifd/transport/detail/unique_fd.hpp"
#include "support/basics.hpp"

using namespace multifd;
using namespace std::chrono_literals;
using exemplar::FileOutlet;
using exemplar::FileShared;
using exemplar::IntoFile;
using testing::MemoryTransport;

namespace {

void check(const ContractReport& report) { CHECK_MESSAGE(report.ok(), report.text()); }

void check_fails(const ContractReport& report, const char* because) {
  CHECK_MESSAGE(report.text().find(because) != std::string::npos, report.text());
}

/// A file in memory.
std::shared_ptr<detail::UniqueFd> make_file() {
  auto file = std::make_shared<detail::UniqueFd>(::memfd_create("ends_contract_test", 0));
  REQUIRE(file->get() >= 0);
  return file;
}

/// Reads pages from a file in which the blocks of a map lie one behind the other.
auto page_reader(const RamMap& map, std::shared_ptr<detail::UniqueFd> file) {
  return [&map, file](BlockId block, std::uint64_t offset, std::span<std::byte> page) {
    for (std::uint32_t before = 0; before < index(block); ++before) offset += map.block(BlockId{before}).bytes;
    REQUIRE(::pread(file->get(), page.data(), page.size(), static_cast<off_t>(offset)) ==
            static_cast<ssize_t>(page.size()));
  };
}

// ---- PageSource

enum class WrongSource { short_offsets, neighbours, looks_back, counts };

template <WrongSource wrong>
struct BadSource {
  static constexpr bool guest = true;
  static constexpr bool copies = false;
  static inline std::atomic<std::size_t> calls{0};

  static std::byte* page(const RamBlock& block, const PageBatch& batch, std::size_t i,
                         std::size_t page_bytes) noexcept {
    const auto offsets = batch.offsets();
    std::byte* const host = block.host.data();
    switch (wrong) {
      case WrongSource::short_offsets: return host + static_cast<std::uint32_t>(offsets[i]);
      case WrongSource::neighbours: return host + offsets[0] + i * page_bytes;
      case WrongSource::looks_back: return host + (i > 1 && offsets[i - 1] == offsets[0] ? 0 : offsets[i]);
      case WrongSource::counts: return host + offsets[calls++ % offsets.size()];
    }
    return nullptr;
  }
};

/// Takes copies for memory: the page lies at its offset.
struct BadCopies {
  static constexpr bool guest = false;
  static constexpr bool copies = true;
  static std::byte* page(const RamBlock&, const PageBatch& batch, std::size_t i, std::size_t) noexcept {
    return batch.copies.data() + batch.offsets()[i] % batch_bytes;
  }
};

/// Has both, and looks only into memory.
struct BadEither : FromEither {
  static std::byte* page(const RamBlock& block, const PageBatch& batch, std::size_t i,
                         std::size_t page_bytes) noexcept {
    return FromGuest::page(block, batch, i, page_bytes);
  }
};

}  // namespace

TEST_CASE("FromGuest, FromCopies, FromEither and the exemplar keep the PageSource contract") {
  check(check_page_source_contract<FromGuest>());
  check(check_page_source_contract<FromCopies>());
  check(check_page_source_contract<FromEither>());
  check(check_page_source_contract<exemplar::FromSlowMemory>());
}

TEST_CASE("the PageSource contract notices a source that breaks it") {
  check_fails(check_page_source_contract<BadSource<WrongSource::short_offsets>>(), "other bytes than were queued");
  check_fails(check_page_source_contract<BadSource<WrongSource::neighbours>>(), "other bytes than were queued");
  check_fails(check_page_source_contract<BadSource<WrongSource::looks_back>>(),
              "depends on the offsets before its own");
  check_fails(check_page_source_contract<BadSource<WrongSource::counts>>(), "asked again, and backwards");
  check_fails(check_page_source_contract<BadCopies>(), "other bytes than were queued");
  check_fails(check_page_source_contract<BadEither>(), "other bytes than were queued");
}

// ---- PageSink

namespace {

/// What a PacketHook has been given, by place.
struct Collected {
  explicit Collected(std::size_t bytes) : page_bytes(bytes) {}

  PacketHook hook() {
    return [this](ReceivedPacket& packet) -> Result<void> {
      const std::scoped_lock lock(mutex);
      for (std::size_t i = 0; i < packet.offsets.size(); ++i) {
        std::vector<std::byte>& page = pages[{index(packet.block), packet.offsets[i]}];
        page.assign(page_bytes, std::byte{});
        if (i < packet.normal_pages) std::memcpy(page.data(), packet.pages.data() + i * page_bytes, page_bytes);
      }
      return {};
    };
  }
  ReadPage reader() {
    return [this](BlockId block, std::uint64_t offset, std::span<std::byte> page) {
      const auto found = pages.find({index(block), offset});
      if (found != pages.end()) std::memcpy(page.data(), found->second.data(), page.size());
    };
  }

  const std::size_t page_bytes;
  std::mutex mutex;
  std::map<std::pair<std::uint32_t, std::uint64_t>, std::vector<std::byte>> pages;
};

/// Page i of a block is page i of the file; as the contract's map has two blocks of one size.
ReadPage two_blocks(std::shared_ptr<detail::UniqueFd> file) {
  return [file](BlockId block, std::uint64_t offset, std::span<std::byte> page) {
    const off_t half = ::lseek(file->get(), 0, SEEK_END) / 2;
    REQUIRE(::pread(file->get(), page.data(), page.size(), index(block) * half + static_cast<off_t>(offset)) ==
            static_cast<ssize_t>(page.size()));
  };
}

enum class WrongSink { no_zero_check, zeroes_early, reversed, forgets_zeros, one_buffer, stops_not, misplaces };

/// A sink into memory that breaks one rule.
template <WrongSink wrong>
struct BadSink {
  static constexpr bool writes_memory = wrong != WrongSink::one_buffer;
  Collected* collected = nullptr;

  class Sink {
   public:
    class Channel {
     public:
      static Result<Channel> create(Sink& sink) { return Channel{&sink}; }

      Result<void> place(const ArrivingPages& pages, PageRuns& runs) noexcept {
        const RamMap& map = sink_->map_;
        const std::size_t page_bytes = map.page_bytes();
        for (std::size_t i = 0; i < pages.offsets.size(); ++i) {
          if (wrong == WrongSink::no_zero_check && i >= pages.normal_pages) continue;
          if (wrong == WrongSink::zeroes_early && i < pages.zeros().size() && map.check(pages.block, pages.zeros()[i]))
            std::memset(map.block(pages.block).host.data() + pages.zeros()[i], 0, page_bytes);
          if (auto good = map.check(pages.block, pages.offsets[i]); !good) return good;
        }
        for (std::size_t i = 0; i < pages.normal_pages; ++i) {
          const std::size_t at = wrong == WrongSink::reversed ? pages.normal_pages - 1 - i : i;
          if (wrong == WrongSink::one_buffer)
            runs.add(sink_->buffer_.data() + i * page_bytes, page_bytes);
          else
            runs.add(map.block(pages.block).host.data() + pages.offsets[at], page_bytes);
        }
        return {};
      }
      void begin(const ArrivingPages& pages) noexcept {
        if (!writes_memory || wrong == WrongSink::forgets_zeros) return;
        for (const std::uint64_t offset : pages.zeros()) {
          const RamBlock& block = sink_->map_.block(wrong == WrongSink::misplaces ? BlockId{0} : pages.block);
          std::memset(block.host.data() + offset, 0, sink_->map_.page_bytes());
        }
      }
      Result<void> arrived(const ArrivingPages& pages) {
        if (wrong != WrongSink::one_buffer) return {};
        ReceivedPacket packet{.channel = pages.channel,
                              .block = pages.block,
                              .offsets = pages.offsets,
                              .normal_pages = pages.normal_pages,
                              .pages = sink_->buffer_};
        return sink_->collected_->hook()(packet);
      }
      Sink* sink_;
    };

    static Result<std::unique_ptr<Sink>> create(const RamMap& map, BadSink& settings, const ThreadHook& hook) {
      auto buffer = PageBuffer::create();
      REQUIRE(buffer.has_value());
      std::unique_ptr<Sink> sink(new Sink(map, settings.collected, std::move(*buffer)));
      if (wrong == WrongSink::stops_not) {
        auto thread = Thread::start(*sink, hook, {.role = "bad", .channel = 0});
        REQUIRE(thread.has_value());
        sink->thread_ = std::move(*thread);
        // The contract sees a thread by its hook, which has run before run().
        REQUIRE(test::eventually([&] { return sink->runs_.load(); }));
      }
      return sink;
    }
    ~Sink() { end_.store(true, std::memory_order_relaxed); }
    void stop() noexcept {}
    void run() noexcept {
      runs_.store(true);
      while (!end_.load(std::memory_order_relaxed)) std::this_thread::sleep_for(1ms);
    }

    Sink(const RamMap& of, Collected* to, PageBuffer pages) : map_(of), collected_(to), buffer_(std::move(pages)) {}
    const RamMap& map_;
    Collected* const collected_;
    PageBuffer buffer_;
    std::atomic<bool> runs_{false};
    std::atomic<bool> end_{false};
    Thread thread_{};
  };
};

/// `patience`: long, so that a busy machine changes nothing; shorter for a model whose fault is a call that never ends.
template <WrongSink wrong>
ContractReport check_bad_sink(std::chrono::milliseconds patience = 20s) {
  return check_page_sink_contract<BadSink<wrong>>([] { return BadSink<wrong>{}; }, {},
                                                  {.old_content = std::byte{0xee}, .patience = patience});
}

}  // namespace

TEST_CASE("IntoMemory keeps the PageSink contract, with all settings and page sizes") {
  for (const std::size_t page_bytes : {std::size_t{1024}, std::size_t{4096}, std::size_t{65536}})
    for (const Populate populate : {Populate::off, Populate::ahead}) {
      if (populate == Populate::ahead && page_bytes != 4096) continue;
      CAPTURE(page_bytes);
      const auto with = [&](DestinationMemory destination) {
        return [=] { return IntoMemory{.destination = destination, .populate = populate}; };
      };
      check(check_page_sink_contract<IntoMemory>(with(DestinationMemory::zeroed), {}, {.page_bytes = page_bytes}));
      check(check_page_sink_contract<IntoMemory>(with(DestinationMemory::unknown), {},
                                                 {.page_bytes = page_bytes, .old_content = std::byte{0xee}}));
    }
}

TEST_CASE("IntoHook and the exemplar keep the PageSink contract") {
  for (const std::size_t page_bytes : {std::size_t{1024}, std::size_t{4096}, std::size_t{65536}}) {
    CAPTURE(page_bytes);
    Collected collected(page_bytes);
    check(check_page_sink_contract<IntoHook>([&] { return IntoHook{collected.hook()}; }, collected.reader(),
                                             {.page_bytes = page_bytes}));
    const auto file = make_file();
    check(check_page_sink_contract<IntoFile>([&] { return IntoFile{file->get()}; }, two_blocks(file),
                                             {.page_bytes = page_bytes}));
  }
}

TEST_CASE("the PageSink contract notices a sink that breaks it") {
  check_fails(check_bad_sink<WrongSink::no_zero_check>(), "of a zero page is accepted");
  check_fails(check_bad_sink<WrongSink::zeroes_early>(), "place: refused, and yet");
  check_fails(check_bad_sink<WrongSink::reversed>(), "in the order of their offsets");
  check_fails(check_bad_sink<WrongSink::forgets_zeros>(), "pages are not what arrived");
  check_fails(check_bad_sink<WrongSink::misplaces>(), "pages changed that did not arrive");
  check_fails(check_bad_sink<WrongSink::stops_not>(1s), "stop() leaves a thread of the sink behind");
  Collected collected(4096);
  check_fails(check_page_sink_contract<BadSink<WrongSink::one_buffer>>(
                  [&] { return BadSink<WrongSink::one_buffer>{&collected}; }, collected.reader()),
              "bytes of two channels go to the same place");
  CHECK_FALSE(check_page_sink_contract<IntoHook>([&] { return IntoHook{collected.hook()}; }).ok());  // no reader
}

// ---- Outlet

namespace {

enum class WrongOutlet { none, keeps_pointers, holds_back, no_cap, no_barrier, no_shutdown, no_zeros, miscounts };

/// The exemplar, and variants of it that break one rule.
template <WrongOutlet wrong>
class File : public FileOutlet {
 public:
  using FileOutlet::FileOutlet;

  Result<engine::Sent> send(const engine::PageList& pages, engine::Meter& meter) noexcept {
    engine::PageList list = pages;
    if constexpr (wrong == WrongOutlet::no_zeros) list.offsets = list.offsets.first(list.normal_pages);
    if constexpr (wrong == WrongOutlet::no_cap) {
      engine::RateLimiter none(0);
      engine::Meter free(meter.counters(), none);
      return FileOutlet::send(list, free);
    }
    if constexpr (wrong == WrongOutlet::keeps_pointers || wrong == WrongOutlet::holds_back) {
      // Keeps pages and offsets, but not the bytes.
      held_offsets_.assign(pages.offsets.begin(), pages.offsets.end());
      held_runs_.assign(pages.runs.begin(), pages.runs.end());
      if (auto granted = meter.acquire(1); !granted) return std::unexpected(granted.error());
      held_.emplace(engine::PageList{pages.id, pages.block, held_offsets_, pages.normal_pages, held_runs_});
      return engine::Sent{};
    }
    auto sent = FileOutlet::send(list, meter);
    if (wrong == WrongOutlet::miscounts && sent) sent->payload_bytes = sent->wire_bytes + 1;
    return sent;
  }
  Result<void> push_out(engine::Meter& meter) noexcept {
    if (wrong == WrongOutlet::keeps_pointers && held_) {
      auto sent = FileOutlet::send(*held_, meter);
      held_.reset();
      if (!sent) return std::unexpected(sent.error());
    }
    return {};
  }
  Result<engine::Sent> close_epoch(std::uint64_t epoch, engine::Meter& meter) noexcept {
    if (wrong == WrongOutlet::no_barrier) return engine::Sent{};
    return FileOutlet::close_epoch(epoch, meter);
  }
  void shutdown() noexcept {
    if (wrong != WrongOutlet::no_shutdown) FileOutlet::shutdown();
  }

 private:
  std::vector<std::uint64_t> held_offsets_;
  std::vector<iovec> held_runs_;
  std::optional<engine::PageList> held_;
};

template <class O>
OutletTransfer<O> into_file(const RamMap& map, unsigned channels) {
  struct Shared {
    Shared(const RamMap& ram, unsigned count) : shared(ram, count) {}
    std::shared_ptr<detail::UniqueFd> file = make_file();
    FileShared shared;
  };
  const auto there = std::make_shared<Shared>(map, channels);
  OutletTransfer<O> transfer{.other_end = there,
                             .outlets = {},
                             .wait_for_pages = [](std::uint64_t) { return true; },
                             .read_page = page_reader(map, there->file),
                             .whole = [] { return true; }};
  for (unsigned i = 0; i < channels; ++i) transfer.outlets.emplace_back(there->shared, there->file->get());
  return transfer;
}

template <WrongOutlet wrong>
ContractReport check_file(std::chrono::milliseconds patience = 20s) {
  return check_outlet_contract<File<wrong>>(&into_file<File<wrong>>, {}, {.patience = patience});
}

/// Packets, received by a Receiver into a file.
template <class C>
struct PacketsTransfer {
  using Rx = Receiver<MemoryTransport, C, IntoFile>;
  using Outlet = packets::Outlet<MemoryTransport, C>;

  struct OtherEnd {
    explicit OtherEnd(std::size_t page_bytes, Digest digest) : shared(page_bytes, Uuid{}, digest) {}
    packets::OutletShared shared;
    std::shared_ptr<detail::UniqueFd> file = make_file();
    std::vector<MemoryTransport> links;      ///< that nobody reads
    std::future<std::optional<Rx>> opening;  ///< waits for the hellos
    std::optional<Rx> rx;

    Rx* receiver() {
      if (opening.valid()) rx = opening.get();
      return rx ? &*rx : nullptr;
    }
  };

  static OutletTransfer<Outlet> make(const RamMap& map, unsigned channels, Digest digest, bool reads) {
    const auto there = std::make_shared<OtherEnd>(map.page_bytes(), digest);
    OutletTransfer<Outlet> transfer{.other_end = there,
                                    .outlets = {},
                                    .wait_for_pages =
                                        [there = there.get()](std::uint64_t pages) {
                                          Rx* const rx = there->receiver();
                                          return rx && test::eventually([&] {
                                                   const ChannelStats sum = total(rx->stats().channels);
                                                   return sum.normal_pages + sum.zero_pages == pages;
                                                 });
                                        },
                                    .read_page = page_reader(map, there->file),
                                    .whole =
                                        [there = there.get()] {
                                          Rx* const rx = there->receiver();
                                          return rx && rx->finish().has_value();
                                        }};
    for (unsigned i = 0; i < channels; ++i) {
      auto [near, far] = testing::memory_transport_pair(64 * 1024);
      auto outlet = Outlet::create(there->shared, i, std::move(near), C{});
      REQUIRE(outlet.has_value());
      transfer.outlets.push_back(std::move(*outlet));
      there->links.push_back(std::move(far));
    }
    if (reads)
      there->opening =
          std::async(std::launch::async, [&map, fd = there->file->get(), links = std::move(there->links)]() mutable {
            auto opened = Rx::open(map, std::move(links), {.into = {fd}});
            return opened ? std::optional<Rx>(std::move(*opened)) : std::nullopt;
          });
    return transfer;
  }
};

template <class C>
ContractReport check_packets(std::size_t page_bytes, Digest digest) {
  const auto make = [digest](bool reads) {
    return [=](const RamMap& map, unsigned channels) { return PacketsTransfer<C>::make(map, channels, digest, reads); };
  };
  return check_outlet_contract<typename PacketsTransfer<C>::Outlet>(make(true), make(false),
                                                                    {.page_bytes = page_bytes, .patience = 20s});
}

}  // namespace

TEST_CASE("packets::Outlet keeps the Outlet contract, and the exemplar of a PageSink receives all of it") {
  for (const std::size_t page_bytes : {std::size_t{1024}, std::size_t{4096}, std::size_t{65536}}) {
    CAPTURE(page_bytes);
    check(check_packets<NoComp>(page_bytes, Digest::off));
  }
  check(check_packets<Zlib>(4096, Digest::on));
}

TEST_CASE("the exemplar of an Outlet, a format that is no packet, keeps the Outlet contract") {
  for (const std::size_t page_bytes : {std::size_t{1024}, std::size_t{4096}}) {
    CAPTURE(page_bytes);
    check(check_outlet_contract<FileOutlet>(&into_file<FileOutlet>, {}, {.page_bytes = page_bytes, .patience = 20s}));
  }
}

TEST_CASE("the Outlet contract notices an outlet that breaks it") {
  check(check_file<WrongOutlet::none>());
  check_fails(check_file<WrongOutlet::keeps_pointers>(), "are not what was sent");
  check_fails(check_file<WrongOutlet::holds_back>(), "are not what was sent");
  check_fails(check_file<WrongOutlet::no_zeros>(), "are not what was sent");
  check_fails(check_file<WrongOutlet::miscounts>(), "counts more page data than bytes");
  check_fails(check_file<WrongOutlet::no_cap>(), "does not ask meter.acquire()");
  check_fails(check_file<WrongOutlet::no_barrier>(), "a page of an older epoch replaces that of a newer one");
  check_fails(check_file<WrongOutlet::no_shutdown>(1s), "shutdown() does not end close_epoch()");
}

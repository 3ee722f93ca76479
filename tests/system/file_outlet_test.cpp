// SPDX-License-Identifier: MIT
//
// A format that is no packet (exemplar/file_outlet.hpp), plugged into the engine: what the engine brings, it brings to that
// format, too.
#include <doctest/doctest.h>
#include <fcntl.h>
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <atomic>
#include <cstring>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <thread>
#include <utility>
#include <vector>

#include "exemplar/file_outlet.hpp"
#include "multifd/engine/pipeline.hpp"
#include "multifd/transport/detail/unique_fd.hpp"
#include "support/memory.hpp"

using namespace multifd;
using namespace test;
using exemplar::FileOutlet;
using exemplar::FileSender;

namespace {

// What has no messages takes none.
template <class Producer>
concept TakesMessages = requires(Producer& producer, Message message) { producer.queue_message(std::move(message)); };
struct WithMessages : FileOutlet {
  Result<engine::Sent> send_message(const Message&, engine::Meter&) noexcept { return engine::Sent{}; }
};
static_assert(!TakesMessages<engine::BatchProducer<FileOutlet, ZeroPagesNone, FromGuest>>);
static_assert(TakesMessages<engine::BatchProducer<WithMessages, ZeroPagesNone, FromGuest>>);

/// One whose first list of pages waits, whichever channel has it.
class GatedOutlet : public FileOutlet {
 public:
  using FileOutlet::FileOutlet;
  enum Gate { closed, held, open };
  static inline std::atomic<Gate> gate{closed};

  Result<engine::Sent> send(const engine::PageList& pages, engine::Meter& meter) noexcept {
    Gate expected = closed;
    if (gate.compare_exchange_strong(expected, held)) gate.wait(held);
    return FileOutlet::send(pages, meter);
  }
};

constexpr std::uint64_t page = 4096;
constexpr std::uint64_t batch_pages = batch_bytes / page;

/// A file in memory, with nothing in it.
class File {
 public:
  File() : fd_(::memfd_create("file_outlet_test", MFD_ALLOW_SEALING)) { REQUIRE(fd_.get() >= 0); }

  int fd() const { return fd_.get(); }
  std::vector<int> fds(unsigned channels) const { return std::vector<int>(channels, fd_.get()); }
  std::vector<std::byte> bytes() const {
    std::vector<std::byte> all(static_cast<std::size_t>(::lseek(fd_.get(), 0, SEEK_END)));
    REQUIRE(::pread(fd_.get(), all.data(), all.size(), 0) == static_cast<ssize_t>(all.size()));
    return all;
  }
  /// Whether nothing of a page is stored.
  bool is_hole(std::uint64_t offset) const {
    const off_t data = ::lseek(fd_.get(), static_cast<off_t>(offset), SEEK_DATA);
    return data < 0 || static_cast<std::uint64_t>(data) >= offset + page;
  }

 private:
  detail::UniqueFd fd_;
};

/// A guest of two blocks.
struct Guest {
  Guest() {
    for (std::size_t i = 0; i < blocks.size(); ++i) {
      const auto added = ram.add(i == 0 ? "pc.ram" : "vga.vram", blocks[i].bytes());
      REQUIRE(added.has_value());
      ids[i] = *added;
    }
  }
  std::vector<std::byte> bytes() const {
    std::vector<std::byte> all;
    for (const Block& block : blocks) all.insert(all.end(), block.bytes().begin(), block.bytes().end());
    return all;
  }

  std::array<Block, 2> blocks{Block(700 * page), Block(131 * page)};
  std::array<BlockId, 2> ids{};
  RamMap ram;
};

/// Rounds of random pages; after each the file's content is the guest's.
template <class Z>
void send_rounds(unsigned channels) {
  const Watchdog watchdog("rounds into a file");
  CAPTURE(std::string(Z::name));
  CAPTURE(channels);
  CAPTURE(seed());
  Rng rng(seed());
  Guest guest;
  const File file;
  auto opened = FileSender<Z>::open(guest.ram, file.fds(channels));
  REQUIRE_MESSAGE(opened.has_value(), text(opened));
  auto& sender = *opened->pipeline;
  std::uint64_t dirty_pages = 0, zero_pages = 0, taken = 0;

  for (std::uint64_t round = 0; round < 8; ++round) {
    std::vector<std::uint64_t> zero_offsets;  // of what the producer reports: the main stream's, in other formats
    for (std::size_t b = 0; b < guest.blocks.size(); ++b) {
      const Block& block = guest.blocks[b];
      std::vector<std::uint64_t> dirty((block.size() / page + 63) / 64);
      for (std::size_t i = 0; i < block.size() / page; ++i) {
        // All in the first round; then some, with runs among them.
        if (round != 0 && (rng() % 4 != 0 || i % 100 < 30)) continue;
        const Fill fill = any_fill(rng);
        fill_page(block.page(i, page), fill, rng);
        dirty[i / 64] |= std::uint64_t{1} << i % 64;
        ++dirty_pages;
        zero_pages += fill == Fill::zero;
      }
      const auto on_zero = [&](std::uint64_t offset) {
        if (offset / page % 3 == 0) return false;  // as bytes, please
        zero_offsets.push_back(opened->shared->places[b] + offset);
        return true;
      };
      const auto queued = sender.producer.queue_dirty(guest.ids[b], dirty, 0, on_zero);
      REQUIRE_MESSAGE(queued.has_value(), text(queued));
    }
    const auto epoch = sender.producer.close_epoch();
    REQUIRE_MESSAGE(epoch.has_value(), text(epoch));
    CHECK(*epoch == round);
    CHECK(code_of(sender.wait(round + 1)) == Errc::bad_range);
    REQUIRE(sender.wait(*epoch).has_value());
    for (const std::uint64_t offset : zero_offsets)
      REQUIRE(::fallocate(file.fd(), FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, static_cast<off_t>(offset), page) ==
              0);
    taken += zero_offsets.size();
    CHECK(first_difference(file.bytes(), guest.bytes()) == guest.bytes().size());
  }
  const auto ended = sender.finish();
  CHECK_MESSAGE(ended.has_value(), text(ended));

  REQUIRE(zero_pages > 100);
  const SenderStats stats = sender.stats();
  const ChannelStats sum = total(stats.channels);
  const std::uint64_t listed = Z::stage == ZeroStage::channel ? zero_pages : 0;
  CHECK(stats.epochs == 8);
  CHECK(sum.syncs == 8 * channels);
  CHECK((taken != 0) == (Z::stage == ZeroStage::producer));
  CHECK(stats.zero_on_main == taken);
  CHECK(stats.queued_pages == dirty_pages - taken);
  CHECK(sum.zero_pages == listed);
  CHECK(sum.normal_pages == dirty_pages - taken - listed);
  CHECK(sum.payload_bytes == sum.normal_pages * page);
  CHECK(sum.wire_bytes == sum.payload_bytes);
}

/// Everybody gets the first error, the same one.
template <class Z = ZeroPagesNone>
Error first_error(const std::vector<int>& fds) {
  const Watchdog watchdog("a file that cannot be written");
  GuestRam guest(16 * batch_pages, std::byte{Z::stage == ZeroStage::none});
  std::atomic<unsigned> told{0};
  auto opened = FileSender<Z>::open(guest.map, fds, {.on_error = [&](const Error&) { ++told; }});
  REQUIRE_MESSAGE(opened.has_value(), text(opened));
  auto& sender = *opened->pipeline;
  // Whether it fails here or behind is a matter of who is faster.
  static_cast<void>(sender.producer.queue_range(guest.block, 0, guest.memory.size(), engine::NoZeroSink{}));
  const auto ended = sender.finish();
  REQUIRE_FALSE(ended.has_value());
  CHECK(eventually([&] { return told == 1; }));
  CHECK(code_of(sender.producer.queue_page(guest.block, 0)) == ended.error().code);
  sender.cancel("too late");
  const auto later = sender.producer.close_epoch();
  REQUIRE_FALSE(later.has_value());
  CHECK(text(later) == text(ended));
  CHECK(told == 1);
  return ended.error();
}

/// Three packets on their way into a file. One may leave; the next one's turn comes in six days.
struct Capped {
  GuestRam guest{3 * batch_pages};
  const File file;
  FileSender<ZeroPagesNone> opened = FileSender<ZeroPagesNone>::open(guest.map, file.fds(2), {.bandwidth = 1}).value();
  decltype(*opened.pipeline) sender = *opened.pipeline;

  Capped() {
    REQUIRE(sender.producer.queue_range(guest.block, 0, guest.memory.size(), engine::NoZeroSink{}).has_value());
  }
  ChannelStats so_far() const { return total(sender.stats().channels); }
};

}  // namespace

TEST_CASE("A format that is no packet: pages get to their places in a file, with each zero policy") {
  for (const unsigned channels : {1u, 4u}) {
    send_rounds<ZeroPagesNone>(channels);
    send_rounds<ZeroPagesLegacy>(channels);
    send_rounds<ZeroPagesMultifd>(channels);
  }
}

TEST_CASE("A format that is no packet: a zero page is a hole, also where a page was") {
  const Watchdog watchdog("holes");
  GuestRam guest(3 * batch_pages);
  const File file;
  auto opened = FileSender<ZeroPagesMultifd>::open(guest.map, file.fds(2));
  REQUIRE(opened.has_value());
  auto& sender = *opened->pipeline;
  const auto send_all = [&] {
    REQUIRE(sender.producer.queue_range(guest.block, 0, guest.memory.size(), engine::NoZeroSink{}).has_value());
    const auto epoch = sender.producer.close_epoch();
    REQUIRE(epoch.has_value());
    REQUIRE(sender.wait(*epoch).has_value());
  };
  send_all();
  CHECK(total(sender.stats().channels).packets == 3);
  CHECK(total(sender.stats().channels).wire_bytes == guest.memory.size());
  CHECK_FALSE(file.is_hole(page * batch_pages));
  guest.memory.fill(std::byte{0});
  guest.memory.page(5, page)[0] = std::byte{1};
  send_all();
  CHECK(total(sender.stats().channels).zero_pages == 3 * batch_pages - 1);
  CHECK(total(sender.stats().channels).wire_bytes == guest.memory.size() + page);
  CHECK(file.is_hole(page * batch_pages));
  CHECK_FALSE(file.is_hole(5 * page));
  CHECK(same_bytes(file.bytes(), guest.memory.bytes()));
  CHECK(sender.finish().has_value());
  CHECK(code_of(sender.finish()) == Errc::already_closed);
}

TEST_CASE("A format that is no packet: epochs do not overtake each other, although nobody waits for one") {
  const Watchdog watchdog("epochs into a file");
  constexpr unsigned channels = 4;
  RamMap ram;
  const auto block = ram.add_elsewhere("pc.ram", batch_bytes);
  REQUIRE(block.has_value());
  auto buffer = PageBuffer::create();
  REQUIRE(buffer.has_value());
  // The same pages in each epoch, backwards, so that neighbours in the buffer are none in the file.
  std::vector<std::uint64_t> offsets;
  for (std::uint64_t i = batch_pages; i > 0; --i) offsets.push_back((i - 1) * page);
  std::vector<std::byte> newest(batch_bytes);
  for (unsigned round = 0; round < 30; ++round) {
    CAPTURE(round);
    const File file;
    GatedOutlet::gate = GatedOutlet::closed;
    auto opened = FileSender<ZeroPagesNone, FromCopies, GatedOutlet>::open(ram, file.fds(channels));
    REQUIRE(opened.has_value());
    auto& sender = *opened->pipeline;
    for (unsigned epoch = 0; epoch < 5; ++epoch) {
      for (const std::uint64_t offset : offsets)
        std::memset(&newest[offset], static_cast<int>((5 * round + epoch + offset / page) % 251), page);
      for (std::size_t i = 0; i < batch_pages; ++i) std::memcpy(buffer->data() + i * page, &newest[offsets[i]], page);
      REQUIRE(sender.producer.queue_copies(*block, offsets, batch_pages, *buffer, engine::NoZeroSink{}).has_value());
      REQUIRE(sender.producer.close_epoch().has_value());
    }
    // The other channels have nothing to do with the first epoch, and close it; there they wait for the one that is held.
    CHECK(eventually([&] {
      const auto locked = opened->shared->barrier.lock();
      return opened->shared->closings >= channels - 1;
    }));
    CHECK(total(sender.stats().channels).packets == 0);
    GatedOutlet::gate = GatedOutlet::open;
    GatedOutlet::gate.notify_all();
    const auto ended = sender.finish();
    CHECK_MESSAGE(ended.has_value(), text(ended));
    CHECK(total(sender.stats().channels).packets == 5);
    CHECK(first_difference(file.bytes(), newest) == batch_bytes);
  }
}

TEST_CASE("A format that is no packet: the cap holds, cancel() ends who waits for it and who waits for an epoch") {
  const Watchdog watchdog("a cap on a file");
  Capped capped;
  const auto epoch = capped.sender.producer.close_epoch();
  REQUIRE(epoch.has_value());
  std::optional<Result<void>> waited;
  std::thread waiter([&] { waited = capped.sender.wait(*epoch); });
  CHECK(eventually([&] { return capped.so_far().packets == 1; }));
  capped.sender.cancel("test");
  waiter.join();
  REQUIRE(waited.has_value());
  CHECK(code_of(*waited) == Errc::cancelled);
  CHECK(code_of(capped.sender.finish()) == Errc::cancelled);
  CHECK(capped.so_far().packets == 1);
  CHECK(capped.so_far().wire_bytes == batch_bytes);
  CHECK(capped.so_far().syncs == 0);
}

TEST_CASE("A format that is no packet: a cap that is lifted lets go what waits for it") {
  const Watchdog watchdog("a cap that is lifted");
  Capped capped;
  REQUIRE(capped.sender.producer.push_out().has_value());
  CHECK(eventually([&] { return capped.so_far().packets == 1; }));
  capped.sender.set_bandwidth(0);
  const auto ended = capped.sender.finish();
  CHECK_MESSAGE(ended.has_value(), text(ended));
  CHECK(capped.so_far().packets == 3);
  CHECK(capped.so_far().capped_ns > 0);
  CHECK(same_bytes(capped.file.bytes(), capped.guest.memory.bytes()));
}

TEST_CASE("A format that is no packet: its destructor ends what has not been finished") {
  const Watchdog watchdog("a sender into a file is destroyed");
  GuestRam guest(64 * batch_pages);
  const File file;
  for (const std::uint64_t bandwidth : {std::uint64_t{0}, std::uint64_t{1}}) {
    auto opened = FileSender<ZeroPagesNone>::open(guest.map, file.fds(3), {.bandwidth = bandwidth});
    REQUIRE(opened.has_value());
    const std::uint64_t bytes = bandwidth == 0 ? guest.memory.size() : 2 * batch_bytes;
    REQUIRE(opened->pipeline->producer.queue_range(guest.block, 0, bytes, engine::NoZeroSink{}).has_value());
    REQUIRE(opened->pipeline->producer.close_epoch().has_value());
  }
}

TEST_CASE("A format that is no packet: the first error says which channel, what, and why") {
  SUBCASE("one channel's descriptor is none: its channel is named") {
    const File file;
    const Error error = first_error({file.fd(), file.fd(), -1, file.fd()});
    CHECK(error.code == std::errc::bad_file_descriptor);
    CHECK(error.channel == 2);
    CHECK(std::string_view(error.op) == "ftruncate");
  }
  SUBCASE("no space is left on the device") {
    const detail::UniqueFd device(::open("/dev/full", O_RDWR | O_CLOEXEC));
    REQUIRE(device.get() >= 0);
    const Error error = first_error(std::vector<int>(3, device.get()));
    CHECK(error.code == std::errc::no_space_on_device);
    CHECK(error.channel < 3);
    CHECK(error.packet == 0);
    CHECK(error.stage == Stage::write);
    CHECK(std::string_view(error.op) == "pwrite");
  }
  SUBCASE("a hole that cannot be made") {
    const File file;
    REQUIRE(::ftruncate(file.fd(), 16 * batch_bytes) == 0);
    REQUIRE(::fcntl(file.fd(), F_ADD_SEALS, F_SEAL_WRITE) == 0);
    const Error error = first_error<ZeroPagesMultifd>(file.fds(2));
    CHECK(error.code == std::errc::operation_not_permitted);
    CHECK(std::string_view(error.op) == "fallocate");
  }
}

// SPDX-License-Identifier: MIT
//
// Channels of own peers that lose their connections, and come back (format/extension.md section 19.10): what was lost is sent
// again, and nothing old overwrites what is newer.
#include <doctest/doctest.h>

#include <array>
#include <atomic>
#include <deque>
#include <mutex>
#include <optional>
#include <thread>
#include <vector>

#include "multifd/any.hpp"
#include "multifd/compress/zlib.hpp"
#include "multifd/compress/zstd.hpp"
#include "multifd/engine/monitor.hpp"
#include "support/links.hpp"
#include "support/memory.hpp"

using namespace multifd;
using namespace test;

namespace {

using Compressors = PolicyList<NoComp, Zlib, Zstd>;
using Zeros = PolicyList<ZeroPagesNone, ZeroPagesLegacy, ZeroPagesMultifd>;

/// Both ends of the way back: what a sender dials is what a receiver gets. And who breaks connections.
class Switchboard {
 public:
  using Arrival = packets::Rejoins<FdTransport>::Arrival;

  explicit Switchboard(Links<FdTransport>& links) : waiting_(links.sender.size()), ends_(links.sender.size()) {
    for (unsigned i = 0; i < ends_.size(); ++i) keep(i, links.sender[i], links.receiver[i]);
  }
  ~Switchboard() {
    for (const Ends& each : ends_)
      for (const int fd : {each.sender, each.receiver}) ::close(fd);
  }

  /// While true, nothing can be dialled.
  void down(bool is_down) {
    monitor_.update([&] { down_ = is_down; });
  }
  /// Breaks the connection that the channel has, at one of its ends; once the receiver knows the channels.
  void cut(unsigned channel, bool at_receiver) {
    const auto held = monitor_.lock();
    if (!armed) return;
    ::shutdown(at_receiver ? ends_[channel].receiver : ends_[channel].sender, SHUT_RDWR);
  }
  unsigned channels() const { return static_cast<unsigned>(ends_.size()); }

  /// The receiver's drop_older(), until there is none.
  void fence_with(std::function<void(unsigned, std::uint32_t)> fence) {
    const std::lock_guard held(fencing_);
    fence_ = std::move(fence);
  }
  std::atomic<bool> armed{false};
  std::atomic<unsigned> made{0}, sender_joined{0}, receiver_joined{0};

  /// What the sender has of it.
  struct Dialling final : packets::Redial<FdTransport> {
    explicit Dialling(Switchboard& board) : of(board) {}
    void joined(unsigned channel) noexcept override { of.note_joined(channel); }
    void stop() noexcept override {
      of.monitor_.update([this] { of.dialling_over_ = true; });
    }
    Result<FdTransport> do_reconnect(unsigned channel, const Error&) noexcept override { return of.dial(channel); }
    Switchboard& of;
  } dialling{*this};
  /// What the receiver has of it.
  struct Accepting final : packets::Rejoins<FdTransport> {
    explicit Accepting(Switchboard& board) : of(board) {}
    void joined(unsigned channel) noexcept override { of.note_joined(channel); }
    /// Who has dialled, and waits for the receiver's answer, sees an end.
    void stop() noexcept override {
      of.monitor_.update([this] {
        of.accepting_over_ = true;
        for (auto& each : of.waiting_) {
          if (each) each->link.shutdown();  // keep() has a descriptor of it, too: closing it is no end
          each.reset();
        }
      });
    }
    Result<Arrival> do_await(unsigned channel, const Error&) noexcept override { return of.accept(channel); }
    Switchboard& of;
  } accepting{*this};
  /// Whether both sides use the newest connection of each channel.
  bool whole() const {
    const auto held = monitor_.lock();
    return std::ranges::all_of(ends_, [](const Ends& each) { return each.joined >= 2 * each.generation; });
  }

 private:
  struct Ends {
    int sender = -1, receiver = -1;
    std::uint32_t generation = 0;
    std::uint32_t joined = 0;  ///< calls by both sides
  };

  void keep(unsigned channel, const FdTransport& sender, const FdTransport& receiver) {
    Ends& ends = ends_[channel];
    for (const int fd : {ends.sender, ends.receiver})
      if (fd >= 0) ::close(fd);
    ends.sender = ::dup(sender.native_handle());
    ends.receiver = ::dup(receiver.native_handle());
  }

  void note_joined(unsigned channel) noexcept {
    monitor_.update([&] { ++ends_[channel].joined; });
  }
  Result<FdTransport> dial(unsigned channel) noexcept {
    for (;;) {
      auto links = tcp_links(1);
      std::uint32_t generation = 0;
      {
        auto held = monitor_.lock();
        monitor_.wait(held, [&] { return !down_ || dialling_over_; });
        if (dialling_over_) return fail(Errc::cancelled, Stage::connect, "switchboard");
        keep(channel, links.sender[0], links.receiver[0]);
        generation = ++ends_[channel].generation;
        ends_[channel].joined = 2 * generation - 2;  // the one before was lost while it was joined
      }
      ++made;
      monitor_.update([&] {
        Arrival arrival{std::move(links.receiver[0]), generation};
        if (accepting_over_)
          arrival.link.shutdown();
        else
          waiting_[channel].emplace(std::move(arrival));
      });
      {
        const std::lock_guard fencing(fencing_);
        if (fence_) fence_(channel, generation);
      }
      std::array<std::byte, wire::rejoin_answer_bytes> said;
      if (!read_exact(links.sender[0], std::span<std::byte>(said))) continue;
      const auto answer = wire::parse_rejoin_answer(said);
      REQUIRE(answer.has_value());
      CHECK(answer->verdict == wire::RejoinVerdict::joined);
      CHECK(answer->generation == generation);
      ++sender_joined;
      return std::move(links.sender[0]);
    }
  }
  Result<Arrival> accept(unsigned channel) noexcept {
    auto held = monitor_.lock();
    monitor_.wait(held, [&] { return waiting_[channel].has_value() || accepting_over_; });
    if (!waiting_[channel]) return fail(Errc::cancelled, Stage::accept, "switchboard");
    Arrival arrival = std::move(*waiting_[channel]);
    waiting_[channel].reset();
    ++receiver_joined;
    return arrival;
  }

  engine::Monitor monitor_;  ///< of all below
  std::vector<std::optional<Arrival>> waiting_;
  std::vector<Ends> ends_;
  bool down_ = false;
  bool dialling_over_ = false, accepting_over_ = false;
  std::mutex fencing_;
  std::function<void(unsigned, std::uint32_t)> fence_;
};

/// What the main connection carries here: closed epochs one way, EPOCH_WHOLE the other.
template <class Item>
class Mailbox {
 public:
  void put(Item item) {
    monitor_.update([&] { items_.push_back(std::move(item)); });
  }
  Item take() {
    auto held = monitor_.lock();
    monitor_.wait(held, [&] { return !items_.empty(); });
    Item item = std::move(items_.front());
    items_.pop_front();
    return item;
  }

 private:
  engine::Monitor monitor_;
  std::deque<Item> items_;
};

struct Outcome {
  std::uint64_t lost_pages = 0, epochs = 0;
};

/// A sender, a receiver, and what a migration does with them.
class Transfer {
 public:
  static constexpr std::size_t pages = 3000;

  Transfer(std::string_view compression, std::string_view zero_pages, unsigned channels)
      : compression_(compression), zero_pages_(zero_pages), links_(tcp_links(channels)), board(links_) {}

  /// Sends `rounds` epochs of a guest whose pages change between them, and then what was lost.
  Outcome run(unsigned rounds, Rng& rng, const std::function<void(unsigned)>& round_begins = {}) {
    std::thread destination([this] { receive(); });
    Outcome outcome;
    {
      auto tx = with_policies(compression_, Compressors{}, zero_pages_, Zeros{}, [this]<class C, class Z>() {
        return open_any_sender_of<C, FromGuest>(Z{}, here.map, std::move(links_.sender), {.progress_timeout = 50s},
                                                &board.dialling);
      });
      REQUIRE_MESSAGE(tx.has_value(), text(tx));
      outcome = send(**tx, rounds, rng, round_begins);
      const auto closed = (*tx)->close_channels();
      CHECK_MESSAGE(closed.has_value(), text(closed));
    }
    destination.join();
    CHECK(first_difference(here.memory.bytes(), there.memory.bytes()) == here.memory.size());
    return outcome;
  }

 private:
  void receive() {
    auto rx = open_any_receiver(Compressors{}, there.map, std::move(links_.receiver),
                                {.compression = compression_, .barrier = Barrier::manual, .barrier_timeout = 50s},
                                &board.accepting);
    REQUIRE_MESSAGE(rx.has_value(), text(rx));
    board.fence_with([&](unsigned channel, std::uint32_t generation) { (*rx)->drop_older(channel, generation); });
    board.armed = true;
    for (bool more = true; more;) {
      more = closed_.take();
      const auto epoch = (*rx)->release_epoch();
      REQUIRE_MESSAGE(epoch.has_value(), text(epoch));
      whole_.put({.epoch = *epoch, .received = 0, .channels = (*rx)->arrived_channels()});
    }
    REQUIRE((*rx)->end_epochs().has_value());
    const auto finished = (*rx)->finish(30s);
    CHECK_MESSAGE(finished.has_value(), text(finished));
    board.fence_with({});
  }

  Outcome send(AnySender& tx, unsigned rounds, Rng& rng, const std::function<void(unsigned)>& round_begins) {
    Outcome outcome;
    DirtyBitmaps dirty(here.map);
    dirty.fill(here.map);
    std::uint64_t settled = 0;
    const auto settle = [&](std::uint64_t epochs) {
      for (; settled < epochs; ++settled) {
        const wire::EpochWhole whole = whole_.take();
        CHECK(whole.epoch == settled);
        REQUIRE(tx.settle(whole).has_value());
      }
    };
    for (unsigned round = 0;; ++round) {
      if (round_begins) round_begins(round);
      if (round < rounds) write_pages(dirty, rng);
      const bool last = round >= rounds && dirty.count() == 0;
      REQUIRE(tx.queue_dirty(here.block, dirty[here.block], 0, {}).has_value());
      dirty.clear();
      settle(outcome.epochs);
      const auto epoch = tx.close_epoch();
      REQUIRE_MESSAGE(epoch.has_value(), text(epoch));
      CHECK(*epoch == outcome.epochs++);
      closed_.put(!last);
      const auto written = tx.wait(*epoch);
      REQUIRE_MESSAGE(written.has_value(), text(written));
      if (last) {
        settle(outcome.epochs);
        return outcome;
      }
      if (round + 1 >= rounds) settle(outcome.epochs);  // the guest stands still: all that is lost is to be known
      outcome.lost_pages += tx.take_lost(dirty);
    }
  }

  void write_pages(DirtyBitmaps& dirty, Rng& rng) {
    for (unsigned i = 0; i < 400; ++i) {
      const std::size_t at = below(rng, pages);
      fill_page(here.memory.page(at, 4096), any_fill(rng), rng);
      dirty[here.block][at / 64] |= std::uint64_t{1} << at % 64;
    }
  }

  const std::string_view compression_, zero_pages_;
  Links<FdTransport> links_;
  Mailbox<bool> closed_;  ///< false: the last epoch
  Mailbox<wire::EpochWhole> whole_;

 public:
  Switchboard board;
  GuestRam here{pages}, there{pages, std::byte{0xaa}};
};

/// Cuts connections at random moments, until it is destroyed.
class Cutter {
 public:
  Cutter(Switchboard& board, std::uint64_t number)
      : thread_([this, &board, number] {
          Rng rng(seed() + number);
          auto held = over_.lock();
          const auto pause = [&](std::size_t us) {
            return !over_.wait_until(held, std::chrono::steady_clock::now() + std::chrono::microseconds(us),
                                     [] { return false; });
          };
          while (pause(below(rng, 8000))) {
            // Most connections get so far that they carry something.
            const bool early = below(rng, 4) == 0;
            while (!early && !board.whole() && pause(500)) {
            }
            board.cut(static_cast<unsigned>(below(rng, board.channels())), below(rng, 2) == 0);
            ++cuts;
          }
        }) {}
  ~Cutter() {
    over_.stop();
    thread_.join();
  }
  std::atomic<unsigned> cuts{0};

 private:
  engine::Monitor over_;
  std::thread thread_;
};

}  // namespace

TEST_CASE("Connections that break at any moment: what was lost is sent again, in every codec and zero mode") {
  const Watchdog watchdog("channels that come back", 240s);
  Rng rng(seed());
  constexpr std::array<std::string_view, 3> compressions{"none", "zlib", "zstd"}, modes{"multifd", "none", "legacy"};
  const bool all = full();
  for (std::size_t i = 0; i < compressions.size(); ++i)
    for (std::size_t j = all ? 0 : i; j < (all ? modes.size() : i + 1); ++j)
      for (const unsigned channels : {1u, 3u}) {
        const std::string_view compression = compressions[i], zeros = modes[j];
        CAPTURE(compression);
        CAPTURE(zeros);
        CAPTURE(channels);
        Transfer transfer(compression, zeros, channels);
        const Cutter cutter(transfer.board, channels);
        const Outcome outcome = transfer.run(6, rng);
        CHECK(outcome.epochs > 6);
      }
}

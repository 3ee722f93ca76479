// SPDX-License-Identifier: MIT
//
// Channels that lose their connections and come back (format/extension.md section 19.10), under every order of a few steps and
// every moment of a loss: nothing is lost, nothing old overwrites what is newer, and nobody waits for ever.
//
// Real: EpochBarrier, ClosedEpochs, SentJournal. The loops around them are written out below, each with the function whose
// lines it stands for; the hand-off is one step here, because it has a model of its own (handoff_model_test.cpp). Connections
// are queues: bytes that fly when the sender finds the loss arrive later, until the receiver has ended that connection.
#include "model/instrument.hpp"

#include <doctest/doctest.h>

#include "model/report.hpp"
#include "multifd/engine/closed_epochs.hpp"
#include "multifd/engine/sent_journal.hpp"
#include "multifd/packets/epoch_barrier.hpp"

using namespace multifd;
using model::expect;
using model::report;
using model::Run;
using namespace std::chrono_literals;

namespace {

constexpr auto no_progress = [] { return std::uint64_t{0}; };
constexpr unsigned pages = 2;

enum class Mistake {
  none,
  reads_both,       ///< the receiver reads the older connection on beside the newer one
  closes_behind,    ///< closing() is called behind the SYNC
  admits_behind,    ///< admit() is called behind the answer
  forgets_to_lose,  ///< lose() is not called at all
  says_own_epoch,   ///< a channel goes on in the epoch in which it was lost
};

/// What one thread waits for. Who changes it says so.
class Door {
 public:
  void wait(std::function<bool()> ready) {
    model::point();
    ready_ = std::move(ready);
    while (!ready_()) Run::current_run->block(this);
    ready_ = {};
  }
  /// Until it is ready, or nobody else can go on.
  void rest(std::function<bool()> ready) {
    model::point();
    ready_ = std::move(ready);
    if (!ready_()) Run::current_run->rest(this);
    ready_ = {};
  }
  void changed() {
    if (ready_ && ready_()) Run::current_run->wake(this, true);
  }

 private:
  std::function<bool()> ready_;
};

struct Message {
  enum class Kind { page, sync, first_epoch, end } kind;
  unsigned page = 0, version = 0;
  std::uint64_t epoch = 0;
};

/// One connection of a channel.
struct Link {
  std::deque<Message> flying;
  std::uint32_t generation = 0;
  bool lost = false;  ///< the sender knows that it is
  bool over = false;  ///< the receiver will: nothing comes behind what flies
  bool shut = false;  ///< the receiver has ended it: what flies is lost, and what is still written
  bool answered = false;
  Door arrivals;
};
using LinkPointer = std::shared_ptr<Link>;

class World {
 public:
  World(unsigned channels, std::vector<unsigned> losses, Mistake mistake)
      : mistake_(mistake),
        losses_(std::move(losses)),
        ram_(map()),
        epochs_(channels),
        journal_(ram_, channels),
        barrier_(std::move(*packets::EpochBarrier::create(channels, Barrier::manual, 1h))),
        near_(channels),
        far_(channels) {
    for (unsigned c = 0; c < channels; ++c) near_[c].link = far_[c].link = std::make_shared<Link>();
  }

  // ---- Sender

  /// BatchProducer and Precopy::run(), send_lost(): `rounds` epochs with pages, then what was lost, then END.
  void produce(unsigned rounds) {
    DirtyBitmaps dirty(ram_);
    dirty.fill(ram_);
    std::uint64_t closed = 0, settled = 0;
    const auto settle = [&] {
      for (; settled < closed; ++settled) {
        wholes_door_.wait([&] { return !wholes_.empty(); });
        const auto whole = wholes_.front();
        wholes_.pop_front();
        // Pipeline::settle()
        const auto arrived = [&](unsigned c) { return (whole[0] >> c & 1) != 0; };
        journal_.settle(settled, arrived);
        for (unsigned c = 0; c < near_.size(); ++c)
          if (!arrived(c) && epochs_.took_part(c, settled)) drop_link(c);
      }
    };
    for (unsigned round = 0;; ++round) {
      if (round > 0 && round < rounds) {
        ++guest_[0];  // the same page in each
        dirty[BlockId{0}][0] |= 1;
      }
      const bool last = round >= rounds && dirty.count() == 0;
      for (unsigned page = 0; page < pages; ++page)
        if ((dirty[BlockId{0}][0] >> page & 1) != 0) put(page);
      dirty.clear();
      settle();  // SourceStream::close_epoch(): the pages of two epochs are remembered
      change([&] { ++closed_; });
      ++closed;
      change([&] { endings_.push_back(last); });
      endings_door_.changed();
      expect(epochs_.wait(closed - 1, 1h, [] {}), "the epoch's end is written");
      if (last || round + 1 >= rounds) settle();
      if (last) break;
      journal_.take_lost(dirty);
    }
    change([&] { redial_stopped_ = ended_ = true; });
    for (Near& each : near_) each.answer.changed(), each.pause.changed();
    expect(epochs_.wait_for_channels(1h, [] {}), "every channel ends");
    DirtyBitmaps rest(ram_);
    expect(journal_.take_lost(rest) == 0, "nothing is lost behind END");
  }

  /// SendWorker::run().
  void send(unsigned c) {
    bool ended = send_on(c);
    while (!ended) ended = send_again(c);
    // Also a network that is silent: packets::limit_silence().
    near_[c].link->over = true;
    near_[c].link->arrivals.changed();
    epochs_.channel_ended();
  }

  // ---- Receiver

  /// Inlet::run().
  void receive(unsigned c) {
    bool ended = receive_on(c);
    while (!ended) ended = receive_again(c);
  }

  /// Destination: Receiver::release_epoch(), EPOCH_WHOLE, Receiver::end_epochs().
  void release() {
    for (bool more = true; more;) {
      endings_door_.wait([&] { return !endings_.empty(); });
      more = !endings_.front();
      endings_.pop_front();
      const auto epoch = barrier_->release_when_all(no_progress, [&]() -> Result<void> {
        bool any = false;
        for (const Far& each : far_) {
          const bool there = each.synced == epoch_ || each.later > epoch_;
          expect(there || each.away, "an epoch ends when each channel that is there has its SYNC, or a later epoch");
          any |= there;
        }
        expect(any, "an epoch ends only when a channel is there");
        return {};
      });
      expect(epoch && *epoch == epoch_, "epochs are counted");
      ++epoch_;
      for (Near& each : near_) each.pause.changed();
      wholes_.push_back(barrier_->last_arrived());
      wholes_door_.changed();
    }
    expect(barrier_->end_epochs().has_value(), "no SYNC too many");
    epochs_ended_.store(true);
    rejoins_stopped_ = true;
    older_door_.changed();
    for (Near& each : near_) each.answer.changed();
    for (Far& each : far_) each.waiting_door.changed();
    expect(barrier_->wait_for_channels(1h, no_progress, "ends").has_value(), "every channel ends");
  }

  /// With Mistake::reads_both: who reads the older connection.
  void read_older() {
    older_door_.wait([&] { return older_ || rejoins_stopped_; });
    if (!older_) return;
    while (const auto message = read(*older_))
      if (message->kind == Message::Kind::page) arrive(*message);
  }

  void check() const {
    for (unsigned page = 0; page < pages; ++page)
      expect(memory_[page] == guest_[page], "every page has arrived as it is at last");
  }

 private:
  struct Near {
    LinkPointer link;
    std::uint64_t synced = 0;
    Door work, answer, pause;
  };
  struct Far {
    LinkPointer link, waiting;
    std::uint32_t newest = 0;
    Door waiting_door;
    // What is known without the barrier.
    std::uint64_t synced = ~std::uint64_t{0}, later = 0;
    bool away = false;
  };
  struct Work {
    enum class Kind { batch, close_epoch, end, lost } kind;
    unsigned page = 0;
    std::uint64_t epoch = 0;
  };

  static RamMap map() {
    alignas(4096) static std::array<std::byte, pages * 4096> memory;
    RamMap ram;
    expect(ram.add("pc.ram", memory).has_value(), "a map");
    return ram;
  }
  bool may_lose(unsigned c) const { return losses_[c] > 0; }
  void count_loss(unsigned c) { --losses_[c]; }
  template <class Change>
  void change(Change&& change) {
    model::point();
    change();
    for (Near& each : near_) each.work.changed();
  }

  // ---- Connections

  /// False: the connection is lost.
  bool write(unsigned c, const Message& message) {
    model::point();
    Link& link = *near_[c].link;
    if (link.lost) return false;
    if (link.shut) return true;
    const unsigned how = may_lose(c) ? Run::current_run->pick(5) : 0;
    const bool arrives = how == 0 || how % 2 == 1;
    if (how != 0) {
      count_loss(c);
      link.lost = true;
      link.over = how > 2;  // else the network is silent
    }
    if (arrives) link.flying.push_back(message);
    link.arrivals.changed();
    return how == 0;
  }
  std::optional<Message> read(Link& link) {
    link.arrivals.wait([&] { return !link.flying.empty() || link.over || link.shut; });
    if (link.shut || link.flying.empty()) return std::nullopt;
    const Message message = link.flying.front();
    link.flying.pop_front();
    return message;
  }
  std::optional<Message> read(unsigned c) {
    Link& link = *far_[c].link;
    const auto message = read(link);
    if (!message || !may_lose(c)) return message;
    const unsigned how = Run::current_run->pick(3);
    if (how == 0) return message;
    count_loss(c);
    link.shut = true;  // of which the sender may not hear before it is told by EPOCH_WHOLE
    if (how == 1) shut_down(c, link);
    return std::nullopt;
  }
  void arrive(const Message& message) {
    model::point();
    expect(memory_[message.page] <= message.version, "nothing old overwrites what is newer");
    memory_[message.page] = message.version;
  }
  /// The receiver ends a connection, of which the sender hears.
  void shut_down(unsigned c, Link& link) {
    link.shut = link.lost = true;
    link.arrivals.changed();
    near_[c].work.changed();
    near_[c].answer.changed();
  }

  // ---- Sender

  void put(unsigned page) {
    change([&] { ring_.push_back({.kind = Work::Kind::batch, .page = page, .epoch = closed_}); });
  }
  /// BatchHandoff::next_work().
  std::optional<Work> next_work(Near& near) {
    if (!ring_.empty() && ring_.front().epoch <= near.synced) {
      const Work batch = ring_.front();
      ring_.pop_front();
      return batch;
    }
    if (!ring_.empty() || closed_ > near.synced) return Work{.kind = Work::Kind::close_epoch, .epoch = near.synced++};
    if (ended_) return Work{.kind = Work::Kind::end};
    return std::nullopt;
  }
  bool has_work(const Near& near) const { return !ring_.empty() || closed_ > near.synced || ended_; }
  /// BatchHandoff::take(), and Outlet::check_link() where there is nothing to do.
  Work take(unsigned c) {
    Near& near = near_[c];
    model::point();
    for (;;) {
      if (auto work = next_work(near)) return *work;
      if (may_lose(c))
        if (const unsigned how = Run::current_run->pick(3); how != 0) {
          count_loss(c);
          near.link->lost = true;
          near.link->over = how == 1;
          near.link->arrivals.changed();
        }
      const auto ready = [&] { return has_work(near) || near.link->lost; };
      near.work.rest(ready);
      near.link->lost |= near.link->shut;  // packets::limit_silence()
      near.work.wait(ready);
      if (!has_work(near)) return {.kind = Work::Kind::lost};
    }
  }
  /// SendWorker::work(), send(), close_epoch().
  bool send_on(unsigned c) {
    for (;;) {
      const Work work = take(c);
      switch (work.kind) {
        case Work::Kind::batch: {
          const std::uint64_t offset = work.page * 4096;
          journal_.note(c, work.epoch, BlockId{0}, std::span(&offset, 1));
          if (!write(c, {.kind = Message::Kind::page, .page = work.page, .version = guest_[work.page]})) return false;
          break;
        }
        case Work::Kind::close_epoch:
          if (mistake_ != Mistake::closes_behind) epochs_.closing(c);
          if (!write(c, {.kind = Message::Kind::sync, .epoch = work.epoch})) return false;
          if (mistake_ == Mistake::closes_behind) epochs_.closing(c);
          epochs_.closed(c);
          break;
        case Work::Kind::end: write(c, {.kind = Message::Kind::end}); return true;
        case Work::Kind::lost: return false;
      }
    }
  }
  /// SendWorker::come_back(), go_on().
  bool send_again(unsigned c) {
    if (mistake_ != Mistake::forgets_to_lose) journal_.lose(c);
    epochs_.leave(c);
    // A network may need long.
    if (Run::current_run->pick(2) == 1)
      near_[c].pause.rest([this, now = epoch_] { return epoch_ != now || redial_stopped_; });
    const bool connected = reconnect(c);
    std::uint64_t epoch = epochs_.rejoin(c);
    if (mistake_ == Mistake::says_own_epoch) epoch = near_[c].synced;
    near_[c].synced = epoch;  // BatchHandoff::come_back()
    if (!connected) return true;
    if (!write(c, {.kind = Message::Kind::first_epoch, .epoch = epoch})) return false;
    return send_on(c);
  }
  /// Outlet::drop_link().
  void drop_link(unsigned c) {
    model::point();
    Link& link = *near_[c].link;
    link.lost = link.over = true;
    link.arrivals.changed();
    near_[c].work.changed();
    near_[c].answer.changed();
  }
  /// Outlet::reconnect() and the source's Redial. False: it is needed no more.
  bool reconnect(unsigned c) {
    for (;;) {
      model::point();
      if (redial_stopped_ || rejoins_stopped_) return false;
      const auto link = std::make_shared<Link>();
      link->generation = ++generation_;
      // DestinationReconnect::offer(), ReturningLink::drop_older()
      Far& far = far_[c];
      far.waiting = link;
      far.waiting_door.changed();
      model::point();
      far.newest = std::max(far.newest, link->generation);
      if (far.link->generation < far.newest) {
        if (mistake_ == Mistake::reads_both) {
          older_ = std::make_shared<Link>();
          older_->flying = std::move(far.link->flying);
          older_->over = true;
          older_door_.changed();
        }
        shut_down(c, *far.link);
      }
      near_[c].answer.wait(
          [&] { return link->answered || link->shut || link->lost || redial_stopped_ || rejoins_stopped_; });
      if (link->answered) {
        near_[c].link = link;
        return true;
      }
      link->over = true;  // it is closed
      link->arrivals.changed();
    }
  }

  // ---- Receiver

  /// Inlet::work(), synchronise(), leave().
  bool receive_on(unsigned c) {
    Far& far = far_[c];
    for (;;) {
      const auto message = read(c);
      if (!message) return false;
      switch (message->kind) {
        case Message::Kind::page: arrive(*message); break;
        case Message::Kind::sync:
          far.synced = message->epoch;
          expect(barrier_->arrive(c, no_progress).has_value(), "the SYNC is one that the destination waits for");
          break;
        case Message::Kind::first_epoch: expect(false, "an epoch in the middle of a channel"); break;
        case Message::Kind::end:
          if (!epochs_ended_.load()) return false;
          expect(barrier_->channel_ended(c).has_value(), "an end in order");
          return true;
      }
    }
  }
  /// ReturningLink::find(), join(), and the destination's Rejoins.
  bool receive_again(unsigned c) {
    Far& far = far_[c];
    if (!far.link->shut) shut_down(c, *far.link);
    const auto end = [&] {
      expect(barrier_->channel_ended(c).has_value(), "an end that is none too early");
      return true;
    };
    if (epochs_ended_.load()) return end();
    far.away = true;
    barrier_->leave(c);
    far.waiting_door.wait([&] { return far.waiting || rejoins_stopped_; });
    if (rejoins_stopped_) return end();
    far.link = std::exchange(far.waiting, nullptr);
    if (far.link->generation < far.newest) shut_down(c, *far.link);
    const auto answer = [&] {
      model::point();
      far.link->answered = !far.link->shut;
      near_[c].answer.changed();
    };
    if (mistake_ == Mistake::admits_behind) answer();
    barrier_->admit(c);
    far.away = false;
    if (mistake_ != Mistake::admits_behind) answer();
    const auto said = read(c);
    if (!said) return false;
    expect(said->kind == Message::Kind::first_epoch, "a channel begins with its epoch");
    far.later = said->epoch;
    expect(barrier_->join(c, said->epoch).has_value(), "no channel begins with an epoch that has ended");
    return receive_on(c);
  }

  const Mistake mistake_;
  std::vector<unsigned> losses_;  ///< how many connections each channel may lose
  RamMap ram_;
  std::array<unsigned, pages> guest_{1, 1}, memory_{};  ///< versions
  engine::ClosedEpochs epochs_;
  engine::SentJournal journal_;
  std::unique_ptr<packets::EpochBarrier> barrier_;
  std::vector<Near> near_;
  std::vector<Far> far_;
  std::deque<Work> ring_;
  std::uint64_t closed_ = 0;
  bool ended_ = false, redial_stopped_ = false, rejoins_stopped_ = false;
  std::uint32_t generation_ = 0;
  std::atomic<bool> epochs_ended_{false};
  std::uint64_t epoch_ = 0;   ///< that the destination has open
  std::deque<bool> endings_;  ///< of epochs, on the main connection: whether it is the last
  std::deque<std::array<std::uint8_t, 32>> wholes_;
  Door endings_door_, wholes_door_, older_door_;
  LinkPointer older_;
};

/// A loss costs nothing, a preemption and a switch to another thread than the next one does.
/// Params `losses`: how many connections each channel may lose; `turn`: which thread is the first where several can go on.
model::Explored explore(const std::vector<unsigned>& losses, Mistake mistake, unsigned turn,
                        unsigned deviations = model::preemptions()) {
  return model::explore(
      deviations,
      [=](Run& run) {
        const unsigned channels = static_cast<unsigned>(losses.size());
        auto world = std::make_shared<World>(channels, losses, mistake);
        std::vector<std::function<void()>> threads{[=] { world->produce(2); }, [=] { world->release(); }};
        for (unsigned c = 0; c < channels; ++c) {
          threads.push_back([=] { world->send(c); });
          threads.push_back([=] { world->receive(c); });
        }
        if (mistake == Mistake::reads_both) threads.push_back([=] { world->read_older(); });
        std::ranges::rotate(threads, threads.begin() + static_cast<std::ptrdiff_t>(turn % threads.size()));
        for (auto& each : threads) run.spawn(std::move(each));
        run.at_end([=] { world->check(); });
      },
      model::Switches::counted);
}

}  // namespace

TEST_CASE("One channel loses its connection at any moment and comes back: an epoch waits for it, and nothing is lost") {
  for (unsigned turn = 0; turn < 4; ++turn) report("1 channel", explore({1}, Mistake::none, turn));
}

TEST_CASE(
    "One of two channels loses its connection at any moment and comes back: nothing is lost or overwritten by older") {
  for (unsigned turn = 0; turn < 6; ++turn) report("2 channels", explore({0, 1}, Mistake::none, turn));
}

TEST_CASE("Connections that are lost at once, or while they are being made") {
  for (unsigned turn = 0; turn < 6; ++turn) {
    report("1 channel, twice", explore({2}, Mistake::none, turn, 0));
    report("2 channels, both", explore({1, 1}, Mistake::none, turn, 0));
  }
}

TEST_CASE("Mistakes in how channels come back are found") {
  CHECK(explore({0, 1}, Mistake::reads_both, 0).failure);
  CHECK(explore({0, 1}, Mistake::closes_behind, 3).failure);
  CHECK(explore({0, 1}, Mistake::admits_behind, 0).failure);
  CHECK(explore({0, 1}, Mistake::forgets_to_lose, 0).failure);
  CHECK(explore({0, 1}, Mistake::says_own_epoch, 0).failure);
}

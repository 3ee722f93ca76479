// SPDX-License-Identifier: MIT
//
// Lets one operation of one side go wrong, 0, 1, 2 ... until a migration gets through: a read or write that fails, is
// cut, ends, is short or late, or a call of the compressor. Whatever went wrong first is what is reported, with its
// place; everything ends, nothing is left behind, and the next migration over the same memory works.
//
// Over the two stacks of `every_operation`, which have all paths of I/O between them, every operation goes wrong in each
// run. Over the others one, drawn by lot, for each kind of fault and side; with MULTIFD_TEST_FULL=1 all, or where there are
// more than 60, that many.
#include <doctest/doctest.h>

#include <array>
#include <atomic>
#include <concepts>
#include <thread>
#include <tuple>
#include <vector>

#include "fault/faulty_compressor.hpp"
#include "fault/tally.hpp"
#include "multifd/compress/nocomp.hpp"
#include "multifd/compress/zlib.hpp"
#include "multifd/compress/zstd.hpp"
#include "multifd/receiver.hpp"
#include "multifd/sender.hpp"
#include "multifd/testing/fault_transport.hpp"
#include "support/leftovers.hpp"
#include "support/links.hpp"
#include "support/memory.hpp"

using namespace multifd;
using namespace test;
using testing::FaultKind;

namespace {

constexpr std::size_t page = 4096;
constexpr std::size_t pages = 48;
constexpr std::size_t piece = 12;  ///< pages of a packet
constexpr std::uint64_t nowhere = testing::FaultOptions::never;

template <class T, class C, class Z>
struct Stack {
  using Transport = T;
  using Compressor = C;
  using ZeroPages = Z;
};

template <class C, class Z>
using InMemory = Stack<MemoryTransport, C, Z>;

/// Pages as they are with zero lists, and an encoded payload with zero pages on the main stream.
template <class S>
inline constexpr bool every_operation =
    std::same_as<S, InMemory<NoComp, ZeroPagesMultifd>> || std::same_as<S, InMemory<Zlib, ZeroPagesLegacy>>;

enum class Side { none, sender, receiver };

/// What goes wrong, and where.
struct Plan {
  Side side = Side::none;
  bool codec = false;  ///< a call of the compressor, else of the transport
  FaultKind kind = FaultKind::fail;
  std::uint64_t at = nowhere;
  unsigned channels = 1;
  Digest digest = Digest::off;
};

struct Ends {
  Result<void> sending;
  Result<void> receiving;
  std::vector<ChannelStats> sent;          ///< by channel
  std::vector<ChannelStats> received;      ///< by channel, where open() went well
  std::uint64_t transport_operations = 0;  ///< of the side with the fault
  std::uint64_t codec_operations = 0;
  std::uint32_t codec_channel = no_channel;
  std::uint64_t codec_packets = 0;
};

const std::error_code injected(EIO, std::system_category());

/// The transport's error carries the number of its link, beginning here.
constexpr std::uint64_t first_detail = 1000;

struct Guest {
  Guest() {
    Rng rng(seed());
    for (std::size_t p = 0; p < pages; ++p) fill_page(source.page(p, page), any_fill(rng), rng);
  }
  Block source{pages * page};
  Block target{pages * page};
};

template <class T>
Links<T> make_links(unsigned channels) {
  if constexpr (std::is_same_v<T, MemoryTransport>)
    return memory_links(channels, 64 * 1024);
  else
    return tcp_links(channels);
}

template <class S>
Ends migrate(const Guest& guest, const Plan& plan) {
  using Wrapped = testing::FaultTransport<typename S::Transport>;
  using C = Faulty<typename S::Compressor>;
  RamMap source, target;
  const auto block = source.add("pc.ram", guest.source.bytes());
  REQUIRE(target.add("pc.ram", guest.target.bytes()).has_value());

  std::atomic<std::uint64_t> operations = 0;
  CodecFault codec;
  codec.error = {.code = injected, .op = "injected codec fault"};
  if (plan.codec) codec.fail_at = plan.at;
  const auto wrap = [&](std::vector<typename S::Transport> links, Side mine) {
    std::vector<Wrapped> result;
    for (std::size_t i = 0; i < links.size(); ++i) {
      // Parts of 40,000 bytes: some packets take several operations.
      testing::FaultOptions options{.max_io_bytes = 40'000};
      if (mine == plan.side) {
        if (!plan.codec) options.fail_at = plan.at;
        options.kind = plan.kind;
        options.operations = &operations;
        options.error.detail = first_detail + i;
      }
      result.emplace_back(std::move(links[i]), options);
    }
    return result;
  };
  const auto compressor = [&](Side mine) {
    C made;
    if (mine == plan.side) made.fault = &codec;
    return made;
  };

  auto links = make_links<typename S::Transport>(plan.channels);
  Ends ends;
  std::vector<std::uint64_t> zeros;  // on the caller's main stream
  {
    auto receiver_links = wrap(std::move(links.receiver), Side::receiver);
    auto sender_links = wrap(std::move(links.sender), Side::sender);
    std::thread receiving([&] {
      auto rx =
          Receiver<Wrapped, C>::open(target, std::move(receiver_links), {.compressor = compressor(Side::receiver)});
      ends.receiving = rx ? rx->finish() : std::unexpected(rx.error());
      if (rx) ends.received = rx->stats().channels;
    });
    {
      auto tx = Sender<Wrapped, C, typename S::ZeroPages>::open(
          source, std::move(sender_links), {.compressor = compressor(Side::sender), .digest = plan.digest});
      if (!tx) ends.sending = std::unexpected(tx.error());
      for (int round = 0; round < 2 && ends.sending; ++round) {
        zeros.clear();
        for (std::size_t p = 0; p < pages && ends.sending; p += piece) {
          const auto queued =
              tx->queue_range(*block, p * page, piece * page, [&](std::uint64_t offset) { zeros.push_back(offset); });
          if (!queued)
            ends.sending = std::unexpected(queued.error());
          else
            ends.sending = tx->push_out();
        }
        if (ends.sending)
          if (auto synced = tx->close_epoch_and_wait(); !synced) ends.sending = std::unexpected(synced.error());
      }
      if (tx) {
        if (ends.sending) ends.sending = tx->close_channels();
        ends.sent = tx->stats().channels;
      }
    }
    receiving.join();
  }
  if (ends.sending && ends.receiving)
    for (const std::uint64_t offset : zeros) std::memset(guest.target.data() + offset, 0, page);
  ends.transport_operations = operations;
  ends.codec_operations = codec.operations;
  ends.codec_channel = codec.channel;
  ends.codec_packets = codec.packets;
  return ends;
}

void check_whole(const Guest& guest, const Ends& ends) {
  CHECK_MESSAGE(ends.sending.has_value(), text(ends.sending));
  CHECK_MESSAGE(ends.receiving.has_value(), text(ends.receiving));
  CHECK(guest.source == guest.target);
}

/// The first error is the one that was injected, and says where.
void check_place(const Error& error, const Plan& plan, const Ends& ends) {
  if (plan.codec) {
    CHECK(error.channel == ends.codec_channel);
    if (ends.codec_channel == no_channel) {
      CHECK(error.stage == Stage::setup);
    } else {
      CHECK(error.stage == (plan.side == Side::sender ? Stage::encode : Stage::decode));
      CHECK(error.packet >= ends.codec_packets);  // packets of nothing but zero pages count too
      CHECK(error.packet < 2 * pages / piece);
    }
    return;
  }
  CHECK(error.op == std::string_view("injected fault"));
  const std::uint32_t link = static_cast<std::uint32_t>(error.detail - first_detail);
  CHECK(link < plan.channels);
  const bool hello = plan.side == Side::receiver && error.channel == no_channel;  // before it a channel has no id
  if (!hello) CHECK(error.channel == link);
  if (plan.side == Side::sender) {
    CHECK((error.stage == Stage::write || error.stage == Stage::close));
  } else {
    CHECK(error.stage == (hello ? Stage::hello : Stage::read));
  }
  // As the channel's own counter: packets before this one.
  const auto& stats = plan.side == Side::sender ? ends.sent : ends.received;
  if (link < stats.size() && !hello) CHECK(error.packet == stats[link].packets);
  if (hello) CHECK(error.packet == no_packet);  // an initial packet is none of those that are counted
}

void check_broken(const Plan& plan, const Ends& ends) {
  const bool sender = plan.side == Side::sender;
  const Result<void>& hit = sender ? ends.sending : ends.receiving;
  const Result<void>& other = sender ? ends.receiving : ends.sending;
  if (other) {
    // What a sender has written, it has written. But no receiver takes a broken stream for a whole one, but where the
    // end came instead of the end.
    if (sender) CHECK(plan.kind == FaultKind::end);
  } else {
    CHECK_MESSAGE(other.error().code != injected, text(other));
    CHECK_MESSAGE((other.error().code == Condition::peer_gone || other.error().code == Condition::peer_protocol),
                  text(other));
  }
  if (!plan.codec && plan.kind == FaultKind::end && !sender) {
    // Not an error of the transport: the stream's end, where it should not be, or where it could.
    if (hit) return;
    CHECK_MESSAGE(hit.error().code == Condition::peer_protocol, text(hit));
    CHECK((hit.error().channel < plan.channels || hit.error().stage == Stage::hello));
    return;
  }
  REQUIRE_FALSE(hit.has_value());
  // The peer sees an end or a cut as soon as we do, and may have cut our other channels before we report it.
  const bool race = !plan.codec && plan.kind != FaultKind::fail && plan.channels > 1;
  if (race && hit.error().code == Condition::peer_gone) return;
  CHECK_MESSAGE(hit.error().code == injected, text(hit));
  if (hit.error().code == injected) check_place(hit.error(), plan, ends);
}

/// One migration in which something goes wrong; whether it did.
template <class S>
bool inject(const Guest& guest, const Plan& plan) {
  CAPTURE(plan.side);
  CAPTURE(plan.codec);
  CAPTURE(static_cast<int>(plan.kind));
  CAPTURE(plan.at);
  CAPTURE(plan.channels);
  CAPTURE(plan.digest);
  guest.target.fill(std::byte{0xee});
  const Leftovers before;
  const Stopwatch watch;
  const Ends ends = migrate<S>(guest, plan);
  CHECK(watch.elapsed() < no_hang);
  CHECK(before.no_thread());
  CHECK(before.no_descriptor());
  const bool came = (plan.codec ? ends.codec_operations : ends.transport_operations) > plan.at;
  // A receiver's last operation ends its answer, behind all memory, to a sender that waits for none here.
  const bool answering = !plan.codec && plan.side == Side::receiver && ends.receiving.has_value() &&
                         ends.transport_operations == plan.at + 1;
  const bool harmless =
      answering || (!plan.codec && (plan.kind == FaultKind::shorten || plan.kind == FaultKind::delay));
  if (came) count_fault();
  if (!came || harmless)
    check_whole(guest, ends);
  else
    check_broken(plan, ends);
  return came;
}

/// Nothing goes wrong, over the memory that the broken ones have left.
template <class S>
Ends inject_nothing(const Guest& guest, Plan plan) {
  plan.at = nowhere;
  guest.target.fill(std::byte{0xee});
  const Ends ends = migrate<S>(guest, plan);
  check_whole(guest, ends);
  return ends;
}

template <class S>
void sweep(const Guest& guest, Plan plan, std::uint64_t operations, Rng& rng) {
  if (full() || every_operation<S>) {
    // Over sockets a receiver reads what is there, in as many pieces as it comes: then some of them will do.
    const std::uint64_t step = every_operation<S> ? 1 : operations / 60 + 1;
    for (plan.at = 0; inject<S>(guest, plan); plan.at += step) {
      REQUIRE(plan.at < 2000);
      if (rng() % 8 == 0) inject_nothing<S>(guest, plan);
    }
    CHECK(plan.at > 0);
  } else if (!quick() || rng() % 4 == 0) {
    plan.at = below(rng, operations);
    inject<S>(guest, plan);
  }
}

template <class S>
void sweep_all() {
  const Watchdog watchdog("fault sweep", full() ? 3000s : 280s);
  const Guest guest;
  Rng rng(seed());
  inject_nothing<S>(guest, {.channels = 3});  // what the system keeps of threads is there now
  const Leftovers before;
  for (const Side side : {Side::sender, Side::receiver})
    for (const unsigned channels : {1u, 3u})
      for (const Digest digest : {Digest::off, Digest::on}) {
        Plan plan{.side = side, .channels = channels, .digest = digest};
        const Ends good = inject_nothing<S>(guest, plan);
        for (const FaultKind kind :
             {FaultKind::fail, FaultKind::cut, FaultKind::end, FaultKind::shorten, FaultKind::delay}) {
          plan.kind = kind;
          sweep<S>(guest, plan, good.transport_operations, rng);
        }
        plan.codec = true;
        plan.kind = FaultKind::fail;
        sweep<S>(guest, plan, good.codec_operations, rng);
      }
  inject_nothing<S>(guest, {.channels = 3});
  // A leak for each fault would be more. AddressSanitizer looks closer.
  CHECK(before.bytes() < 32 * 1024);
}

}  // namespace

TEST_CASE_TEMPLATE("Whatever goes wrong in transport or compressor is reported as it is: none", S,
                   InMemory<NoComp, ZeroPagesNone>, InMemory<NoComp, ZeroPagesLegacy>,
                   InMemory<NoComp, ZeroPagesMultifd>) {
  sweep_all<S>();
}

TEST_CASE_TEMPLATE("Whatever goes wrong in transport or compressor is reported as it is: zlib", S,
                   InMemory<Zlib, ZeroPagesNone>, InMemory<Zlib, ZeroPagesLegacy>, InMemory<Zlib, ZeroPagesMultifd>) {
  sweep_all<S>();
}

TEST_CASE_TEMPLATE("Whatever goes wrong in transport or compressor is reported as it is: zstd", S,
                   InMemory<Zstd, ZeroPagesNone>, InMemory<Zstd, ZeroPagesLegacy>, InMemory<Zstd, ZeroPagesMultifd>) {
  sweep_all<S>();
}

TEST_CASE("Whatever goes wrong in transport or compressor is reported as it is: sockets") {
  sweep_all<Stack<FdTransport, Zlib, ZeroPagesMultifd>>();
}

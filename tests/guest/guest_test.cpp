// SPDX-License-Identifier: MIT
//
// The guests of live_migration, each backend for itself: memory goes from one to the other by plain copies,
// so that what fails here is the guest or its dirty log, not the migration.
#include "live_migration/guest.hpp"

#include <doctest/doctest.h>
#include <fcntl.h>
#include <linux/kvm.h>
#include <signal.h>
#include <sys/ioctl.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <bit>
#include <cerrno>
#include <chrono>
#include <cstring>
#include <functional>
#include <memory>
#include <stdexcept>
#include <string>
#include <thread>
#include <vector>

namespace {

using live::Backend;
using live::Guest;
using live::guest_page_size;
using live::GuestConfig;
using namespace std::chrono_literals;
using Clock = std::chrono::steady_clock;

constexpr std::size_t mailbox_page = 3;
constexpr std::size_t no_page = ~std::size_t{0};

GuestConfig small_config() {
  GuestConfig config;
  config.memory_bytes = std::size_t{64} << 20;
  config.working_set_bytes = std::size_t{4} << 20;
  config.seed = 42;
  return config;
}

/// Why there is no KVM here; empty where there is one, which then has to work.
std::string why_no_kvm() {
  const int fd = open("/dev/kvm", O_RDWR | O_CLOEXEC);
  if (fd < 0) return std::string("/dev/kvm: ") + std::strerror(errno);
  const int version = ioctl(fd, KVM_GET_API_VERSION, 0);
  close(fd);
  return version == KVM_API_VERSION ? "" : "/dev/kvm is not KVM's";
}

/// The backends that this host can run; prints once why KVM is not among them.
const std::vector<Backend>& backends() {
  static const std::vector<Backend> found = [] {
    const std::string why = why_no_kvm();
    if (why.empty()) return std::vector{Backend::kvm, Backend::thread};
    MESSAGE("skipped for backend kvm: ", why);
    return std::vector{Backend::thread};
  }();
  return found;
}

bool eventually(const std::function<bool()>& condition) {
  for (const auto deadline = Clock::now() + 30s; Clock::now() < deadline; std::this_thread::sleep_for(1ms))
    if (condition()) return true;
  return false;
}

bool sweeps_on(Guest& guest, std::uint64_t sweeps) {
  const std::uint64_t goal = guest.report().sweeps + sweeps;
  return eventually([&] { return guest.report().sweeps >= goal || !guest.report().failure.empty(); }) &&
         guest.report().failure.empty();
}

std::vector<std::uint64_t> empty_bitmap(Guest& guest) {
  return std::vector<std::uint64_t>(live::bitmap_words(guest.memory().size()));
}

bool test_bit(const std::vector<std::uint64_t>& bitmap, std::size_t page) {
  return (bitmap[page / 64] >> (page % 64) & 1) != 0;
}

std::size_t count_bits(const std::vector<std::uint64_t>& bitmap) {
  std::size_t count = 0;
  for (std::uint64_t word : bitmap) count += static_cast<std::size_t>(std::popcount(word));
  return count;
}

bool same_page(Guest& a, Guest& b, std::size_t page) {
  const std::size_t at = page * guest_page_size;
  return std::memcmp(a.memory().data() + at, b.memory().data() + at, guest_page_size) == 0;
}

/// Word by word and atomic, because the guest writes meanwhile.
void copy_page(Guest& from, Guest& to, std::size_t page) {
  auto* source = reinterpret_cast<std::uint64_t*>(from.memory().data() + page * guest_page_size);
  auto* target = reinterpret_cast<std::uint64_t*>(to.memory().data() + page * guest_page_size);
  for (std::size_t i = 0; i < guest_page_size / 8; ++i)
    target[i] = std::atomic_ref(source[i]).load(std::memory_order_relaxed);
}

void copy_dirty(Guest& from, Guest& to, const std::vector<std::uint64_t>& bitmap, std::size_t skip = no_page) {
  for (std::size_t page = 0; page < from.memory().size() / guest_page_size; ++page)
    if (test_bit(bitmap, page) && page != skip) copy_page(from, to, page);
}

/// Migrates the memory of a running guest and stops it. `skip` is not copied in the last round.
/// Returns: the pages of the last round.
std::vector<std::uint64_t> migrate_memory(Guest& from, Guest& to, int rounds, std::size_t skip = no_page) {
  from.start_dirty_log();
  for (std::size_t page = 0; page < from.memory().size() / guest_page_size; ++page) copy_page(from, to, page);
  for (int i = 0; i < rounds; ++i) {
    auto bitmap = empty_bitmap(from);
    from.fetch_dirty(bitmap);
    copy_dirty(from, to, bitmap);
  }
  // All of the working set is in the last round then, and stale on the other side without it.
  CHECK(sweeps_on(from, 2));
  from.stop();
  auto last = empty_bitmap(from);
  from.fetch_dirty(last);
  copy_dirty(from, to, last, skip);
  from.stop_dirty_log();
  return last;
}

std::size_t different_pages(Guest& a, Guest& b) {
  std::size_t count = 0;
  for (std::size_t page = 0; page < a.memory().size() / guest_page_size; ++page)
    if (!same_page(a, b, page)) ++count;
  return count;
}

/// Two guests, one that runs and one to fill.
struct Pair {
  explicit Pair(Backend backend, GuestConfig config = small_config())
      : source(live::make_guest(backend, config)), destination(live::make_guest(backend, destination_config(config))) {
    source->boot();
    source->run();
  }
  static GuestConfig destination_config(const GuestConfig& config) {
    GuestConfig plain;
    plain.memory_bytes = config.memory_bytes;
    plain.working_set_bytes = guest_page_size;
    return plain;
  }
  std::unique_ptr<Guest> source, destination;
};

}  // namespace

TEST_CASE("boot fills memory with the shares asked for, the same for the same seed") {
  for (Backend backend : backends()) {
    CAPTURE(live::make_guest(backend, small_config())->backend());
    auto config = small_config();
    config.zero_share = 0.5;
    config.text_share = 0.3;
    const auto a = live::make_guest(backend, config);
    const auto b = live::make_guest(backend, config);
    a->boot();
    b->boot();
    CHECK(different_pages(*a, *b) == 0);

    std::size_t zero = 0, text = 0;
    const std::size_t pages = a->memory().size() / guest_page_size;
    const std::vector<std::byte> zeros(guest_page_size);
    for (std::size_t page = 0; page < pages; ++page) {
      const auto bytes = a->memory().subspan(page * guest_page_size + 8, guest_page_size - 16);
      if (std::memcmp(bytes.data(), zeros.data(), bytes.size()) == 0)
        ++zero;
      else if (std::ranges::all_of(bytes, [](std::byte c) { return c >= std::byte{' '} && c <= std::byte{'z'}; }))
        ++text;
    }
    CHECK(static_cast<double>(zero) / static_cast<double>(pages) == doctest::Approx(0.5).epsilon(0.15));
    CHECK(static_cast<double>(text) / static_cast<double>(pages) == doctest::Approx(0.3).epsilon(0.15));

    config.seed = 43;
    const auto c = live::make_guest(backend, config);
    c->boot();
    CHECK(different_pages(*a, *c) > pages / 4);
  }
}

TEST_CASE("a guest sweeps over its working set and finds no errors") {
  for (Backend backend : backends()) {
    const auto guest = live::make_guest(backend, small_config());
    CAPTURE(guest->backend());
    guest->boot();
    guest->run();
    CHECK(sweeps_on(*guest, 3));
    guest->stop();
    const auto report = guest->report();
    CHECK(report.errors == 0);
    CHECK(report.working_set_pages == 1024);
    CHECK(report.sweeps == report.pages_written / 1024);
    CHECK(report.working_set_first * guest_page_size > guest->memory().size() / 3);
  }
}

TEST_CASE("the dirty log holds exactly the pages that changed") {
  for (Backend backend : backends()) {
    const auto guest = live::make_guest(backend, small_config());
    const auto before = live::make_guest(backend, small_config());
    CAPTURE(guest->backend());
    guest->boot();
    before->boot();
    guest->start_dirty_log();
    auto dirty = empty_bitmap(*guest);
    guest->fetch_dirty(dirty);
    CHECK(count_bits(dirty) == 0);

    guest->run();
    CHECK(eventually([&] { return guest->report().pages_written >= 600; }));
    guest->stop();
    guest->fetch_dirty(dirty);
    std::size_t missed = 0, unchanged = 0;
    for (std::size_t page = 0; page < guest->memory().size() / guest_page_size; ++page) {
      const bool same = same_page(*guest, *before, page);
      if (!same && !test_bit(dirty, page)) ++missed;
      if (same && test_bit(dirty, page)) ++unchanged;
    }
    CHECK(missed == 0);
    CHECK(unchanged <= 1);  // a virtual CPU can be stopped when KVM has logged a write and not yet done it
    CHECK(test_bit(dirty, mailbox_page));
    CHECK(count_bits(dirty) >= 601);

    auto again = empty_bitmap(*guest);
    guest->fetch_dirty(again);
    CHECK(count_bits(again) == 0);
    // The bits of an earlier call stay: the log is ORed in.
    auto kept = dirty;
    guest->fetch_dirty(kept);
    CHECK(kept == dirty);

    guest->run();
    CHECK(sweeps_on(*guest, 2));
    guest->stop();
    guest->fetch_dirty(again);
    CHECK(count_bits(again) == 1025);
  }
}

TEST_CASE("a guest whose dirty pages are copied runs on elsewhere without errors, and can leave again") {
  for (Backend backend : backends()) {
    Pair pair(backend);
    CAPTURE(pair.source->backend());
    migrate_memory(*pair.source, *pair.destination, 20);
    CHECK(different_pages(*pair.source, *pair.destination) == 0);
    const auto left = pair.source->report();
    CHECK(left.errors == 0);

    pair.destination->load_state(pair.source->save_state());
    CHECK(pair.destination->report().pages_written == left.pages_written);
    pair.destination->run();
    CHECK(sweeps_on(*pair.destination, 2));
    CHECK(pair.destination->report().errors == 0);
    CHECK(pair.destination->report().working_set_pages == left.working_set_pages);

    const auto third = live::make_guest(backend, Pair::destination_config(small_config()));
    migrate_memory(*pair.destination, *third, 5);
    CHECK(different_pages(*pair.destination, *third) == 0);
    third->load_state(pair.destination->save_state());
    third->run();
    CHECK(sweeps_on(*third, 2));
    third->stop();
    CHECK(third->report().errors == 0);
    CHECK(third->report().sweeps >= left.sweeps + 6);

    // And the one that stayed behind could go on, had the migration failed.
    pair.source->run();
    CHECK(sweeps_on(*pair.source, 2));
    CHECK(pair.source->report().errors == 0);
  }
}

TEST_CASE("no write is lost between a fetch and the next, however often they come") {
  for (Backend backend : backends()) {
    auto config = small_config();
    config.memory_bytes = std::size_t{2} << 20;
    config.working_set_bytes = 8 * guest_page_size;
    Pair pair(backend, config);
    CAPTURE(pair.source->backend());
    for (int turn = 0; turn < 10; ++turn) {
      pair.source->start_dirty_log();
      for (std::size_t page = 0; page < config.memory_bytes / guest_page_size; ++page)
        copy_page(*pair.source, *pair.destination, page);
      auto bitmap = empty_bitmap(*pair.source);
      for (const auto end = Clock::now() + 50ms; Clock::now() < end;) {
        std::ranges::fill(bitmap, 0);
        pair.source->fetch_dirty(bitmap);
        copy_dirty(*pair.source, *pair.destination, bitmap);
      }
      pair.source->stop();
      std::ranges::fill(bitmap, 0);
      pair.source->fetch_dirty(bitmap);
      copy_dirty(*pair.source, *pair.destination, bitmap);
      CHECK(different_pages(*pair.source, *pair.destination) == 0);
      pair.source->run();
    }
    CHECK(pair.source->report().errors == 0);
  }
}

TEST_CASE("a guest stopped while it waits for its rate goes on behind the wait") {
  for (Backend backend : backends()) {
    auto config = small_config();
    config.memory_bytes = std::size_t{2} << 20;
    config.working_set_bytes = 8 * guest_page_size;
    config.dirty_bytes_per_s = 40;  // a page in 100 s
    Pair pair(backend, config);
    CAPTURE(pair.source->backend());
    for (std::uint64_t pages = 1; pages <= 3; ++pages) {
      CHECK(eventually([&] { return pair.source->report().pages_written == pages; }));
      // Long enough to be waiting. If it is not, this proves less, but does not fail.
      std::this_thread::sleep_for(20ms);
      pair.source->stop();
      for (std::size_t page = 0; page < config.memory_bytes / guest_page_size; ++page)
        copy_page(*pair.source, *pair.destination, page);
      pair.destination->load_state(pair.source->save_state());
      // Were the exit taken along, the other side would wait 100 s before it wrote a page.
      pair.destination->run();
      std::swap(pair.source, pair.destination);
    }
  }
}

TEST_CASE("a lost page shows within two sweeps, with its number") {
  for (Backend backend : backends()) {
    Pair pair(backend);
    CAPTURE(pair.source->backend());
    const std::size_t lost = pair.source->report().working_set_first + 77;
    const auto last = migrate_memory(*pair.source, *pair.destination, 3, lost);
    REQUIRE(test_bit(last, lost));
    CHECK(different_pages(*pair.source, *pair.destination) == 1);
    pair.destination->load_state(pair.source->save_state());
    pair.destination->run();
    CHECK(sweeps_on(*pair.destination, 2));
    CHECK(pair.destination->report().errors == 1);
    CHECK(pair.destination->report().first_error_page == lost);
  }
}

TEST_CASE("a page at the wrong place shows") {
  for (Backend backend : backends()) {
    Pair pair(backend);
    CAPTURE(pair.source->backend());
    migrate_memory(*pair.source, *pair.destination, 1);
    const std::size_t first = pair.source->report().working_set_first;
    const auto memory = pair.destination->memory();
    std::memcpy(memory.data() + (first + 5) * guest_page_size, memory.data() + (first + 6) * guest_page_size,
                guest_page_size);
    pair.destination->load_state(pair.source->save_state());
    pair.destination->run();
    CHECK(sweeps_on(*pair.destination, 2));
    CHECK(pair.destination->report().errors == 1);
    CHECK(pair.destination->report().first_error_page == first + 5);
  }
}

TEST_CASE("a stale mailbox and registers of another moment show") {
  for (Backend backend : backends()) {
    Pair pair(backend);
    CAPTURE(pair.source->backend());
    migrate_memory(*pair.source, *pair.destination, 1, mailbox_page);
    pair.destination->load_state(pair.source->save_state());
    pair.destination->run();
    CHECK(sweeps_on(*pair.destination, 2));
    pair.destination->stop();
    CHECK(pair.destination->report().errors >= 1);  // the count is stale, and the sweep number may be
    CHECK(pair.destination->report().errors <= 2);
    CHECK(pair.destination->report().first_error_page == mailbox_page);

    const auto old_state = pair.source->save_state();
    pair.source->run();
    CHECK(sweeps_on(*pair.source, 2));
    pair.source->stop();
    pair.source->load_state(old_state);
    pair.source->run();
    CHECK(eventually([&] { return pair.source->report().errors > 0; }));
  }
}

TEST_CASE("stop returns at once, whatever the guest does") {
  for (Backend backend : backends()) {
    for (std::uint64_t rate : {std::uint64_t{0}, std::uint64_t{40}, std::uint64_t{100} << 20}) {
      auto config = small_config();
      config.dirty_bytes_per_s = rate;
      const auto guest = live::make_guest(backend, config);
      CAPTURE(guest->backend());
      CAPTURE(rate);
      guest->boot();
      guest->stop();  // not running: nothing to do
      guest->start_dirty_log();
      guest->run();
      CHECK(eventually([&] { return guest->report().pages_written > 0; }));
      const auto begin = Clock::now();
      guest->stop();
      guest->stop();
      CHECK(Clock::now() - begin < 20s);  // "does not hang": its rate would let it wait for 100 s
      const auto written = guest->report().pages_written;
      guest->run();
      CHECK((rate == 40 || eventually([&] { return guest->report().pages_written > written; })));
      // The destructor stops a running guest, in time as well.
    }
  }
}

TEST_CASE("a guest stopped, saved, loaded and started many times makes no error") {
  for (Backend backend : backends()) {
    auto config = small_config();
    config.dirty_bytes_per_s = std::uint64_t{400} << 20;
    const auto guest = live::make_guest(backend, config);
    CAPTURE(guest->backend());
    guest->boot();
    guest->start_dirty_log();
    for (int i = 0; i < 200; ++i) {
      guest->run();
      std::this_thread::sleep_for(std::chrono::microseconds(i * 37 % 1500));
      guest->stop();
      guest->load_state(guest->save_state());
    }
    guest->run();
    CHECK(sweeps_on(*guest, 1));
    CHECK(guest->report().errors == 0);
  }
}

TEST_CASE("the guest keeps to its rate") {
  for (Backend backend : backends()) {
    auto config = small_config();
    config.dirty_bytes_per_s = std::uint64_t{8} << 20;
    const auto guest = live::make_guest(backend, config);
    CAPTURE(guest->backend());
    guest->boot();
    const auto begin = Clock::now();
    guest->run();
    CHECK(eventually([&] { return guest->report().pages_written > 0 && Clock::now() - begin > 500ms; }));
    guest->stop();
    const std::chrono::duration<double> seconds = Clock::now() - begin;
    const double rate = static_cast<double>(guest->report().pages_written * guest_page_size) / seconds.count();
    CHECK(rate < 1.1 * static_cast<double>(config.dirty_bytes_per_s));
  }
}

TEST_CASE("bytes that are no state of this guest are refused, and the guest is as before") {
  for (Backend backend : backends()) {
    Pair pair(backend);
    CAPTURE(pair.source->backend());
    CHECK_THROWS_AS(pair.source->save_state(), std::runtime_error);
    migrate_memory(*pair.source, *pair.destination, 1);
    const auto state = pair.source->save_state();
    auto& destination = *pair.destination;
    for (std::size_t size = 0; size < state.size(); ++size)
      CHECK_THROWS_AS(destination.load_state(std::span(state).first(size)), std::runtime_error);
    for (std::size_t i = 0; i < state.size(); ++i) {
      auto damaged = state;
      damaged[i] ^= std::byte{0x10};
      CHECK_THROWS_AS(destination.load_state(damaged), std::runtime_error);
    }
    auto longer = state;
    longer.push_back(std::byte{0});
    CHECK_THROWS_AS(destination.load_state(longer), std::runtime_error);

    const auto empty = live::make_guest(backend, Pair::destination_config(small_config()));
    CHECK_THROWS_WITH_AS(empty->load_state(state), doctest::Contains("migrate memory before"), std::runtime_error);
    auto config = small_config();
    config.memory_bytes *= 2;
    CHECK_THROWS_WITH_AS(live::make_guest(backend, config)->load_state(state), doctest::Contains("bytes of memory"),
                         std::runtime_error);
    config = small_config();
    config.working_set_bytes /= 2;
    const auto other = live::make_guest(backend, config);
    other->boot();
    CHECK_THROWS_WITH_AS(other->load_state(state), doctest::Contains("different guests"), std::runtime_error);

    destination.load_state(state);
    destination.run();
    CHECK(sweeps_on(destination, 2));
    CHECK(destination.report().errors == 0);
    CHECK_THROWS_AS(destination.load_state(state), std::runtime_error);
    CHECK(sweeps_on(destination, 1));
    CHECK(destination.report().errors == 0);
  }
}

TEST_CASE("a state of one backend is refused by the other, by name") {
  if (backends().size() < 2) return;
  const auto kvm = live::make_guest(Backend::kvm, small_config());
  const auto thread = live::make_guest(Backend::thread, small_config());
  kvm->boot();
  thread->boot();
  CHECK_THROWS_WITH_AS(kvm->load_state(thread->save_state()), doctest::Contains("saved by backend thread"),
                       std::runtime_error);
  CHECK_THROWS_WITH_AS(thread->load_state(kvm->save_state()), doctest::Contains("saved by backend kvm"),
                       std::runtime_error);
}

TEST_CASE("a running guest leaves the signals of the process alone") {
  for (Backend backend : backends()) {
    const auto guest = live::make_guest(backend, small_config());
    CAPTURE(guest->backend());
    sigset_t mask_before, mask_after;
    pthread_sigmask(SIG_SETMASK, nullptr, &mask_before);
    guest->boot();
    guest->run();
    CHECK(sweeps_on(*guest, 1));
    guest->stop();
    pthread_sigmask(SIG_SETMASK, nullptr, &mask_after);
    for (int signal = 1; signal <= SIGRTMAX; ++signal) {
      CHECK(sigismember(&mask_before, signal) == sigismember(&mask_after, signal));
      struct sigaction action{};
      if (signal >= SIGRTMIN && sigaction(signal, nullptr, &action) == 0) CHECK((action.sa_handler == SIG_DFL));
    }
  }
}

TEST_CASE("impossible configurations are refused with what to change") {
  const auto refused = [](auto change, const char* why) {
    auto config = small_config();
    change(config);
    CHECK_THROWS_WITH_AS(live::make_guest(Backend::automatic, config), doctest::Contains(why), std::runtime_error);
  };
  refused([](auto& c) { c.memory_bytes = 0; }, "multiple of 4096");
  refused([](auto& c) { c.memory_bytes += 1; }, "multiple of 4096");
  refused([](auto& c) { c.working_set_bytes = 0; }, "working set");
  refused([](auto& c) { c.working_set_bytes = c.memory_bytes; }, "working set");
  refused([](auto& c) { c.zero_share = -0.1; }, "shares");
  refused([](auto& c) { c.zero_share = 0.7; }, "shares");
  CHECK(live::parse_backend("auto") == Backend::automatic);
  CHECK(live::parse_backend("kvm") == Backend::kvm);
  CHECK(live::parse_backend("thread") == Backend::thread);
  CHECK(!live::parse_backend("qemu"));
}

TEST_CASE("the automatic backend says what it took") {
  std::string note;
  const auto guest = live::make_guest(Backend::automatic, small_config(), &note);
  CHECK(note.starts_with(guest->backend()));
}

// SPDX-License-Identifier: MIT
#include "multifd_pager/guest.hpp"

#include <fcntl.h>
#include <fmt/format.h>
#include <linux/magic.h>
#include <poll.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/vfs.h>
#include <multifd/postcopy/lazy_memory.hpp>

#include <algorithm>
#include <array>
#include <cerrno>
#include <nlohmann/json.hpp>
#include <optional>
#include <thread>
#include <utility>
#include <vector>

#include "common/limits.hpp"
#include "common/program.hpp"
#include "common/report.hpp"
#include "common/tell.hpp"

namespace pager {
namespace {

using namespace multifd;
using postcopy::LazyMemory;
using postcopy::LazyMemoryEvent;
using postcopy::LazyMemoryStatus;
using postcopy::LazyRegion;
using postcopy::Userfaultfd;
using program::Descriptor;
using program::Failure;

/// Shared memory of the guest's, mapped here, too.
class SharedMemory {
 public:
  /// Throws Failure: not sealed memory of memfd_create(), or smaller than it should be. What could shrink, or run out of
  /// room, would end this process, and with it all other guests' memory.
  SharedMemory(int fd, std::uint64_t offset, std::uint64_t bytes) : bytes_(bytes) {
    struct stat status{};
    struct statfs system{};
    const int seals = ::fcntl(fd, F_GET_SEALS);
    if (::fstat(fd, &status) != 0 || ::fstatfs(fd, &system) != 0 || system.f_type != TMPFS_MAGIC || seals < 0 ||
        (seals & F_SEAL_SHRINK) == 0)
      throw Failure("handshake: shared memory that is no memfd sealed with F_SEAL_SHRINK");
    const auto size = static_cast<std::uint64_t>(status.st_size);
    if (offset > size || bytes > size - offset || offset % 4096 != 0)
      throw Failure(fmt::format("handshake: {} bytes at {} of shared memory that has {}", bytes, offset, size));
    void* const at = ::mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_SHARED, fd, static_cast<off_t>(offset));
    if (at == MAP_FAILED) throw Failure("shared memory: " + program::error_text(errno));
    memory_ = static_cast<std::byte*>(at);
  }
  SharedMemory(SharedMemory&& other) noexcept
      : memory_(std::exchange(other.memory_, nullptr)), bytes_(std::exchange(other.bytes_, 0)) {}
  SharedMemory& operator=(SharedMemory&&) = delete;
  ~SharedMemory() {
    if (memory_ != nullptr) ::munmap(memory_, bytes_);
  }
  std::byte* data() const noexcept { return memory_; }

 private:
  std::byte* memory_ = nullptr;
  std::uint64_t bytes_ = 0;
};

/// A guest from its handshake to its end.
class Guest {
 public:
  Guest(Descriptor socket, GuestReport& report, Shared& shared)
      : socket_(std::move(socket)), report_(report), shared_(shared), protocol_(make_protocol(shared.protocol)) {}
  /// What the threads of lazy_ use goes last.
  ~Guest() { lazy_.reset(); }
  Guest(const Guest&) = delete;
  Guest& operator=(const Guest&) = delete;

  void run() {
    const program::Stopwatch watch;
    try {
      open();
      protocol_->accepted(socket_.get(), report_.guest);
      report_.accepted = true;
      if (!shared_.quiet)
        program::say("guest {} (pid {}): {} in {} regions\n", report_.guest, report_.pid,
                     program::format_bytes(static_cast<double>(report_.bytes)), regions_.size());
      clear_dropped();
      wait();
    } catch (const std::exception& error) {
      fail(program::text_of(error));
    }
    report_.seconds = watch.seconds();
    if (lazy_) {
      report_.stats = lazy_->stats();
      report_.latency = lazy_->latency();
      if (const auto recorded = lazy_->recorded(); recorded) shared_.recorder.add(*recorded);
    }
    tell_end();
    // Before lazy_, and with it perhaps the last userfaultfd, goes.
    if (report_.accepted && !report_.complete && !report_.gone) wait_for_end();
  }

 private:
  void open() {
    peer_ = peer_process(socket_.get());
    report_.pid = peer_.pid;
    Incoming in(socket_.get(), protocol_->descriptors(), shared_.handshake_timeout, shared_.interrupt);
    Handshake said = protocol_->receive(in);
    auto userfaultfd = program::need(Userfaultfd::adopt(said.descriptors.front().release()), "handshake");
    for (const Region& region : said.regions) add_region(region, said);
    if (!said.dropped.empty()) {
      for (const Dropped& each : said.dropped) shared_.memory.drop(each, shared_.source.page_bytes(), missing_);
      dropped_ = Descriptor(::fcntl(userfaultfd.native_handle(), F_DUPFD_CLOEXEC, 0));
      if (dropped_.get() < 0) throw Failure("userfaultfd: " + program::error_text(errno));
    }
    store_ = shared_.source.for_guest();
    done_.emplace(program::need(Interrupt::create()));
    // A pager that was killed may have read faults that it did not serve: who is woken asks again.
    program::need(postcopy::check_regions(regions_, *store_), "handshake");
    for (const LazyRegion& region : regions_)
      program::need(userfaultfd.wake(region.address, region.bytes), "handshake");
    lazy_ = program::need(LazyMemory::open(std::move(userfaultfd), regions_, *store_,
                                           {.fault_threads = shared_.fault_threads,
                                            .workers = shared_.workers,
                                            .prefetch = shared_.recorder.prefetch(),
                                            .record = shared_.recorder.records(),
                                            .missing = missing_,
                                            .registration = postcopy::RegionRegistration::by_the_vmm,
                                            .pidfd = peer_.pidfd.get(),
                                            .thread_hook = {},
                                            .on_event = [this](const LazyMemoryEvent& event) { on_event(event); }}),
                          "handshake");
    program::need(lazy_->start());
  }

  void add_region(const Region& region, const Handshake& said) {
    report_.bytes += region.bytes;
    std::byte* mapping = nullptr;
    if (region.memory != 0) {
      shared_memory_.emplace_back(said.descriptors[region.memory].get(), region.memory_offset, region.bytes);
      mapping = shared_memory_.back().data();
    }
    for (LazyRegion& each : shared_.memory.regions_of(region)) {
      if (mapping != nullptr) {
        each.mode = postcopy::FaultMode::minor;
        each.mapping = mapping + (each.address - region.address);
      }
      regions_.push_back(each);
    }
  }

  /// Zeros for what the guest has given back before this pager knew it. No fault there is fetched for: they are not
  /// missing, so whoever waits there waits for this.
  void clear_dropped() {
    if (dropped_.get() < 0) return;
    const auto userfaultfd = program::need(Userfaultfd::adopt(dropped_.release()));
    const std::uint64_t page = shared_.source.page_bytes();
    for (const LazyRegion& region : regions_) {
      const auto& words = missing_[index(region.block)];
      if (words.empty()) continue;
      for (std::uint64_t at = 0; at < region.bytes; at += region.unit_bytes) {
        bool missing = false;
        for (std::uint64_t in = at; in < at + region.unit_bytes; in += page) {
          const std::uint64_t number = (region.offset + in) / page;
          missing = missing || (words[number / 64] >> number % 64 & 1) != 0;
        }
        if (!missing) clear_unit(userfaultfd, region.address + at, region.unit_bytes);
      }
    }
  }

  void clear_unit(const Userfaultfd& userfaultfd, std::uint64_t address, std::uint64_t bytes) {
    const auto deadline = std::chrono::steady_clock::now() + shared_.handshake_timeout;
    for (;;) {
      const auto done = userfaultfd.zeropage(address, bytes, bytes);
      // Not registered any more: all is there, or was never anything but empty.
      if (!done && done.error().code == std::error_code(ENOENT, std::system_category())) return;
      if (program::need(done) == bytes) return;
      // The guest gives memory back just now: that event has to be read first, by one of the LazyMemory's threads.
      if (shared_.interrupt.triggered() || std::chrono::steady_clock::now() > deadline)
        throw Failure("the guest's memory did not stand still (dropped)");
      std::this_thread::sleep_for(std::chrono::milliseconds(1));
    }
  }

  void on_event(const LazyMemoryEvent& event) noexcept {
    if (event.status == LazyMemoryStatus::active || event.status == LazyMemoryStatus::paused) return;
    done_->trigger();
  }

  /// Until the LazyMemory has come to an end, or a signal comes. Answers what the VMM says meanwhile.
  void wait() {
    bool listens = protocol_->says_more();
    for (;;) {
      std::array<pollfd, 3> events{{{shared_.interrupt.native_handle(), POLLIN, 0},
                                    {done_->native_handle(), POLLIN, 0},
                                    {listens ? socket_.get() : -1, POLLIN, 0}}};
      if (::poll(events.data(), events.size(), -1) < 0) continue;
      if (events[1].revents != 0) break;
      if (events[0].revents != 0) throw Failure("cancelled by a signal");
      if (events[2].revents == 0) continue;
      try {
        Incoming in(socket_.get(), 0, shared_.handshake_timeout, shared_.interrupt);
        protocol_->next(in, socket_.get());
      } catch (const Failure&) {
        listens = false;  // the guest is served all the same
      }
    }
    const auto ended = lazy_->wait(std::chrono::milliseconds(1000));
    if (!ended && ended.error().code == Errc::guest_gone) {
      report_.gone = true;
      return;
    }
    program::need(ended);
    report_.complete = true;
    protocol_->completed(socket_.get());
  }

  void fail(const std::string& why) {
    report_.error = why;
    if (!report_.accepted) lazy_.reset();
    protocol_->refused(socket_.get(), why);
  }

  void tell_end() const {
    if (!report_.error.empty()) {
      program::tell("multifd_pager: guest {} (pid {}): {}{}\n", report_.guest, report_.pid, report_.error,
                    report_.accepted ? ": threads of it may wait for memory for ever, so end it" : "");
      return;
    }
    if (shared_.quiet) return;
    const auto ms = [](std::uint64_t ns) { return static_cast<double>(ns) / 1e6; };
    program::say(
        "guest {} (pid {}): {} after {:.2f} s: {} pages placed, {} faults, {} fetched: p50 {:.3f} ms, p99 {:.3f} ms\n",
        report_.guest, report_.pid, report_.complete ? "complete" : "has ended", report_.seconds,
        report_.stats.urgent_pages + report_.stats.background_pages, report_.stats.faults, report_.stats.faults_fetched,
        ms(report_.latency.p50_ns()), ms(report_.latency.p99_ns()));
  }

  /// Until its process has ended, or a signal comes.
  void wait_for_end() const noexcept {
    std::array<pollfd, 2> events{{{shared_.interrupt.native_handle(), POLLIN, 0}, {peer_.pidfd.get(), POLLIN, 0}}};
    while (::poll(events.data(), events.size(), -1) < 0 && errno == EINTR) {
    }
  }

  Descriptor socket_;
  GuestReport& report_;
  Shared& shared_;
  std::unique_ptr<Protocol> protocol_;
  PeerProcess peer_;
  std::vector<SharedMemory> shared_memory_;
  std::vector<LazyRegion> regions_;
  std::vector<std::vector<std::uint64_t>> missing_;
  Descriptor dropped_;
  std::optional<Interrupt> done_;
  std::unique_ptr<postcopy::PageStore> store_;
  std::unique_ptr<LazyMemory> lazy_;
};

}  // namespace

nlohmann::json json_of(const GuestReport& report) {
  const auto& stats = report.stats;
  return {{"guest", report.guest},
          {"pid", report.pid},
          {"accepted", report.accepted},
          {"complete", report.complete},
          {"gone", report.gone},
          {"error", program::text_or_null(report.error)},
          {"bytes", report.bytes},
          {"seconds", report.seconds},
          {"faults", stats.faults},
          {"faults_fetched", stats.faults_fetched},
          {"faults_zero", stats.faults_zero},
          {"urgent_pages", stats.urgent_pages},
          {"background_pages", stats.background_pages},
          {"zero_pages", stats.zero_pages},
          {"removed_pages", stats.removed_pages},
          {"latency_ns",
           {{"p50", report.latency.p50_ns()},
            {"p99", report.latency.p99_ns()},
            {"p999", report.latency.p999_ns()},
            {"most", report.latency.most_ns}}}};
}

GuestReport serve_guest(Descriptor socket, unsigned number, Shared& shared) noexcept {
  GuestReport report;
  report.guest = number;
  try {
    Guest(std::move(socket), report, shared).run();
  } catch (const std::exception& error) {  // no memory, even to say what is wrong
    program::tell("multifd_pager: guest {}: {}\n", number, error.what());
  }
  return report;
}

}  // namespace pager

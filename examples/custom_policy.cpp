// SPDX-License-Identifier: MIT
//
// custom_policy: a transport, a compressor and a zero-page policy of the user's own, composed into one stack. Each is
// a plain struct: no base class, no registration, no macro.
#include <fmt/format.h>

#include <sys/socket.h>
#include <CLI/CLI.hpp>
#include <multifd/multifd.hpp>
#include <multifd/testing/compressor_contract.hpp>
#include <multifd/testing/transport_contract.hpp>
#include <multifd/testing/zero_policy_contract.hpp>

#include <atomic>
#include <cstring>
#include <memory>
#include <nlohmann/json.hpp>
#include <random>

#include "common/program.hpp"
#include "common/report.hpp"
#include "common/tell.hpp"

namespace {

using namespace multifd;

// A policy that wraps a policy: counts what goes through any transport. Prefer this to a new option.
template <Transport Next>
struct Counting {
  Next next;
  std::shared_ptr<std::atomic<std::uint64_t>> bytes;

  Result<std::size_t> write_some(ConstBuffers buffers) noexcept {
    auto written = next.write_some(buffers);
    if (written) bytes->fetch_add(*written, std::memory_order_relaxed);
    return written;
  }
  Result<std::size_t> read_some(MutableBuffers buffers) noexcept { return next.read_some(buffers); }
  Result<void> finish() noexcept { return next.finish(); }
  void shutdown() noexcept { next.shutdown(); }
};
static_assert(check_transport<Counting<FdTransport>>());

// A compressor: runs of equal 64-bit words become (count, word). Good for page tables and cleared buffers.
struct WordRuns {
  static constexpr std::string_view name = "word-runs";
  // No method of QEMU's: only two ends that both have this policy understand each other. The receiver compares the
  // whole field, so a value that QEMU does not use keeps strangers out.
  static constexpr std::uint32_t method = wire::flag_compression_mask;
  static constexpr PayloadForm payload_form = PayloadForm::encoded;

  // The worst case is two words for one, which just fits the payload's bound of twice a packet.
  class Encoder {
   public:
    static Result<Encoder> open(const WordRuns&, const CodecLimits& limits) noexcept {
      Encoder encoder;
      encoder.size_ = limits.payload_bytes;
      encoder.out_.reset(new (std::nothrow) std::byte[limits.payload_bytes]);
      if (!encoder.out_) return fail_errno(Stage::setup, "allocate", ENOMEM);
      return encoder;
    }

    Result<ConstBuffers> encode(ConstBuffers pages) noexcept {
      std::size_t used = 0;
      std::uint64_t run[2] = {0, 0};  // count, word
      const auto put = [&] {
        if (run[0] == 0) return true;
        if (size_ - used < sizeof run) return false;
        std::memcpy(out_.get() + used, run, sizeof run);
        used += sizeof run;
        return true;
      };
      for (const iovec& buffer : pages) {
        const auto* at = static_cast<const std::byte*>(buffer.iov_base);
        for (std::size_t i = 0; i < buffer.iov_len; i += 8) {
          std::uint64_t word;  // one read: the guest may be writing this page
          std::memcpy(&word, at + i, 8);
          if (run[0] > 0 && word == run[1]) {
            ++run[0];
            continue;
          }
          if (!put()) return fail(Errc::payload_too_large, Stage::encode, "word runs", used);
          run[0] = 1;
          run[1] = word;
        }
      }
      if (!put()) return fail(Errc::payload_too_large, Stage::encode, "word runs", used);
      view_ = {out_.get(), used};
      return ConstBuffers(&view_, 1);
    }

   private:
    std::unique_ptr<std::byte[]> out_;
    std::size_t size_ = 0;
    iovec view_{};
  };

  class Decoder {
   public:
    static Result<Decoder> open(const WordRuns&, const CodecLimits&) noexcept { return Decoder{}; }

    // The payload comes from a peer that is not trusted: every count is compared with the room that is left.
    Result<void> decode(std::span<const std::byte> payload, MutableBuffers pages) noexcept {
      std::uint64_t run[2] = {0, 0};
      for (const iovec& buffer : pages) {
        auto* at = static_cast<std::byte*>(buffer.iov_base);
        for (std::size_t i = 0; i < buffer.iov_len; i += 8) {
          if (run[0] == 0) {
            if (payload.size() < sizeof run) return fail(Errc::bad_payload_size, Stage::decode, "word runs");
            std::memcpy(run, payload.data(), sizeof run);
            payload = payload.subspan(sizeof run);
            if (run[0] == 0) return fail(Errc::corrupt_payload, Stage::decode, "word runs: an empty run");
          }
          std::memcpy(at + i, &run[1], 8);
          --run[0];
        }
      }
      if (!payload.empty() || run[0] != 0) return fail(Errc::bad_payload_size, Stage::decode, "word runs", run[0]);
      return {};
    }
  };
};
static_assert(check_compressor<WordRuns>());

// [readme]
// Pages that the balloon driver holds are zero by contract: do not even read them.
struct BalloonAware {
  static constexpr std::string_view name = "balloon";
  static constexpr ZeroStage stage = ZeroStage::channel;
  const std::vector<bool>* ballooned = nullptr;

  bool is_zero(PageRef page) const noexcept {
    if (ballooned != nullptr && (*ballooned)[page.offset / page.bytes.size()]) return true;
    return buffer_is_zero(page.bytes.data(), page.bytes.size());
  }
};
static_assert(check_zero_page_policy<BalloonAware>());
// [readme end]

using Link = Counting<FdTransport>;

std::pair<Link, Link> link_pair(const std::shared_ptr<std::atomic<std::uint64_t>>& bytes) {
  int fds[2];
  if (::socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, fds) != 0)
    throw program::Failure(fail_errno(Stage::connect, "socketpair").error());
  return {Link{program::need(FdTransport::adopt(fds[0])), bytes},
          Link{program::need(FdTransport::adopt(fds[1])), bytes}};
}

// What a policy's author runs in a unit test: the library's own contract checks.
void check_contracts() {
  const auto counter = std::make_shared<std::atomic<std::uint64_t>>();
  const auto check = [](std::string_view policy, const ContractReport& report) {
    if (!report.ok()) throw program::Failure(fmt::format("{}: {}", policy, report.text()));
    program::tell("contract holds: {}\n", policy);
  };
  check("Counting<FdTransport>", check_transport_contract<Link>([&] { return link_pair(counter); }));
  check("WordRuns", check_compressor_contract(WordRuns{}));
  check("BalloonAware", check_zero_policy_contract(BalloonAware{}));
}

int migrate(unsigned channels, std::uint64_t memory_bytes, const std::string& json_path) {
  program::JsonFile json_file(json_path);
  check_contracts();
  constexpr std::size_t page = 4096;
  const std::size_t pages = memory_bytes / page;
  // A guest: a quarter in the balloon (with stale bytes that must not be sent), a quarter zero, a quarter page tables,
  // a quarter noise.
  std::vector<std::byte> guest(pages * page);
  std::vector<std::byte> arrived(pages * page, std::byte{0xee});
  std::vector<bool> ballooned(pages, false);
  std::mt19937_64 random(1);
  for (std::size_t i = 0; i < pages; ++i) {
    ballooned[i] = i % 4 == 0;
    auto* const words = reinterpret_cast<std::uint64_t*>(guest.data() + i * page);
    for (std::size_t w = 0; w < page / 8; ++w)
      words[w] = i % 4 == 0 ? ~0ull : i % 4 == 1 ? 0 : i % 4 == 2 ? w / 64 : random();
  }

  const auto on_the_wire = std::make_shared<std::atomic<std::uint64_t>>();
  std::vector<Link> left;
  std::vector<Link> right;
  for (unsigned i = 0; i < channels; ++i) {
    auto [a, b] = link_pair(on_the_wire);
    left.push_back(std::move(a));
    right.push_back(std::move(b));
  }
  RamMap source;
  RamMap destination;
  const BlockId block = program::need(source.add("pc.ram", guest));
  program::need(destination.add("pc.ram", arrived));

  const program::Stopwatch watch;
  auto tx = program::need(
      Sender<Link, WordRuns, BalloonAware>::open(source, std::move(left), {.zero_pages = {.ballooned = &ballooned}}));
  auto rx = program::need(Receiver<Link, WordRuns>::open(destination, std::move(right)));
  program::need(tx.queue_range(block, 0, guest.size()));
  program::need(tx.close_channels());
  program::need(rx.finish());
  const double seconds = watch.seconds();

  for (std::size_t i = 0; i < pages; ++i) {
    const bool right_bytes = ballooned[i] ? buffer_is_zero(arrived.data() + i * page, page)
                                          : std::memcmp(&guest[i * page], &arrived[i * page], page) == 0;
    if (!right_bytes) throw program::Failure(fmt::format("page {} differs", i));
  }
  const SenderStats stats = tx.stats();
  if (*on_the_wire != total(stats.channels).wire_bytes)
    throw program::Failure("the transport counted other bytes than the sender");
  if (json_path != "-")
    program::say(
        "moved {} through Sender<Counting<FdTransport>, WordRuns, BalloonAware>: {} on the wire, {} of {} pages "
        "without bytes; verified\n",
        program::format_bytes(static_cast<double>(guest.size())),
        program::format_bytes(static_cast<double>(*on_the_wire)), total(stats.channels).zero_pages, pages);
  json_file.write(program::report(seconds, guest.size(), 0, stats.channels));
  return program::exit_done;
}

}  // namespace

int main(int argc, char** argv) {
  unsigned channels = 2;
  std::uint64_t memory = std::uint64_t{64} << 20;
  std::string json_path;
  CLI::App app("Moves memory through a stack of user-written policies.", "custom_policy");
  app.add_option("--channels", channels, "Connections")
      ->check(CLI::Range(1u, multifd::max_channels))
      ->capture_default_str();
  program::add_size(app, "--memory", memory, "How much, a multiple of 4096");
  app.add_option("--json", json_path, "Write one JSON object to a file, or to stdout for -");
  return program::run(app, argc, argv, [&] {
    if (memory == 0 || memory % 4096 != 0) throw program::Usage("--memory: a multiple of 4096");
    return migrate(channels, memory, json_path);
  });
}

// SPDX-License-Identifier: MIT
#include "multifd/packets/inlet.hpp"

#include <doctest/doctest.h>

#include <atomic>
#include <memory>
#include <thread>
#include <utility>
#include <vector>

#include "multifd/compress/nocomp.hpp"
#include "multifd/ends/into_memory.hpp"
#include "support/links.hpp"
#include "support/memory.hpp"

using namespace multifd;
using namespace test;

namespace {

/// What a transport that has one writer at a time sees of its calls.
struct Writers {
  void enter() {
    if (now.fetch_add(1) > 0) ++together;
    ++calls;
  }
  void leave() { --now; }
  std::atomic<int> now = 0, calls = 0, together = 0;
  std::shared_ptr<Gate> gate = std::make_shared<Gate>(false);  ///< holds each write
};

/// Counts writers that are in it at once, as TLS, whose records they would tear, cannot.
class OneWriter {
 public:
  OneWriter(MemoryTransport next, std::shared_ptr<Writers> writers)
      : next_(std::move(next)), writers_(std::move(writers)) {}

  Result<std::size_t> write_some(ConstBuffers buffers) noexcept { return write_now(buffers); }
  Result<std::size_t> read_some(MutableBuffers buffers) noexcept { return next_.read_some(buffers); }
  bool is_two_way() const noexcept { return true; }
  Result<std::size_t> write_now(ConstBuffers buffers) noexcept {
    writers_->enter();
    (void)writers_->gate->pass();
    auto written = next_.write_now(buffers);
    writers_->leave();
    return written;
  }
  Result<std::size_t> read_now(MutableBuffers buffers) noexcept { return next_.read_now(buffers); }
  Result<void> finish() noexcept {
    writers_->enter();
    auto finished = next_.finish();
    writers_->leave();
    return finished;
  }
  void shutdown() noexcept { next_.shutdown(); }

 private:
  MemoryTransport next_;
  std::shared_ptr<Writers> writers_;
};
static_assert(check_transport<OneWriter>() && HasAnswers<OneWriter>);

}  // namespace

TEST_CASE("The confirmation and the reason of a cancel() never share the stream: the first has it, the other returns") {
  const wire::AnswerBytes reason = wire::encode_answer(Error{.code = Errc::cancelled});
  const wire::AnswerBytes good = wire::encode_answer();
  for (const bool confirm_first : {false, true}) {
    CAPTURE(confirm_first);
    const Watchdog watchdog("two answers");
    GuestRam ram(4);
    packets::InletShared shared(ram.map, 1, NoComp::method, FirstPacket::any, {}, {}, [] {}, {});
    auto sink = IntoMemory::Sink::create(shared.map, {}, {}).value();
    auto links = memory_links(1);
    const auto writers = std::make_shared<Writers>();
    auto inlet = packets::Inlet<OneWriter, NoComp, IntoMemory>::create(
                     shared, 0, OneWriter(std::move(links.receiver[0]), writers), {}, *sink)
                     .value();
    bool confirmed = false;
    const auto confirm = [&] { confirmed = inlet->confirm(); };
    const auto give_reason = [&] { inlet->give_reason(reason); };
    std::thread first([&] { confirm_first ? confirm() : give_reason(); });
    REQUIRE(writers->gate->wait_for_visitor());
    // The first is held in its write; the other one neither writes nor waits.
    confirm_first ? give_reason() : confirm();
    CHECK(writers->calls == 1);
    writers->gate->open();
    first.join();
    CHECK(writers->together == 0);
    CHECK(confirmed == confirm_first);
    CHECK(writers->calls == (confirm_first ? 2 : 1));
    inlet->give_reason(reason);
    CHECK_FALSE(inlet->confirm());
    wire::AnswerBytes got{};
    const iovec buffer = mutable_buffer(std::span<std::byte>(got));
    const auto arrived = links.sender[0].read_now(MutableBuffers(&buffer, 1));
    CHECK(arrived == got.size());
    CHECK(got == (confirm_first ? good : reason));
  }
}

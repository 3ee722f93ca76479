// SPDX-License-Identifier: MIT
//
// One connection of a page server, from the hello to its end (format/page_requests.md section 21).
#pragma once

#include <algorithm>
#include <array>
#include <chrono>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <mutex>
#include <new>
#include <optional>
#include <span>
#include <string>
#include <utility>

#include "multifd/buffers.hpp"
#include "multifd/compress/policy.hpp"
#include "multifd/engine/counters.hpp"
#include "multifd/engine/outlet.hpp"
#include "multifd/format/page_requests.hpp"
#include "multifd/memory/page_runs.hpp"
#include "multifd/packets/outlet.hpp"
#include "multifd/postcopy/detail/link_watch.hpp"
#include "multifd/postcopy/detail/page_server_shared.hpp"
#include "multifd/postcopy/page_store.hpp"
#include "multifd/transport/algorithms.hpp"
#include "multifd/transport/policy.hpp"

namespace multifd::postcopy::detail {

/// Threads: run() one; cut_for() any.
template <Transport T, Compressor C>
class ServedLink final : public WatchedLink {
 public:
  using Shared = PageServerShared<C>;

  ServedLink(Shared& shared, unsigned number, T link) noexcept
      : shared_(shared), number_(number), link_(std::move(link)) {}

  /// Closes the connection. Behind run(), and no cut_for() may come any more.
  void close() noexcept { link_.reset(); }

  /// Serves until the client ends the connection. Errors: PageServer::serve().
  [[nodiscard]] Result<void> run() noexcept {
    Result<void> ended = hello();
    if (ended) {
      shared_.serving.fetch_add(1, std::memory_order_relaxed);
      ended = answer_requests();
      shared_.serving.fetch_sub(1, std::memory_order_relaxed);
    }
    if (ended) {
      (void)link_->finish();  // the client may have closed its end already
      return {};
    }
    Error error = explain(ended.error());
    if (error.channel == no_channel) error.channel = number_;
    return std::unexpected(error);
  }

 private:
  static constexpr std::chrono::milliseconds longest_gate_wait{20};

  /// The way to the link for the outlet: in pieces, between which what is urgent goes first.
  class Way {
   public:
    explicit Way(ServedLink& of) noexcept : of_(&of) {}

    [[nodiscard]] Result<std::size_t> write_some(ConstBuffers buffers) noexcept {
      std::array<iovec, 64> piece;
      if (of_->kind_ == FetchKind::background) {
        of_->shared_.gate.yield_if_recent();
        // Not for long, because an urgent client may not read its answer.
        if (of_->shared_.gate.closed()) of_->shared_.gate.wait(longest_gate_wait);
        buffers = first_bytes(buffers, piece, of_->shared_.options.piece_bytes);
      }
      auto written = of_->link_->write_some(buffers);
      if (written) of_->moved(*written);
      return written;
    }
    [[nodiscard]] Result<std::size_t> read_some(MutableBuffers buffers) noexcept {
      return of_->link_->read_some(buffers);
    }
    [[nodiscard]] Result<void> finish() noexcept { return of_->link_->finish(); }
    void shutdown() noexcept { of_->link_->shutdown(); }

   private:
    /// The buffers up to `most` bytes and the room of `piece`.
    static ConstBuffers first_bytes(ConstBuffers buffers, std::span<iovec> piece, std::size_t most) noexcept {
      std::size_t count = 0;
      for (const iovec& each : buffers.first(std::min(buffers.size(), piece.size()))) {
        if (most == 0) break;
        piece[count] = each;
        piece[count].iov_len = std::min(each.iov_len, most);
        most -= piece[count++].iov_len;
      }
      return piece.first(count);
    }

    ServedLink* of_;
  };
  using Outlet = packets::Outlet<Way, C>;

  void cut() noexcept override {
    link_->shutdown();
    const std::lock_guard held(fetcher_mutex_);
    if (fetcher_) fetcher_->cancel();
  }

  // ---- The hello (section 21.2)

  [[nodiscard]] Result<void> hello() noexcept {
    expect(shared_.options.hello_timeout);
    const wire::PageHello own{.session = shared_.options.session,
                              .page_bytes = static_cast<std::uint32_t>(shared_.store.page_bytes()),
                              .method = C::method};
    const auto greeting = wire::encode_page_greeting(own);
    MULTIFD_TRY(write(greeting));
    std::array<std::byte, wire::page_hello_bytes> bytes;
    constexpr std::size_t magic_bytes = 4;  // enough to refuse a stranger, which may never send a whole hello
    MULTIFD_TRY(read(std::span(bytes).first(magic_bytes)));
    if (wire::load_be<std::uint32_t>(bytes.data()) != wire::page_client_magic)
      return fail(Errc::bad_magic, Stage::hello, "page connection", wire::load_be<std::uint32_t>(bytes.data()),
                  wire::page_client_magic);
    MULTIFD_TRY(read(std::span(bytes).subspan(magic_bytes)));
    const auto client = wire::parse_page_hello(bytes);
    if (!client) return refuse(client.error());
    if (auto same = wire::compare(*client, own); !same) return refuse(same.error());
    kind_ = static_cast<FetchKind>(client->kind);
    if (auto ready = prepare(); !ready) return refuse(ready.error());
    expect(shared_.options.progress_timeout);
    settle();
    MULTIFD_TRY(write_blocks());
    expect({});
    return {};
  }

  /// Has everything that answers need.
  [[nodiscard]] Result<void> prepare() noexcept {
    const std::size_t pages = batch_bytes / shared_.store.page_bytes();
    MULTIFD_TRY_ASSIGN(runs_, PageRuns::create(pages));
    offsets_.reset(new (std::nothrow) std::uint64_t[pages]);
    if (!offsets_) return fail_errno(Stage::setup, "allocate connection", ENOMEM);
    auto outlet = Outlet::create(shared_.outlets, number_, Way(*this), shared_.options.compressor);
    if (!outlet) return std::unexpected(outlet.error());
    outlet_.emplace(std::move(*outlet));
    meter_.emplace(counters_, kind_ == FetchKind::urgent ? shared_.uncapped : shared_.limiter);
    if (shared_.guest != nullptr) return {};
    expect({});  // a store whose own connection is lost may take its time
    auto fetcher = shared_.store.open(kind_);
    if (!fetcher) return std::unexpected(fetcher.error());
    const std::lock_guard held(fetcher_mutex_);
    fetcher_ = std::move(*fetcher);
    window_ = std::clamp(fetcher_->window(), 1u, most_asked);
    return is_cut() ? fail(Errc::cancelled, Stage::hello, "page connection") : Result<void>{};
  }

  [[nodiscard]] Result<void> write_blocks() noexcept {
    wire::PageBlockList list{.blocks = static_cast<std::uint32_t>(shared_.blocks.size())};
    for (const RamBlock& block : shared_.blocks)
      list.bytes += static_cast<std::uint32_t>(wire::encode_page_block(block.idstr, block.bytes).view().size());
    MULTIFD_TRY(write(wire::encode_page_accepted(list)));
    for (const RamBlock& block : shared_.blocks)
      MULTIFD_TRY(write(wire::encode_page_block(block.idstr, block.bytes).view()));
    return {};
  }

  /// Tells the client why, and returns `error`.
  [[nodiscard]] std::unexpected<Error> refuse(const Error& error) noexcept {
    expect(last_words_timeout);
    if (outlet_ && !push_out()) return std::unexpected(error);  // answers to what it asked for before
    std::string text;                                           // without memory for it the client learns the code
    ignore_bad_alloc([&] { text = describe(error); });
    if (!write(wire::encode_page_failed(error, text).view()) || !link_->finish()) return std::unexpected(error);
    // What the client has sent is read, because a connection that is closed before that is reset, and the text with it.
    std::array<std::byte, 4096> dropped;
    iovec buffer = mutable_buffer(std::span<std::byte>(dropped));
    for (std::size_t left = 256; left > 0; --left) {
      const auto arrived = link_->read_some(MutableBuffers(&buffer, 1));
      if (!arrived || *arrived == 0) break;
    }
    return std::unexpected(error);
  }

  // ---- Requests (section 21.5)

  [[nodiscard]] Result<void> answer_requests() noexcept {
    for (;;) {
      while (asked_ < window_ && !shut_) {
        const auto request = parser_.next();
        if (!request) return refuse(request.error());
        if (*request) {
          if (auto taken = take(**request); !taken) return taken;
          continue;
        }
        if (asked_ > 0) break;
        MULTIFD_TRY_ASSIGN(const bool more, read_requests());
        if (!more) return {};
      }
      if (asked_ == 0) return say_whole();
      if (auto answered = answer(queue_[first_ % most_asked]); !answered) return answered;
      ++first_;
      --asked_;
    }
  }

  /// Waits for more of what the client says. False at the end of the stream.
  [[nodiscard]] Result<bool> read_requests() noexcept {
    MULTIFD_TRY(push_out());
    expect({});
    iovec buffer = mutable_buffer(parser_.room());
    const auto arrived = link_->read_some(MutableBuffers(&buffer, 1));
    if (!arrived) return std::unexpected(arrived.error());
    if (*arrived == 0 && parser_.inside()) return fail(Errc::peer_closed, Stage::read, "page request");
    moved(*arrived);
    parser_.commit(*arrived);
    return *arrived > 0;
  }

  [[nodiscard]] Result<void> take(const wire::PageRequest& request) noexcept {
    if (request.kind == wire::PageRequestKind::gave_up) return fail(Errc::peer_gave_up, Stage::read, "page client");
    if (request.kind == wire::PageRequestKind::whole) {
      shut_ = true;
      return {};
    }
    if (!request.idstr.empty()) {
      const auto found = std::ranges::find(shared_.blocks, request.idstr, &RamBlock::idstr);
      if (found == shared_.blocks.end())
        return refuse(fail(Errc::unknown_block, Stage::parse, "page request", 0, 0, request.idstr).error());
      block_ = static_cast<std::uint32_t>(found - shared_.blocks.begin());
    }
    if (!block_) return refuse(fail(Errc::unknown_block, Stage::parse, "first page request").error());
    const RamBlock& block = shared_.blocks[*block_];
    if (auto good = wire::check_page_request(request, block.bytes, shared_.store.page_bytes(), block.idstr); !good)
      return refuse(good.error());
    const PageRange range{.block = BlockId{*block_}, .offset = request.start, .bytes = request.bytes};
    if (fetcher_) {
      if (auto asked = fetcher_->ask(range); !asked) return give_up(asked.error());
    }
    queue_[(first_ + asked_++) % most_asked] = range;
    return {};
  }

  /// The store's error. The client learns of one that another connection would have as well.
  [[nodiscard]] std::unexpected<Error> give_up(const Error& error) noexcept {
    if (shared_.store.may_return(error) || error.code == Errc::cancelled) return std::unexpected(error);
    return refuse(error);
  }

  [[nodiscard]] Result<void> answer(const PageRange& range) noexcept {
    const bool urgent = kind_ == FetchKind::urgent;
    struct Urgent {
      UrgentGate* gate;
      ~Urgent() {
        if (gate != nullptr) gate->leave();
      }
    } const holds_back{urgent ? &shared_.gate : nullptr};
    if (urgent) shared_.gate.enter();
    const RamBlock& block = shared_.blocks[index(range.block)];
    const std::size_t size = shared_.store.page_bytes();
    const std::span offsets(offsets_.get(), range.bytes / size);
    std::size_t normal = 0;
    iovec fetched_bytes{};
    ConstBuffers runs;
    if (shared_.guest != nullptr) {
      normal = shared_.guest->list(range, offsets, runs_);
      runs = runs_.view();
    } else {
      const auto fetched = fetcher_->take();
      if (!fetched) return give_up(fetched.error());
      normal = list(*fetched, offsets);
      fetched_bytes = const_buffer(fetched->bytes);
      if (normal > 0) runs = ConstBuffers(&fetched_bytes, 1);
    }
    expect(shared_.options.progress_timeout);
    const auto sent = outlet_->send(
        {.id = range.block, .block = block, .offsets = offsets, .normal_pages = normal, .runs = runs}, *meter_);
    if (!sent) return std::unexpected(sent.error());
    if (urgent) MULTIFD_TRY(push_out());
    count(offsets.size(), normal, *sent);
    return {};
  }

  /// The offsets of a range: those that were fetched, and behind them the others.
  std::size_t list(const FetchedPages& fetched, std::span<std::uint64_t> offsets) const noexcept {
    const std::size_t normal = fetched.offsets.size();
    std::ranges::copy(fetched.offsets, offsets.begin());
    std::size_t zero = normal;
    auto next = fetched.offsets.begin();
    for (std::uint64_t at = fetched.range.offset; at < fetched.range.end(); at += shared_.store.page_bytes()) {
      if (next != fetched.offsets.end() && *next == at)
        ++next;
      else
        offsets[zero++] = at;
    }
    return normal;
  }

  [[nodiscard]] Result<void> push_out() noexcept { return outlet_->push_out(*meter_); }

  /// Says that it has been heard that the guest has every page (section 21.7).
  [[nodiscard]] Result<void> say_whole() noexcept {
    MULTIFD_TRY(push_out());
    shared_.end.update([this] { shared_.whole = true; });
    std::array<std::byte, 4> bytes;
    wire::store_be<std::uint32_t>(bytes.data(), wire::page_whole_magic);
    return write(bytes);
  }

  void count(std::size_t pages, std::size_t normal, const engine::Sent& sent) noexcept {
    constexpr auto relaxed = std::memory_order_relaxed;
    shared_.requests.fetch_add(1, relaxed);
    if (kind_ == FetchKind::urgent) shared_.urgent_requests.fetch_add(1, relaxed);
    shared_.normal_pages.fetch_add(normal, relaxed);
    shared_.zero_pages.fetch_add(pages - normal, relaxed);
    shared_.payload_bytes.fetch_add(sent.payload_bytes, relaxed);
    shared_.wire_bytes.fetch_add(sent.wire_bytes, relaxed);
  }

  // ---- Bytes of the hello

  auto counted() noexcept {
    return [this](std::size_t bytes) noexcept { moved(bytes); };
  }
  [[nodiscard]] Result<void> write(std::span<const std::byte> bytes) noexcept {
    return write_all(*link_, bytes, counted());
  }
  [[nodiscard]] Result<void> read(std::span<std::byte> bytes) noexcept {
    iovec buffer = mutable_buffer(bytes);
    const auto arrived = read_at_least(*link_, std::span(&buffer, 1), bytes.size(), counted());
    if (!arrived) return std::unexpected(arrived.error());
    if (*arrived < bytes.size()) return fail(Errc::peer_closed, Stage::hello, "page connection");
    return {};
  }

  static constexpr unsigned most_asked = 16;
  static constexpr std::chrono::milliseconds last_words_timeout{2000};

  Shared& shared_;
  const unsigned number_;
  std::optional<T> link_;
  FetchKind kind_ = FetchKind::background;
  engine::ChannelCounters counters_;
  std::optional<engine::Meter> meter_;
  std::optional<Outlet> outlet_;
  PageRuns runs_;
  std::unique_ptr<std::uint64_t[]> offsets_;
  wire::PageRequestParser parser_;
  std::optional<std::uint32_t> block_;         ///< of the request before
  std::array<PageRange, most_asked> queue_{};  ///< asked for and not answered
  unsigned first_ = 0;
  unsigned asked_ = 0;
  unsigned window_ = 1;
  bool shut_ = false;
  std::mutex fetcher_mutex_;  ///< for cut(): against the moment when there comes to be one
  std::unique_ptr<PageFetcher> fetcher_;
};

}  // namespace multifd::postcopy::detail

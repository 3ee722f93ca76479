// SPDX-License-Identifier: MIT
//
// One connection to a page server, as a PageFetcher (format/page_requests.md section 21).
#pragma once

#include <algorithm>
#include <array>
#include <atomic>
#include <chrono>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <memory>
#include <new>
#include <optional>
#include <span>
#include <string_view>
#include <utility>
#include <vector>

#include "multifd/buffers.hpp"
#include "multifd/compress/policy.hpp"
#include "multifd/engine/monitor.hpp"
#include "multifd/format/page_requests.hpp"
#include "multifd/memory/page_digest.hpp"
#include "multifd/postcopy/detail/link_watch.hpp"
#include "multifd/postcopy/page_store.hpp"
#include "multifd/postcopy/remote_pages_options.hpp"
#include "multifd/transport/algorithms.hpp"
#include "multifd/transport/policy.hpp"

namespace multifd::postcopy::detail {

/// What the connections of one RemotePages share.
template <Compressor C>
struct RemotePagesShared {
  explicit RemotePagesShared(RemotePagesOptions<C> chosen)
      : options(std::move(chosen)), blocks(options.blocks), page_bytes(options.page_bytes) {}

  const RemotePagesOptions<C> options;
  std::vector<StoreBlock> blocks;  ///< the server's, once a first connection has them, where the options have none
  std::size_t page_bytes;          ///< the same
  LinkWatch watch{};
  std::atomic<bool> cancelled{false};  ///< PageStore::cancel()
  std::atomic<std::uint64_t> made{0}, lost{0}, wire_bytes{0};
};

/// Threads: one; cancel() and cut_for() any.
template <Transport T, Compressor C>
class RemoteLink final : public PageFetcher, public WatchedLink {
 public:
  using Shared = RemotePagesShared<C>;

  /// What a connection is made for.
  enum class Purpose : std::uint8_t {
    fetch,   ///< PageStore::open(), which PageStore::cancel() ends
    finish,  ///< RemotePages::finish(), which it does not
  };

  /// Takes a connection through its hello.
  ///
  /// Errors (stage hello): those of the transport; peer_gave_up with the server's reason; what does not fit
  ///   (wire::compare()), and what the server breaks of the format; block_list_mismatch; cancelled, timed_out.
  [[nodiscard]] static Result<std::unique_ptr<RemoteLink>> create(Shared& shared, FetchKind kind, T link,
                                                                  Purpose purpose = Purpose::fetch) noexcept {
    std::unique_ptr<RemoteLink> made(new (std::nothrow) RemoteLink(shared, kind, std::move(link)));
    if (!made) return fail_errno(Stage::setup, "allocate fetcher", ENOMEM);
    MULTIFD_TRY(shared.watch.enter(*made, max_links));
    made->watched_ = true;
    if (purpose == Purpose::finish)
      made->settle();
    else if (shared.cancelled.load(std::memory_order_relaxed))  // was set ahead of the watch's lock
      made->cut_for(Cut::cancelled);
    if (auto begun = made->hello(); !begun) return std::unexpected(made->lose(begun.error()));
    shared.made.fetch_add(1, std::memory_order_relaxed);
    return made;
  }

  ~RemoteLink() override {
    if (!watched_) return;
    shared_.watch.leave(*this);
    shared_.wire_bytes.fetch_add(moved_bytes(), std::memory_order_relaxed);
    (void)link_.finish();  // in order: the server sees the end, and no broken connection
  }

  unsigned window() const noexcept override { return kind_ == FetchKind::urgent ? 1 : shared_.options.window; }
  void cancel() noexcept override { cut_for(Cut::cancelled); }

  std::size_t page_bytes() const noexcept { return page_bytes_; }
  /// The server's, until the first request.
  std::vector<StoreBlock>& server_blocks() noexcept { return server_blocks_; }

  /// Tells the server that the guest has every page, and waits until it says that it has heard that.
  [[nodiscard]] Result<void> say_whole() noexcept {
    expect(shared_.options.hello_timeout);
    auto heard = [&]() noexcept -> Result<void> {
      MULTIFD_TRY(write(wire::encode_page_request({.kind = wire::PageRequestKind::whole}).view()));
      std::array<std::byte, 4> bytes;
      MULTIFD_TRY(read(bytes));
      if (const auto got = wire::load_be<std::uint32_t>(bytes.data()); got != wire::page_whole_magic)
        return fail(Errc::bad_magic, Stage::close, "page server's last word", got, wire::page_whole_magic);
      return {};
    }();
    if (!heard) return std::unexpected(lose(heard.error()));
    return {};
  }

 private:
  RemoteLink(Shared& shared, FetchKind kind, T link) noexcept : shared_(shared), kind_(kind), link_(std::move(link)) {}

  void cut() noexcept override { link_.shutdown(); }

  /// The error as it is told.
  Error lose(const Error& error) noexcept {
    if (!lost_) shared_.lost.fetch_add(1, std::memory_order_relaxed);
    lost_ = true;
    return explain(error);
  }

  // ---- The hello (section 21.2 to 21.4)

  [[nodiscard]] Result<void> hello() noexcept {
    expect(shared_.options.hello_timeout);
    wire::PageHello own{.session = shared_.options.session,
                        .page_bytes = static_cast<std::uint32_t>(shared_.options.page_bytes),
                        .method = C::method,
                        .kind = static_cast<std::uint8_t>(kind_)};
    if (shared_.page_bytes != 0) own.page_bytes = static_cast<std::uint32_t>(shared_.page_bytes);
    const auto bytes = wire::encode_page_hello(own);
    MULTIFD_TRY(write(bytes));
    std::array<std::byte, wire::page_greeting_bytes> greeting;
    MULTIFD_TRY(read(std::span(greeting).first(4)));  // a stranger may never send all of it
    if (wire::load_be<std::uint32_t>(greeting.data()) == wire::page_server_magic)
      MULTIFD_TRY(read(std::span(greeting).subspan(4)));
    MULTIFD_TRY_ASSIGN(const auto server, wire::parse_page_greeting(greeting));
    MULTIFD_TRY(wire::compare(server, own));
    page_bytes_ = server.page_bytes;
    std::array<std::byte, wire::page_accepted_bytes> answer;
    constexpr std::size_t header = wire::page_failed_header_bytes;
    MULTIFD_TRY(read(std::span(answer).first(header)));
    if (wire::load_be<std::uint32_t>(answer.data()) == wire::page_failed_magic)
      return read_reason(std::span<const std::byte>(answer).first(header));
    MULTIFD_TRY(read(std::span(answer).subspan(header)));
    MULTIFD_TRY_ASSIGN(const auto list, wire::parse_page_accepted(answer));
    if (auto read = read_blocks(list); !read) return read;
    if (auto ready = allocate(); !ready) return ready;
    expect({});
    settle();
    return {};
  }

  [[nodiscard]] Result<void> read_blocks(const wire::PageBlockList& list) noexcept {
    return catch_bad_alloc(Stage::hello, "page server's blocks", [&]() -> Result<void> {
      std::vector<std::byte> bytes(list.bytes);
      if (auto arrived = read(bytes); !arrived) return arrived;
      auto taken = wire::parse_page_blocks(
          bytes, list.blocks, page_bytes_, [&](std::string_view idstr, std::uint64_t size) -> Result<void> {
            if (std::ranges::find(server_blocks_, idstr, &StoreBlock::idstr) != server_blocks_.end())
              return fail(Errc::repeated_block_name, Stage::hello, "page server's block", 0, 0, idstr);
            server_blocks_.push_back({std::string(idstr), size});
            return {};
          });
      if (!taken) return taken;
      for (const StoreBlock& own : shared_.blocks) {
        const auto found = std::ranges::find(server_blocks_, own.idstr, &StoreBlock::idstr);
        const std::uint64_t size = found == server_blocks_.end() ? 0 : found->bytes;
        if (size != own.bytes)
          return fail(Errc::block_list_mismatch, Stage::hello, "page server's block", size, own.bytes, own.idstr);
      }
      return {};
    });
  }

  [[nodiscard]] Result<void> allocate() noexcept {
    const std::size_t most_payload =
        C::payload_form == PayloadForm::pages ? batch_bytes : std::size_t{wire::max_payload_bytes};
    auto decoder = C::Decoder::open(shared_.options.compressor, {.page_bytes = page_bytes_});
    if (!decoder) return std::unexpected(decoder.error());
    decoder_.emplace(std::move(*decoder));
    room_ = wire::header_bytes(page_bytes_) + most_payload;
    in_.reset(new (std::nothrow) std::byte[room_]);
    offsets_.reset(new (std::nothrow) std::uint64_t[wire::page_count(page_bytes_)]);
    if (C::payload_form == PayloadForm::encoded) pages_.reset(new (std::nothrow) std::byte[batch_bytes]);
    if (!in_ || !offsets_ || (C::payload_form == PayloadForm::encoded && !pages_))
      return fail_errno(Stage::setup, "allocate fetcher", ENOMEM);
    return {};
  }

  /// Reads why the server gives up. Params `here`: what has come of it, at least its header.
  [[nodiscard]] std::unexpected<Error> read_reason(std::span<const std::byte> here) noexcept {
    const auto size = wire::parse_page_failed_size(here.data());
    if (!size) return std::unexpected(size.error());
    std::array<std::byte, wire::max_page_failed_bytes> bytes;
    here = here.subspan(wire::page_failed_header_bytes);
    const std::size_t come = std::min(here.size(), *size);
    std::copy_n(here.begin(), come, bytes.begin());
    if (auto rest = read(std::span(bytes).subspan(come, *size - come)); !rest) return std::unexpected(rest.error());
    const auto failure = wire::parse_page_failed(std::span(bytes).first(*size));
    return std::unexpected(failure ? failure->error() : failure.error());
  }

  // ---- Requests and answers (section 21.5, 21.6)

  [[nodiscard]] Result<void> do_ask(const PageRange& range) noexcept override {
    if (is_cut()) return std::unexpected(lose({.code = Errc::cancelled, .stage = Stage::write, .op = "ask for pages"}));
    MULTIFD_ASSERT(asked_ < window() && index(range.block) < shared_.blocks.size());
    const bool again = last_block_ == range.block;
    wire::PageRequest request{.kind = wire::PageRequestKind::pages,
                              .idstr = {},
                              .start = range.offset,
                              .bytes = static_cast<std::uint32_t>(range.bytes)};
    if (!again) request.idstr = shared_.blocks[index(range.block)].idstr;
    last_block_ = range.block;
    queue_[(first_ + asked_++) % max_page_window] = range;
    expect(shared_.options.progress_timeout);
    auto written = write(wire::encode_page_request(request).view());
    if (!written) return std::unexpected(lose(written.error()));
    return {};
  }

  [[nodiscard]] Result<FetchedPages> do_take() noexcept override {
    if (is_cut()) return std::unexpected(lose({.code = Errc::cancelled, .stage = Stage::read, .op = "fetch pages"}));
    MULTIFD_ASSERT(asked_ > 0);
    const PageRange range = queue_[first_++ % max_page_window];
    auto fetched = take(range);
    if (!fetched) return std::unexpected(lose(fetched.error()));
    if (--asked_ == 0) expect({});
    return fetched;
  }

  [[nodiscard]] Result<FetchedPages> take(const PageRange& range) noexcept {
    // What came behind the last answer begins this one.
    here_ -= used_;
    if (here_ > 0) std::memmove(in_.get(), in_.get() + used_, here_);
    used_ = 0;
    const std::size_t header_bytes = wire::header_bytes(page_bytes_);
    // No more than the answer will have without compression: it is the only one that is certain to come.
    const std::size_t all = header_bytes + range.bytes;
    if (auto begun = read_to(wire::page_failed_header_bytes, all); !begun) return std::unexpected(begun.error());
    if (wire::load_be<std::uint32_t>(in_.get()) == wire::page_failed_magic) {
      const std::size_t come = std::min(here_, wire::page_failed_header_bytes + wire::max_page_failed_bytes);
      return read_reason({in_.get(), come});
    }
    if (auto whole = read_to(header_bytes, all); !whole) return std::unexpected(whole.error());
    const auto header = wire::parse_header({in_.get(), header_bytes}, {.page_bytes = page_bytes_, .method = C::method});
    if (!header) return std::unexpected(header.error());
    const std::string_view idstr = shared_.blocks[index(range.block)].idstr;
    MULTIFD_TRY(wire::check_page_answer(*header, in_.get(), idstr, range.offset, range.bytes, page_bytes_));
    const std::size_t payload = wire::payload_bytes(*header);
    if (auto whole = read_to(header_bytes + payload, header_bytes + payload); !whole)
      return std::unexpected(whole.error());
    used_ = header_bytes + payload;
    for (std::size_t i = 0; i < header->normal_pages; ++i) offsets_[i] = wire::load_offset(in_.get(), i);

    FetchedPages fetched{.range = range, .offsets = std::span(offsets_.get(), header->normal_pages)};
    if (header->normal_pages == 0) return fetched;
    fetched.bytes = {in_.get() + header_bytes, payload};
    if constexpr (C::payload_form == PayloadForm::encoded) {
      const std::span pages(pages_.get(), header->normal_pages * page_bytes_);
      const iovec to = mutable_buffer(pages);
      if (auto decoded = decoder_->decode(fetched.bytes, MutableBuffers(&to, 1)); !decoded)
        return std::unexpected(decoded.error());
      fetched.bytes = pages;
    }
    if (header->has_digest) {
      if (const std::uint64_t got = digest_of(fetched.bytes); got != header->digest)
        return fail(Errc::digest_mismatch, Stage::decode, "XXH3-64", got, header->digest, idstr);
    }
    return fetched;
  }

  /// Reads until `wanted` bytes are in `in_`, and takes up to `most` with them.
  [[nodiscard]] Result<void> read_to(std::size_t wanted, std::size_t most) noexcept {
    if (here_ >= wanted) return {};
    iovec buffer = mutable_buffer(std::span(in_.get() + here_, std::max(wanted, most) - here_));
    const auto arrived = read_at_least(link_, std::span(&buffer, 1), wanted - here_, counted());
    if (!arrived) return std::unexpected(arrived.error());
    here_ += *arrived;
    // Wherever the stream ends, the connection is lost: what was asked for has not come.
    if (here_ < wanted) return fail(Errc::peer_closed, Stage::read, "answer of the page server");
    return {};
  }

  auto counted() noexcept {
    return [this](std::size_t bytes) noexcept { moved(bytes); };
  }
  [[nodiscard]] Result<void> write(std::span<const std::byte> bytes) noexcept { return write_all(link_, bytes); }
  [[nodiscard]] Result<void> read(std::span<std::byte> bytes) noexcept {
    iovec buffer = mutable_buffer(bytes);
    const auto arrived = read_at_least(link_, std::span(&buffer, 1), bytes.size(), counted());
    if (!arrived) return std::unexpected(arrived.error());
    if (*arrived < bytes.size()) return fail(Errc::peer_closed, Stage::hello, "page server");
    return {};
  }

  static constexpr unsigned max_links = 4096;

  Shared& shared_;
  const FetchKind kind_;
  T link_;
  bool watched_ = false;
  bool lost_ = false;
  std::size_t page_bytes_ = 0;
  std::vector<StoreBlock> server_blocks_;
  std::optional<typename C::Decoder> decoder_;
  std::unique_ptr<std::byte[]> in_;
  std::size_t room_ = 0;
  std::size_t here_ = 0;  ///< bytes in `in_`
  std::size_t used_ = 0;  ///< of them, those of the last answer
  std::unique_ptr<std::uint64_t[]> offsets_;
  std::unique_ptr<std::byte[]> pages_;  ///< decoded
  std::optional<BlockId> last_block_;
  std::array<PageRange, max_page_window> queue_{};  ///< asked for and not answered
  unsigned first_ = 0;
  unsigned asked_ = 0;
};

}  // namespace multifd::postcopy::detail

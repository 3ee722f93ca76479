// SPDX-License-Identifier: MIT
//
// The main connection of a migration whose connections may return (format/extension.md section 19.10): a lost one is made again
// by who reads or writes it, both directions go on byte by byte, and nobody above notices.
#pragma once

#include <algorithm>
#include <chrono>
#include <cstddef>
#include <cstdint>
#include <limits>
#include <memory>
#include <mutex>
#include <optional>
#include <span>
#include <string>
#include <utility>
#include <vector>

#include "multifd/buffers.hpp"
#include "multifd/packets/redial.hpp"
#include "multifd/result.hpp"
#include "multifd/time_limit.hpp"
#include "multifd/transport/algorithms.hpp"
#include "multifd/transport/interrupt.hpp"
#include "multifd/transport/policy.hpp"

namespace multifd::migrate::detail {

/// Makes a main connection again. Threads: the migration's.
template <Transport T>
class MainRedial {
 public:
  virtual ~MainRedial() = default;
  struct Again {
    T link;
    std::uint64_t received = 0;  ///< by the other side, of what this one has written
    std::uint32_t generation = 0;
  };
  /// Blocks until there is another connection. Params `received`: bytes of the other side's that have arrived; `why`: what
  /// became of the one before; `interrupt`: may be null.
  /// Errors: Errc::timed_out, cancelled; any other one is the migration's end.
  [[nodiscard]] Result<Again> reconnect_main(std::uint64_t received, const Error& why, const Interrupt* interrupt) {
    return do_reconnect_main(received, why, interrupt);
  }

 private:
  [[nodiscard]] virtual Result<Again> do_reconnect_main(std::uint64_t received, const Error& why,
                                                        const Interrupt* interrupt) = 0;
};

/// A Transport with time limits. Up to engage() it is `T` and nothing more.
///
/// Threads: one; but drop_older() from any.
/// Cost: engaged, what is written is kept until the other side has confirmed it.
template <Transport T>
class ResumableLink {
 public:
  explicit ResumableLink(T link) : mutex_(std::make_unique<std::mutex>()), link_(std::move(link)) {}

  /// From here on a lost connection is made again. Params `redial`: outlives this object; `already_read`: bytes behind this
  /// point of the stream that the reader has taken already; `most_kept`: bytes, for a side whose peer never confirms any.
  void engage(MainRedial<T>& redial, std::uint64_t already_read = 0,
              std::size_t most_kept = std::numeric_limits<std::size_t>::max()) noexcept {
    redial_ = &redial;
    most_kept_ = most_kept;
    received_ = already_read;
  }
  /// A lost connection is an error again.
  void disengage() noexcept { redial_ = nullptr; }
  bool engaged() const noexcept { return redial_ != nullptr; }
  /// From here on an end of the other side's stream is one. Before, it is a loss: neither side ends in the middle.
  void expect_end() noexcept { may_end_ = true; }
  /// How often a connection was made again.
  std::uint64_t mended() const noexcept { return mended_; }
  /// Bytes of the other side's since engage().
  std::uint64_t received() const noexcept { return received_; }
  /// The other side has so many of this one's bytes, which are never needed again.
  /// Errors: Errc::bad_extension_message: it cannot have.
  [[nodiscard]] Result<void> confirm(std::uint64_t bytes) noexcept {
    if (bytes <= first_kept_) return {};  // said earlier, and read behind a REJOIN that has said more
    if (bytes > written_)
      return fail(Errc::bad_extension_message, Stage::parse, "bytes that the other side has", bytes, written_,
                  "EPOCH_WHOLE");
    first_kept_ = bytes;
    // Moved seldom: when more than half of it is not needed.
    const std::size_t unneeded = kept_.size() - static_cast<std::size_t>(written_ - first_kept_);
    if (2 * unneeded > kept_.size()) kept_.erase(kept_.begin(), kept_.begin() + static_cast<std::ptrdiff_t>(unneeded));
    return {};
  }

  /// Breaks the connection where it is an older one: that of this generation takes its place.
  void drop_older(std::uint32_t generation) noexcept {
    const std::lock_guard held(*mutex_);
    newest_ = std::max(newest_, generation);
    if (generation_ < newest_) link_.shutdown();
  }

  // ---- The Transport policy

  [[nodiscard]] Result<std::size_t> write_some(ConstBuffers buffers) noexcept {
    return write_some(buffers, no_timeout, nullptr);
  }
  [[nodiscard]] Result<std::size_t> read_some(MutableBuffers buffers) noexcept {
    return read_some(buffers, no_timeout, nullptr);
  }
  [[nodiscard]] Result<std::size_t> write_some(ConstBuffers buffers, std::chrono::milliseconds timeout,
                                               const Interrupt* interrupt) noexcept {
    return kept(buffers, again_and_again(interrupt, [&] { return link_.write_some(buffers, timeout, interrupt); }));
  }
  [[nodiscard]] Result<std::size_t> read_some(MutableBuffers buffers, std::chrono::milliseconds timeout,
                                              const Interrupt* interrupt) noexcept {
    return count(again_and_again(interrupt, [&] { return or_lost(link_.read_some(buffers, timeout, interrupt)); }));
  }
  bool is_two_way() const noexcept
    requires HasAnswers<T>
  {
    return link_.is_two_way();
  }
  [[nodiscard]] Result<std::size_t> read_now(MutableBuffers buffers) noexcept
    requires HasAnswers<T>
  {
    return count(again_and_again(nullptr, [&] { return link_.read_now(buffers); }));
  }
  [[nodiscard]] Result<std::size_t> write_now(ConstBuffers buffers) noexcept
    requires HasAnswers<T>
  {
    return kept(buffers, again_and_again(nullptr, [&] { return link_.write_now(buffers); }));
  }
  [[nodiscard]] Result<void> finish() noexcept { return link_.finish(); }
  void shutdown() noexcept {
    disengage();
    const std::lock_guard held(*mutex_);
    link_.shutdown();
  }
  int native_handle() const noexcept
    requires requires(const T& link) { link.native_handle(); }
  {
    return link_.native_handle();
  }
  bool secured() const noexcept
    requires requires(const T& link) { link.secured(); }
  {
    return link_.secured();
  }
  std::string cipher() const
    requires requires(const T& link) { link.cipher(); }
  {
    return link_.cipher();
  }

 private:
  /// For what is written again, each wait.
  static constexpr std::chrono::milliseconds longest_write{10'000};

  /// drop_older() ends a call, too.
  static bool is_lost(const Error& error, const Interrupt* interrupt) noexcept {
    if (error.code == Errc::cancelled) return interrupt == nullptr || !interrupt->triggered();
    return packets::is_lost_link(error);
  }

  [[nodiscard]] Result<std::size_t> or_lost(Result<std::size_t> read) const noexcept {
    if (read && *read == 0 && engaged() && !may_end_) return fail(Errc::peer_closed, Stage::read, "main connection");
    return read;
  }

  template <class Call>
  [[nodiscard]] Result<std::size_t> again_and_again(const Interrupt* interrupt, const Call& call) noexcept {
    for (;;) {
      auto done = call();
      if (done || !engaged() || !is_lost(done.error(), interrupt)) return done;
      auto mended = catch_bad_alloc(Stage::connect, "main connection", [&] { return mend(done.error(), interrupt); });
      if (!mended) return std::unexpected(mended.error());
    }
  }

  /// Another connection, on which all that the other side does not have was written.
  [[nodiscard]] Result<void> mend(Error why, const Interrupt* interrupt) {
    for (;;) {
      MULTIFD_TRY_ASSIGN(auto again, redial_->reconnect_main(received_, why, interrupt));
      if (again.received < first_kept_ || again.received > written_)
        return fail(Errc::bad_extension_message, Stage::parse, "bytes that the other side has", again.received,
                    written_, "REJOIN");
      {
        const std::lock_guard held(*mutex_);
        link_ = std::move(again.link);
        generation_ = again.generation;
        if (generation_ < newest_) link_.shutdown();
      }
      MULTIFD_TRY(confirm(again.received));
      const auto rest = std::span<const std::byte>(kept_).last(static_cast<std::size_t>(written_ - first_kept_));
      const auto sent = write_all(link_, rest, longest_write, interrupt);
      if (sent) {
        ++mended_;
        return {};
      }
      if (!is_lost(sent.error(), interrupt) && sent.error().code != Errc::timed_out) return sent;
      why = sent.error();
    }
  }

  [[nodiscard]] Result<void> keep(ConstBuffers buffers, std::size_t bytes) noexcept {
    if (kept_.size() + bytes > most_kept_)
      return fail(Errc::stream_limit_exceeded, Stage::write, "answers that the source makes this side keep",
                  kept_.size() + bytes, most_kept_);
    return catch_bad_alloc(Stage::write, "main connection", [&]() -> Result<void> {
      for (const iovec& buffer : buffers) {
        const auto* from = static_cast<const std::byte*>(buffer.iov_base);
        const std::size_t part = std::min(bytes, buffer.iov_len);
        kept_.insert(kept_.end(), from, from + part);
        written_ += part;
        bytes -= part;
      }
      return {};
    });
  }
  [[nodiscard]] Result<std::size_t> kept(ConstBuffers buffers, Result<std::size_t> written) noexcept {
    if (!written || !engaged()) return written;
    if (auto done = keep(buffers, *written); !done) return std::unexpected(done.error());
    return written;
  }
  [[nodiscard]] Result<std::size_t> count(Result<std::size_t> read) noexcept {
    if (read) received_ += *read;
    return read;
  }

  std::unique_ptr<std::mutex>
      mutex_;  ///< of link_, while it is replaced and another thread shuts it down, and of the two generations
  T link_;
  std::uint32_t generation_ = 0;  ///< of link_
  std::uint32_t newest_ = 0;      ///< that has come
  MainRedial<T>* redial_ = nullptr;
  bool may_end_ = false;
  std::uint64_t received_ = 0;
  std::uint64_t written_ = 0;     ///< since engage(), as the two below
  std::uint64_t first_kept_ = 0;  ///< the other side has all before it
  std::vector<std::byte> kept_;   ///< the end of what was written
  std::size_t most_kept_ = 0;
  std::uint64_t mended_ = 0;
};

}  // namespace multifd::migrate::detail

// SPDX-License-Identifier: MIT
//
// What OpenSSL does for a BasicTlsSession: the handshake (openssl_handshake.hpp), then the records (openssl_records.hpp).
//
// Two threads: each direction has its own keys, numbers and buffer, and no object of OpenSSL's is shared by them. The one
// thing that the reader tells the writer, that the peer wants new keys, is an atomic flag.
#pragma once

#include <algorithm>
#include <array>
#include <atomic>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <utility>

#include "multifd/buffers.hpp"
#include "multifd/config.hpp"
#include "multifd/result.hpp"
#include "multifd/transport/detail/basic_tls_batch.hpp"
#include "multifd/transport/detail/basic_tls_link.hpp"
#include "multifd/transport/detail/basic_tls_session.hpp"
#include "multifd/transport/detail/openssl_handshake.hpp"
#include "multifd/transport/detail/openssl_records.hpp"
#include "multifd/transport/fd.hpp"
#include "multifd/transport/openssl_credentials.hpp"
#include "multifd/transport/tls_options.hpp"

namespace multifd::detail {

/// Threads: step() by one; then write() and close_notify() by one, read() by one.
class OpensslEngine {
 public:
  using Credentials = OpensslCredentials;

  OpensslEngine(FdTransport link, const OpensslCredentials& credentials, const TlsOptions& options)
      : link_(std::move(link)), credentials_(credentials), options_(options) {}
  OpensslEngine(const OpensslEngine&) = delete;
  OpensslEngine& operator=(const OpensslEngine&) = delete;

  [[nodiscard]] Result<void> init() {
    handshake_ = std::make_unique<OpensslHandshake>(link_);
    return handshake_->init(credentials_, options_);
  }

  [[nodiscard]] Result<TlsProgress> step() noexcept {
    const auto progress = handshake_->step();
    if (!progress || *progress != TlsProgress::done) return progress;
    return catch_bad_alloc(Stage::handshake, "TLS handshake", [&]() -> Result<TlsProgress> {
      MULTIFD_TRY_ASSIGN(agreed_, handshake_->agreed());
      if (!sealing_.start(agreed_.suite, agreed_.ours, true, agreed_.first_record) ||
          !opening_.start(agreed_.suite, agreed_.theirs, false, agreed_.first_record))
        return fail_openssl(Stage::handshake, "TLS handshake");
      handshake_.reset();
      return TlsProgress::done;
    });
  }

  /// Writes as many records as are sent in one go.
  [[nodiscard]] Result<std::size_t> write(ConstBuffers buffers, const TlsWait* wait) noexcept {
    std::size_t left = total_bytes(buffers);
    if (left == 0) return left;
    if (auto begun = batch_.begin(); !begun) return std::unexpected(begun.error());
    Pieces pieces(buffers);
    std::size_t taken = 0;
    for (std::size_t records = batch_.records(wait); records > 0 && left > 0; --records) {
      if (auto renewed = renew_keys(); !renewed) return std::unexpected(renewed.error());
      const std::size_t count = std::min(left, agreed_.most_content);
      if (auto sealed = seal(TlsContent::data, pieces, count); !sealed) return std::unexpected(sealed.error());
      taken += count;
      left -= count;
    }
    if (auto sent = batch_.send(link_, wait); !sent) return std::unexpected(sent.error());
    return taken;
  }

  /// Reads the records that have come, at least one byte of data.
  [[nodiscard]] Result<std::size_t> read(MutableBuffers buffers, const TlsWait* wait) noexcept {
    std::size_t room = total_bytes(buffers);
    std::size_t arrived = 0;
    Pieces into(buffers);
    while (room > 0) {
      if (plain_begin_ < plain_end_) {
        const std::span<std::byte> piece = into.next(std::min(room, plain_end_ - plain_begin_));
        std::memcpy(piece.data(), plain_.get() + plain_begin_, piece.size());
        plain_begin_ += piece.size();
        room -= piece.size();
        arrived += piece.size();
        continue;
      }
      if (closed_) break;
      const auto record = next_record();
      if (!record) return std::unexpected(record.error());
      if (record->empty()) {
        if (arrived > 0) break;
        const auto more = fill(room, wait);
        if (!more) return std::unexpected(more.error());
        if (*more == 0) break;
        continue;
      }
      const auto placed = open(*record, into, room);
      if (!placed) return std::unexpected(placed.error());
      room -= *placed;
      arrived += *placed;
    }
    return arrived;
  }

  [[nodiscard]] Result<void> close_notify() noexcept {
    const std::array<std::byte, 2> alert{std::byte{1}, static_cast<std::byte>(TlsAlert::close_notify)};
    if (auto begun = batch_.begin(); !begun) return begun;
    if (auto sealed = seal_message(TlsContent::alert, alert); !sealed) return sealed;
    auto sent = batch_.send(link_, nullptr);
    if (!sent) {
      sent.error().stage = Stage::close;
      sent.error().op = "close_notify";
    }
    return sent;
  }

  std::string cipher() const { return agreed_.text; }

  TlsLink& link() noexcept { return link_; }

 private:
  static constexpr std::size_t most_record = OpensslRecords::header_bytes + OpensslRecords::most_content + 2048;
  static constexpr std::size_t platls_receive_bytes = most_record;
  /// Smaller records are copied; some of them are no data.
  static constexpr std::size_t worth_in_place = 1024;
  /// How many records without data may come side by side. Beyond it a peer keeps this side busy with nothing.
  static constexpr unsigned most_without_data = 64;

  // Of the sending thread.

  [[nodiscard]] Result<void> seal(TlsContent content, Pieces& pieces, std::size_t count) noexcept {
    ::ERR_clear_error();  // the host program's own
    const std::size_t size = sealing_.seal(content, pieces, count, batch_.room());
    if (size == 0) return fail_openssl(Stage::write, "encrypt");
    batch_.add(size);
    return {};
  }

  [[nodiscard]] Result<void> seal_message(TlsContent content, std::span<const std::byte> bytes) noexcept {
    const iovec buffer = const_buffer(bytes);
    Pieces pieces(std::span(&buffer, 1));
    return seal(content, pieces, bytes.size());
  }

  /// Under TLS 1.3: new keys ahead of what is written next, when the old ones have served for long enough, or the peer
  /// has asked for them.
  [[nodiscard]] Result<void> renew_keys() noexcept {
    if (!agreed_.suite.tls13) return {};
    const bool asked = keys_wanted_.load(std::memory_order_relaxed);
    if (!asked && sealing_.number() < options_.records_per_key) return {};
    keys_wanted_.store(false, std::memory_order_relaxed);
    constexpr std::array message{std::byte{24}, std::byte{0}, std::byte{0}, std::byte{1}, std::byte{0}};  // KeyUpdate
    if (auto sealed = seal_message(TlsContent::handshake, message); !sealed) return sealed;
    if (!update(agreed_.suite.hash, agreed_.our_secret) ||
        !keys_of(agreed_.suite.hash, agreed_.our_secret, agreed_.suite.key_bytes(), agreed_.ours) ||
        !sealing_.start(agreed_.suite, agreed_.ours, true, 0))
      return fail_openssl(Stage::write, "new keys");
    return {};
  }

  // Of the receiving thread.

  /// What has come and has not been opened.
  std::span<const std::byte> come() const noexcept { return {in_.get() + in_begin_, in_end_ - in_begin_}; }

  /// The size of the record in front of come(), which has its header.
  std::size_t record_size() const noexcept {
    const std::byte* const size = in_.get() + in_begin_ + 3;
    return OpensslRecords::header_bytes +
           (std::to_integer<std::size_t>(size[0]) << 8 | std::to_integer<std::size_t>(size[1]));
  }

  /// How much is missing to the end of that record and of the next one's header, or to the end of its own header.
  std::size_t missing() const noexcept {
    const std::size_t have = come().size();
    if (have < OpensslRecords::header_bytes) return OpensslRecords::header_bytes - have;
    return record_size() + OpensslRecords::header_bytes - have;
  }

  /// The next whole record that has come; empty: none.
  [[nodiscard]] Result<std::span<const std::byte>> next_record() noexcept {
    const std::span<const std::byte> come = this->come();
    if (come.size() < OpensslRecords::header_bytes) return std::span<const std::byte>();
    const std::size_t size = record_size();
    if (agreed_.suite.tls13 && come[0] != static_cast<std::byte>(TlsContent::data))
      return fail_ssl(SSL_R_UNEXPECTED_MESSAGE, Stage::read, "read");
    if (!opening_.content_of(size)) return fail_ssl(SSL_R_ENCRYPTED_LENGTH_TOO_LONG, Stage::read, "read");
    if (come.size() < size) return std::span<const std::byte>();
    in_begin_ += size;
    return come.first(size);
  }

  /// Receives for a read of `room` bytes. Returns how much; 0: the stream may end here.
  [[nodiscard]] Result<std::size_t> fill(std::size_t room, const TlsWait* wait) noexcept {
    if (auto memory = allocate(in_, tls_receive_bytes); !memory) return std::unexpected(memory.error());
    if (auto memory = allocate(plain_, platls_receive_bytes); !memory) return std::unexpected(memory.error());
    std::memmove(in_.get(), in_.get() + in_begin_, in_end_ - in_begin_);  // less than a record
    in_end_ -= std::exchange(in_begin_, 0);
    std::size_t most = tls_receive_bytes - in_end_;
    // A small read, which may be a look at the first bytes, leaves at the socket what it does not need: others ask the
    // socket whether there is more.
    if (room < OpensslRecords::most_content) most = missing();
    const iovec buffer = mutable_buffer(std::span(in_.get() + in_end_, most));
    auto count = link_.receive(std::span(&buffer, 1), wait);
    if (!count) return count;
    if (*count == 0 && (in_end_ > 0 || options_.end != TlsEnd::fin))
      return fail(Errc::tls_truncated, Stage::read, "read");
    in_end_ += *count;
    return count;
  }

  /// Decrypts a record: data that fits to where it belongs, all else into this object. Returns how much was placed.
  [[nodiscard]] Result<std::size_t> open(std::span<const std::byte> record, Pieces& into, std::size_t room) noexcept {
    const std::size_t count = *opening_.content_of(record.size());
    constexpr auto data = static_cast<std::uint8_t>(TlsContent::data);
    if (count >= worth_in_place && count <= room) {
      const auto type = opening_.open(record, into);
      if (!type) return bad_record();
      if (*type == data && count <= OpensslRecords::most_content) {
        opening_.opened();
        without_data_ = 0;
        into.skip(count);
        return count;
      }
    }
    const iovec buffer = mutable_buffer(std::span(plain_.get(), platls_receive_bytes));
    const auto last = opening_.open(record, Pieces(std::span(&buffer, 1)));
    if (!last) return bad_record();
    opening_.opened();
    std::span<const std::byte> content(plain_.get(), count);
    std::uint8_t type = *last;
    for (; agreed_.suite.tls13 && type == 0 && !content.empty(); content = content.first(content.size() - 1))
      type = std::to_integer<std::uint8_t>(content.back());
    if (content.size() > OpensslRecords::most_content) return fail_ssl(SSL_R_DATA_LENGTH_TOO_LONG, Stage::read, "read");
    if (type == data && !content.empty()) {
      without_data_ = 0;
      plain_begin_ = 0;
      plain_end_ = content.size();
      return std::size_t{0};
    }
    if (++without_data_ > most_without_data) return fail_ssl(SSL_R_RECORD_TOO_SMALL, Stage::read, "read");
    if (type == data) return std::size_t{0};
    if (auto heard = hear(static_cast<TlsContent>(type), content); !heard) return std::unexpected(heard.error());
    return std::size_t{0};
  }

  [[nodiscard]] static std::unexpected<Error> bad_record() noexcept {
    ::ERR_clear_error();
    return fail_ssl(SSL_R_DECRYPTION_FAILED_OR_BAD_RECORD_MAC, Stage::read, "read");
  }

  /// Takes a record that carries no data.
  [[nodiscard]] Result<void> hear(TlsContent type, std::span<const std::byte> content) noexcept {
    if (type == TlsContent::handshake) return hear_messages(content);
    if (type != TlsContent::alert || content.size() != 2)
      return fail_ssl(SSL_R_UNEXPECTED_MESSAGE, Stage::read, "read");
    const auto alert = static_cast<TlsAlert>(content[1]);
    if (alert == TlsAlert::close_notify) {
      closed_ = true;
      return {};
    }
    const bool warning = content[0] == std::byte{1};
    if (alert == TlsAlert::user_canceled || (warning && !agreed_.suite.tls13)) return {};
    return std::unexpected(
        error_of_alert(std::to_integer<int>(content[1]), !credentials_.uses_certificates(), Stage::read));
  }

  /// Takes the handshake's messages that may follow it: tickets, which nobody uses, and TLS 1.3's KeyUpdate.
  [[nodiscard]] Result<void> hear_messages(std::span<const std::byte> content) noexcept {
    constexpr std::uint8_t hello_request = 0, new_session_ticket = 4, key_update = 24;
    const auto unexpected = fail_ssl(SSL_R_UNEXPECTED_MESSAGE, Stage::read, "read");
    for (; !content.empty();) {
      const std::size_t skipped = std::min(content.size(), message_left_);
      message_left_ -= skipped;
      content = content.subspan(skipped);
      if (content.empty()) break;
      message_head_[message_head_bytes_++] = content.front();
      content = content.subspan(1);
      if (message_head_bytes_ < message_head_.size()) continue;
      message_head_bytes_ = 0;
      const auto type = std::to_integer<std::uint8_t>(message_head_[0]);
      for (std::size_t i = 1; i < 4; ++i)
        message_left_ = message_left_ << 8 | std::to_integer<std::size_t>(message_head_[i]);
      if (type == new_session_ticket && agreed_.suite.tls13) continue;
      if (type == hello_request && !agreed_.suite.tls13 && message_left_ == 0) continue;
      // Keys change between two records.
      if (type != key_update || !agreed_.suite.tls13 || message_left_ != 1 || content.size() != 1) return unexpected;
      if (content.front() > std::byte{1}) return unexpected;
      message_left_ = 0;
      if (!update(agreed_.suite.hash, agreed_.their_secret) ||
          !keys_of(agreed_.suite.hash, agreed_.their_secret, agreed_.suite.key_bytes(), agreed_.theirs) ||
          !opening_.start(agreed_.suite, agreed_.theirs, false, 0))
        return fail_openssl(Stage::read, "new keys");
      if (content.front() == std::byte{1}) keys_wanted_.store(true, std::memory_order_relaxed);
      break;
    }
    return {};
  }

  TlsLink link_;
  const OpensslCredentials credentials_;
  const TlsOptions options_;
  std::unique_ptr<OpensslHandshake> handshake_;  ///< until it is done
  TlsAgreed agreed_;                             ///< each thread changes its own direction's secret and keys
  std::atomic<bool> keys_wanted_ = false;        ///< the peer has asked for new keys of this side

  // Used by the sending thread.
  alignas(cache_line) OpensslRecords sealing_;
  TlsBatch batch_;

  // Used by the receiving thread.
  alignas(cache_line) OpensslRecords opening_;
  TlsMemory in_;  ///< what has come: [in_begin_, in_end_)
  std::size_t in_begin_ = 0, in_end_ = 0;
  TlsMemory plain_;  ///< decrypted, and not read yet: [plain_begin_, plain_end_)
  std::size_t plain_begin_ = 0, plain_end_ = 0;
  unsigned without_data_ = 0;
  bool closed_ = false;
  std::array<std::byte, 4> message_head_{};  ///< type and length of a message
  std::size_t message_head_bytes_ = 0;
  std::size_t message_left_ = 0;  ///< of a message that is skipped
};

}  // namespace multifd::detail

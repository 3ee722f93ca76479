// SPDX-License-Identifier: MIT
//
// What a source says on its main connection before a page travels: the question, SETTINGS, RAM's START (format/extension.md
// section 19.3), read as it comes, so that a slow source delays no other.
#pragma once

#include <chrono>
#include <cstddef>
#include <cstdint>
#include <optional>
#include <span>
#include <string_view>
#include <utility>
#include <vector>

#include "multifd/buffers.hpp"
#include "multifd/format/extension.hpp"
#include "multifd/format/main_stream.hpp"
#include "multifd/format/peer_failure.hpp"
#include "multifd/format/peer_settings.hpp"
#include "multifd/qemu/main_stream.hpp"
#include "multifd/qemu/peer_handshake.hpp"
#include "multifd/qemu/return_path_writer.hpp"
#include "multifd/result.hpp"

namespace multifd::migrate::detail {

/// The beginning of one main stream. Threads: one.
class SourcePrelude {
 public:
  /// Params `any_page_size`: what SETTINGS say becomes the parser's page size; that of `limits` is the largest.
  /// Errors: those of MainStreamParser::create().
  [[nodiscard]] static Result<SourcePrelude> create(const qemu::MainStreamLimits& limits, bool any_page_size) {
    MULTIFD_TRY_ASSIGN(qemu::MainStreamParser parser, qemu::MainStreamParser::create(limits));
    return SourcePrelude(std::move(parser), any_page_size);
  }

  /// Reads what has arrived, and answers the source's question. Never waits for the source.
  /// Returns whether all is there, RAM's START with its records included.
  /// Errors: Errc::peer_gave_up with the source's reason; not_supported: a source that has not said that it is ours; those
  ///   of the parser, and of the connection.
  template <class Link>
  [[nodiscard]] Result<bool> read(Link& link) {
    return read_until(link, [this] { return whole_; });
  }

  /// Called when read() has returned true, while the source waits to be accepted: reads whether it gives up.
  /// Errors: as read().
  template <class Link>
  [[nodiscard]] Result<void> read_on(Link& link) {
    MULTIFD_TRY(read_until(link, [] { return false; }));
    return {};
  }
  /// Whether the source has shown that it is ours: it takes FAILED then.
  bool own_source() const noexcept { return parser.commands().own_source(); }
  /// The source's SETTINGS, once read() has returned true. Errors: those of qemu::check_settings().
  [[nodiscard]] Result<wire::PeerSettings> check(const wire::PeerSettings& own) const {
    MULTIFD_TRY_ASSIGN(const wire::ExtensionMessage message,
                       wire::parse_extension(settings_, wire::Towards::destination));
    wire::PeerSettings spoken = own;
    MULTIFD_TRY_ASSIGN(spoken.versions, versions(own.versions));
    return qemu::check_settings(message, spoken);
  }
  /// What the source has given up with; empty before that.
  std::string_view reason() const noexcept { return failure_.text(); }
  /// The bytes that check()'s names are part of.
  std::vector<std::byte> take_settings() noexcept { return std::move(settings_); }
  /// How many of the channels' epochs have ended so far.
  unsigned epochs() const noexcept { return epochs_; }

  qemu::MainStreamParser parser;  ///< goes on where read() has ended

 private:
  SourcePrelude(qemu::MainStreamParser made, bool any_page_size)
      : parser(std::move(made)), any_page_size_(any_page_size) {}

  /// With the version that both sides speak. Errors: Errc::extension_version_mismatch.
  [[nodiscard]] Result<wire::ExtensionVersions> versions(wire::ExtensionVersions own) const noexcept {
    MULTIFD_TRY_ASSIGN(own.spoken, wire::common_version(parser.commands().asked().value_or(0), own));
    return own;
  }

  /// Takes what has arrived, up to where `done` is. Returns whether it is.
  template <class Link, class Done>
  [[nodiscard]] Result<bool> read_until(Link& link, const Done& done) {
    while (!done()) {
      MULTIFD_TRY_ASSIGN(const auto element, parser.next());
      if (element) {
        MULTIFD_TRY(take(link, *element));
        continue;
      }
      const iovec room = mutable_buffer(parser.room());
      MULTIFD_TRY_ASSIGN(const std::size_t got, link.read_now(std::span(&room, 1)));
      if (got == 0) return false;
      parser.commit(got);
    }
    return true;
  }

  [[nodiscard]] Result<void> take_page_size(const wire::ExtensionMessage& message) {
    MULTIFD_TRY_ASSIGN(const auto spoken, versions({}));
    MULTIFD_TRY_ASSIGN(const wire::PeerSettings said, wire::parse_settings(message, spoken));
    if (!said.page_bytes) return fail(Errc::page_size_mismatch, Stage::hello, "SETTINGS without a page size");
    return parser.set_page_bytes(*said.page_bytes);
  }

  template <class Link>
  [[nodiscard]] Result<void> take(Link& link, const qemu::Element& element) {
    using qemu::ElementKind;
    if (whole_ && element.kind != ElementKind::extension && element.kind != ElementKind::command)
      return fail(Errc::unexpected_extension_message, Stage::hello, "a source that goes on before it is accepted");
    if (element.closes_epoch) ++epochs_;
    switch (element.kind) {
      case ElementKind::command:
        if (element.command != qemu::command_ping) return {};
        // A few bytes on a fresh connection: they fit its buffer.
        return qemu::ReturnPathWriter<Link>(link).pong(
            parser.commands().answer(wire::load_be<std::uint32_t>(element.data.data())));
      case ElementKind::extension: {
        MULTIFD_TRY_ASSIGN(const auto message, wire::parse_extension(element.data, wire::Towards::destination));
        if (message.kind == wire::ExtensionKind::settings) {
          settings_.assign(element.data.begin(), element.data.end());
          if (any_page_size_) return take_page_size(message);
        }
        if (message.kind == wire::ExtensionKind::known_zeros || message.kind == wire::ExtensionKind::base_wanted)
          return fail(Errc::unexpected_extension_message, Stage::hello, "a source that goes on before it is accepted");
        if (message.kind != wire::ExtensionKind::failed) return {};
        MULTIFD_TRY_ASSIGN(failure_, wire::parse_failed(message));
        return std::unexpected(failure_.error());
      }
      case ElementKind::section_start:
        if (!own_source())
          return fail(Errc::not_supported, Stage::hello, "a source that is no migrate_to(): a QEMU, or a relay");
        return {};
      case ElementKind::footer: whole_ = true; return {};
      default: return {};
    }
  }

  bool any_page_size_;
  std::vector<std::byte> settings_;  ///< the message
  wire::PeerFailure failure_{};
  unsigned epochs_ = 0;
  bool whole_ = false;
};

}  // namespace multifd::migrate::detail

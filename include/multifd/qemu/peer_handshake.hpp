// SPDX-License-Identifier: MIT
//
// How the two ends of this library find each other on a main stream and agree, before a page travels
// (format/extension.md sections 19.1 and 19.4): the source's calls, which wait for answers, and the destination's
// check of what a source announces.
//
//   source                                        destination
//   begin_stream(), open_return_path()
//   ask_peer()              PING  ------------>   ReturnPathWriter::pong(Commands::answer(value))
//   settings(), start_ram()       ------------>   check_settings(), compare_blocks()
//   await_accepted()              <------------   accepted(), or failed() and shut(1)
#pragma once

#include <chrono>
#include <cstdint>
#include <optional>

#include "multifd/format/compare_settings.hpp"
#include "multifd/format/extension.hpp"
#include "multifd/format/peer_failure.hpp"
#include "multifd/format/peer_settings.hpp"
#include "multifd/qemu/main_stream_writer.hpp"
#include "multifd/qemu/return_path.hpp"
#include "multifd/qemu/return_path_reader.hpp"
#include "multifd/result.hpp"
#include "multifd/time_limit.hpp"
#include "multifd/transport/interrupt.hpp"

namespace multifd::qemu {

/// Asks the destination whether it is ours, and waits for the answer. Behind open_return_path(), ahead of start_ram(),
/// with all channels connected. Only where the user has not named a QEMU as the peer.
///
/// Params `timeout`: for each wait for bytes. `interrupt`: may be null. `own`: the versions of this side.
/// Returns the version that both speak, for PeerSettings::versions.spoken; from then on `reader` takes the extension.
///   None: a QEMU, or a version of this library without the extension, which is shown none of it.
/// Errors: Errc::extension_version_mismatch; peer_closed, when the destination ended or gave up; those of
///   MainStreamWriter and ReturnPathReader.
/// Threads: one, that of both. Cost: a round trip.
template <Transport T>
[[nodiscard]] Result<std::optional<std::uint8_t>> ask_peer(MainStreamWriter<T>& writer, ReturnPathReader<T>& reader,
                                                           std::chrono::milliseconds timeout = no_timeout,
                                                           const Interrupt* interrupt = nullptr,
                                                           const wire::ExtensionVersions& own = {}) noexcept {
  const std::uint32_t question = wire::extension_ping(own.newest);
  MULTIFD_TRY(writer.ping(question));
  MULTIFD_TRY(writer.push_out());
  for (;;) {
    MULTIFD_TRY_ASSIGN(const auto message, reader.next(timeout, interrupt));
    if (!message || message->type == return_shut)
      return fail(Errc::peer_closed, Stage::hello, "the destination ended ahead of RAM");
    if (message->type != return_pong) continue;
    if (message->value == question) return std::nullopt;
    const auto newest = wire::version_in_pong(message->value);
    if (!newest) continue;  // of another PING
    reader.take_extension();
    MULTIFD_TRY_ASSIGN(const std::uint8_t spoken, wire::common_version(*newest, own));
    return spoken;
  }
}

/// Waits until the destination has taken SETTINGS and the block list. Behind the end_section() of RAM's START, and a
/// push_out().
///
/// Params `own`: what MainStreamWriter::settings() has announced. `theirs`: set when the destination gives up; has its
///   whole text.
/// Returns the features that both sides have.
/// Errors: Errc::peer_gave_up (peer_reason, subject: the destination's); peer_closed; unknown_feature, missing_feature;
///   those of wire::parse_settings() and ReturnPathReader.
/// Threads: one, the reader's.
template <Transport T>
[[nodiscard]] Result<wire::FeatureList> await_accepted(ReturnPathReader<T>& reader, const wire::PeerSettings& own,
                                                       wire::PeerFailure& theirs,
                                                       std::chrono::milliseconds timeout = no_timeout,
                                                       const Interrupt* interrupt = nullptr) noexcept {
  for (;;) {
    MULTIFD_TRY_ASSIGN(const auto message, reader.next(timeout, interrupt));
    if (!message || message->type == return_shut)
      return fail(Errc::peer_closed, Stage::hello, "the destination ended, and has not said why");
    if (message->type != wire::extension_number) continue;  // a PONG
    if (message->message.kind == wire::ExtensionKind::failed) {
      MULTIFD_TRY_ASSIGN(theirs, wire::parse_failed(message->message));
      return std::unexpected(theirs.error());
    }
    // The parser lets nothing else come first.
    MULTIFD_TRY_ASSIGN(const wire::PeerSettings accepted, wire::parse_settings(message->message, own.versions));
    MULTIFD_TRY(wire::check_features(accepted.features, own.features));
    return wire::common_features(accepted.features, own.features);
  }
}

/// Checks the SETTINGS of a source. What is left to the caller: the block list (compare_blocks()), and the VMM's own.
///
/// Params `own`: this side's versions and features, and what it insists on. `own.versions.spoken` must be
///   wire::common_version() of Commands::asked().
/// Returns the source's settings, whose names are part of `message`.
/// Errors: those of wire::parse_settings(), check_features() and compare_settings().
/// Threads: any.
[[nodiscard]] inline Result<wire::PeerSettings> check_settings(const wire::ExtensionMessage& message,
                                                               const wire::PeerSettings& own) noexcept {
  MULTIFD_TRY_ASSIGN(const wire::PeerSettings sources, wire::parse_settings(message, own.versions));
  MULTIFD_TRY(wire::check_features(sources.features, own.features));
  MULTIFD_TRY(wire::compare_settings(sources, own));
  return sources;
}

}  // namespace multifd::qemu

// SPDX-License-Identifier: MIT
//
// A migration's source of any version, message by message, up to the moment at which pages would travel.
#pragma once

#include <doctest/doctest.h>

#include <cstdint>
#include <functional>
#include <optional>
#include <span>
#include <utility>
#include <vector>

#include "multifd/format/missing_pages.hpp"
#include "multifd/qemu/main_stream_writer.hpp"
#include "multifd/qemu/return_path_reader.hpp"
#include "multifd/qemu/stream_style.hpp"
#include "multifd/transport/algorithms.hpp"
#include "multifd/transport/connect.hpp"
#include "support/basics.hpp"
#include "support/raw_stream.hpp"

namespace test {

inline multifd::FdTransport connect_by_hand(const multifd::Address& address) {
  auto link = multifd::connect_to(address, {.connect_timeout = 5s});
  REQUIRE_MESSAGE(link.has_value(), text(link));
  return std::move(*link);
}
inline void say(multifd::FdTransport& link, std::span<const std::byte> bytes) {
  REQUIRE(multifd::write_all(link, bytes).has_value());
}
inline void say(multifd::FdTransport& link, std::string_view text) { say(link, std::as_bytes(std::span(text))); }

/// The other side has ended the connection.
inline void check_link_closed(multifd::FdTransport& link) {
  std::byte byte;
  const iovec buffer = multifd::mutable_buffer(std::span(&byte, 1));
  const auto got = link.read_some(std::span(&buffer, 1), no_hang, nullptr);
  CHECK((!got || *got == 0));
  if (!got) CHECK_MESSAGE(got.error().code != multifd::Errc::timed_out, text(got));
}

class SourceByHand {
 public:
  /// Params `channels`: how many it connects, each with a hello of `uuid`, and the SYNC of START's epoch.
  explicit SourceByHand(const multifd::Address& address, unsigned channels = 1, std::byte uuid = {})
      : main_(connect_by_hand(address)), writer_(main_, multifd::qemu::style_of("multifd")), reader_(main_) {
    for (unsigned i = 0; i < channels; ++i) {
      channels_.push_back(connect_by_hand(address));
      say(channels_.back(), std::span<const std::byte>(RawStream().hello(i, uuid).packet({.flags = 1}).bytes()));
    }
  }
  void begin() {
    REQUIRE(writer_.begin_stream({.machine_type = "multifd"}).has_value());
    REQUIRE(writer_.open_return_path().has_value());
    REQUIRE(writer_.push_out().has_value());
  }
  /// Asks whether the destination is ours. Returns the value of its PONG.
  std::uint32_t ask(std::uint8_t version = multifd::wire::extension_version) {
    begin();
    REQUIRE(writer_.ping(multifd::wire::extension_ping(version)).has_value());
    REQUIRE(writer_.push_out().has_value());
    const auto pong = reader_.next(10s, nullptr);
    REQUIRE_MESSAGE(pong.has_value(), text(pong));
    REQUIRE(pong->has_value());
    reader_.take_extension();
    return (*pong)->value;
  }
  /// SETTINGS, and START of one RAM block. Params `said`: how many channels are announced.
  void announce(std::size_t pages, const multifd::wire::ExtensionVersions& versions = {},
                const multifd::wire::FeatureList& features = {}, std::uint32_t said = 1,
                const std::optional<multifd::Uuid>& session = {}, const std::function<void()>& behind_start = {}) {
    const multifd::wire::PeerSettings settings{.versions = versions,
                                               .features = features,
                                               .channels = said,
                                               .page_bytes = 4096,
                                               .compression = 0,
                                               .zero_pages = multifd::wire::ZeroPagesMode::multifd,
                                               .digest = multifd::Digest::off,
                                               .tls = false,
                                               .paths = 1,
                                               .session = session};
    REQUIRE(writer_.settings(settings).has_value());
    start_ram(pages, behind_start);
  }
  /// Params `behind_start`: says something that arrives together with START.
  void start_ram(std::size_t pages, const std::function<void()>& behind_start = {}) {
    const multifd::qemu::BlockInfo block{.idstr = "pc.ram", .used_length = pages * 4096};
    REQUIRE(writer_.start_ram(std::span(&block, 1)).has_value());
    REQUIRE(writer_.end_epoch().has_value());
    REQUIRE(writer_.end_section().has_value());
    if (behind_start) behind_start();
    REQUIRE(writer_.push_out().has_value());
  }
  /// Names 64 pages of a block by the bits of a word. Params `offset`: of the first one.
  void known_zeros(std::uint32_t block, std::uint64_t offset, std::uint64_t word, bool push) {
    multifd::wire::FieldWriter<27> bytes;
    bytes.be(std::uint8_t{8}).be(multifd::wire::extension_number).be(std::uint16_t{22});
    bytes.be(static_cast<std::uint16_t>(multifd::wire::ExtensionKind::known_zeros)).be(block).be(offset).be(word);
    REQUIRE(writer_.forward({.bytes = bytes.view()}).has_value());
    if (push) REQUIRE(writer_.push_out().has_value());
  }
  /// Asks for the destination's older copy.
  void base_wanted() {
    REQUIRE(writer_.base_wanted().has_value());
    REQUIRE(writer_.push_out().has_value());
  }
  /// RAM's END, and the SYNC of its epoch on all channels.
  void end_ram() {
    REQUIRE(writer_.begin_end().has_value());
    REQUIRE(writer_.end_epoch().has_value());
    REQUIRE(writer_.end_section().has_value());
    REQUIRE(writer_.push_out().has_value());
    for (multifd::FdTransport& channel : channels_)
      say(channel, std::span<const std::byte>(RawStream().packet({.flags = 1, .packet_num = 1}).bytes()));
  }
  /// Says that a page of the first block is missing. Params `follows`: and that memory follows.
  void miss_a_page(bool follows) {
    const std::uint64_t bitmap = 2;
    REQUIRE(writer_.missing_pages(0, std::span(&bitmap, 1)).has_value());
    if (follows) REQUIRE(writer_.memory_follows({.pages = 1, .connections = 1, .session = {}}).has_value());
    REQUIRE(writer_.push_out().has_value());
  }
  void state_whole() {
    REQUIRE(writer_.state_whole().has_value());
    REQUIRE(writer_.push_out().has_value());
  }
  /// The destination's answer to SETTINGS.
  multifd::qemu::ReturnMessage answer() {
    for (;;) {
      const auto message = reader_.next(10s, nullptr);
      REQUIRE_MESSAGE(message.has_value(), text(message));
      REQUIRE(message->has_value());
      if ((*message)->type == multifd::wire::extension_number) return **message;
    }
  }
  void hand_over() {
    REQUIRE(writer_.hand_over().has_value());
    REQUIRE(writer_.push_out().has_value());
  }
  /// Other connections take the place of those that there are.
  void replace_main(multifd::FdTransport link) { main_ = std::move(link); }
  void replace_channel(unsigned channel, multifd::FdTransport link) { channels_[channel] = std::move(link); }
  multifd::FdTransport& channel(unsigned channel) { return channels_[channel]; }
  /// The text of its FAILED.
  std::string failure() {
    const multifd::qemu::ReturnMessage message = answer();
    CHECK(message.message.kind == multifd::wire::ExtensionKind::failed);
    const auto said = multifd::wire::parse_failed(message.message);
    REQUIRE(said.has_value());
    return std::string(said->text());
  }

 private:
  multifd::FdTransport main_;
  std::vector<multifd::FdTransport> channels_;
  multifd::qemu::MainStreamWriter<multifd::FdTransport> writer_;
  multifd::qemu::ReturnPathReader<multifd::FdTransport> reader_;
};

}  // namespace test

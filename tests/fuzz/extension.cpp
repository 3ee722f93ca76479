// SPDX-License-Identifier: MIT
//
// One message of our own two ends (format/extension.md section 19). Input: u8 options (bit 0: for the source; bits 1-2:
// page size), then the data of the message.
#include <algorithm>
#include <string>
#include <vector>

#include "fuzz/fuzz.hpp"
#include "multifd/format/base_digests.hpp"
#include "multifd/format/compare_settings.hpp"
#include "multifd/format/extension.hpp"
#include "multifd/format/missing_pages.hpp"
#include "multifd/format/page_digests.hpp"
#include "multifd/format/peer_failure.hpp"
#include "multifd/format/peer_settings.hpp"
#include "multifd/format/rejoin.hpp"

namespace {

using namespace fuzz;
using namespace multifd;
using wire::ExtensionKind;

bool inside(Span part, Span whole) {
  return part.empty() || (part.data() >= whole.data() && part.data() + part.size() <= whole.data() + whole.size());
}

void check_settings(const wire::ExtensionMessage& message, Span data) {
  const auto settings = wire::parse_settings(message);
  if (!settings) {
    require(settings.error().code == Condition::peer_protocol, "refused settings are the peer's fault");
    return;
  }
  require(settings->features.all().size() <= wire::max_features && inside(settings->user, data) &&
              settings->user.size() <= wire::max_user_setting_bytes,
          "the bounds hold");
  for (const wire::Feature& feature : settings->features.all())
    require(inside(std::as_bytes(std::span(feature.name)), data), "a feature's name is in the message");
  if (settings->channels) require(*settings->channels >= 1 && *settings->channels <= max_channels, "channels");
  if (settings->page_bytes) require(valid_page_bytes(*settings->page_bytes), "page size");
  require(wire::compare_settings(*settings, *settings).has_value(), "settings are equal to themselves");
  require(wire::check_features(settings->features, settings->features).has_value(), "so are features");
  // Written again and read again they are the same.
  const auto bytes = wire::encode_settings(*settings, message.kind);
  const auto again = wire::parse_extension(
      bytes.view(), message.kind == ExtensionKind::settings ? wire::Towards::destination : wire::Towards::source);
  if (!again) return;  // ACCEPTED with a setting of the VMM's own may be too long for a source
  const auto same = wire::parse_settings(*again);
  require(same.has_value() && wire::compare_settings(*same, *settings).has_value() &&
              same->features.all().size() == settings->features.all().size() &&
              std::ranges::equal(same->user, settings->user),
          "settings are what we would write");
}

void check_failed(const wire::ExtensionMessage& message) {
  const auto failure = wire::parse_failed(message);
  if (!failure) {
    require(failure.error().code == Errc::bad_extension_message, "a refused reason is malformed");
    return;
  }
  require(failure->text().size() <= wire::max_failure_text_bytes, "a text is bounded");
  for (const char c : failure->text()) require(c >= ' ' && c <= '~', "a text is printable");
  require(!describe(failure->error()).empty(), "a reason can be shown");
  Error error = failure->error();
  error.code = failure->reason;
  const auto bytes = wire::encode_failed(error, failure->text());
  const auto again = wire::parse_extension(bytes.view(), wire::Towards::source);
  require(again && wire::parse_failed(*again)->text() == failure->text() &&
              wire::parse_failed(*again)->reason == failure->reason,
          "a reason survives the round trip");
}

void check_digests(const wire::ExtensionMessage& message, std::size_t page_bytes) {
  const auto digests = wire::parse_page_digests(message);
  if (!digests) return;
  require(digests->pages() >= 1 && digests->pages() <= wire::max_page_digests, "the number of digests is bounded");
  static const Bytes memory(256 * 1024);
  const auto compared = wire::compare_page_digests(*digests, memory, page_bytes, "ram");
  if (compared)
    require(digests->offset + digests->pages() * page_bytes <= memory.size(), "only pages of the block are equal");
}

void check_missing(const wire::ExtensionMessage& message, std::size_t page_bytes) {
  const auto pages = wire::parse_page_bitmap(message);
  if (!pages) return;
  require(pages->words() >= 1 && pages->words() <= wire::max_page_bitmap_words, "the size of the bitmap is bounded");
  constexpr std::size_t pages_in_block = 64 * 100 + 1;
  std::vector<std::uint64_t> bitmap(101);
  const auto added = wire::add_missing_pages(*pages, bitmap, pages_in_block * page_bytes, page_bytes, "ram");
  require(bitmap.back() <= 1, "only pages of the block are missing");
  if (!added) require(added.error().code == Condition::peer_protocol, "refused pages are the peer's fault");
}

void check_follows(const wire::ExtensionMessage& message, Span data) {
  const auto follows = wire::parse_memory_follows(message);
  if (!follows) return;
  require(follows->connections >= 1 && follows->connections <= wire::max_page_connections, "connections are bounded");
  require(std::ranges::equal(wire::encode_memory_follows(*follows).view(), data), "it is what we would write");
}

void check_epoch(const wire::ExtensionMessage& message, Span data) {
  const wire::EpochWhole whole = wire::parse_epoch_whole(message);
  require(whole.epoch == message.number, "the number is the epoch");
  require(std::ranges::equal(wire::encode_epoch_whole(whole).view(), data), "it is what we would write");
  wire::EpochWhole again{.epoch = whole.epoch, .received = whole.received};
  for (unsigned channel = 0; channel < 256; ++channel)
    if (whole.has(channel)) again.add(channel);
  require(again == whole, "each bit is a channel");
}

void check_base(const wire::ExtensionMessage& message, Span data) {
  const auto pages = wire::parse_base_pages(message);
  if (!pages) return;
  require(pages->pages > 0 && inside(pages->digests, data), "there are pages, and their digests are in the message");
  if (pages->digests.empty()) {
    require(std::ranges::equal(wire::encode_base_zeros(pages->block, pages->offset, pages->pages).view(), data),
            "it is what we would write");
    return;
  }
  require(pages->pages <= wire::max_base_digests, "the bound holds");
  std::vector<Digest128> digests;
  for (std::size_t i = 0; i < pages->pages; ++i) digests.push_back(pages->digest(i));
  require(std::ranges::equal(wire::encode_base_digests(pages->block, pages->offset, digests).view(), data),
          "it is what we would write");
}

void test(Span input) {
  Reader in(input);
  const unsigned options = in.u8();
  const Span data = in.rest();
  const auto towards = options % 2 == 0 ? wire::Towards::destination : wire::Towards::source;
  const auto message = wire::parse_extension(data, towards);
  if (!message) {
    require(message.error().code == Condition::peer_protocol, "a refused message is the peer's fault");
    return;
  }
  require(message->body.size() + 2 == data.size() && inside(message->body, data), "the body is the rest");
  switch (message->kind) {
    case ExtensionKind::settings:
    case ExtensionKind::accepted: check_settings(*message, data); break;
    case ExtensionKind::failed: check_failed(*message); break;
    case ExtensionKind::page_digests: check_digests(*message, page_bytes_of(options >> 1)); break;
    case ExtensionKind::known_zeros:
    case ExtensionKind::missing_pages: check_missing(*message, page_bytes_of(options >> 1)); break;
    case ExtensionKind::memory_follows: check_follows(*message, data); break;
    case ExtensionKind::epoch_whole: check_epoch(*message, data); break;
    case ExtensionKind::base_key:
      require(std::ranges::equal(wire::encode_base_key(wire::base_key_of(*message)).view(), data),
              "a key is its bytes");
      break;
    case ExtensionKind::base_digests:
    case ExtensionKind::base_zeros: check_base(*message, data); break;
    case ExtensionKind::user_data: break;
    default:
      require(std::ranges::equal(wire::encode_extension(message->kind, message->number).view(), data),
              "a message of a number is what we would write");
  }
}

const Register registered({.name = "extension", .test = test});

}  // namespace

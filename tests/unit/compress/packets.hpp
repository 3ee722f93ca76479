// SPDX-License-Identifier: MIT
//
// Pages to compress, and payloads as values, for the tests of this folder.
#pragma once

#include <doctest/doctest.h>
#include <time.h>

#include <cstddef>
#include <cstdint>
#include <initializer_list>
#include <random>
#include <span>
#include <system_error>
#include <utility>
#include <vector>

#include "multifd/buffers.hpp"
#include "multifd/compress/policy.hpp"
#include "multifd/error.hpp"
#include "multifd/result.hpp"

namespace codec_payloads {

using Bytes = std::vector<std::byte>;

inline constexpr std::size_t page_bytes = 4096;

/// Pages of a few hundred words in random order: compresses about as well as a guest's own data does.
inline Bytes text_pages(std::size_t pages, std::uint64_t seed = 1) {
  std::mt19937_64 random(seed);
  std::vector<Bytes> words(400);
  for (Bytes& word : words) {
    word.resize(2 + random() % 9);
    for (std::byte& letter : word) letter = static_cast<std::byte>('a' + random() % 26);
    word.back() = std::byte{' '};
  }
  Bytes content;
  content.reserve(pages * page_bytes + 16);
  while (content.size() < pages * page_bytes) {
    // Rare words and common ones.
    const Bytes& word = words[random() % (1 + random() % words.size())];
    content.insert(content.end(), word.begin(), word.end());
  }
  content.resize(pages * page_bytes);
  return content;
}

inline Bytes random_pages(std::size_t pages, std::uint64_t seed = 1) {
  std::mt19937_64 random(seed);
  Bytes content(pages * page_bytes);
  for (std::byte& byte : content) byte = static_cast<std::byte>(random());
  return content;
}

/// One packet of each kind, in the order that a guest would not choose.
inline std::vector<Bytes> stream_of_pages() {
  return {text_pages(1),    random_pages(128), Bytes(128 * page_bytes), text_pages(128, 2),
          text_pages(3, 3), Bytes(page_bytes), random_pages(2, 4),      text_pages(128, 2)};
}

/// Opens an encoder or decoder, or ends the test.
template <class Coder, class C>
Coder open(const C& parameters, const multifd::CodecLimits& limits = {}) {
  auto coder = Coder::open(parameters, limits);
  REQUIRE(coder.has_value());
  return std::move(*coder);
}

/// Encodes one run of pages, which has to succeed, and copies the payload out.
template <class Encoder>
Bytes encode(Encoder& encoder, const Bytes& content) {
  const iovec run = multifd::const_buffer(content);
  const auto payload = encoder.encode(multifd::ConstBuffers(&run, content.empty() ? 0 : 1));
  REQUIRE(payload.has_value());
  Bytes bytes;
  for (const iovec& piece : *payload) {
    const auto* data = static_cast<const std::byte*>(piece.iov_base);
    bytes.insert(bytes.end(), data, data + piece.iov_len);
  }
  return bytes;
}

/// Decodes into one run of `size` bytes; `content` gets them.
template <class Decoder>
multifd::Result<void> decode(Decoder& decoder, const Bytes& payload, std::size_t size, Bytes& content) {
  content.assign(size, std::byte{0xee});
  const iovec run = multifd::mutable_buffer(content);
  return decoder.decode(payload, multifd::MutableBuffers(&run, size == 0 ? 0 : 1));
}

/// The code with which a payload is refused; an empty one when it is taken.
template <class Decoder>
std::error_code refusal(Decoder& decoder, const Bytes& payload, std::size_t size) {
  Bytes content;
  const auto result = decode(decoder, payload, size, content);
  if (result) return {};
  CHECK(result.error().stage == multifd::Stage::decode);
  CHECK(result.error().op[0] != '\0');
  return result.error().code;
}

inline Bytes operator+(Bytes left, const Bytes& right) {
  left.insert(left.end(), right.begin(), right.end());
  return left;
}

inline Bytes without_tail(Bytes bytes, std::size_t count) {
  bytes.resize(bytes.size() - count);
  return bytes;
}

inline Bytes bytes_of(std::initializer_list<int> values) {
  Bytes bytes;
  for (const int value : values) bytes.push_back(static_cast<std::byte>(value));
  return bytes;
}

}  // namespace codec_payloads

namespace doctest {
template <>
struct StringMaker<std::error_code> {
  static String convert(const std::error_code& code) { return code ? code.message().c_str() : "no error"; }
};
}  // namespace doctest

// SPDX-License-Identifier: MIT
//
// Whether the destination ends epochs as the source does (format/packets.md section 6.1), which the stream does not
// say. Two sides that differ wait for each other for good, each for SYNCs that the other does not send.
#pragma once

#include <multifd/qemu/main_stream.hpp>

#include <atomic>
#include <chrono>
#include <cstdint>

#include "qemu_relay/destination.hpp"

namespace relay {

/// Asks the destination behind the first section, with a PING of the relay's own, whose answer shows it.
///
/// Threads: the main one, where nothing else is said. Each call that writes throws Failure.
class StyleCheck {
 public:
  /// `stream`: the source's.
  StyleCheck(const Settings& settings, const multifd::qemu::MainStreamParser& stream, const Forwarded& forwarded,
             Destination& destination, FirstFailure& failure)
      : settings_(settings), stream_(stream), forwarded_(forwarded), destination_(destination), failure_(failure) {}

  /// Called ahead of sending an element on, and behind it.
  void before(const multifd::qemu::Element& element);
  void behind(const multifd::qemu::Element& element);
  /// Whether the destination has been sent that element, a footer, by prove() ahead of the source.
  bool was_sent(const multifd::qemu::Element& element) const noexcept;

  /// Called before the first epoch ends, while the channels are held: proves, where names do not tell, that the
  /// destination ends epochs with each section. Returns whether `end_of_section`, the element that ends the epoch, has
  /// been sent on for that.
  bool prove(const multifd::qemu::Element& end_of_section);
  /// Called before the second epoch ends: waits for the answer.
  void wait_for_answer() const;
  /// Throws when the answer is late. Threads: any.
  void check_answer_in_time() const;

 private:
  bool has_to_prove_sections() const;
  void ping();
  void ask();
  std::chrono::milliseconds answer_limit() const;

  const Settings& settings_;
  const multifd::qemu::MainStreamParser& stream_;
  const Forwarded& forwarded_;
  Destination& destination_;
  FirstFailure& failure_;
  std::uint32_t ram_section_ = 0;
  enum class FirstSection : std::uint8_t { open, ended, over } first_section_ = FirstSection::open;
  bool footer_sent_ = false;  ///< ahead of the source's own
  using Clock = std::chrono::steady_clock;
  std::atomic<Clock::time_point> asked_{};  ///< when ask() asked; {}: never
};

}  // namespace relay

// SPDX-License-Identifier: MIT
#include "common/control.hpp"

#include <fmt/format.h>
#include <poll.h>
#include <sys/socket.h>

#include <array>
#include <chrono>
#include <cstring>

#include "common/mapped_file.hpp"
#include "common/program.hpp"

namespace program {
namespace {

using namespace std::chrono_literals;
namespace wire = multifd::wire;

constexpr std::size_t longest_reason = 1000;

/// What a peer wrote, fit for a terminal.
std::string printable(std::string text) {
  if (text.size() > longest_reason) text.resize(longest_reason);
  for (char& c : text)
    if (static_cast<unsigned char>(c) < 0x20 || static_cast<unsigned char>(c) >= 0x7f) c = '?';
  return text;
}

constexpr const char* silent = "is silent";
constexpr const char* full = "takes nothing";

Failure too_late(const char* what, const Limit& limit) {
  return Failure(multifd::Error{.code = multifd::Errc::timed_out},
                 fmt::format("main connection: the other side {} for {}", what, limit.text()));
}

const char* name_of(MessageType type) {
  constexpr const char* names[] = {"?",       "hello", "zero runs", "round end", "state",
                                   "digests", "done",  "ready",     "result",    "failed"};
  const auto i = static_cast<std::size_t>(type);
  return i < std::size(names) ? names[i] : "?";
}

}  // namespace

std::string Message::text() const { return std::string(reinterpret_cast<const char*>(payload.data()), payload.size()); }

nlohmann::json Message::json() const {
  auto object = nlohmann::json::parse(text(), nullptr, /*allow_exceptions=*/false);
  if (!object.is_object()) throw Failure("main connection: the peer's message is not a JSON object");
  return object;
}

Failure Message::failure() const { return Failure::of_peer(printable(text())); }

Control Control::connect(const multifd::Address& address, const multifd::Interrupt& interrupt, const TimeLimits& limits,
                         const Tls& tls) {
  auto plain = need(multifd::connect_to(address, limits.socket(&interrupt)), "connect to " + to_string(address));
  Control control(need(tls.secure(std::move(plain), interrupt, limits.connect), "main connection"), interrupt, limits);
  std::array<std::byte, 4> magic;
  wire::store_be(magic.data(), control_magic);
  control.write(magic);
  return control;
}

Control Control::adopt(Link link, const multifd::Interrupt& interrupt, const TimeLimits& limits) {
  return Control(std::move(link), interrupt, limits);
}

void Control::send(MessageType type, std::span<const std::byte> payload) {
  std::array<std::byte, message_header_bytes> header;
  header[0] = static_cast<std::byte>(type);
  wire::store_be(&header[1], static_cast<std::uint32_t>(payload.size()));
  write(header);
  write(payload);
}

void Control::send_json(MessageType type, const nlohmann::json& object) {
  const std::string text = object.dump();
  send(type, std::as_bytes(std::span(text)));
}

bool Control::send_last(MessageType type, std::span<const std::byte> payload) noexcept {
  const multifd::Interrupt* const interrupt = interrupt_;
  bool sent = false;
  try {
    // The interrupt may be what ended us; this one line still has to go out, if the socket takes it at once.
    // Nothing is made for that: a process without descriptors, memory or threads has to say so, too.
    interrupt_ = nullptr;
    message_limit_ = {.time = 1s};
    send(type, payload);
    sent = true;
  } catch (const std::exception&) {  // the peer is gone: then there is nobody to tell
  }
  interrupt_ = interrupt;
  // A peer that has read this may have closed, or reset, the connection by now: the end is not what counts.
  if (sent) (void)link_.finish();
  return sent;
}

std::string Control::why_unheard(std::chrono::milliseconds limit) noexcept {
  try {
    if (!wait_for_message(limit))
      return fmt::format("it is silent for {} s", std::chrono::duration<double>(limit).count());
    std::byte byte{};
    const iovec buffer = multifd::mutable_buffer(std::span(&byte, 1));
    const auto got = link_.read_some(std::span(&buffer, 1), limit, interrupt_);
    if (!got) return multifd::describe(got.error());
    return *got == 0 ? "" : "it sends something else";
  } catch (const std::exception& error) {
    return error.what();
  }
}

void Control::send_failed(const std::string& reason) noexcept {
  const std::string_view text = std::string_view(reason).substr(0, longest_reason);
  (void)send_last(MessageType::failed, std::as_bytes(std::span(text)));
}

Message Control::receive(std::size_t limit_bytes, const Limit& limit) {
  std::array<std::byte, message_header_bytes> header;
  read(header, limit);
  Message message{.type = static_cast<MessageType>(header[0]), .payload = {}};
  const auto size = wire::load_be<std::uint32_t>(&header[1]);
  if (size > std::max(limit_bytes, small_message))
    throw Failure(fmt::format("main connection: a {} message of {} bytes is more than the {} that fit here",
                              name_of(message.type), size, limit_bytes));
  message.payload.resize(size);
  read(message.payload, message_limit_);
  if (message.type == MessageType::failed) throw message.failure();
  return message;
}

Message Control::expect(MessageType type, std::size_t limit_bytes, const Limit& limit) {
  Message message = receive(limit_bytes, limit);
  if (message.type != type)
    throw Failure(fmt::format("main connection: expected {}, got {}", name_of(type), name_of(message.type)));
  return message;
}

void Control::give_up(const Failure& noticed) {
  const Failure failure = cause_of(noticed);
  if (failure.may_be_echo()) {
    interrupt_ = nullptr;
    try {
      for (;;) (void)receive(small_message, {.time = 500ms});
    } catch (const Failure& theirs) {
      if (theirs.from_peer()) throw;
      if (theirs.may_be_echo()) throw Failure(std::string("the other side has gone: ") + failure.what());
    }
  }
  if (!failure.from_peer()) send_failed(failure.what());
  throw failure;
}

bool Control::wait_for_message(std::chrono::milliseconds timeout) {
  bool begun = false;
  if (link_.secured()) {  // no message is shorter than the four bytes that are looked at
    const auto first = peek_magic(link_, multifd::as_timeout(timeout), interrupt_);
    begun = first || (first.error().code != multifd::Errc::timed_out && first.error().code != multifd::Errc::cancelled);
  } else {  // where looking would take a reset's error away from the read
    begun = wait_for(link_.native_handle(), multifd::as_timeout(timeout), interrupt_);
  }
  if (interrupt_ != nullptr && interrupt_->triggered()) throw Failure(multifd::Error{.code = multifd::Errc::cancelled});
  return begun;  // the read says how, if by an error
}

std::size_t Control::moved(const multifd::Result<std::size_t>& bytes, const char* too_late_because,
                           const Limit& limit) {
  if (!bytes && bytes.error().code == multifd::Errc::timed_out) throw too_late(too_late_because, limit);
  if (!bytes && bytes.error().code == multifd::Errc::cancelled)
    throw Failure(multifd::Error{.code = bytes.error().code});
  return need(bytes, "main connection");
}

void Control::write(std::span<const std::byte> bytes) {
  while (!bytes.empty()) {
    const iovec buffer = multifd::const_buffer(bytes);
    const auto put = link_.write_some(std::span(&buffer, 1), multifd::as_timeout(message_limit_.time), interrupt_);
    bytes = bytes.subspan(moved(put, full, message_limit_));
  }
}

void Control::read(std::span<std::byte> bytes, const Limit& limit) {
  while (!bytes.empty()) {
    const iovec buffer = multifd::mutable_buffer(bytes);
    const auto taken = link_.read_some(std::span(&buffer, 1), multifd::as_timeout(limit.time), interrupt_);
    const std::size_t got = moved(taken, silent, limit);
    if (got == 0) throw Failure(multifd::Error{.code = multifd::Errc::peer_closed}, "main connection");
    bytes = bytes.subspan(got);
  }
}

void ZeroRuns::add(std::uint64_t offset) {
  if (length_ > 0 && start_ + length_ == offset) {
    length_ += page_bytes_;
    return;
  }
  append();
  start_ = offset;
  length_ = page_bytes_;
}

void ZeroRuns::append() {
  if (length_ == 0) return;
  const std::size_t at = payload_.size();
  payload_.resize(at + 16);
  wire::store_be(&payload_[at], start_);
  wire::store_be(&payload_[at + 8], std::exchange(length_, 0));
  if (payload_.size() >= large_message / 2) {
    control_.send(MessageType::zero_runs, payload_);
    payload_.clear();
  }
}

void ZeroRuns::flush() {
  append();
  if (!payload_.empty()) control_.send(MessageType::zero_runs, payload_);
  payload_.clear();
}

std::uint64_t apply_zero_runs(const Message& message, const multifd::RamMap& map, multifd::BlockId block,
                              const std::function<multifd::Result<void>(std::uint64_t offset)>& apply_zero) {
  std::uint64_t pages = 0;
  std::uint64_t end = 0;  // runs ascend, so that one message costs no more than one look at the block
  const auto& whole = map.block(block);
  const auto where = [&](std::uint64_t offset) {
    return fmt::format("main connection: zero pages at offset {} of RAM block {} ({} bytes)", offset,
                       printable(std::string(whole.idstr)), whole.host.size());
  };
  if (message.payload.size() % 16 != 0) throw Failure("main connection: a zero runs message of a broken size");
  for (std::size_t at = 0; at < message.payload.size(); at += 16) {
    const auto start = wire::load_be<std::uint64_t>(&message.payload[at]);
    const auto bytes = wire::load_be<std::uint64_t>(&message.payload[at + 8]);
    if (bytes > whole.host.size()) throw Failure(fmt::format("{}: {} bytes, more than the block", where(start), bytes));
    if (start < end) throw Failure(fmt::format("{}: behind a run that ends at {}: runs ascend", where(start), end));
    end = start + bytes;
    for (std::uint64_t offset = start; offset - start < bytes; offset += map.page_bytes()) {
      if (auto applied = apply_zero(offset); !applied) throw Failure(applied.error(), where(offset));
      ++pages;
    }
  }
  return pages;
}

}  // namespace program

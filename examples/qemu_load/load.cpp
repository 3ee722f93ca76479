// SPDX-License-Identifier: MIT
#include "qemu_load/load.hpp"

#include <fmt/format.h>
#include <multifd/image/workers.hpp>
#include <multifd/qemu/stream_style.hpp>
#include <multifd/zero/buffer_is_zero.hpp>

#include <algorithm>
#include <array>
#include <bit>
#include <cstring>
#include <nlohmann/json.hpp>

#include "common/qemu_source.hpp"
#include "common/report.hpp"

namespace load {

using namespace multifd;
using namespace std::chrono_literals;
using nlohmann::json;
using program::Failure;
using program::need;

Load::Load(const Settings& settings, const Input& input, const Interrupt& interrupt)
    : settings_(settings), input_(input), interrupt_(interrupt), out_(settings.out), ram_(input.page_bytes()) {
  for (const qemu::BlockInfo& block : input_.blocks())
    need(ram_.add_elsewhere(block.idstr, block.used_length), "RAM block " + program::printable(block.idstr));
  fresh_ = program::fresh_blocks(ram_, settings.memory);
  out_.peer = settings.peer.value_or(peer_of_machine_type(input_.machine_type()));
  if (settings.choose_zero_pages)
    out_.zero_pages = out_.peer.zero_lists ? ZeroPagesMultifd::name : ZeroPagesLegacy::name;
  out_.check();
}

json Load::run() {
  const program::Stopwatch watch;
  const program::Progress progress([&] { return look(watch.seconds()); }, 10s);
  try {
    connect();
    send();
  } catch (...) {
    if (sender_) sender_->cancel();
    if (main_) main_->shutdown();
    throw;
  }
  return report(watch.seconds());
}

void Load::connect_main(const std::string& whom, const SocketOptions& options) {
  if (settings_.pipe) {
    pipe_.emplace(*settings_.pipe, program::PipeUse::write);
    main_.emplace(pipe_->take());
    return;
  }
  auto main = need(connect_to(program::address_of(settings_.connect, "--connect"), options), whom);
  main_ = need(settings_.tls.secure(std::move(main), interrupt_, settings_.timeout), "destination");
}

void Load::connect() {
  const std::string whom = "destination " + settings_.connect;
  SocketOptions options;
  options.interrupt = &interrupt_;
  options.connect_timeout = settings_.timeout;
  // Main first, and established, before the channels: QEMU up to 7.2 tells them apart by that (format section 1.2).
  connect_main(whom, options);
  const std::string machine = input_.machine_type();
  writer_.emplace(*main_, qemu::style_of(machine, out_.peer, input_.page_bytes()));
  writer_->set_limits(as_timeout(settings_.timeout), &interrupt_);
  if (out_.channels == 0) return;
  const Address address = program::address_of(settings_.connect, "--connect");
  auto links = need(connect_channels(address, out_.channels, options), whom);
  auto channels = need(settings_.tls.secure_with_first_write(std::move(links)), "destination");
  sender_ = program::open_relay_sender(out_, ram_, std::move(channels));
  seen_ = sender_.get();
}

void Load::send() {
  const auto wrote = [this](const Result<void>& written) {
    if (!written) throw failure(written.error());
  };
  const std::string machine = input_.machine_type();
  wrote(writer_->begin_stream({.machine_type = machine, .uuid = input_.uuid()}));
  if (asks_for_answer()) wrote(writer_->open_return_path());
  wrote(writer_->start_ram(input_.blocks()));
  close_epoch();
  wrote(writer_->begin_part());
  send_ram();
  close_epoch();
  wrote(writer_->switchover_start());
  wrote(writer_->begin_end());
  close_epoch();
  send_devices();
  wrote(writer_->push_out());
  await_loaded();
}

void Load::close_epoch() {
  const auto closed = [&]() -> Result<void> {
    if (sender_) {
      MULTIFD_TRY_ASSIGN(const std::uint64_t epoch, sender_->close_epoch());
      // A destination that has the record and never gets the SYNCs hangs for good: so they leave first.
      MULTIFD_TRY(sender_->wait(epoch));
      MULTIFD_TRY(writer_->end_epoch());
    }
    MULTIFD_TRY(writer_->end_section());
    return writer_->push_out();
  }();
  if (!closed) throw failure(closed.error());
}

void Load::send_ram() {
  const image::RamPieces pieces = need(image::RamPieces::create(input_.blocks(), input_.page_bytes()));
  std::vector<PageBuffer> buffers;
  for (unsigned i = 0; i < settings_.threads; ++i) buffers.push_back(need(PageBuffer::create()));
  const auto sent = image::in_threads(
      {.threads = settings_.threads, .interrupted = [this] { return interrupt_.triggered(); }}, pieces.count(),
      [&](std::uint64_t piece, unsigned worker) { return send_piece(pieces.at(piece), buffers[worker]); },
      [this] { sender_ ? sender_->cancel() : main_->shutdown(); });
  if (!sent) throw failure(sent.error());
}

Result<void> Load::send_piece(const image::RamPiece& piece, PageBuffer& buffer) {
  const std::size_t page_bytes = input_.page_bytes();
  std::uint64_t at = piece.first_page * page_bytes;
  const std::uint64_t end = at + piece.pages * page_bytes;
  const auto send = [&](std::uint64_t offset, std::uint64_t bytes) -> Result<void> {
    MULTIFD_TRY(send_zeros(piece.block, at, offset - at));
    at = offset + bytes;
    return send_pages(piece.block, offset, bytes, buffer);
  };
  MULTIFD_TRY(input_.for_each_run(piece.block, piece.first_page, piece.pages, send));
  return send_zeros(piece.block, at, end - at);
}

Result<void> Load::write_pages(std::size_t block, std::uint64_t offset, std::span<const std::byte> bytes) {
  const std::size_t page_bytes = input_.page_bytes();
  const std::string_view name = input_.blocks()[block].idstr;
  for (std::size_t at = 0; at < bytes.size(); at += page_bytes) {
    const auto page = bytes.subspan(at, page_bytes);
    if (!buffer_is_zero(page.data(), page_bytes)) {
      MULTIFD_TRY(writer_->page(name, offset + at, page));
      ++page_records_;
    } else if (fresh_[block]) {
      ++left_out_;
    } else {
      MULTIFD_TRY(writer_->zero_page(name, offset + at));
      ++zero_records_;
    }
  }
  return {};
}

Result<void> Load::send_pages(std::size_t block, std::uint64_t offset, std::uint64_t bytes, PageBuffer& buffer) {
  const std::size_t page_bytes = input_.page_bytes();
  const BlockId id{static_cast<std::uint32_t>(block)};
  // A page that is listed for the first time is not written by a QEMU: see common/out_memory.hpp.
  const bool by_record = out_.zero_pages == ZeroPagesMultifd::name && !fresh_[block];
  std::array<std::uint64_t, batch_bytes / min_page_bytes> offsets;
  for (const std::uint64_t end = offset + bytes; offset < end;) {
    const std::size_t part = std::min<std::uint64_t>(batch_bytes, end - offset);
    MULTIFD_TRY(input_.read(block, offset, {buffer.data(), part}));
    const std::lock_guard lock(mutex_);
    if (!sender_) {
      MULTIFD_TRY(write_pages(block, offset, {buffer.data(), part}));
      offset += part;
      continue;
    }
    std::size_t kept = 0;
    for (std::size_t at = 0; at < part; at += page_bytes) {
      std::byte* const page = buffer.data() + at;
      if (by_record && buffer_is_zero(page, page_bytes)) {
        MULTIFD_TRY(writer_->zero_page(input_.blocks()[block].idstr, offset + at));
        ++zero_records_;
        continue;
      }
      if (kept * page_bytes != at) std::memmove(buffer.data() + kept * page_bytes, page, page_bytes);
      offsets[kept++] = offset + at;
    }
    if (kept > 0) {
      Result<void> written;
      MULTIFD_TRY(sender_->queue_copies(id, std::span(offsets).first(kept), kept, buffer, [&](std::uint64_t zero) {
        written = writer_->zero_page(input_.blocks()[block].idstr, zero);
        ++zero_records_;
        return true;
      }));
      MULTIFD_TRY(written);
    }
    offset += part;
  }
  return {};
}

Result<void> Load::send_zeros(std::size_t block, std::uint64_t offset, std::uint64_t bytes) {
  if (bytes == 0) return {};
  const std::size_t page_bytes = input_.page_bytes();
  const bool as_pages = sender_ && out_.zero_pages == ZeroPagesNone::name;
  if (fresh_[block] && !as_pages) {
    left_out_ += bytes / page_bytes;
    return {};
  }
  const std::lock_guard lock(mutex_);
  const BlockId id{static_cast<std::uint32_t>(block)};
  for (const std::uint64_t end = offset + bytes; offset < end; offset += page_bytes) {
    if (as_pages) {
      MULTIFD_TRY(sender_->queue_zero(id, offset));
    } else {
      MULTIFD_TRY(writer_->zero_page(input_.blocks()[block].idstr, offset));
      ++zero_records_;
    }
  }
  return {};
}

void Load::send_devices() {
  const Input::Devices devices = input_.devices();
  std::vector<std::byte> piece(std::min<std::uint64_t>(devices.extent.bytes, 1024 * 1024));
  for (std::uint64_t at = 0; at < devices.extent.bytes;) {
    const auto part = std::span(piece).first(std::min<std::uint64_t>(piece.size(), devices.extent.bytes - at));
    need(devices.file.read(devices.extent.offset + at, part), settings_.input);
    if (const auto written = writer_->raw(part); !written) throw failure(written.error());
    at += part.size();
  }
}

/// Waits until the destination says that it has loaded the guest; without a return path until it closes.
void Load::await_loaded() {
  const auto limit = as_timeout(settings_.timeout);
  if (!main_->is_two_way()) {
    if (const auto finished = main_->finish(); !finished) throw failure(finished.error());
    if (pipe_ && !pipe_->wait(limit, &interrupt_)) {
      if (interrupt_.triggered()) throw Failure("cancelled by a signal");
      throw Failure(fmt::format("{}: has not ended {} after it got everything (--timeout)", settings_.connect,
                                program::format_time(settings_.timeout)));
    }
    return;
  }
  qemu::ReturnPathReader reader(*main_);
  for (;;) {
    const auto message = reader.next(limit, &interrupt_);
    if (!message) throw failure(message.error());
    if (!*message) {
      if (asks_for_answer())
        throw Failure("destination: closed its connection without a word: its own message says why");
      break;
    }
    if ((*message)->type != qemu::return_shut) continue;
    if ((*message)->value != 0)
      throw Failure(
          fmt::format("destination: could not load the guest (SHUT {}): its own message says why", (*message)->value));
    break;
  }
  // The guest is the destination's: what goes wrong from here on takes nothing away.
  if (sender_) static_cast<void>(sender_->close_channels());
  static_cast<void>(main_->finish());
}

Failure Load::failure(const Error& error) {
  if (interrupt_.triggered()) return Failure("cancelled by a signal");
  if (pipe_ && error.code == Condition::peer_gone) {
    // A command that has failed says why.
    static_cast<void>(pipe_->wait(1000ms, &interrupt_));
    return Failure(error, settings_.connect + ": does not take the whole stream");
  }
  if (error.code == Condition::peer_gone)
    return Failure(
        fmt::format("destination: has gone in the middle of the migration; its own message says why. Machine type, "
                    "devices, channels and "
                    "compression must be those it expects (noticed here: {})",
                    describe(error)));
  return Failure(error, "destination");
}

json Load::report(double seconds) const {
  const SenderStats stats = sender_ ? sender_->stats() : SenderStats{};
  const ChannelStats sum = total(stats.channels);
  const std::uint64_t pages = sum.normal_pages + sum.zero_pages + page_records_ + zero_records_ + left_out_;
  json report = program::report(seconds, pages * input_.page_bytes(), zero_records_, stats.channels);
  report["normal_pages"] = sum.normal_pages + page_records_;
  report["machine"] = program::printable(input_.machine_type());
  report["input"] = settings_.input;
  report["peer"] = out_.peer.name;
  report["zero_pages_mode"] = out_.zero_pages;
  report["left_out_pages"] = left_out_.load();
  report["return_path"] = asks_for_answer();
  report["tls_cipher"] = program::text_or_null(main_->cipher());
  return report;
}

program::Snapshot Load::look(double seconds) const {
  program::Snapshot now{.line = "connecting"};
  const program::AnySender* const sender = seen_;
  if (sender == nullptr && page_records_ + zero_records_ + left_out_ == 0) return now;
  const ChannelStats sum = sender == nullptr ? ChannelStats{} : sender->total();
  const std::uint64_t pages = sum.normal_pages + sum.zero_pages + page_records_ + zero_records_ + left_out_;
  const auto bytes = static_cast<double>(pages * input_.page_bytes());
  now.line = fmt::format("sent {} of {}  {:.2f} GiB/s", program::format_bytes(bytes),
                         program::format_bytes(static_cast<double>(ram_.total_bytes())), program::rate(bytes, seconds));
  now.moved = sum.wire_bytes + pages;
  now.stalled =
      "The destination's QEMU may wait for another number of channels, or be stopped: `info migrate` in its monitor "
      "says more";
  return now;
}

}  // namespace load

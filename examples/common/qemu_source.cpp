// SPDX-License-Identifier: MIT
#include "common/qemu_source.hpp"

#include "common/limits.hpp"
#include "common/progress.hpp"
#include "common/report.hpp"
#include "common/tell.hpp"

#include <fmt/format.h>
#include <poll.h>
#include <CLI/CLI.hpp>

#include <algorithm>

namespace program {
namespace {

using namespace multifd;
using namespace std::chrono_literals;

void tell_stranger(std::uint32_t first_bytes) {
  if (first_bytes == wire::main_stream_magic || first_bytes == wire::magic) {
    tell("closed a connection of another source, or of an older try of this one\n");
    return;
  }
  std::string text(4, ' ');
  wire::store_be(reinterpret_cast<std::byte*>(text.data()), first_bytes);
  tell("closed a connection that is no QEMU migration: {}\n",
       first_bytes == 0 ? "it said nothing" : fmt::format("it begins with \"{}\"", printable(text)));
}

void tell_dropped(std::size_t connections) {
  tell("closed a connection{} of a source that gave up during its setup; waiting for its next try\n",
       connections == 1 ? "" : fmt::format(" and {} more", connections - 1));
}

std::string method_name(std::uint64_t bits) {
  switch (bits) {
    case wire::flag_none: return "none";
    case wire::flag_zlib: return "zlib";
    case wire::flag_zstd: return "zstd";
    case wire::flag_qpl: return "qpl";
    case wire::flag_uadk: return "uadk";
    case wire::flag_qatzip: return "qatzip";
    default: return fmt::format("unknown method {:#x}", bits);
  }
}

/// What to do about a refusal that has a name: what of the source, or of its machine, brings it about.
std::string advice(const Error& error, std::string_view subject) {
  if (error.code == Errc::page_size_mismatch) return fmt::format(": give --page-size {}", error.detail);
  if (error.code == Errc::stream_limit_exceeded && std::string_view(error.op).contains("max_ram_bytes"))
    return fmt::format(": give --max-ram {}", error.detail);
  if (error.code == Errc::early_device_refused && subject.contains("virtio-mem"))
    return ": take the guest's virtio-mem devices away";
  if (error.code == Errc::obsolete_ram_record && subject == "XBZRLE")
    return ": switch the source's capability xbzrle off; qemu_dump takes it without multifd (--channels 0)";
  if (error.code == Errc::obsolete_ram_record && subject == "COMPRESS_PAGE")
    return ": switch the source's capability compress off";
  if (error.code == Errc::obsolete_ram_record && subject == "HOOK") return ": migrate to tcp: or unix:, not to rdma:";
  if (error.code != Errc::unknown_section) return {};
  if (subject == "dirty-bitmap") return ": switch the source's capability dirty-bitmaps off";
  if (subject == "s390-storage_attributes" || subject == "s390-skeys")
    return ": this is an s390x guest, which always sends it; its RAM cannot be taken";
  if (subject == "spapr/htab")
    return ": this is a pseries guest, which sends it unless its CPU has radix page tables; its RAM cannot be taken";
  if (subject.ends_with("/vfio")) return ": take the guest's VFIO device away";
  return ": take the device away that migrates in this way";
}

/// Whether it is an end that a connection of a source comes to when the source fails, or somebody cuts it.
bool is_loss(const Error& error) {
  const auto code = error.code;
  return code == Condition::peer_gone || code == Errc::unsynced_end || code == Errc::truncated_hello ||
         code == Errc::truncated_header || code == Errc::truncated_payload ||
         code == std::error_code(ETIMEDOUT, std::system_category());
}

}  // namespace

void SourceOptions::add_to(CLI::App& app, const std::string& prefix, FewestChannels fewest) {
  const bool plain = fewest == FewestChannels::none;
  app.add_option("--listen", listen,
                 plain
                     ? "Where the source migrates to: tcp:HOST:PORT (port 0: any) or unix:PATH; with --channels 0 also "
                       "exec:COMMAND, whose stdout is the stream, or fd:N, a descriptor that is open"
                     : "Where the source migrates to: tcp:HOST:PORT (port 0: any) or unix:PATH")
      ->required();
  app.add_option(
         "--" + prefix + "channels", channels,
         plain ? "The source's multifd-channels; 0: it migrates without multifd" : "The source's multifd-channels")
      ->check(CLI::Range(static_cast<unsigned>(fewest), multifd::max_channels))
      ->capture_default_str();
  app.add_option("--" + prefix + "compression", compression, "The source's multifd-compression")
      ->check(CLI::IsMember(compressor_names()))
      ->capture_default_str();
  app.add_option("--uuid", uuid, "Insist on the VM's uuid (default: any, the same on all channels)");
  add_duration(
      app, "--timeout", timeout,
      "Give up when not all of a source's connections have come by then, when the source has not said which RAM "
      "it has by then, or when a destination takes no connection or no byte for that long");
  limits.add_peer(app);
  tls.add_to(app, TlsSide::server, prefix);
  tls.take_bare_ends();
  add_size(app, "--page-size", page_size, "The guest's page size (x86: 4K; ARM's versatilepb and raspi3b: 1K)");
  add_size(app, "--max-ram", max_ram, "The most RAM that a source may announce");
}

void SourceOptions::prepare() {
  (void)uuid_check();
  pipe = pipe_address_of(listen, PipeUse::read, "--listen");
  if (!pipe) return tls.prepare(address_of(listen, "--listen"));
  if (channels != 0)
    throw Usage("--listen " + listen + " with channels: give --channels 0, and migrate without multifd");
  if (tls.on()) throw Usage("--listen " + listen + " with TLS: only sockets have it");
}

UuidCheck SourceOptions::uuid_check() const {
  if (uuid.empty()) return {};
  UuidCheck check{.kind = UuidCheck::Kind::exact};
  const auto parsed = parse_uuid(uuid);
  if (!parsed) throw Usage("--uuid " + uuid + ": is not 32 hexadecimal digits");
  check.uuid = *parsed;
  return check;
}

std::chrono::milliseconds SourceOptions::at_most(std::chrono::milliseconds usual) const {
  return timeout.count() == 0 ? no_timeout : std::min(usual, timeout);
}

std::chrono::milliseconds SourceOptions::at_least(std::chrono::milliseconds usual) const {
  return timeout.count() == 0 ? no_timeout : std::max(usual, timeout);
}

QemuSource::QemuSource(const SourceOptions& options, const Interrupt& interrupt)
    : options_(options),
      accept_options_{.timeout = options.timeout,
                      .interrupt = &interrupt,
                      .on_stranger = tell_stranger,
                      .on_dropped = tell_dropped},
      links_(listen()) {}

QemuSource::Links QemuSource::listen() {
  if (options_.pipe) {
    pipe_.emplace(*options_.pipe, PipeUse::read);
    tell("reading from {}\n", options_.listen);
    return {Link(pipe_->take()), {}};
  }
  listener_.emplace(need(
      Listener::listen(address_of(options_.listen, "--listen"), multifd::max_channels + 1u, options_.limits.socket()),
      "listen on " + options_.listen));
  tell_of_smaller_backlog(options_.channels + 1);
  tell("listening on {}\n", to_string(listener_->local_address()));
  const std::string at = to_string(listener_->local_address());
  const Progress waiting(
      options_.channels == 0
          ? fmt::format("waiting for a source on {}", at)
          : fmt::format("waiting for a source's main connection and {} channels on {}", options_.channels, at),
      options_.channels == 0
          ? "If the source has begun to migrate: its address must lead here"
          : fmt::format("If the source has begun to migrate: its capability multifd must be on, with multifd-channels "
                        "{}, and its address must lead here",
                        options_.channels),
      options_.limits.hint);
  return accept();
}

QemuSource::Links QemuSource::accept() {
  const auto need_links = [&]<class L>(multifd::Result<multifd::SourceLinks<L>> source) -> Links {
    if (!source) throw failure(source.error());
    if constexpr (std::same_as<L, Link>)
      return {std::move(source->main), std::move(source->channels)};
    else
      return {std::move(source->main), Link::all_of(std::move(source->channels))};
  };
  if (!options_.tls.on()) return need_links(accept_source(*listener_, options_.channels, accept_options_));
  acceptor_.emplace(options_.tls.acceptor(*listener_, 10s));
  return need_links(accept_source(*acceptor_, options_.channels, accept_options_));
}

bool QemuSource::any_more() const noexcept {
  pollfd listener{.fd = listener_->poll_handle(), .events = POLLIN, .revents = 0};
  return acceptor_->pending() || ::poll(&listener, 1, 0) == 1;
}

std::optional<std::string> QemuSource::finish(AnyReceiver* receiver) {
  if (receiver == nullptr) return std::nullopt;
  const auto finished = receiver->finish(end_limit());
  if (finished) return std::nullopt;
  if (finished.error().code != Errc::timed_out) throw failure(finished.error());
  return still_open("its channels");
}

std::chrono::milliseconds QemuSource::end_limit() const noexcept { return options_.at_most(10s); }

std::string QemuSource::still_open(const char* what) const {
  return fmt::format(
      "the source has kept {} open for {} after the end of its stream: a proxy on the way or a stopped host may be "
      "the reason, or COLO (capability x-colo), with which the source's guest stands still until it gets an "
      "x-colo-lost-heartbeat",
      what, format_time(end_limit()));
}

std::optional<std::string> QemuSource::end_command() {
  if (!pipe_ || pipe_->wait(end_limit(), accept_options_.interrupt)) return std::nullopt;
  return fmt::format("{} has not ended {} after its stream, and is ended", options_.listen, format_time(end_limit()));
}

void QemuSource::check_command() {
  if (pipe_) (void)pipe_->wait(200ms, nullptr);
}

void QemuSource::refuse_more_channels(const AnyReceiver* receiver) {
  if (pipe_) return;
  const auto is_one_more = [&](std::span<const std::byte> first) {
    // Without channels nobody knows the source's uuid: every hello may be of one that has multifd on.
    if (receiver == nullptr) return first.size() >= 4 && wire::load_be<std::uint32_t>(first.data()) == wire::magic;
    return wire::id_of_channel_too_many(first, options_.channels, receiver->peer_uuid()).has_value();
  };
  const auto refuse = [&] { throw failure(fail(Errc::too_many_channels, Stage::accept, "accept").error()); };
  if (!acceptor_) {
    const auto is_stranger = [](std::span<const std::byte> first) {
      if (first.size() < 4) return false;
      const auto number = wire::load_be<std::uint32_t>(first.data());
      if (number == wire::main_stream_magic || number == wire::magic) return false;
      tell_stranger(number);
      return true;
    };
    const auto more = listener_->any_waiting(is_one_more, is_stranger);
    if (more.value_or(false))
      refuse();  // a look that failed says nothing about the migration: the next one looks again
    return;
  }
  // All of them share the time and have a number, so that nobody holds up a migration.
  const auto deadline = std::chrono::steady_clock::now() + 200ms;
  for (unsigned looked_at = 0; looked_at < 512 && any_more(); ++looked_at) {
    auto next = acceptor_->next(deadline, accept_options_.interrupt);
    if (!next) return;     // as above; whoever was cancelled learns that elsewhere
    if (!*next) continue;  // what becomes of the source's own connections, their readers learn
    Link link(std::move((*next)->link));
    wire::InitPacketBytes hello{};
    std::size_t got = 0;
    while (got < hello.size()) {
      const iovec room = mutable_buffer(std::span(hello).subspan(got));
      const auto left = std::chrono::ceil<std::chrono::milliseconds>(deadline - std::chrono::steady_clock::now());
      const auto more = link.read_some(std::span(&room, 1), std::max(left, 0ms), nullptr);
      if (!more || *more == 0) break;
      got += *more;
    }
    if (is_one_more(std::span(hello).first(got))) refuse();
    tell_stranger((*next)->magic.value_or(0));
  }
}

Failure QemuSource::failure(const Error& error) const {
  if ((error.stage != Stage::accept || error.code == Errc::peer_closed) && is_loss(error))
    return source_lost(Failure(error).what());
  std::string context = "source";
  if (error.code == Errc::page_size_mismatch)
    context = fmt::format("the guest has pages of {} bytes, this side expects {}: give --page-size {}", error.detail,
                          options_.page_size, error.detail);
  else if (error.code == Errc::wrong_compression)
    context = fmt::format("the source compresses with {}, this side expects {}", method_name(error.detail),
                          options_.compression);
  else if (error.code == Errc::uuid_mismatch && !options_.uuid.empty())
    context = fmt::format("this side expects the VM {}", options_.uuid);
  else if (error.code == Errc::too_many_channels || error.code == Errc::channel_id_out_of_range)
    context = options_.channels == 0 ? "the source has multifd on, and --channels is 0 here"
                                     : fmt::format("this side expects {} channels", options_.channels);
  else if (error.stage == Stage::accept && error.code == Errc::timed_out)
    context = fmt::format("waited {} for the main connection and {} channels (--timeout)",
                          format_time(options_.timeout), options_.channels);
  return Failure(error, context);
}

void QemuSource::check_channels(const AnyReceiver* receiver) const {
  const auto has_ended = [](const Link& link) {
    pollfd entry{.fd = link.native_handle(), .events = POLLRDHUP, .revents = 0};
    return ::poll(&entry, 1, 0) == 1;
  };
  if (receiver != nullptr ? receiver->ended_channels() > 0 : std::ranges::any_of(links_.channels, has_ended))
    throw source_lost("a channel: closed; main connection: silent");
  const std::chrono::duration<double> limit = as_timeout(options_.timeout);
  if (receiver == nullptr && since_whole_.seconds() > limit.count())
    throw Failure(fmt::format(
        "source: has connected, but has not said within {} which RAM it has (--timeout): is it stopped, or does it "
        "hang?",
        format_time(options_.timeout)));
}

Failure source_lost(const std::string& noticed) {
  return Failure(fmt::format(
      "source: has gone in the middle of the migration; its query-migrate and its log say why (noticed here: {})",
      noticed));
}

MainStream::MainStream(Link& link, const SourceOptions& options, Hooks hooks)
    : reader_(link, need(qemu::MainStreamParser::create({.page_bytes = options.page_size,
                                                         .max_ram_bytes = options.max_ram,
                                                         .xbzrle = options.channels == 0}))),
      hooks_(std::move(hooks)),
      is_pipe_(options.pipe.has_value()) {}

std::optional<qemu::Element> MainStream::next(std::chrono::milliseconds idle) {
  for (;;) {
    const auto element = reader_.arrived();
    if (!element) {
      const std::string_view subject = parser().subject();
      throw Failure(Failure(element.error(), subject.empty()
                                                 ? "source: main stream"
                                                 : fmt::format("source: main stream: \"{}\"", printable(subject)))
                        .what() +
                    advice(element.error(), subject));
    }
    if (*element) return **element;
    if (hooks_.before_wait) hooks_.before_wait();
    for (auto left = idle;;) {
      const auto more = reader_.read(std::min<std::chrono::milliseconds>(left, 1000ms));
      if (more && !*more) return std::nullopt;
      if (more) break;
      if (more.error().code != Errc::timed_out) throw failure(more.error());
      if (left <= 1000ms) return std::nullopt;
      if (left != no_timeout) left -= 1000ms;
      if (hooks_.on_silence && hooks_.on_silence()) return std::nullopt;
    }
  }
}

Failure MainStream::failure(const Error& error) {
  const bool closed = error.code == Errc::truncated_stream;
  if (!closed && !is_loss(error)) return Failure(error, "source: main stream");
  if (is_pipe_)
    return Failure(fmt::format("source: the stream is cut off inside the {}", reader_.arrived().error().op));
  return source_lost(fmt::format("main connection: {}, inside the {}", closed ? "closed" : Failure(error).what(),
                                 reader_.arrived().error().op));
}

const char* to_string(SyncStyle style) { return style == SyncStyle::per_section ? "per-section" : "per-round"; }

std::string printable(std::string_view text) {
  std::string safe(text);
  std::ranges::replace_if(safe, [](char c) { return c < ' ' || c > '~'; }, '?');
  return safe;
}

}  // namespace program

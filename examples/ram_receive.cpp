// SPDX-License-Identifier: MIT
//
// ram_receive: the smallest real receiver. Takes one RAM block from ram_send into a file, or into memory that is
// thrown away, and checks that what arrived is what was sent.
#include <fmt/format.h>

#include <sys/socket.h>
#include <CLI/CLI.hpp>

#include "common/accept_peer.hpp"
#include "common/control.hpp"
#include "common/limits.hpp"
#include "common/mapping.hpp"
#include "common/program.hpp"
#include "common/progress.hpp"
#include "common/receive.hpp"
#include "common/report.hpp"
#include "common/stacks.hpp"
#include "common/tell.hpp"

namespace {

using namespace multifd;
using nlohmann::json;
using program::Accepted;
using program::Failure;
using program::MessageType;
using program::need;
using program::Received;

struct Settings {
  std::string listen;
  std::string file;
  bool discard = false;
  bool populate = false;
  bool populate_ahead = false;
  std::uint64_t size = 0;
  std::uint64_t socket_buffer = 0;
  unsigned channels = 0;
  std::string compression;
  std::string json_path;
  program::TimeLimits limits;
  program::Tls tls;
};

/// The memory to receive into. A file's name is reserved from the start.
struct Target {
  std::optional<program::NewFile> file;
  std::optional<program::Mapping> anonymous;

  Target(const Settings& settings, const Interrupt& interrupt) {
    if (!settings.discard) file.emplace(settings.file);
    if (!settings.populate) return;
    allocate(settings.size);
    const program::Step step("touching the memory to receive into");
    mapping().populate(&interrupt);
  }
  void allocate(std::uint64_t bytes) {
    if (file)
      file->allocate(bytes);
    else
      anonymous = program::Mapping::anonymous(bytes);
  }
  std::string digest(std::size_t page_size) {
    const program::Step step(file ? "all is here, looking through the file for zeros and for its digest"
                                  : "all is here, reading it again for its digest");
    return file ? file->make_sparse(page_size).digest : mapping().digest();
  }
  void keep() {
    if (!file) return;
    const program::Step step("the digest is right, waiting for the disk to have it all (fsync)");
    file->keep();
  }
  const program::Mapping& mapping() const { return file ? file->mapping() : *anonymous; }
};

int migrate(const Settings& settings) {
  const Interrupt& interrupt = program::catch_signals();
  const program::Stopwatch watch;
  program::JsonFile json_file(settings.json_path);
  try {
    const std::uint64_t limit = settings.size != 0 ? settings.size : program::physical_memory();
    Target target(settings, interrupt);
    SocketOptions socket = settings.limits.socket();
    socket.send_buffer_bytes = socket.receive_buffer_bytes = static_cast<int>(settings.socket_buffer);
    program::tell_of_smaller_buffers(SO_RCVBUF, settings.socket_buffer);
    const Address address = program::address_of(settings.listen, "--listen");
    auto listener = need(Listener::listen(address, multifd::max_channels + 1u, socket), "listen on " + settings.listen);
    program::tell("listening on {}\n", to_string(listener.local_address()));
    Accepted source = program::accept_peer(listener, settings.channels, interrupt, settings.limits, settings.tls);
    try {
      const auto bytes = program::field<std::uint64_t>(source.hello, "size");
      const auto page_size = program::field<std::size_t>(source.hello, "page_size");
      const auto compression = program::field<std::string>(source.hello, "compression");
      if (bytes > limit)
        throw Failure(fmt::format("the source announces {} bytes; at most {} are taken here (--size)", bytes, limit));
      if (!settings.compression.empty() && compression != settings.compression)
        throw Failure(fmt::format("the source compresses with {}, --compression here says {}", compression,
                                  settings.compression));
      if (!multifd::valid_page_bytes(page_size) || bytes == 0 || bytes % page_size != 0)
        throw Failure(fmt::format("the source announces {} bytes in pages of {}", bytes, page_size));

      if (!settings.populate) target.allocate(bytes);
      const std::span<std::byte> memory = target.mapping().bytes();
      if (memory.size() != bytes)
        throw Failure(fmt::format("the source announces {} bytes; {} were populated (--size)", bytes, memory.size()));
      RamMap ram(page_size);
      const BlockId block = need(ram.add("ram", memory));
      const program::Meter meter;
      const Received received = program::receive_ram(compression, source, ram, block, interrupt, settings.limits,
                                                     settings.populate_ahead ? Populate::ahead : Populate::off);
      const program::Spent spent = meter.spent();

      const std::string digest = target.digest(page_size);
      if (const auto theirs = program::field<std::string>(received.done, "digest"); digest != theirs) {
        // Digests or TLS have checked the wire, so this is the only reason left.
        const bool changed =
            received.done.value("changed", false) || received.stats.pages_verified > 0 || settings.tls.on();
        throw Failure(fmt::format(
            "what arrived is not what the source's file holds now: digest {}, the source says {}: {}", digest, theirs,
            changed
                ? "the file was changed while it was being sent"
                : "the file was written to while it was being sent, as a running guest does, or the data was damaged "
                  "on the way (--digest at the source tells which)"));
      }
      if (interrupt.triggered()) throw Failure(Error{.code = Errc::cancelled});
      target.keep();
      // A verified file stays, even if the source has gone before it got the result.
      const std::string verdict = json{{"ok", true}, {"digest", digest}}.dump();
      if (!source.control.send_last(MessageType::result, std::as_bytes(std::span(verdict))))
        program::tell("the source has gone before it heard that all is verified\n");
      else if (const std::string why = source.control.why_unheard(); !why.empty())
        program::tell("all is verified, but the source may not have heard it: {}\n", why);

      const ChannelStats sum = total(received.stats.channels);
      const std::uint64_t pages = sum.normal_pages + sum.zero_pages + received.main_zero_pages;
      json report = program::report(received.memory_seconds, pages * page_size, received.main_zero_pages,
                                    received.stats.channels);
      program::add_spent(report, spent);
      report["digest"] = digest;
      report["tls_cipher"] = program::text_or_null(source.control.cipher());
      report["epochs"] = received.stats.epochs;
      report["pages_verified"] = received.stats.pages_verified;
      if (settings.json_path != "-")
        program::say("received {} in {:.2f} s: {:.2f} GiB/s, {} epochs; digest {} verified{}\n",
                     program::format_bytes(static_cast<double>(pages * page_size)), received.memory_seconds,
                     report["gib_per_s"].get<double>(), received.stats.epochs, digest,
                     program::cipher_note(source.control.cipher()));
      json_file.write(report);
      return program::exit_done;
    } catch (const Failure& failure) {
      source.control.give_up(failure);
    } catch (const std::exception& error) {
      source.control.give_up(Failure(program::text_of(error)));
    }
  } catch (const std::exception& error) {
    json_file.write(program::failure_report(program::text_of(error), watch.seconds()));
    throw;
  }
}

}  // namespace

int main(int argc, char** argv) {
  Settings settings;
  CLI::App app("Receives one RAM block from ram_send into a file or into memory.", "ram_receive");
  app.add_option("--listen", settings.listen, "Where ram_send connects to: tcp:HOST:PORT (port 0: any) or unix:PATH")
      ->required();
  auto* file = app.add_option(
      "--file", settings.file,
      "Where to put the bytes; appears only when all is verified; a name that is taken is refused. Needed without "
      "--discard");
  auto* discard = app.add_flag("--discard", settings.discard, "Receive into memory and keep nothing");
  file->excludes(discard);
  app.add_flag("--populate", settings.populate, "Touch the memory before listening; --size says how much");
  app.add_flag("--populate-ahead", settings.populate_ahead,
               "A helper thread touches memory in front of the data: where cores are idle");
  program::add_size(app, "--size", settings.size, "The most that a sender may announce (0: the machine's memory)");
  program::add_size(app, "--socket-buffer", settings.socket_buffer,
                    "SO_RCVBUF of what connects (0: the kernel's choice); net.core.rmem_max at most")
      ->check(CLI::Range(0u, 1u << 30));
  app.add_option("--channels", settings.channels, "Insist on that many channels (0: whatever the sender announces)")
      ->check(CLI::Range(0u, multifd::max_channels))
      ->capture_default_str();
  app.add_option("--compression", settings.compression, "Insist on a method (default: whatever the sender announces)")
      ->check(CLI::IsMember(program::compressor_names()));
  settings.limits.add_to_receiver(app);
  settings.tls.add_to(app, program::TlsSide::server);
  app.add_option("--json", settings.json_path, "Write one JSON object to a file, or to stdout for -");
  return program::run(app, argc, argv, [&] {
    if (settings.file.empty() && !settings.discard) throw program::Usage("--file or --discard is needed");
    if (settings.populate && (settings.size == 0 || settings.size % multifd::min_page_bytes != 0))
      throw program::Usage("--populate needs --size, the exact size that will be sent");
    settings.tls.prepare(program::address_of(settings.listen, "--listen"));
    return migrate(settings);
  });
}

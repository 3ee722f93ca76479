// SPDX-License-Identifier: MIT
//
//   fuzz_seeds FOLDER   writes FOLDER/<target>/<seed> anew from the captures in tests/golden and from hand-made streams
//
// Seeds are small: of a capture's channel a few packets, with pages near the front of a block that targets have; of a
// main stream a few records of each section. What a compressed packet holds cannot be cut.
#define DOCTEST_CONFIG_IMPLEMENT  // raw_stream.hpp wants it
#include <doctest/doctest.h>

#include <sys/mman.h>

#include <filesystem>
#include <fstream>
#include <string>
#include <utility>

#include "fuzz/fuzz.hpp"
#include "fuzz/receiver_input.hpp"
#include "golden/captured.hpp"
#include "multifd/compress/zstd.hpp"
#include "multifd/format/base_digests.hpp"
#include "multifd/format/missing_pages.hpp"
#include "multifd/format/page_digests.hpp"
#include "multifd/format/page_requests.hpp"
#include "multifd/format/peer_failure.hpp"
#include "multifd/format/peer_settings.hpp"
#include "multifd/format/rejoin.hpp"
#include "multifd/image/file.hpp"
#include "multifd/image/seekable_zstd.hpp"
#include "multifd/image/seekable_zstd_writer.hpp"
#include "multifd/qemu/main_stream.hpp"
#include "multifd/qemu/return_path.hpp"
#include "support/format_vector.hpp"
#include "support/raw_stream.hpp"

namespace {

using namespace fuzz;
namespace fs = std::filesystem;
namespace qemu = multifd::qemu;

fs::path root;
constexpr std::size_t small_bytes = 4096;

void write(const std::string& target, const std::string& name, Span bytes) {
  fs::create_directories(root / target);
  std::ofstream file(root / target / name, std::ios::binary);
  file.write(reinterpret_cast<const char*>(bytes.data()), static_cast<std::streamsize>(bytes.size()));
  require(file.good(), "write a seed");
}

std::uint32_t method_of(const golden::Capture& capture) {
  const std::string& name = capture.how.at("compression");
  return name == "zlib" ? 2 : name == "zstd" ? 4 : 0;
}

bool is_sync(const Piece& piece) { return (get(piece.head, field::flags, 4) & 1) != 0; }
bool has_pages(const Piece& piece) { return get(piece.head, field::normal, 4) + get(piece.head, field::zero, 4) > 0; }

/// Few enough pages for a small file, all of them at the front of the first block.
void shrink(Piece& piece, const Format& format) {
  const auto normal = static_cast<std::size_t>(get(piece.head, field::normal, 4));
  const auto zero = static_cast<std::size_t>(get(piece.head, field::zero, 4));
  const std::size_t kept_normal = format.method == 0 ? std::min<std::size_t>(normal, 1) : normal;
  const std::size_t kept_zero = std::min<std::size_t>(zero, 6);
  piece.payload.resize(format.method == 0 ? kept_normal * format.page_bytes : piece.payload.size());
  put(piece.head, field::normal, kept_normal, 4);
  put(piece.head, field::zero, kept_zero, 4);
  if (normal > 0) put(piece.head, field::size, piece.payload.size(), 4);
  if (normal + zero > 0) set_name(piece.head, block_names[0]);
  for (std::size_t slot = 0; slot < format.slots(); ++slot)
    put(piece.head, field::offsets + 8 * slot, slot < kept_normal + kept_zero ? slot * format.page_bytes : 0, 8);
}

/// A channel's hello, its first SYNC, at least one packet with pages, more if they are small, and a SYNC.
Bytes channel_seed(const golden::Capture& capture, std::size_t channel) {
  const Format format{.page_bytes = 4096, .method = method_of(capture)};
  std::vector<Piece> pieces = take_apart(capture.channels[channel], format);
  std::vector<Piece> kept = {pieces[0], pieces[1]};
  require(is_sync(pieces[1]), "captures begin with a SYNC");
  std::size_t payload_bytes = 0;
  for (std::size_t i = 2; i < pieces.size() && kept.size() < 5 && payload_bytes < small_bytes; ++i) {
    if (!has_pages(pieces[i])) continue;
    shrink(pieces[i], format);
    payload_bytes += pieces[i].payload.size();
    kept.push_back(pieces[i]);
  }
  if (!is_sync(kept.back())) kept.push_back(make_packet(format, 1));
  return put_together(kept);
}

void receiver_seeds() {
  for (const golden::Capture& capture : golden::captures()) {
    const std::string target = "receiver_" + capture.how.at("compression");
    ReceiverInput one{.mode = ReceiverInput::sync_first, .more = 0, .streams = {}};
    one.streams[0] = channel_seed(capture, 0);
    write(target, capture.name, one.write());
    if (!capture.machine_is("8.1")) continue;
    ReceiverInput two{.mode = ReceiverInput::two_channels, .more = 0, .streams = {}};
    for (std::size_t i = 0; i < 2; ++i) two.streams[i] = channel_seed(capture, i);
    write(target, capture.name + "-two", two.write());
  }
  // By hand: what no capture has. A page of 64 KiB is too large for a seed, a zero page is not.
  const auto hand = [](const char* name, std::uint8_t mode, std::uint8_t more, const test::RawStream& stream) {
    ReceiverInput input{.mode = mode, .more = more, .streams = {}};
    append(input.streams[0], stream.bytes());
    write("receiver_none", name, input.write());
  };
  using test::Packet;
  using test::RawStream;
  const auto state = make_device_state("vfio", 1, RawStream().hello(0).bytes());
  Bytes state_bytes = state.head;
  append(state_bytes, state.payload);
  hand("page-64k", ReceiverInput::zeroed, 2 | 4,
       RawStream(65536).hello(0).packet({.idstr = "ram0", .zero = {0, 65536}}).sync());
  hand("page-1k", 0, 3,
       RawStream(1024).hello(0).packet({.idstr = "vga", .normal = {0}, .payload = test::Bytes(1024)}).sync());
  hand("device-state", ReceiverInput::device_state, 0, RawStream().hello(0).raw(state_bytes).sync().raw(state_bytes));
  hand("old-sync", ReceiverInput::manual, 0x20,
       RawStream()
           .hello(0)
           .packet({.flags = 1, .idstr = "vga", .zero = {0}, .stale = true})
           .packet({.next_packet_size = 4096, .stale = true})
           .sync());
  hand("relay-cut", 0x80 | ReceiverInput::packet_hook, 0x50,
       RawStream()
           .hello(0)
           .packet({.idstr = "pc.bios", .normal = {4096}, .zero = {0}, .payload = test::Bytes(4096)})
           .sync());
  hand("stranger", 0xc0, 0, RawStream().raw("GET / HTTP/1.1\r\n"));
}

void packet_seeds() {
  const std::uint32_t methods[] = {0, 2, 4, 32};
  for (const golden::Capture& capture : golden::captures()) {
    const Format format{.page_bytes = 4096, .method = method_of(capture)};
    const auto choice = static_cast<unsigned>(std::ranges::find(methods, format.method) - methods);
    write("init_packet", capture.name, [&] {
      Bytes bytes{std::byte(capture.channels.size())};
      append(bytes, Span(capture.channels[1]).first(64));
      return bytes;
    }());
    if (capture.name.contains("machine")) continue;
    std::vector<std::string> written;  // one of each kind
    for (Piece& piece : take_apart(capture.channels[0], format)) {
      if (piece.head.size() != format.header_bytes()) continue;
      std::string kind;
      if (get(piece.head, field::normal, 4) > 0) kind += "-data";
      if (get(piece.head, field::zero, 4) > 0) kind += "-zero";
      if (is_sync(piece)) kind += "-sync";
      if (std::ranges::find(written, kind) != written.end()) continue;
      written.push_back(kind);
      shrink(piece, format);
      Bytes bytes{std::byte(choice << 2)};
      append(bytes, piece.head);
      write("packet_header", capture.name + kind, bytes);
    }
  }
  for (unsigned choice = 1; choice < 4; ++choice) {
    const Format format{.page_bytes = page_bytes_of(choice), .method = 0};
    Bytes bytes{std::byte(choice)};
    Piece piece = make_pages(format, block_names[1], 0, 0, 1);
    append(bytes, piece.head);
    write("packet_header", "page-" + std::to_string(format.page_bytes), bytes);
  }
}

void decoder_seeds() {
  for (const golden::Capture& capture : golden::captures()) {
    const Format format{.page_bytes = 4096, .method = method_of(capture)};
    if (format.method == 0) continue;
    Bytes bytes;
    for (const Piece& piece : take_apart(capture.channels[0], format)) {
      if (piece.payload.empty() || bytes.size() > small_bytes) continue;
      append(bytes, get(piece.head, field::normal, 4), 1);
      append(bytes, bytes.size() % 2, 1);
      append(bytes, piece.payload.size(), 2);
      append(bytes, piece.payload);
    }
    write("decode_" + capture.how.at("compression"), capture.name, bytes);
  }
}

/// All elements but most records, and of the devices' state its front and a description.
Bytes main_seed(const golden::Capture& capture) {
  Bytes seed{std::byte{0}, std::byte{16}};
  auto parser = qemu::MainStreamParser::create({});
  Span left = capture.main;
  std::size_t records = 0;
  bool kept_all = true;  // records of this section: CONTINUE means the one before
  for (;;) {
    auto element = parser->next();
    require(element.has_value(), "captures are good");
    if (*element) {
      using enum qemu::ElementKind;
      const auto kind = (*element)->kind;
      if (kind == device_state) break;
      if (kind == section_start || kind == section_part || kind == section_end) records = 0;
      const bool record = kind == zero_page || kind == page;
      if (record && (++records > 2 || ((*element)->continues && !kept_all))) {
        kept_all = false;
        continue;
      }
      kept_all = kept_all || record;
      append(seed, (*element)->bytes);
    } else {
      const auto now = left.first(std::min(left.size(), parser->room().size()));
      std::ranges::copy(now, parser->room().begin());
      parser->commit(now.size());
      left = left.subspan(now.size());
    }
  }
  append(seed, std::as_bytes(std::span("\4\0\0\0\7\5timer")).first(11));
  append(seed, std::as_bytes(std::span("\0\6\0\0\0\2{}")).first(8));
  return seed;
}

void stream_seeds() {
  for (const golden::Capture& capture : golden::captures()) write("main_stream", capture.name, main_seed(capture));
  Bytes answers{std::byte{2}};
  for (const std::uint32_t value : {1u, 3u}) append(answers, qemu::encode_pong(value));
  append(answers, qemu::encode_switchover_ack());
  append(answers, qemu::encode_shut(0));
  write("return_path", "all", answers);
  Bytes failed{std::byte{0}};
  append(failed, qemu::encode_shut(1));
  write("return_path", "failed", failed);
  for (const std::size_t size : {std::size_t{1}, std::size_t{60'000}}) {
    Bytes bytes;
    append(bytes, 65536, 4);
    append(bytes, make_device_state("0000:00:03.0/vfio", 2, Bytes(size)).head);
    write("device_state", std::to_string(size), bytes);
  }
}

/// The extension of our own: its messages, and whole streams with them.
void extension_seeds() {
  namespace wire = multifd::wire;
  wire::PeerSettings settings;
  settings.features.add({.name = wire::feature_resume}).add({.name = wire::feature_page_digests, .needed = true});
  settings.channels = settings.paths = 2;
  settings.page_bytes = 4096;
  settings.compression = 2;
  settings.zero_pages = wire::ZeroPagesMode::legacy;
  settings.digest = multifd::Digest::on;
  settings.tls = false;
  settings.uuid.emplace();
  settings.session.emplace();
  settings.user = std::as_bytes(std::span(std::string_view("vmm")));
  Bytes digests;
  append(digests, wire::encode_page_digests_header(0, 4096).view());
  append(digests, multifd::digest_of(Bytes(4096)), 8);
  Bytes user;
  append(user, 4, 2);
  append(user, settings.user);
  const auto message = [](const char* name, unsigned options, Span data) {
    Bytes bytes{std::byte(options)};
    append(bytes, data);
    write("extension", name, bytes);
  };
  const auto failed = wire::encode_failed({.code = multifd::Errc::cancelled}, "cancelled by a signal");
  using Kind = wire::ExtensionKind;
  message("settings", 0, wire::encode_settings(settings).view());
  message("accepted", 1, wire::encode_settings(settings, Kind::accepted).view());
  message("failed", 0, failed.view());
  message("user-data", 1, user);
  message("page-digests", 0, digests);
  Bytes missing;
  append(missing, wire::encode_page_bitmap_header(wire::ExtensionKind::missing_pages, 0, 0).view());
  append(missing, 6, 8);
  message("missing-pages", 0, missing);
  Bytes zeros;
  append(zeros, wire::encode_page_bitmap_header(Kind::known_zeros, 0, 0).view());
  append(zeros, 6, 8);
  message("known-zeros", 0, zeros);
  message("base-wanted", 0, wire::encode_extension(Kind::base_wanted).view());
  message("base-key", 1, wire::encode_base_key({std::byte{1}}).view());
  message("base-digests", 1, wire::encode_base_digests(0, 4096, std::vector<multifd::Digest128>(2)).view());
  message("base-zeros", 1, wire::encode_base_zeros(0, 4096, 7).view());
  message("memory-follows", 0, wire::encode_memory_follows({.pages = 2, .connections = 3}).view());
  message("state-whole", 0, wire::encode_extension(Kind::state_whole, 2).view());
  message("loaded", 1, wire::encode_extension(Kind::loaded, 2).view());
  message("epoch-whole", 1, wire::encode_epoch_whole({.epoch = 1, .received = 26, .channels = {3}}).view());
  message("running", 1, wire::encode_extension(Kind::running).view());

  const test::Bytes stream = test::format_vector("extension.md", "extension_stream");
  const test::Bytes answers = test::format_vector("extension.md", "extension_answers");
  Bytes seed{std::byte{8}, std::byte{16}};
  append(seed, stream);
  append(seed, std::as_bytes(std::span("\6\0\0\0\2{}")).first(7));
  write("main_stream", "extension", seed);
  seed = {std::byte{8}, std::byte{16}};
  append(seed, test::format_vector("extension.md", "extension_missing_pages"));
  write("main_stream", "missing-pages", seed);
  seed = {std::byte{8}, std::byte{16}};
  append(seed, test::format_vector("extension.md", "extension_known_zeros"));
  write("main_stream", "known-zeros", seed);
  seed = {std::byte{8}, std::byte{16}};
  append(seed, test::format_vector("extension.md", "extension_base_wanted"));
  write("main_stream", "base-wanted", seed);
  seed = {std::byte{2}};
  append(seed, test::format_vector("extension.md", "extension_base_answers"));
  write("return_path", "base", seed);
  seed = {std::byte{2}};
  append(seed, answers);
  write("return_path", "extension", seed);
  for (const char* name : {"main", "main_answer", "channel", "channel_answer", "refused"})
    write("rejoin", name, test::format_vector("extension.md", std::string("rejoin_") + name));
}

/// Files with mapped-ram, as pieces with holes between them (mapped_ram.cpp).
void mapped_ram_seeds() {
  const test::Bytes file = test::format_vector("mapped_ram.md", "mapped_ram_file");
  const auto piece = [&](Bytes& seed, std::size_t offset, std::size_t end, Span of) {
    append(seed, offset, 3);
    append(seed, end - offset, 2);
    append(seed, of.subspan(offset, end - offset));
  };
  Bytes seed{std::byte{0}};
  append(seed, file.size(), 3);
  for (const auto& [begin, end] : {std::pair{0, 144}, {1052672, 1056768}, {1085440, 1089536}, {1114112, 1114183}})
    piece(seed, static_cast<std::size_t>(begin), static_cast<std::size_t>(end), file);
  write("mapped_ram", "vector", seed);

  // Close together, as QEMU takes it, too: two blocks, of which one is shared memory; pages of 1024 bytes.
  Bytes small;
  append(small, std::uint64_t{0x5145564d}, 4);
  append(small, 3, 4);
  append(small, 7, 1);
  append(small, 2, 4);
  append(small, std::as_bytes(std::span("pc")).first(2));
  append(small, 0x051a, 2);
  append(small, std::as_bytes(std::span("configuration/capabilities")).first(26));
  append(small, 1, 4);
  append(small, 2, 4);
  append(small, 10, 1);
  append(small, std::as_bytes(std::span("mapped-ram")).first(10));
  append(small, 15, 1);
  append(small, std::as_bytes(std::span("x-ignore-shared")).first(15));
  append(small, 1, 1);
  append(small, 1, 4);
  append(small, 3, 1);
  append(small, std::as_bytes(std::span("ram")).first(3));
  append(small, 4, 8);             // instance 0, version 4
  append(small, 5 * 1024 | 4, 8);  // total
  const auto entry = [&](char name, std::uint64_t length, std::uint64_t bitmap, std::uint64_t pages) {
    append(small, 1, 1);
    small.push_back(std::byte(name));
    append(small, length, 8);
    append(small, 0, 8);  // gpa
    append(small, 1, 4);
    append(small, 1024, 8);
    append(small, bitmap, 8);
    append(small, pages, 8);
  };
  entry('a', 3 * 1024, 200, 1024);
  small.resize(200);
  small.push_back(std::byte{5});  // pages 0 and 2
  small.resize(4096, std::byte{0x5a});
  entry('b', 2 * 1024, 0, 0);
  for (const unsigned id : {1u, 3u}) {  // the end of START, and END
    if (id == 3) append(small, 0x0300000001, 5);
    append(small, 0x10, 8);
    append(small, 0x7e00000001, 5);
  }
  append(small, 0, 1);
  seed = {std::byte{3}};
  append(seed, small.size(), 3);
  for (const auto& [begin, end] : {std::pair<std::size_t, std::size_t>{0, 208}, {1024, small.size()}})
    piece(seed, begin, end, small);
  write("mapped_ram", "two-blocks", seed);
}

/// Compressed images: whole, incremental, and another program's. In frames of the smallest size with little in them.
void image_seeds() {
  namespace image = multifd::image;
  const auto file_of = [](Span bytes) {
    auto file = image::File::adopt(::memfd_create("seed", MFD_CLOEXEC));
    require(file && file->resize(bytes.size()) && file->write(0, bytes), "make a file");
    return std::move(*file);
  };
  const auto seed = [](const char* name, unsigned options, const image::File& file) {
    Bytes bytes(1 + file.bytes(), std::byte(options));
    require(file.read(0, std::span(bytes).subspan(1)).has_value(), "read a seed");
    write("seekable_zstd", name, bytes);
  };
  Bytes content(3 * 65536 + 100, std::byte{0});
  for (std::size_t i = 0; i < 300; ++i) content[i] = content[content.size() - 100 + i % 100] = std::byte(i * i);
  const image::File empty = file_of({});
  image::File whole = file_of({});
  image::File incremental = file_of({});
  image::File nothing = file_of({});
  require(image::write_seekable_zstd(file_of(content), whole, {.frame_bytes = 65536}).has_value(), "write an image");
  const auto base = image::SeekableZstd::open(whole);
  require(base.has_value(), "open an image");
  content[65536] = std::byte{1};
  require(image::write_seekable_zstd(file_of(content), incremental, {.frame_bytes = 65536, .base = &*base}).has_value(),
          "write an incremental image");
  require(image::write_seekable_zstd(empty, nothing).has_value(), "write an empty image");
  seed("whole", 0, whole);
  seed("whole-mended", 1, whole);
  seed("incremental", 2, incremental);
  seed("incremental-mended", 3, incremental);
  seed("empty", 1, nothing);

  // Another program's: the same frames with a seek table of its own.
  Bytes foreign;
  const std::uint64_t stored = base->table().stored_count();
  const std::uint64_t frames_end = base->table().place(stored - 1).end();
  foreign.resize(frames_end);
  require(whole.read(0, foreign).has_value(), "read the frames");
  using multifd::wire::SeekFooter;
  append(foreign, multifd::wire::encode_skippable_header(
                      {multifd::wire::seek_table_frame_magic,
                       static_cast<std::uint32_t>(SeekFooter{.entries = unsigned(stored)}.table_bytes() - 8)}));
  for (std::uint64_t i = 0; i < stored; ++i)
    append(foreign, multifd::wire::encode_seek_entry(
                        {.frame_bytes = static_cast<std::uint32_t>(base->table().place(i).bytes),
                         .content_bytes = static_cast<std::uint32_t>(base->table().content(i).bytes),
                         .checksum = base->table().checksum(i)}));
  append(foreign, multifd::wire::encode_seek_footer(static_cast<std::uint32_t>(stored)));
  foreign.insert(foreign.begin(), std::byte{0});
  write("seekable_zstd", "foreign", foreign);
}

void xbzrle_seeds() {
  constexpr std::string_view changes(
      "\x00\x02"
      "ab"
      "\x81\x01\x03"
      "cde",
      10);
  Bytes seed{std::byte{0}, std::byte{0}, std::byte{changes.size()}};
  append(seed, std::as_bytes(std::span(changes)));
  seed.resize(seed.size() + 200, std::byte{'p'});
  write("xbzrle", "two-runs", seed);

  // RAM of a page in a stream: the page, and then what changes.
  seed = {std::byte{16}, std::byte{99}};
  const auto put = [&](std::string_view text) { append(seed, std::as_bytes(std::span(text))); };
  using namespace std::string_view_literals;
  put("QEVM\0\0\0\3\1\0\0\0\2\3ram\0\0\0\0\0\0\0\4"sv);
  put("\0\0\0\0\0\0\x10\4\1a\0\0\0\0\0\0\x10\0\0\0\0\0\0\0\0\x10~\0\0\0\2\2\0\0\0\2"sv);
  put("\0\0\0\0\0\0\0\2\1a\0"sv);
  put("\0\0\0\0\0\0\0\x60\1\0\x0a"sv);
  put(changes);
  put("\0\0\0\0\0\0\0\x10"sv);
  write("main_stream", "xbzrle", seed);
}

void page_seeds() {
  namespace wire = multifd::wire;
  const auto ask = [](std::string_view idstr, std::uint64_t page, std::uint32_t pages) {
    return wire::encode_page_request(
        {.kind = wire::PageRequestKind::pages, .idstr = idstr, .start = page * 4096, .bytes = pages * 4096});
  };
  Bytes seed{std::byte{0}, std::byte{0}};
  append(seed, ask("pc.ram", 0, 24).view());
  append(seed, ask("", 3, 1).view());
  append(seed, ask("b", 0, 1).view());
  append(seed, wire::encode_page_request({.kind = wire::PageRequestKind::whole}).view());
  write("page_server", "all", seed);
  Bytes whole{std::byte{7}, std::byte{1}};
  append(whole, wire::encode_page_hello({.page_bytes = 4096, .kind = 1}));
  append(whole, Span(seed).subspan(2, 40));
  write("page_server", "hello", whole);
  write("page_server", "text", test::format_vector("page_requests.md", "page_client"));
  seed.resize(2);
  append(seed, ask("pc.ram", 23, 2).view());
  write("page_server", "behind", seed);

  // Answers: page 1 normal, page 2 zero; page 9 zero; a reason.
  for (const bool zstd : {false, true}) {
    Bytes answers{std::byte{zstd}, std::byte{3}};
    for (const int number : {1, 1, 9, 0, 5, 0}) answers.push_back(std::byte(number));
    Bytes header(wire::header_bytes(4096));
    const auto packet = [&](std::uint32_t normal, std::uint32_t zero, std::uint32_t payload) {
      wire::encode_header(header.data(), {.flags = zstd ? wire::flag_zstd : 0,
                                          .pages_alloc = 128,
                                          .normal_pages = normal,
                                          .zero_pages = zero,
                                          .next_packet_size = payload,
                                          .idstr = "pc.ram"});
    };
    Bytes page(4096, std::byte{'p'});
    Bytes payload = page;
    if (zstd) {
      auto encoder = multifd::Zstd::Encoder::open({}, {});
      const iovec pages = multifd::const_buffer(Span(page));
      const auto encoded = encoder->encode(multifd::ConstBuffers(&pages, 1));
      require(encoded.has_value(), "encode");
      payload.clear();
      for (const iovec& part : *encoded)
        append(payload, Span(static_cast<const std::byte*>(part.iov_base), part.iov_len));
    }
    packet(1, 1, static_cast<std::uint32_t>(payload.size()));
    wire::store_offset(header.data(), 0, 4096);
    wire::store_offset(header.data(), 1, 8192);
    append(answers, header);
    append(answers, payload);
    packet(0, 1, 0);
    wire::store_offset(header.data(), 0, 9 * 4096);
    append(answers, header);
    append(answers, wire::encode_page_failed(
                        multifd::fail(multifd::Errc::truncated_image, multifd::Stage::read).error(), "no more")
                        .view());
    write("page_client", zstd ? "zstd" : "none", answers);
  }
  const Bytes text = test::format_vector("page_requests.md", "page_server_failed");
  Bytes failed(8, std::byte{2});
  append(failed, text);
  write("page_client", "failed", failed);
}

}  // namespace

int main(int argc, char** argv) {
  if (argc != 2) {
    std::fprintf(stderr, "usage: fuzz_seeds FOLDER\n");
    return 2;
  }
  root = argv[1];
  receiver_seeds();
  packet_seeds();
  decoder_seeds();
  stream_seeds();
  extension_seeds();
  mapped_ram_seeds();
  image_seeds();
  xbzrle_seeds();
  page_seeds();
}

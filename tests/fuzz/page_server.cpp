// SPDX-License-Identifier: MIT
//
// What a client says to a page server. Input: u8 size of the reads, u8 even: a hello that fits is put in front; then the
// bytes.
#include "multifd/postcopy/page_server.hpp"

#include <memory>
#include <string>

#include "fuzz/fuzz.hpp"
#include "fuzz/page_script.hpp"

namespace {

using namespace fuzz;
using namespace multifd;
using namespace multifd::postcopy;

constexpr std::size_t ram_pages = 24;
constexpr std::size_t bios_pages = 1;

/// One for all inputs, as a server is one for all clients.
struct Served {
  Served() {
    for (std::size_t page = 0; page < ram_pages; page += 3) ram[page * 4096 + 5] = std::byte{1};
    require(map.add("pc.ram", ram).has_value() && map.add("b", bios).has_value(), "add a block");
    guest = std::move(*GuestPages::open(map));
    server = std::move(*PageServer<PageScript>::open(*guest, {.digest = Digest::on}));
  }
  Bytes ram = Bytes(ram_pages * 4096);
  Bytes bios = Bytes(bios_pages * 4096, std::byte{9});
  RamMap map;
  std::unique_ptr<GuestPages> guest;
  std::unique_ptr<PageServer<PageScript>> server;
};

struct Said {
  std::string text;
  Bytes written;
};

Said serve(Served& served, Span input, std::size_t piece) {
  Said said;
  const auto ended = served.server->serve(PageScript(input, piece, &said.written));
  if (!ended) {
    Error error = ended.error();
    error.channel = no_channel;  // counts connections
    said.text = describe(error);
    const bool the_clients = error.code == Condition::peer_protocol || error.code == Condition::peer_gone;
    require(the_clients, "every error is the client's");
  }
  return said;
}

/// Holds what was written against the format: greeting, blocks, packets of pages that are in the guest, a last word.
void check_written(const Served& served, Span bytes) {
  Reader in(bytes);
  require(in.number(4) == wire::page_server_magic, "a greeting comes first");
  in.take(wire::page_greeting_bytes - 4);
  while (!in.empty()) {
    const Span rest = Reader(in).rest();  // a copy's: nothing is taken
    const std::uint32_t magic = in.number(4);
    if (magic == wire::page_whole_magic) {
      require(in.empty(), "the last word is the last one");
    } else if (magic == wire::page_failed_magic) {
      const auto size = wire::parse_page_failed_size(rest.data());
      in.number(2);
      require(size && wire::parse_page_failed(in.take(*size)) && in.empty(), "a reason is whole, and the last word");
    } else if (magic == wire::page_accepted_magic) {
      in.number(4);
      const std::uint32_t list = in.number(4);
      in.take(list);
    } else {
      const auto header = wire::parse_header(rest.first(wire::header_bytes(4096)), {});
      require(header && header->has_pages() && header->has_digest == (header->normal_pages > 0),
              "an answer is a packet with pages, and a digest of their bytes");
      in.take(wire::header_bytes(4096) - 4);
      const Bytes& memory = header->idstr == "b" ? served.bios : served.ram;
      for (std::size_t i = 0; i < header->normal_pages + header->zero_pages; ++i) {
        const std::uint64_t offset = wire::load_offset(rest.data(), i);
        require(offset % 4096 == 0 && offset < memory.size(), "a page of the guest");
        const Span page = Span(memory).subspan(offset, 4096);
        if (i < header->normal_pages)
          require(std::ranges::equal(in.take(4096), page), "the bytes of that page");
        else
          require(std::ranges::all_of(page, [](std::byte b) { return b == std::byte{0}; }), "a zero page is zero");
      }
    }
  }
}

void test(Span input) {
  static Served served;
  Reader in(input);
  const std::size_t piece = 1 + in.u8();
  Bytes bytes;
  if (in.u8() % 2 == 0) append(bytes, wire::encode_page_hello({.page_bytes = 4096}));
  append(bytes, in.rest());
  if (bytes.size() > 4096) bytes.resize(4096);  // each 16 bytes may be a request for the whole guest
  const Said whole = serve(served, bytes, 1 << 20);
  const Said pieces = serve(served, bytes, piece);
  require(whole.text == pieces.text, "the sizes of reads play no part");
  check_written(served, whole.written);
  check_written(served, pieces.written);
  require(whole.written.size() == pieces.written.size(), "the same answers");
}

const Register registered({.name = "page_server", .test = test});

}  // namespace

// SPDX-License-Identifier: MIT
//
// The extension on the main stream and on the return path (format/extension.md section 19): what a destination and a
// source take, in which order, and what they refuse.
#include "multifd/qemu/return_path.hpp"
#include "support/basics.hpp"
#include "support/format_vector.hpp"
#include "unit/qemu/stream.hpp"

using namespace multifd;
using namespace multifd::qemu;
using test::Bytes;
using test::page;
using test::Stream;

namespace {

constexpr MainStreamLimits with_extension{.extension = true};

void check_order(const Stream& stream, std::uint64_t kind, std::string_view name) {
  test::check_refused(stream, Errc::unexpected_extension_message, kind, name, with_extension);
}

/// What a source makes of a destination's bytes, as text: "PONG ACCEPTED ... SHUT(0)".
std::string heard(const Bytes& bytes, std::size_t most, bool take_extension = true) {
  ReturnPathParser parser;
  std::string text;
  for (std::size_t at = 0;;) {
    const auto message = parser.next();
    if (!message) {
      CHECK(parser.room().empty());
      CHECK_FALSE(parser.next().has_value());
      return text + "refused: " + message.error().code.message();
    }
    if (*message) {
      switch ((*message)->type) {
        case return_pong:
          if (take_extension && wire::version_in_pong((*message)->value)) parser.take_extension();
          text += "PONG ";
          break;
        case wire::extension_number: text.append(wire::extension_name((*message)->message.kind)) += " "; break;
        case return_shut: text += "SHUT(" + std::to_string((*message)->value) + ")"; break;
        default: text += "? ";
      }
      continue;
    }
    if (at == bytes.size()) return text;
    const auto room = parser.room();
    REQUIRE_FALSE(room.empty());
    const std::size_t n = std::min({most, room.size(), bytes.size() - at});
    std::copy_n(bytes.begin() + static_cast<std::ptrdiff_t>(at), n, room.begin());
    parser.commit(n);
    at += n;
  }
}

/// A return path by hand, behind the answer to the question.
struct Answers : Stream {
  Answers() { be(4, 0x00020004).be(4, 0x6d668001); }
  Answers& answer(unsigned kind, const Bytes& body = {}) {
    be(2, 0x6d66).be(2, 2 + body.size()).be(2, kind).append(body);
    return *this;
  }
  Answers& accepted() { return answer(2, Stream().be(4, 0x01010100).bytes); }
  Answers& epoch(std::uint64_t epoch) { return answer(5, Stream().be(8, epoch).append(Bytes(40)).bytes); }
  Answers& loaded() { return answer(9, Stream().be(8, 0).bytes); }
  Answers& running() { return answer(11); }
  Answers& failed() { return answer(3, Stream().be(2, 0x0300).be(8, 0).be(8, 0).be(8, 0).bytes); }
  Answers& user() { return answer(4, Stream().text("u").bytes); }
};

std::string refused(Errc code) { return "refused: " + make_error_code(code).message(); }

}  // namespace

TEST_CASE("An own source's stream is cut into its sections, however it arrives, and every byte belongs to an element") {
  const Stream stream = test::own_stream();
  test::Rng rng(test::seed());
  const auto whole = test::parse(stream.bytes, {}, with_extension);
  CHECK(whole.code == std::error_code{});
  CHECK(whole.bytes == stream.bytes);
  using Events = std::vector<std::string>;
  const auto behind_ram = std::ranges::find(whole.events, "USER_DATA");
  CHECK(Events(behind_ram, whole.events.end()) ==
        Events{"USER_DATA", "SECTION_SIZE", "device timer 9 4", "devices", "footer 9", "PAGE_DIGESTS", "SECTION_SIZE",
               "device cpu 10 0", "footer 10", "STATE_WHOLE", "HAND_OVER", "end of stream", "description"});
  for (const std::size_t most : {1u, 2u, 3u, 17u, 64u}) {
    const auto split = test::parse(stream.bytes, {.most = most, .rng = most > 3 ? &rng : nullptr}, with_extension);
    CHECK(split.events == whole.events);
    CHECK(split.bytes == stream.bytes);
    CHECK(split.code == std::error_code{});
  }
}

TEST_CASE("Missing pages are named right behind RAM, and the devices come once all of them are") {
  Stream stream = Stream().own_ram().missing_pages(0, 0, {1, 0, 3}).message(4, Stream().text("u").bytes);
  stream.missing_pages(1, 0, {2}).memory_follows(4).sized("cpu", "x").state_whole(1).hand_over();
  const auto whole = test::parse(stream.be(1, 0).bytes, {}, with_extension);
  CHECK(whole.code == std::error_code{});
  CHECK(whole.bytes == stream.bytes);
  using Events = std::vector<std::string>;
  const auto behind_ram = std::ranges::find(whole.events, "MISSING_PAGES");
  CHECK(Events(behind_ram, whole.events.end()) == Events{"MISSING_PAGES", "USER_DATA", "MISSING_PAGES",
                                                         "MEMORY_FOLLOWS", "SECTION_SIZE", "device cpu 9 1", "devices",
                                                         "footer 9", "STATE_WHOLE", "HAND_OVER", "end of stream"});
}

TEST_CASE("Known zeros stand between the sections of RAM, and change nothing of the order of what comes behind RAM") {
  Stream stream = Stream().header().configuration().ask().settings().start().two_blocks().flush().eos().footer();
  stream.known_zeros(0, 0, 3).known_zeros(1, 0, 1).part().flush().eos().footer().known_zeros(0, 0, 1);
  stream.end().flush().eos().footer().missing_pages(1, 0, {2}).memory_follows(1).sized("cpu", "x").state_whole(1);
  const auto whole = test::parse(stream.hand_over().be(1, 0).bytes, {}, with_extension);
  CHECK(whole.code == std::error_code{});
  CHECK(std::ranges::count(whole.events, "KNOWN_ZEROS") == 3);
  CHECK(std::ranges::count(whole.events, "MEMORY_FOLLOWS") == 1);
}

TEST_CASE("An own source's stream that ends at any byte is truncated, but behind the end mark and the description") {
  const Stream stream = test::own_stream();
  const std::size_t end_mark = stream.bytes.size() - 5 - Stream::description.size();
  for (std::size_t size = 0; size <= stream.bytes.size(); ++size) {
    CAPTURE(size);
    const Bytes part(stream.bytes.begin(), stream.bytes.begin() + static_cast<std::ptrdiff_t>(size));
    const bool ends = size == end_mark || size == stream.bytes.size();
    CHECK(test::parse(part, {.most = size % 2 == 0 ? SIZE_MAX : 13}, with_extension).code ==
          (ends ? std::error_code{} : std::error_code(Errc::truncated_stream)));
  }
}

TEST_CASE("Nobody is shown a message who has not asked, and nobody takes one from whom he has not heard the question") {
  const auto unasked = [](const Stream& stream, const MainStreamLimits& limits) {
    test::check_refused(stream, Errc::unknown_command, 0x6d66, "", limits);
  };
  unasked(Stream().header().configuration().ask().settings(), {});  // a destination that does not take it
  unasked(Stream().header().configuration().settings(), with_extension);
  unasked(Stream().header().configuration().command(1).ping(1).settings(), with_extension);
  unasked(Stream().header().configuration().command(1).ping(0x6d668001).settings(), with_extension);
  unasked(Stream().header().configuration().ping(0x6d660001).settings(), with_extension);  // without a return path
  // A source that asked, and got no for an answer, goes on in QEMU's stream; its devices are opaque.
  Stream plain = Stream().header().configuration().ask().start().two_blocks().flush().eos().footer();
  plain.end().flush().eos().footer().devices();
  const auto outcome = test::parse(plain.bytes, {}, with_extension);
  CHECK(outcome.code == std::error_code{});
  CHECK(outcome.events.back() == "devices");
  CHECK(outcome.bytes == plain.bytes);
}

TEST_CASE("A destination answers the question where it takes the extension, and every other PING as a QEMU does") {
  const auto answers = [](const Stream& stream, const MainStreamLimits& limits) {
    auto parser = MainStreamParser::create(limits);
    REQUIRE(parser.has_value());
    std::ranges::copy(stream.bytes, parser->room().begin());
    parser->commit(stream.bytes.size());
    std::vector<std::uint32_t> values;
    for (;;) {
      const auto element = parser->next();
      REQUIRE(element.has_value());
      if (!*element) return std::pair(values, parser->commands().asked());
      if ((*element)->command == command_ping)
        values.push_back(parser->commands().answer(wire::load_be<std::uint32_t>((*element)->data.data())));
    }
  };
  const Stream stream = Stream().header().configuration().command(1).ping(1).ping(0x6d660003).ping(0x6d668001);
  const auto [own, asked] = answers(stream, with_extension);
  CHECK(own == std::vector<std::uint32_t>{1, 0x6d668001, 0x6d668001});
  CHECK(asked == 3);
  const auto [plain, not_asked] = answers(stream, {});
  CHECK(plain == std::vector<std::uint32_t>{1, 0x6d660003, 0x6d668001});
  CHECK_FALSE(not_asked);
}

TEST_CASE("Refused: messages out of order (section 19.3)") {
  const auto ahead = [] { return Stream().header().configuration().ask(); };
  const auto ram = [] { return Stream().own_ram(); };
  check_order(ahead().message(4, Stream().text("u").bytes), 4, "USER_DATA");
  check_order(ahead().section_size(1), 6, "SECTION_SIZE");
  check_order(ahead().settings().settings(), 1, "SETTINGS");
  check_order(ahead().settings().section_size(1), 6, "SECTION_SIZE");
  check_order(ahead().settings().page_digests(0, 0, 1), 7, "PAGE_DIGESTS");
  check_order(ahead().settings().state_whole(0), 8, "STATE_WHOLE");
  check_order(ahead().settings().hand_over(), 10, "HAND_OVER");
  check_order(ahead().start().two_blocks().flush().eos().footer().settings(), 1, "SETTINGS");
  check_order(ram().hand_over(), 10, "HAND_OVER");
  check_order(ram().state_whole(1), 8, "STATE_WHOLE");
  check_order(ram().sized("cpu", "x").state_whole(0), 8, "STATE_WHOLE");
  check_order(ram().sized("cpu", "x").state_whole(2), 8, "STATE_WHOLE");
  check_order(ram().state_whole(0).state_whole(0), 8, "STATE_WHOLE");
  check_order(ram().state_whole(0).section_size(0), 6, "SECTION_SIZE");
  check_order(ram().state_whole(0).page_digests(0, 0, 1), 7, "PAGE_DIGESTS");
  check_order(ram().state_whole(0).hand_over().hand_over(), 10, "HAND_OVER");
  check_order(ram().section_size(1).section_size(1), 6, "SECTION_SIZE");
  check_order(ram().section_size(1).message(4, Stream().text("u").bytes), 4, "USER_DATA");
  check_order(ram().section_size(1).state_whole(0), 8, "STATE_WHOLE");
  check_order(ahead().missing_pages(0, 0, {1}), 12, "MISSING_PAGES");
  check_order(ahead().settings().missing_pages(0, 0, {1}), 12, "MISSING_PAGES");
  check_order(ahead().settings().memory_follows(0), 13, "MEMORY_FOLLOWS");
  check_order(ram().sized("cpu", "x").missing_pages(0, 0, {1}), 12, "MISSING_PAGES");
  check_order(ram().sized("cpu", "x").memory_follows(0), 13, "MEMORY_FOLLOWS");
  check_order(ram().page_digests(0, 0, 1).missing_pages(0, 0, {1}), 12, "MISSING_PAGES");
  check_order(ram().missing_pages(0, 0, {1}).section_size(1), 6, "SECTION_SIZE");
  check_order(ram().missing_pages(0, 0, {1}).page_digests(0, 0, 1), 7, "PAGE_DIGESTS");
  check_order(ram().missing_pages(0, 0, {1}).state_whole(0), 8, "STATE_WHOLE");
  check_order(ram().memory_follows(0).memory_follows(0), 13, "MEMORY_FOLLOWS");
  check_order(ram().memory_follows(0).missing_pages(0, 0, {1}), 12, "MISSING_PAGES");
  check_order(ram().memory_follows(0).page_digests(0, 0, 1), 7, "PAGE_DIGESTS");
  check_order(ram().memory_follows(0).sized("cpu", "x").page_digests(0, 0, 1), 7, "PAGE_DIGESTS");
  check_order(ram().state_whole(0).memory_follows(0), 13, "MEMORY_FOLLOWS");
  const auto inside = [&] { return ahead().settings().start().two_blocks().flush().eos().footer(); };
  check_order(ahead().known_zeros(0, 0, 1), 14, "KNOWN_ZEROS");
  check_order(ahead().settings().known_zeros(0, 0, 1), 14, "KNOWN_ZEROS");
  check_order(ahead().start().two_blocks().flush().eos().footer().known_zeros(0, 0, 1), 14, "KNOWN_ZEROS");
  check_order(inside().missing_pages(0, 0, {1}), 12, "MISSING_PAGES");
  check_order(ram().known_zeros(0, 0, 1), 14, "KNOWN_ZEROS");
  check_order(ram().missing_pages(0, 0, {1}).known_zeros(0, 0, 1), 14, "KNOWN_ZEROS");
  check_order(ahead().base_wanted(), 15, "BASE_WANTED");
  check_order(ahead().settings().base_wanted(), 15, "BASE_WANTED");
  check_order(ahead().start().two_blocks().flush().eos().footer().base_wanted(), 15, "BASE_WANTED");
  check_order(inside().base_wanted().base_wanted(), 15, "BASE_WANTED");
  check_order(ram().base_wanted(), 15, "BASE_WANTED");
  check_order(ram().full("cpu"), 0, "cpu");
  check_order(ram().be(1, 0), 0, "");
  check_order(ram().state_whole(0).be(1, 0), 0, "");
  check_order(ram().section_size(0).be(1, 0), 0, "");
  const Bytes failed = Stream().be(2, 0x0300).be(8, 0).be(8, 0).be(8, 0).bytes;
  check_order(ahead().message(3, failed).settings(), 1, "SETTINGS");
  check_order(ram().message(3, failed).message(3, failed), 3, "FAILED");
  for (const unsigned kind : {2u, 5u, 9u, 11u, 16u, 17u, 18u}) {  // those for a source
    const Bytes body(kind == 11 ? 0 : 8);
    const auto outcome = test::parse(ram().message(kind, body).bytes, {}, with_extension);
    CHECK(outcome.code == Errc::unexpected_extension_message);
  }
}

TEST_CASE("Refused: messages and sections out of their bounds (section 16, row 27)") {
  const auto ram = [] { return Stream().own_ram(); };
  const auto refuse = [](const Stream& stream, Errc code, std::uint64_t detail, std::string_view subject = {},
                         const MainStreamLimits& limits = with_extension) {
    test::check_refused(stream, code, detail, subject, limits);
  };
  const auto bad = [](const Stream& stream) {
    for (const std::size_t most : {SIZE_MAX, std::size_t{1}})
      CHECK(test::parse(stream.bytes, {.most = most}, with_extension).code == Errc::bad_extension_message);
  };
  refuse(ram().be(1, 8).be(2, 0x6d66).be(2, 16385), Errc::bad_extension_message, 16385);
  refuse(ram().be(1, 8).be(2, 0x6d66).be(2, 65535), Errc::bad_extension_message, 65535);
  bad(ram().command(0x6d66));
  bad(ram().command(0x6d66, Bytes(1)));
  bad(ram().message(19));
  bad(Stream().header().configuration().ask().settings().start().two_blocks().flush().eos().footer().message(15,
                                                                                                             Bytes(1)));
  bad(ram().message(12, Bytes(19)));
  bad(ram().message(13, Bytes(25)));
  bad(ram().message(13, Bytes(27)));
  bad(ram().message(6, Bytes(7)));
  CHECK(test::parse(ram().message(4, Bytes(16382)).bytes, {}, with_extension).code == Errc::truncated_stream);
  const std::uint64_t most = with_extension.max_section_bytes;
  refuse(ram().section_size(most + 1), Errc::stream_limit_exceeded, most + 1);
  refuse(ram().section_size(~std::uint64_t{0}), Errc::stream_limit_exceeded, ~std::uint64_t{0});
  CHECK(test::parse(ram().section_size(most).full("cpu").text("x").bytes, {}, with_extension).code ==
        Errc::truncated_stream);
  refuse(ram().section_size(1).full(""), Errc::unexpected_element, 0);
}

TEST_CASE("Refused: a device's section without its footer, and anything behind the end, of an own source") {
  const auto refuse = [](const Stream& stream, Errc code, std::uint64_t detail, std::string_view subject = {},
                         const MainStreamLimits& limits = with_extension) {
    test::check_refused(stream, code, detail, subject, limits);
  };
  const auto ram = [] { return Stream().own_ram(); };
  const auto end = [&] { return ram().state_whole(0).hand_over().be(1, 0); };
  refuse(ram().section_size(1).full("cpu").text("x").be(1, 4).be(4, 9), Errc::bad_footer, 4);
  refuse(ram().section_size(1).full("cpu").text("x").footer(8), Errc::bad_footer, 8);
  refuse(ram().sized("cpu", "x").be(1, 1), Errc::unexpected_element, 1);
  refuse(ram().sized("cpu", "x").be(1, 0x7e), Errc::unexpected_element, 0x7e);
  refuse(end().be(1, 0), Errc::unexpected_element, 0);
  refuse(end().be(1, 8), Errc::unexpected_element, 8);
  refuse(end().be(1, 6).be(4, 2).text("{}x"), Errc::unexpected_element, 'x');
  refuse(end().be(1, 6).be(4, 17), Errc::stream_limit_exceeded, 17, "",
         {.extension = true, .max_description_bytes = 16});
  CHECK(test::parse(end().be(1, 6).be(4, 0).bytes, {}, with_extension).code == std::error_code{});
  // A QEMU's commands may stand between the sections.
  CHECK(test::parse(ram().command(11).sized("cpu", "x").ping(3).bytes, {}, with_extension).code ==
        Errc::truncated_stream);
}

TEST_CASE("Twenty thousand broken streams of an own source: no crash, no loop, the same outcome however they arrive") {
  test::Rng rng(test::seed());
  const Bytes good = test::own_stream().bytes;
  std::size_t refused_streams = 0;
  for (int round = 0; round < 20000; ++round) {
    Bytes bytes = good;
    for (std::uint64_t changes = 1 + rng() % 3; changes > 0; --changes) {
      const auto at = static_cast<std::ptrdiff_t>(test::below(rng, bytes.size()));
      switch (rng() % 3) {
        case 0: bytes[static_cast<std::size_t>(at)] = static_cast<std::byte>(rng()); break;
        case 1: bytes.erase(bytes.begin() + at); break;
        case 2: bytes.insert(bytes.begin() + at, static_cast<std::byte>(rng() % 16)); break;
      }
    }
    INFO("seed ", test::seed(), ", round ", round);
    const auto whole = test::parse(bytes, {}, with_extension);
    CHECK(std::equal(whole.bytes.begin(), whole.bytes.end(), bytes.begin()));
    refused_streams += whole.code != std::error_code{};
    if (round % 8 != 0) continue;
    const auto split = test::parse(bytes, {.most = 64, .rng = &rng}, with_extension);
    CHECK(split.events == whole.events);
    CHECK(split.code == whole.code);
    CHECK(split.detail == whole.detail);
  }
  CHECK(refused_streams > 12000);
}

TEST_CASE("A source takes an own destination's messages, and only behind its answer to the question") {
  const Bytes vector = test::format_vector("extension.md", "extension_answers");
  for (const std::size_t most : {std::size_t{1}, std::size_t{5}, SIZE_MAX}) {
    CHECK(heard(vector, most) == "PONG ACCEPTED EPOCH_WHOLE EPOCH_WHOLE EPOCH_WHOLE LOADED USER_DATA RUNNING SHUT(0)");
    CHECK(heard(vector, most, false) == "PONG " + refused(Errc::unknown_return_message));
    CHECK(heard(test::format_vector("extension.md", "extension_failed"), most) == "PONG FAILED SHUT(1)");
    CHECK(heard(test::format_vector("extension.md", "extension_base_answers"), most) ==
          "PONG ACCEPTED BASE_KEY BASE_DIGESTS BASE_ZEROS ");
  }
  const Bytes unasked(vector.begin() + 8, vector.end());
  CHECK(heard(unasked, SIZE_MAX) == refused(Errc::unknown_return_message));
  // An epoch need not be told each, and a message of exactly four bytes is no number.
  CHECK(heard(Answers().accepted().epoch(3).epoch(9).user().answer(4, Bytes(2)).loaded().running().bytes, 1) ==
        "PONG ACCEPTED EPOCH_WHOLE EPOCH_WHOLE USER_DATA USER_DATA LOADED RUNNING ");
}

TEST_CASE("Refused on the return path: messages out of order or out of their bounds (section 19.3)") {
  const std::string out_of_order = refused(Errc::unexpected_extension_message);
  const auto last = [](const Stream& stream) {
    const std::string text = heard(stream.bytes, 3);
    CHECK(text == heard(stream.bytes, SIZE_MAX));
    return text.substr(std::min(text.size(), text.find("refused")));
  };
  for (const Stream& stream : {Answers().epoch(0),
                               Answers().loaded(),
                               Answers().running(),
                               Answers().user(),
                               Answers().accepted().accepted(),
                               Answers().accepted().running(),
                               Answers().accepted().epoch(4).epoch(4),
                               Answers().accepted().epoch(4).epoch(3),
                               Answers().accepted().loaded().loaded(),
                               Answers().accepted().loaded().epoch(1),
                               Answers().accepted().loaded().running().running(),
                               Answers().failed().failed(),
                               Answers().failed().accepted(),
                               Answers().accepted().failed().user(),
                               Answers().answer(1, Bytes(4)),
                               Answers().answer(10),
                               Answers().answer(15),
                               Answers().answer(16, Bytes(16)),
                               Answers().accepted().answer(17, Bytes(28)),
                               Answers().accepted().answer(18, Bytes(20)),
                               Answers().accepted().answer(16, Bytes(16)).answer(16, Bytes(16)),
                               Answers().accepted().loaded().answer(16, Bytes(16)),
                               Answers().accepted().answer(16, Bytes(16)).loaded().answer(17, Bytes(28))})
    CHECK(last(stream) == out_of_order);
  const std::string bad = refused(Errc::bad_extension_message);
  CHECK(last(Answers().answer(19)) == bad);
  CHECK(last(Answers().accepted().answer(16, Bytes(15))) == bad);
  CHECK(last(Answers().accepted().answer(16, Bytes(16)).answer(17, Bytes(27))) == bad);
  CHECK(last(Answers().accepted().answer(16, Bytes(16)).answer(17, Bytes(509))) == bad);
  CHECK(last(Answers().accepted().answer(16, Bytes(16)).answer(18, Bytes(21))) == bad);
  CHECK(last(Answers().accepted().answer(9, Bytes(7))) == bad);
  CHECK(last(Answers().accepted().answer(5, Bytes(8))) == bad);
  CHECK(last(Answers().answer(2, Bytes(3))) == bad);
  CHECK(last(Stream(Answers()).be(2, 0x6d66).be(2, 0)) == bad);
  CHECK(last(Stream(Answers()).be(2, 0x6d66).be(2, 513)) == refused(Errc::bad_return_length));
  CHECK(last(Answers().accepted().user().be(4, 0x00010004).be(4, 0).append(Answers().bytes)) ==
        refused(Errc::unknown_return_message));
}

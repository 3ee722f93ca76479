// SPDX-License-Identifier: MIT
#include "multifd/qemu/ram_records.hpp"

#include "unit/qemu/stream.hpp"

namespace qemu = multifd::qemu;
using test::Bytes;
using test::page;
using test::Stream;

TEST_CASE("Encoded records are the table of format/main_stream.md section 9.6, with a name and with CONTINUE") {
  Bytes to(qemu::max_zero_record_bytes);
  const auto first = [&](std::size_t size) {
    return Bytes(to.begin(), to.begin() + static_cast<std::ptrdiff_t>(size));
  };
  CHECK(first(qemu::encode_zero_record(to, 3 * page, "ram.a")) == Stream().zero(3 * page, "ram.a").bytes);
  CHECK(first(qemu::encode_zero_record(to, 3 * page, "")) == Stream().zero(3 * page).bytes);
  CHECK(first(qemu::encode_page_header(to, page, "rom/b")) == Stream().record(page, 8, "rom/b").bytes);
  CHECK(first(qemu::encode_page_header(to, page, "")) == Stream().record(page, 8, "").bytes);

  const std::string longest(255, 'n');
  const std::uint64_t far = ~std::uint64_t{0} - 0xffff;
  CHECK(first(qemu::encode_zero_record(to, far, longest)) == Stream().zero(far, longest).bytes);
  CHECK(qemu::encode_zero_record(to, far, longest) == qemu::max_zero_record_bytes);
  CHECK(qemu::encode_page_header(to, far, longest) == qemu::max_ram_record_header_bytes);
  // Exactly the room that it takes is enough.
  CHECK(qemu::encode_zero_record(std::span(to).first(9), 0, "") == 9);
  CHECK(qemu::encode_zero_record(std::span(to).first(11), 0, "a") == 11);
}

TEST_CASE("Inserted records are read as what they say") {
  Stream stream = Stream().up_to_start().part();
  Bytes record(qemu::max_zero_record_bytes);
  const auto insert = [&](std::uint64_t offset, std::string_view name) {
    record.resize(qemu::max_zero_record_bytes);
    record.resize(qemu::encode_zero_record(record, offset, name));
    stream.append(record);
  };
  insert(7 * page, "ram.a");
  insert(6 * page, "");
  insert(page, "rom/b");
  insert(0, "");
  const auto outcome = test::parse(stream.eos().footer().bytes);
  CHECK(outcome.bytes == stream.bytes);
  CHECK(outcome.count("zero ram.a#0+28672") == 1);
  CHECK(outcome.count("zero continued ram.a#0+24576") == 1);
  CHECK(outcome.count("zero rom/b#1+4096") == 1);
  CHECK(outcome.count("zero continued rom/b#1+0") == 1);
}

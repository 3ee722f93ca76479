// SPDX-License-Identifier: MIT
//
// The smallest user of the installed library: moves a little memory through both compressors, so that
// everything a consumer has to compile and to link is compiled, linked and run.
#include <sys/socket.h>

#include <cstddef>
#include <cstdio>
#include <cstring>
#include <utility>
#include <vector>

#include "multifd/compress/zlib.hpp"
#include "multifd/compress/zstd.hpp"
#include "multifd/multifd.hpp"

namespace {

int complain(const multifd::Error& error) {
  std::fprintf(stderr, "consumer: %s\n", multifd::describe(error).c_str());
  return 1;
}

template <class C>
int migrate() {
  using multifd::FdTransport;
  std::vector<std::byte> from(std::size_t{64} * 4096);
  std::vector<std::byte> to(from.size(), std::byte{0xff});
  std::memset(from.data(), 0x5a, from.size() / 2);

  multifd::RamMap source;
  multifd::RamMap destination;
  const auto block = source.add("pc.ram", from);
  const auto same = destination.add("pc.ram", to);
  if (!block || !same) return complain(block ? same.error() : block.error());

  std::vector<FdTransport> near;
  std::vector<FdTransport> far;
  for (int channel = 0; channel < 2; ++channel) {
    int ends[2];
    if (::socketpair(AF_UNIX, SOCK_STREAM, 0, ends) != 0) return 1;
    auto one = FdTransport::adopt(ends[0]);
    auto other = FdTransport::adopt(ends[1]);
    if (!one || !other) return 1;
    near.push_back(std::move(*one));
    far.push_back(std::move(*other));
  }

  auto tx = multifd::Sender<FdTransport, C, multifd::ZeroPagesMultifd>::open(source, std::move(near));
  if (!tx) return complain(tx.error());
  auto rx = multifd::Receiver<FdTransport, C>::open(destination, std::move(far));
  if (!rx) return complain(rx.error());
  if (auto done = tx->queue_range(*block, 0, from.size()); !done) return complain(done.error());
  if (auto done = tx->close_channels(); !done) return complain(done.error());
  if (auto done = rx->finish(); !done) return complain(done.error());
  return from == to ? 0 : 1;
}

}  // namespace

int main() {
  if (migrate<multifd::Zlib>() != 0 || migrate<multifd::Zstd>() != 0) return 1;
  std::puts("consumer: ok");
}

// SPDX-License-Identifier: MIT
//
// page_source IMAGE ADDRESS: serves the pages of a mapped-ram image to multifd_pager --connect, until it is killed.
#include <fcntl.h>
#include <multifd/image/file.hpp>
#include <multifd/postcopy/image_pages.hpp>
#include <multifd/postcopy/page_server.hpp>
#include <multifd/transport/listen.hpp>

#include <cstdio>
#include <string>

using namespace multifd;

namespace {

Result<void> serve(const char* path, const char* text) {
  MULTIFD_TRY_ASSIGN(const auto file, image::File::adopt(::open(path, O_RDONLY | O_CLOEXEC)));
  MULTIFD_TRY_ASSIGN(const auto reader, image::MappedRamReader::open(file));
  MULTIFD_TRY_ASSIGN(const auto pages, postcopy::ImagePages::of_image(reader));
  MULTIFD_TRY_ASSIGN(const auto server,
                     postcopy::PageServer<FdTransport>::open(static_cast<postcopy::PageStore&>(*pages)));
  MULTIFD_TRY_ASSIGN(const auto address, parse_address(text));
  MULTIFD_TRY_ASSIGN(auto listener, Listener::listen(address));
  std::fprintf(stderr, "listening on %s\n", text);
  for (;;) {
    MULTIFD_TRY_ASSIGN(auto link, listener.accept(no_timeout));
    if (const auto added = server->add(std::move(link)); !added)
      std::fprintf(stderr, "%s\n", describe(added.error()).c_str());
  }
}

}  // namespace

int main(int argc, char** argv) {
  if (argc != 3) return 2;
  const auto served = serve(argv[1], argv[2]);
  std::fprintf(stderr, "%s\n", describe(served.error()).c_str());
  return 1;
}

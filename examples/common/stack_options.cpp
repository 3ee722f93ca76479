// SPDX-License-Identifier: MIT
#include <multifd/migrate/source_options.hpp>

#include <CLI/CLI.hpp>

#include "common/stacks.hpp"

namespace program {
namespace {

using namespace multifd;

template <class List>
std::vector<std::string> names_of() {
  return {List::names.begin(), List::names.end()};
}

}  // namespace

std::vector<std::string> compressor_names() { return names_of<Compressors>(); }

void StackOptions::add_to(CLI::App& app, const std::string& option_prefix, FewestChannels fewest) {
  prefix_ = "--" + option_prefix;
  app.add_option(prefix_ + "channels", channels,
                 fewest == FewestChannels::none
                     ? "Connections beside the main one; 0: without multifd, everything on the main one"
                     : "Connections beside the main one")
      ->check(CLI::Range(static_cast<unsigned>(fewest), multifd::max_channels))
      ->capture_default_str();
  app.add_option(prefix_ + "compression", compression,
                 "How page data travels (igzip is a faster zlib, the same to the peer)")
      ->check(CLI::IsMember(compressor_names()))
      ->capture_default_str();
  app.add_option(prefix_ + "level", level,
                 "Compression level (zlib 0..9; igzip 1..3; zstd up to 22, below 0 is faster)")
      ->capture_default_str();
  app.add_option(prefix_ + "zero-pages", zero_pages, "How zero pages are found and sent")
      ->check(CLI::IsMember(names_of<ZeroPolicies>()))
      ->capture_default_str();
  add_size(app, prefix_ + "bandwidth", bandwidth, "Cap over all channels, per second (0: none)");
}

void StackOptions::check() const {
  const auto opened = with_policy(compression, Compressors{}, [&]<class C>() -> Result<void> {
    auto encoder = C::Encoder::open(with_level<C>(level), CodecLimits{});
    if (!encoder) return std::unexpected(encoder.error());
    return {};
  });
  const bool lists = with_policy(zero_pages, ZeroPolicies{}, []<class Z>() -> Result<bool> {
                       return Z::stage == ZeroStage::channel;
                     }).value_or(false);
  if (lists && !peer.zero_lists)
    throw Usage(prefix_ + "zero-pages " + zero_pages + " with " + prefix_ + "peer " + std::string(peer.name) + ": " +
                make_error_code(Errc::peer_lacks_zero_lists).message());
  if (!opened)
    throw Usage(prefix_ + "level " + std::to_string(level) + " with " + compression + ": " + describe(opened.error()));
}

multifd::AnySenderOptions StackOptions::for_library() const {
  return {.compression = compression,
          .level = level,
          .zero_pages = zero_pages,
          .uuid = uuid,
          .peer = peer,
          .bandwidth = bandwidth,
          .depth = depth,
          .progress_timeout = progress_timeout,
          .digest = digest,
          .on_error = on_error};
}

multifd::migrate::SourceOptions StackOptions::for_migration() const {
  return {.compression = compression,
          .level = level,
          .zero_pages = zero_pages,
          .bandwidth = bandwidth,
          .digest = digest,
          .peer = peer,
          .uuid = uuid};
}

}  // namespace program

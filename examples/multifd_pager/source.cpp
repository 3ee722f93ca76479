// SPDX-License-Identifier: MIT
#include "multifd_pager/source.hpp"

#include <fcntl.h>
#include <multifd/postcopy/remote_pages.hpp>
#include <multifd/transport/connect.hpp>

#include <utility>

#include "common/part_file.hpp"
#include "common/program.hpp"

namespace pager {
namespace {

using namespace multifd;
using postcopy::FetchKind;
using postcopy::ImagePages;
using Remote = postcopy::RemotePages<FdTransport>;

/// Params `blocks`: what the server has to have; empty: to ask it.
std::unique_ptr<Remote> connect(const SourceSettings& settings, std::vector<postcopy::StoreBlock> blocks,
                                std::size_t page_bytes) {
  const auto connect = [address = *settings.server](FetchKind, const Interrupt& interrupt) {
    return connect_to(address, {.interrupt = &interrupt});
  };
  return program::need(
      Remote::open(connect, {.session = settings.session, .blocks = std::move(blocks), .page_bytes = page_bytes}),
      "--connect");
}

}  // namespace

Source::Source(const SourceSettings& settings) : settings_(settings) {
  if (settings.server) {
    const auto asked = connect(settings, {}, 0);
    blocks_.assign(asked->blocks().begin(), asked->blocks().end());
    page_bytes_ = asked->page_bytes();
    return;
  }
  if (settings.raw) {
    raw_ = program::need(image::File::adopt(program::open_regular(settings.image, O_RDONLY).release()), settings.image);
    pages_ = program::need(ImagePages::of_raw(*raw_, settings.page_bytes, "memory"), settings.image);
  } else {
    image_ = std::make_unique<program::ImageFile>(settings.image, settings.base, settings.page_bytes, settings.offset);
    pages_ = program::need(ImagePages::of_image(image_->ram()), settings.image);
  }
  blocks_.assign(pages_->blocks().begin(), pages_->blocks().end());
  page_bytes_ = pages_->page_bytes();
}

std::unique_ptr<postcopy::PageStore> Source::for_guest() const {
  if (pages_) return program::need(pages_->for_another_guest());
  return connect(settings_, blocks_, page_bytes_);
}

}  // namespace pager

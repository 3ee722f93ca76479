// SPDX-License-Identifier: MIT
//
// The baselines of the codec benchmark: zlib and zstd as one would call them first, and as QEMU's packets show that it
// calls them (format/packets.md section 4): level 1, the library's own parameters, pages in one by one, a flush per
// packet.
#pragma once

#include <zlib.h>
#include <zstd.h>

#include <cstring>
#include <memory>
#include <stdexcept>
#include <vector>

#include "multifd/compress/policy.hpp"

namespace plain {

using multifd::CodecLimits;
using multifd::ConstBuffers;
using multifd::MutableBuffers;
using multifd::PayloadForm;
using multifd::Result;

inline constexpr std::size_t page_bytes = 4096;

template <class Body>
void for_each_page(std::span<const iovec> runs, Body&& body) {
  for (const iovec& run : runs)
    for (std::size_t at = 0; at < run.iov_len; at += page_bytes) body(static_cast<std::byte*>(run.iov_base) + at);
}

/// zlib, page by page through a copy of the page, because zlib is not safe on memory that changes.
struct Zlib {
  int level = 1;

  class Encoder {
   public:
    static Result<Encoder> open(const Zlib& parameters, const CodecLimits& limits) noexcept {
      Encoder encoder;
      encoder.payload_.resize(limits.payload_bytes);
      encoder.stream_.reset(new z_stream{});
      if (deflateInit(encoder.stream_.get(), parameters.level) != Z_OK) std::abort();
      return encoder;
    }
    Result<ConstBuffers> encode(ConstBuffers pages) noexcept {
      std::size_t left = multifd::total_bytes(pages);
      stream_->next_out = payload_.data();
      stream_->avail_out = static_cast<uInt>(payload_.size());
      for_each_page(pages, [&](const std::byte* page) {
        std::memcpy(page_.data(), page, page_bytes);
        left -= page_bytes;
        stream_->next_in = page_.data();
        stream_->avail_in = page_bytes;
        if (deflate(stream_.get(), left == 0 ? Z_SYNC_FLUSH : Z_NO_FLUSH) != Z_OK) std::abort();
      });
      result_ = multifd::const_buffer(payload_.data(), payload_.size() - stream_->avail_out);
      return ConstBuffers(&result_, 1);
    }

   private:
    struct End {
      void operator()(z_stream* stream) const noexcept {
        deflateEnd(stream);
        delete stream;
      }
    };
    std::unique_ptr<z_stream, End> stream_;
    std::vector<Bytef> page_ = std::vector<Bytef>(page_bytes);
    std::vector<Bytef> payload_;
    iovec result_{};
  };

  class Decoder {
   public:
    static Result<Decoder> open(const Zlib&, const CodecLimits&) noexcept {
      Decoder decoder;
      decoder.stream_.reset(new z_stream{});
      if (inflateInit(decoder.stream_.get()) != Z_OK) std::abort();
      return decoder;
    }
    Result<void> decode(std::span<const std::byte> payload, MutableBuffers pages) noexcept {
      stream_->next_in = reinterpret_cast<Bytef*>(const_cast<std::byte*>(payload.data()));
      stream_->avail_in = static_cast<uInt>(payload.size());
      for_each_page(pages, [&](std::byte* page) {
        stream_->next_out = reinterpret_cast<Bytef*>(page);
        stream_->avail_out = page_bytes;
        while (stream_->avail_out != 0)
          if (inflate(stream_.get(), Z_SYNC_FLUSH) != Z_OK) std::abort();
      });
      // What is left is the flush's marker, which writes nothing.
      Bytef none = 0;
      stream_->next_out = &none;
      stream_->avail_out = 1;
      if (stream_->avail_in != 0 && inflate(stream_.get(), Z_SYNC_FLUSH) != Z_OK) std::abort();
      return {};
    }

   private:
    struct End {
      void operator()(z_stream* stream) const noexcept {
        inflateEnd(stream);
        delete stream;
      }
    };
    std::unique_ptr<z_stream, End> stream_;
  };
};

/// zstd, page by page.
struct Zstd {
  int level = 1;

  class Encoder {
   public:
    static Result<Encoder> open(const Zstd& parameters, const CodecLimits& limits) noexcept {
      Encoder encoder;
      encoder.payload_.resize(limits.payload_bytes);
      encoder.stream_.reset(ZSTD_createCStream());
      if (ZSTD_isError(ZSTD_initCStream(encoder.stream_.get(), parameters.level))) std::abort();
      return encoder;
    }
    Result<ConstBuffers> encode(ConstBuffers pages) noexcept {
      std::size_t left = multifd::total_bytes(pages);
      ZSTD_outBuffer out{payload_.data(), payload_.size(), 0};
      for_each_page(pages, [&](const std::byte* page) {
        ZSTD_inBuffer in{page, page_bytes, 0};
        left -= page_bytes;
        while (true) {
          const auto pending =
              ZSTD_compressStream2(stream_.get(), &out, &in, left == 0 ? ZSTD_e_flush : ZSTD_e_continue);
          if (ZSTD_isError(pending)) std::abort();
          if (in.pos == in.size && (left != 0 || pending == 0)) break;
        }
      });
      result_ = multifd::const_buffer(payload_.data(), out.pos);
      return ConstBuffers(&result_, 1);
    }

   private:
    struct Free {
      void operator()(ZSTD_CStream* stream) const noexcept { ZSTD_freeCStream(stream); }
    };
    std::unique_ptr<ZSTD_CStream, Free> stream_;
    std::vector<std::byte> payload_;
    iovec result_{};
  };

  class Decoder {
   public:
    static Result<Decoder> open(const Zstd&, const CodecLimits&) noexcept {
      Decoder decoder;
      decoder.stream_.reset(ZSTD_createDStream());
      return decoder;
    }
    Result<void> decode(std::span<const std::byte> payload, MutableBuffers pages) noexcept {
      ZSTD_inBuffer in{payload.data(), payload.size(), 0};
      for_each_page(pages, [&](std::byte* page) {
        ZSTD_outBuffer out{page, page_bytes, 0};
        while (out.pos != out.size)
          if (ZSTD_isError(ZSTD_decompressStream(stream_.get(), &out, &in))) std::abort();
      });
      return {};
    }

   private:
    struct Free {
      void operator()(ZSTD_DStream* stream) const noexcept { ZSTD_freeDStream(stream); }
    };
    std::unique_ptr<ZSTD_DStream, Free> stream_;
  };
};

}  // namespace plain

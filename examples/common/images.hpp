// SPDX-License-Identifier: MIT
//
// Images as the programs have them: which format a file has, and how one format is made of another.
#pragma once

#include <multifd/image/file.hpp>
#include <multifd/image/mapped_ram_reader.hpp>
#include <multifd/image/seekable_zstd.hpp>
#include <multifd/image/workers.hpp>

#include <atomic>
#include <memory>
#include <nlohmann/json_fwd.hpp>
#include <optional>
#include <string>
#include <vector>

#include "common/part_file.hpp"
#include "common/progress.hpp"
#include "common/report.hpp"

namespace program {

/// The formats of a single file. DESIGN: `mapped-ram|mapped-ram-zst|elf|raw|lime`.
enum class ImageFormat : std::uint8_t { mapped_ram, mapped_ram_zst, elf, raw, lime };

const char* to_string(ImageFormat format);
/// Throws Failure for a name of none.
ImageFormat image_format(const std::string& name);
/// The names of all, and with "blocks", for --help.
std::vector<std::string> image_formats();
std::vector<std::string> dump_formats();

/// Options of making one format of another: of what is written.
struct ConvertOptions {
  unsigned threads = 2;
  int level = 1;
  std::uint64_t frame_bytes = 256 * 1024;
  std::string base;
  std::uint64_t below_4g = 0;  ///< of main memory, for formats by guest-physical address; 0: as the machine type says

  void add_to(CLI::App& app);
};

/// An image that is open for reading: mapped-ram, as it is or compressed. Throws Failure, in all calls.
class ImageFile {
 public:
  /// Params `base`: the image that an incremental one was made against; empty: none. `offset`: where the stream begins in the
  ///   mapped-ram file.
  explicit ImageFile(std::string path, const std::string& base = {}, std::uint64_t page_bytes = 4096,
                     std::uint64_t offset = 0);
  ImageFile(const ImageFile&) = delete;
  ImageFile& operator=(const ImageFile&) = delete;

  const std::string& path() const noexcept { return path_; }
  ImageFormat format() const noexcept { return compressed_ ? ImageFormat::mapped_ram_zst : ImageFormat::mapped_ram; }
  const multifd::image::File& file() const noexcept { return file_; }
  /// The mapped-ram file, decompressed where it is compressed.
  const multifd::image::RandomAccess& bytes() const noexcept;
  const multifd::image::MappedRamReader& ram() const noexcept { return *ram_; }
  /// Null: not compressed.
  const multifd::image::SeekableZstd* compressed() const noexcept { return compressed_ ? &*compressed_ : nullptr; }

 private:
  std::string path_;
  multifd::image::File file_;
  std::unique_ptr<ImageFile> base_;
  std::optional<multifd::image::SeekableZstd> compressed_;
  std::optional<multifd::image::MappedRamReader> ram_;
};

/// Makes `to` of `from`. The file gets its name by the caller. Shows progress on a terminal. Throws Failure.
/// Returns what --json says of it.
nlohmann::json convert(const ImageFile& from, ImageFormat format, PartFile& to, const ConvertOptions& options,
                       const multifd::Interrupt& interrupt);

/// Long work on images: how many threads, ended by a signal, a line on a terminal that says how much is done.
class ImageWork {
 public:
  /// Params `what`: "compressing"; `bytes`: of the whole.
  ImageWork(const std::string& what, std::uint64_t bytes, unsigned threads, const multifd::Interrupt& interrupt);
  multifd::image::WorkOptions options();
  /// Throws the Failure of `result`, about `path`.
  void need(const multifd::Result<void>& result, const std::string& path) const;

 private:
  const unsigned threads_;
  const multifd::Interrupt& interrupt_;
  std::atomic<std::uint64_t> done_ = 0;
  const Stopwatch watch_;
  const Progress progress_;
};

}  // namespace program

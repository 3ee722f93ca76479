// SPDX-License-Identifier: MIT
#include "common/images.hpp"

#include <fcntl.h>
#include <fmt/format.h>
#include <sys/stat.h>
#include <multifd/image/copy.hpp>
#include <multifd/image/elf_core.hpp>
#include <multifd/image/guest_physical.hpp>
#include <multifd/image/raw_memory.hpp>
#include <multifd/image/seekable_zstd_writer.hpp>
#include <multifd/image/vmcoreinfo.hpp>

#include <CLI/CLI.hpp>
#include <algorithm>
#include <array>
#include <nlohmann/json.hpp>
#include <utility>

#include "common/cpu_state.hpp"

namespace program {
namespace {

using namespace multifd;
using nlohmann::json;

constexpr std::array<const char*, 5> names{"mapped-ram", "mapped-ram-zst", "elf", "raw", "lime"};

image::File open_for_reading(const std::string& path) {
  return program::need(image::File::adopt(open_regular(path, O_RDONLY).release()), path);
}

/// Whether a file begins as a frame of zstd's does, ordinary or to be skipped.
bool is_zstd(const image::File& file) {
  std::array<std::byte, 4> magic{};
  if (file.bytes() < magic.size() || !file.read(0, magic)) return false;
  const auto value = wire::load_le<std::uint32_t>(magic.data());
  return value == 0xfd2fb528 || (value & 0xfffffff0) == 0x184d2a50;
}

}  // namespace

const char* to_string(ImageFormat format) { return names.at(static_cast<std::size_t>(format)); }

ImageFormat image_format(const std::string& name) {
  const auto found = std::ranges::find(names, name);
  if (found == names.end()) throw Failure(name + ": no format of images");
  return static_cast<ImageFormat>(found - names.begin());
}

std::vector<std::string> image_formats() { return {names.begin(), names.end()}; }

std::vector<std::string> dump_formats() {
  std::vector<std::string> all{"blocks"};
  all.insert(all.end(), names.begin(), names.end());
  return all;
}

void ConvertOptions::add_to(CLI::App& app) {
  app.add_option("--image-level", level, "mapped-ram-zst: compression level (up to 22; below 0 is faster)")
      ->capture_default_str();
  add_size(
      app, "--frame-size", frame_bytes,
      "mapped-ram-zst: what is compressed as one, a power of two from 64K to 1M; larger ones are smaller on the disk, "
      "and slower where single pages are read");
  app.add_option("--threads", threads, "Threads that convert")
      ->check(CLI::Range(1u, max_channels))
      ->capture_default_str();
  app.add_option(
      "--make-base", base,
      "mapped-ram-zst: an older image in that format; only what differs from it is written, and both are needed "
      "from then on");
  add_size(
      app, "--below-4g", below_4g,
      "elf, raw, lime: how much of main memory lies below 4 GiB (max-ram-below-4g); 0: as the machine type has it");
}

ImageFile::ImageFile(std::string path, const std::string& base, std::uint64_t page_bytes, std::uint64_t offset)
    : path_(std::move(path)), file_(open_for_reading(path_)) {
  if (is_zstd(file_)) {
    if (!base.empty()) base_ = std::make_unique<ImageFile>(base, "", page_bytes, offset);
    if (base_ && base_->compressed() == nullptr)
      throw Failure(base + ": not compressed, and so nobody's base: those are mapped-ram-zst");
    compressed_ = program::need(image::SeekableZstd::open(file_, {}, base_ ? base_->compressed() : nullptr), path_);
  } else if (!base.empty()) {
    throw Failure(path_ + ": not compressed, and so not incremental: it needs no base");
  }
  ram_ = program::need(image::MappedRamReader::open(bytes(), {.stream = {.page_bytes = page_bytes}, .offset = offset}),
                       path_);
}

const image::RandomAccess& ImageFile::bytes() const noexcept {
  if (compressed_) return *compressed_;
  return file_;
}

ImageWork::ImageWork(const std::string& what, std::uint64_t bytes, unsigned threads, const Interrupt& interrupt)
    : threads_(threads),
      interrupt_(interrupt),
      progress_(
          [this, what, bytes] {
            const std::uint64_t done = done_;
            return Snapshot{
                .line = fmt::format("{} {} of {}  {:.2f} GiB/s", what, format_bytes(static_cast<double>(done)),
                                    format_bytes(static_cast<double>(bytes)),
                                    rate(static_cast<double>(done), watch_.seconds())),
                .moved = done};
          },
          std::chrono::milliseconds(0)) {}

image::WorkOptions ImageWork::options() {
  return {.threads = threads_,
          .interrupted = [this] { return interrupt_.triggered(); },
          .on_progress = [this](std::uint64_t bytes) { done_ += bytes; }};
}

void ImageWork::need(const Result<void>& result, const std::string& path) const {
  if (!result && result.error().code == Errc::cancelled) throw Failure("cancelled by a signal");
  program::need(result, path);
}

json convert(const ImageFile& from, ImageFormat format, PartFile& to, const ConvertOptions& options,
             const Interrupt& interrupt) {
  auto file = program::need(image::File::adopt(::fcntl(to.fd(), F_DUPFD_CLOEXEC, 0)), to.part());
  json report{{"format", to_string(format)}, {"input", from.path()}, {"output", to.path()}};
  const std::uint64_t bytes = from.bytes().bytes();
  const auto done = [&](ImageWork& work, const Result<void>& result) {
    // The error says what failed; which of the two files it is is told by the stage.
    work.need(result, !result && result.error().stage == Stage::write ? to.part() : from.path());
  };
  switch (format) {
    case ImageFormat::mapped_ram: {
      ImageWork work("copying", bytes, options.threads, interrupt);
      done(work, image::copy_sparse(from.bytes(), file, work.options()));
      break;
    }
    case ImageFormat::mapped_ram_zst: {
      if (!wire::valid_image_frame_bytes(options.frame_bytes))
        throw Usage("--frame-size: a power of two from 64K to 1M");
      std::optional<ImageFile> base;
      if (!options.base.empty()) {
        base.emplace(options.base);
        if (base->compressed() == nullptr) throw Failure(options.base + ": not compressed, and so nobody's base");
      }
      ImageWork work("compressing", bytes, options.threads, interrupt);
      const auto written = image::write_seekable_zstd(from.bytes(), file,
                                                      {.work = work.options(),
                                                       .level = options.level,
                                                       .frame_bytes = options.frame_bytes,
                                                       .base = base ? base->compressed() : nullptr});
      done(work, written ? Result<void>{} : std::unexpected(written.error()));
      report.update({{"frames", written->frames},
                     {"zero_frames", written->zero_frames},
                     {"frames_in_base", written->frames_in_base}});
      break;
    }
    case ImageFormat::elf:
    case ImageFormat::raw:
    case ImageFormat::lime: {
      const MachineState machine = read_machine_state(from.ram());
      image::PhysicalOptions physical{.told = machine.told, .shadow = machine.shadow};
      if (options.below_4g != 0) physical.below_4g = options.below_4g;
      const auto layout = program::need(
          image::lay_out_pc(from.ram().blocks(), from.ram().page_bytes(), from.ram().stream().machine_type(), physical),
          from.path());
      ImageWork work("writing", layout.ram_bytes, options.threads, interrupt);
      report["vcpus"] = machine.vcpus.size();
      Result<image::WrittenMemory> written;
      if (format == ImageFormat::elf) {
        const auto vmcoreinfo =
            image::find_vmcoreinfo(from.ram(), layout, {.vcpus = machine.vcpus, .work = {.threads = options.threads}});
        done(work, vmcoreinfo ? Result<void>{} : std::unexpected(vmcoreinfo.error()));
        report["vmcoreinfo"] = vmcoreinfo->has_value();
        written = image::write_elf_core(
            from.ram(), layout, file,
            {.vcpus = machine.vcpus,
             .vmcoreinfo = *vmcoreinfo ? std::string_view((*vmcoreinfo)->text) : std::string_view(),
             .work = work.options()});
      } else if (format == ImageFormat::raw) {
        written = image::write_raw_memory(from.ram(), layout, file, work.options());
      } else {
        written = image::write_lime(from.ram(), layout, file, work.options());
      }
      done(work, written ? Result<void>{} : std::unexpected(written.error()));
      break;
    }
  }
  struct stat status{};
  if (::fstat(to.fd(), &status) != 0) fail_path(to.part());
  report["bytes"] = status.st_size;
  report["disk_bytes"] = status.st_blocks * 512;
  return report;
}

}  // namespace program

// SPDX-License-Identifier: MIT
//
// The folder of a dump: a sparse file per RAM block, and a manifest that gets its name last.
#pragma once

#include <nlohmann/json.hpp>

#include <atomic>
#include <cstdint>
#include <deque>
#include <map>
#include <memory>
#include <span>
#include <string>
#include <string_view>

#include "common/mapping.hpp"
#include "common/part_file.hpp"

namespace dump {

/// A failure, or a second signal, before keep() removes all files.
///
/// Threads: one; progress() from any.
class Output {
 public:
  /// Opens the folder: creates it, or takes one that has no dump in it. Keeps other dumps out from then on, whatever
  /// path they use for the folder. Throws Failure.
  explicit Output(std::string path);

  const std::string& path() const noexcept { return path_; }

  /// Makes the file of a RAM block. Returns its memory, as long as this object lives. Throws Failure.
  std::span<std::byte> add(std::string_view idstr, std::uint64_t bytes);

  /// Gives the files holes where pages are zero. Returns what the manifest says of each block, in the order of add().
  nlohmann::json make_sparse(std::size_t page_bytes);
  /// Writes the manifest, and everything to the disk. Throws Failure.
  void write(const nlohmann::json& manifest);
  /// Gives all files their names. Throws Failure when a name is taken: the files stay then, because they are whole.
  void keep();

  struct Progress {
    std::size_t files;
    std::size_t looked_through;  ///< by make_sparse()
    std::size_t synced;          ///< by write()
  };
  /// Behind the last add().
  Progress progress() const noexcept { return {blocks_.size(), looked_through_, synced_}; }

 private:
  struct Block {
    std::string idstr;
    std::string file_name;
    std::unique_ptr<program::NewFile> file;
  };

  const std::string path_;
  std::unique_ptr<program::PartFile> manifest_;
  std::deque<Block> blocks_;
  std::map<std::string, int> taken_;  ///< names of files, so that none comes twice
  std::atomic<std::size_t> looked_through_ = 0, synced_ = 0;
};

}  // namespace dump

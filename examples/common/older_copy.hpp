// SPDX-License-Identifier: MIT
//
// A file from an earlier transfer that the next one begins with: a copy of it, or the file itself.
#pragma once

#include <multifd/memory/keyed_digest.hpp>
#include <multifd/migrate/base_report.hpp>
#include <multifd/transport/interrupt.hpp>

#include <nlohmann/json_fwd.hpp>
#include <optional>
#include <string>

#include "common/descriptor.hpp"
#include "common/mapping.hpp"

namespace program {

/// By what two ends tell which pages are equal: GMAC; empty where this program was built without OpenSSL.
multifd::KeyedDigests page_digests();

/// The value of the JSON key "base": "pages", "digest_bytes", "seconds"; null where there was no older copy.
nlohmann::json base_report(const std::optional<multifd::migrate::BaseReport>& done);
/// For ram_send's summary: empty where there was no older copy.
std::string base_note(const std::optional<multifd::migrate::BaseReport>& done);

/// Copies the data of a file into an empty one of the same size. Blocks are shared where the file system can, and holes stay
/// holes. Throws Failure, also of a signal. Params `name`: of the older file, for messages.
void copy_data(int older, const std::string& name, int to, const multifd::Interrupt* interrupt);

/// A file that becomes the new one as it is: a failure leaves it with pages of both. Locked, so that no other program writes to it.
class FileInPlace {
 public:
  /// Throws Failure: missing, empty, no regular file, not writable, another program writes to it.
  explicit FileInPlace(std::string path);

  const Mapping& mapping() const noexcept { return mapping_; }
  /// As NewFile::make_sparse().
  Summary make_sparse(std::size_t page_bytes) const;
  /// Waits for the disk. Throws Failure.
  void sync();

 private:
  std::string path_;
  Descriptor file_;
  Mapping mapping_;
};

/// Whether two names are of one file that exists.
bool same_file(const std::string& one, const std::string& other);

}  // namespace program

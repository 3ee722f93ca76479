// SPDX-License-Identifier: MIT
#pragma once

#include <nlohmann/json_fwd.hpp>

#include "common/images.hpp"

namespace ram_image {

/// Compares the memory of two images, page by page: what lies where in the files plays no part. Throws program::Failure.
/// Returns what --json says: "differ", and for each block how many pages do, and where the first ones are.
nlohmann::json diff(const program::ImageFile& a, const program::ImageFile& b, unsigned threads,
                    const multifd::Interrupt& interrupt);

void print_diff(const nlohmann::json& report);

}  // namespace ram_image

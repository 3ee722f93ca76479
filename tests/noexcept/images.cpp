// SPDX-License-Identifier: MIT
//
// Compiled with -fno-exceptions -fno-rtti, never run: everything that reads and writes images.
#include "multifd/image/copy.hpp"
#include "multifd/image/elf_core.hpp"
#include "multifd/image/load.hpp"
#include "multifd/image/mapped_ram_sink.hpp"
#include "multifd/image/mapped_ram_writer.hpp"
#include "multifd/image/raw_memory.hpp"
#include "multifd/image/seekable_zstd_verify.hpp"
#include "multifd/image/seekable_zstd_writer.hpp"
#include "multifd/image/vmcoreinfo.hpp"
#include "multifd/qemu/xbzrle.hpp"

namespace multifd::image {

template class MappedRamWriter<>;
template class MappedRamWriter<ZeroPagesNone, FromCopies>;

}  // namespace multifd::image

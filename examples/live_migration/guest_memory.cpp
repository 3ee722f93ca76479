// SPDX-License-Identifier: MIT
#include "guest_memory.hpp"

#include <fmt/format.h>
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <cerrno>
#include <cstring>
#include <stdexcept>
#include <string_view>

namespace live {
namespace {

/// splitmix64: one multiplication-rich step a word, good enough to be incompressible.
class Random {
 public:
  explicit Random(std::uint64_t seed) : state_(seed) {}
  std::uint64_t next() {
    std::uint64_t z = state_ += 0x9e3779b97f4a7c15;
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9;
    z = (z ^ (z >> 27)) * 0x94d049bb133111eb;
    return z ^ (z >> 31);
  }
  double share() { return static_cast<double>(next() >> 11) * 0x1p-53; }

 private:
  std::uint64_t state_;
};

/// Words of a made-up language, with the space after them; short words are drawn more often, as in real text.
class Dictionary {
 public:
  explicit Dictionary(Random& random) {
    static constexpr std::string_view syllables = "kalomirensatudevopigarushetobinefaly";
    for (std::size_t i = 0; i < words_.size(); ++i) {
      Word& word = words_[i];
      word.text.fill(' ');
      const std::size_t count = 1 + i / (words_.size() / 6);
      for (std::size_t k = 0; k < count; ++k) {
        const std::size_t at = random.next() % (syllables.size() / 2) * 2;
        std::memcpy(word.text.data() + 2 * k, syllables.data() + at, 2);
      }
      word.length = 2 * count + 1;
    }
  }

  void write_page(std::byte* page, Random& random) const {
    std::array<char, guest_page_size + sizeof(Word::text)> text;
    for (std::size_t at = 0; at < guest_page_size;) {
      const std::uint64_t r = random.next();
      const Word& word = words_[(r % words_.size()) * ((r >> 32) % words_.size()) / words_.size()];
      std::memcpy(text.data() + at, word.text.data(), word.text.size());
      at += word.length;
    }
    std::memcpy(page, text.data(), guest_page_size);
  }

 private:
  struct Word {
    std::array<char, 16> text;
    std::size_t length;
  };
  std::array<Word, 600> words_;
};

void write_random_page(std::byte* page, Random& random) {
  for (std::size_t at = 0; at < guest_page_size; at += 8) {
    const std::uint64_t word = random.next();
    std::memcpy(page + at, &word, 8);
  }
}

}  // namespace

void check_config(const GuestConfig& config) {
  if (sysconf(_SC_PAGESIZE) != static_cast<long>(guest_page_size))
    throw std::runtime_error(
        fmt::format("this host has pages of {} bytes; the guest needs a host with 4096", sysconf(_SC_PAGESIZE)));
  if (config.memory_bytes % guest_page_size != 0 || config.memory_bytes < 2 * layout::low_end)
    throw std::runtime_error(
        fmt::format("guest memory of {} bytes: give a multiple of 4096, 2 MiB or more", config.memory_bytes));
  const std::size_t room = config.memory_bytes - layout::low_end;
  if (config.working_set_bytes == 0 || config.working_set_bytes > room)
    throw std::runtime_error(
        fmt::format("working set of {} bytes: give 1 to {} for this memory size", config.working_set_bytes, room));
  // Written so that a NaN is refused too.
  if (!(config.zero_share >= 0 && config.text_share >= 0 && config.zero_share + config.text_share <= 1.0 + 1e-9))
    throw std::runtime_error(fmt::format("shares of zero pages {} and text pages {}: give 0 to 1, together at most 1",
                                         config.zero_share, config.text_share));
}

WorkingSet working_set(const GuestConfig& config) {
  const std::size_t pages = (config.working_set_bytes + guest_page_size - 1) / guest_page_size;
  const std::size_t room = (config.memory_bytes - layout::low_end) / guest_page_size;
  return {layout::low_end + (room - pages) / 2 * guest_page_size, pages};
}

GuestMemory::GuestMemory(std::size_t bytes) : size_(bytes) {
  // Without a reservation, so that a guest larger than what is free now fails at the page it uses too much,
  // if at all.
  void* address = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (address == MAP_FAILED)
    throw std::runtime_error(fmt::format("cannot map {} MiB of guest memory: {}; choose a smaller --memory",
                                         bytes >> 20, std::strerror(errno)));
  data_ = static_cast<std::byte*>(address);
}

GuestMemory::~GuestMemory() { munmap(data_, size_); }

void fill_memory(std::span<std::byte> memory, const GuestConfig& config) {
  Random random(config.seed);
  const Dictionary dictionary(random);
  const std::size_t pages = memory.size() / guest_page_size;
  for (std::size_t page = layout::low_end / guest_page_size; page < pages;) {
    const double kind = random.share();
    // Runs of 1 to 64 pages, short ones more often.
    const std::uint64_t longest = std::uint64_t{1} << (random.next() % 7);
    const std::size_t run_end = std::min<std::size_t>(pages, page + 1 + random.next() % longest);
    for (; page < run_end; ++page) {
      std::byte* const bytes = memory.data() + page * guest_page_size;
      if (kind < config.zero_share) continue;
      if (kind < config.zero_share + config.text_share)
        dictionary.write_page(bytes, random);
      else
        write_random_page(bytes, random);
    }
  }
}

}  // namespace live

// SPDX-License-Identifier: MIT
//
// A VMM for the tests of multifd_pager, written from the protocols' documents and with nothing of the library: it maps
// memory, registers it with a userfaultfd, hands that over, and touches pages, which it compares with a file.
//
//   fake_vmm PROTOCOL SOCKET MEMORY [REGIONS] [IDSTR] [minor]
//
// PROTOCOL: firecracker, cloud-hypervisor, multifd. MEMORY: what the guest should see. Commands come on stdin, a line each,
// and are answered by a line, "ok ..." or "wrong ..."; with & in front they run beside the others until `join`.
#include <fcntl.h>
#include <linux/userfaultfd.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/un.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <iostream>
#include <mutex>
#include <random>
#include <sstream>
#include <string>
#include <thread>
#include <utility>
#include <vector>

namespace {

constexpr std::size_t page = 4096;
#ifndef UFFD_FEATURE_MINOR_SHMEM
constexpr unsigned uffd_feature_minor_shmem = 1 << 10;
#else
constexpr unsigned uffd_feature_minor_shmem = UFFD_FEATURE_MINOR_SHMEM;
#endif
constexpr unsigned register_minor = 1 << 2;

[[noreturn]] void die(const char* what) {
  std::printf("wrong %s: %s\n", what, std::strerror(errno));
  std::fflush(stdout);
  std::exit(1);
}

enum class Removed : unsigned char { no, soon, yes };

struct Region {
  unsigned char* at;
  std::size_t bytes;
  std::size_t offset;
};

class Vmm {
 public:
  Vmm(std::string protocol, std::string socket, const char* memory, std::size_t regions, std::string idstr, bool minor)
      : protocol_(std::move(protocol)), path_(std::move(socket)), idstr_(std::move(idstr)), minor_(minor) {
    const int file = ::open(memory, O_RDONLY | O_CLOEXEC);
    struct stat status{};
    if (file < 0 || ::fstat(file, &status) != 0) die("memory file");
    bytes_ = static_cast<std::size_t>(status.st_size);
    expected_ = static_cast<const unsigned char*>(::mmap(nullptr, bytes_, PROT_READ, MAP_SHARED, file, 0));
    if (expected_ == MAP_FAILED) die("mmap");
    removed_ = std::vector<std::atomic<Removed>>(bytes_ / page);
    map(regions);
  }

  std::string run(const std::string& line) {
    std::istringstream in(line);
    std::string command;
    in >> command;
    std::uint64_t a = 0, b = 0, c = 1;
    if (command == "connect") return connect();
    if (command == "say") return say(line.substr(4));
    if (command == "line") return read_line();
    if (command == "answer") return read_answer();
    if (command == "closed") return wait_closed();
    in >> a >> b >> c;
    if (command == "touch") return touch(a, b, c);
    if (command == "remove") return remove(a, b);
    if (command == "check") return check();
    if (command == "resident") return "ok " + std::to_string(resident());
    if (command == "wait-resident") {
      for (int i = 0; i < 20'000 && resident() < a; ++i) ::usleep(1000);
      return resident() >= a ? "ok" : "wrong: " + std::to_string(resident()) + " pages are there";
    }
    if (command == "flood") return flood(a, b);
    if (command == "swallow") return swallow(a);
    return "wrong command";
  }

 private:
  void map(std::size_t count) {
    int fd = static_cast<int>(::syscall(SYS_userfaultfd, O_CLOEXEC | O_NONBLOCK));
    if (fd < 0) {
      const int device = ::open("/dev/userfaultfd", O_RDWR | O_CLOEXEC);
      fd = device < 0 ? -1 : ::ioctl(device, _IO(0xAA, 0x00), O_CLOEXEC | O_NONBLOCK);
    }
    if (fd < 0) {
      std::printf("skipped: no userfaultfd: %s\n", std::strerror(errno));
      std::exit(77);
    }
    uffd_ = fd;
    uffdio_api api{.api = UFFD_API, .features = UFFD_FEATURE_EVENT_REMOVE, .ioctls = 0};
    if (minor_) api.features |= uffd_feature_minor_shmem;
    if (::ioctl(uffd_, UFFDIO_API, &api) != 0) die("UFFDIO_API");
    if (minor_) {
      memory_ = ::memfd_create("guest", MFD_CLOEXEC | MFD_ALLOW_SEALING);
      if (memory_ < 0 || ::ftruncate(memory_, static_cast<off_t>(bytes_)) != 0 ||
          ::fcntl(memory_, F_ADD_SEALS, F_SEAL_SHRINK) != 0)
        die("memfd");
    }
    const std::size_t each = (bytes_ / page + count - 1) / count * page;
    for (std::size_t offset = 0; offset < bytes_; offset += each) {
      const std::size_t bytes = std::min(each, bytes_ - offset);
      void* const at = ::mmap(nullptr, bytes, PROT_READ | PROT_WRITE,
                              minor_ ? MAP_SHARED : MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, memory_,
                              minor_ ? static_cast<off_t>(offset) : 0);
      if (at == MAP_FAILED) die("mmap");
      ::madvise(at, bytes, MADV_NOHUGEPAGE);
      uffdio_register registered{.range = {.start = reinterpret_cast<std::uint64_t>(at), .len = bytes},
                                 .mode = minor_ ? register_minor : UFFDIO_REGISTER_MODE_MISSING,
                                 .ioctls = 0};
      if (minor_) registered.mode |= UFFDIO_REGISTER_MODE_MISSING;
      if (::ioctl(uffd_, UFFDIO_REGISTER, &registered) != 0) die("UFFDIO_REGISTER");
      regions_.push_back({static_cast<unsigned char*>(at), bytes, offset});
      // A hole between regions, as between a guest's memory below and above 4 GiB.
      (void)::mmap(nullptr, 64 * page, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    }
  }

  std::string connect() {
    if (socket_ >= 0) ::close(socket_);
    socket_ = ::socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);
    sockaddr_un address{};
    address.sun_family = AF_UNIX;
    std::strncpy(address.sun_path, path_.c_str(), sizeof address.sun_path - 1);
    if (::connect(socket_, reinterpret_cast<const sockaddr*>(&address), sizeof address) != 0)
      return std::string("wrong connect: ") + std::strerror(errno);
    std::vector<int> fds{uffd_};
    if (minor_) fds.push_back(memory_);
    return send(handshake(), fds);
  }

  std::string handshake() {
    std::ostringstream text;
    if (protocol_ == "cloud-hypervisor") {
      const auto put = [&](std::uint64_t value, int bytes) {
        for (int i = 0; i < bytes; ++i) text.put(static_cast<char>(value >> 8 * i & 255));
      };
      put(1, 2), put(1, 2), put(1 | 4, 1), put(1, 1), put(regions_.size(), 2), put(48 * regions_.size(), 8);
      for (const Region& region : regions_) {
        put(reinterpret_cast<std::uint64_t>(region.at), 8), put(region.bytes, 8), put(region.offset, 8), put(page, 8);
        put(PROT_READ | PROT_WRITE, 4), put(MAP_PRIVATE | MAP_ANONYMOUS, 4), put(0, 8);
      }
      return text.str();
    }
    const bool own = protocol_ == "multifd";
    text << (own ? "{\"version\":1,\"regions\":[" : "[");
    const char* comma = "";
    for (const Region& region : regions_) {
      text << comma << "{\"" << (own ? "address" : "base_host_virt_addr")
           << "\":" << reinterpret_cast<std::uint64_t>(region.at) << ",\"" << (own ? "bytes" : "size")
           << "\":" << region.bytes << ",\"offset\":" << region.offset;
      if (own && !idstr_.empty()) text << ",\"idstr\":\"" << idstr_ << '"';
      if (minor_) text << ",\"memory\":1,\"memory_offset\":" << region.offset;
      text << (own ? ",\"page_bytes\":4096}" : ",\"page_size\":4096,\"page_size_kib\":4096}");
      comma = ",";
    }
    text << ']';
    if (own) {
      text << ",\"dropped\":[";
      const std::lock_guard lock(mutex_);
      comma = "";
      for (const auto& [offset, bytes] : dropped_) {
        text << comma << "{\"offset\":" << offset << ",\"bytes\":" << bytes;
        if (!idstr_.empty()) text << ",\"idstr\":\"" << idstr_ << '"';
        text << '}';
        comma = ",";
      }
      text << "]}";
    }
    return text.str();
  }

  std::string send(const std::string& text, const std::vector<int>& fds) const {
    alignas(cmsghdr) char control[256] = {};
    iovec bytes{.iov_base = const_cast<char*>(text.data()), .iov_len = text.size()};
    msghdr message{};
    message.msg_iov = &bytes;
    message.msg_iovlen = 1;
    message.msg_control = control;
    message.msg_controllen = CMSG_SPACE(fds.size() * sizeof(int));
    cmsghdr* const header = CMSG_FIRSTHDR(&message);
    header->cmsg_level = SOL_SOCKET;
    header->cmsg_type = SCM_RIGHTS;
    header->cmsg_len = CMSG_LEN(fds.size() * sizeof(int));
    std::memcpy(CMSG_DATA(header), fds.data(), fds.size() * sizeof(int));
    const ssize_t sent = ::sendmsg(socket_, &message, MSG_NOSIGNAL);
    if (sent < 0) return std::string("wrong sendmsg: ") + std::strerror(errno);
    return static_cast<std::size_t>(sent) == text.size() ? "ok" : say(text.substr(static_cast<std::size_t>(sent)));
  }

  std::string say(const std::string& text) const {
    for (std::size_t done = 0; done < text.size();) {
      const ssize_t sent = ::send(socket_, text.data() + done, text.size() - done, MSG_NOSIGNAL);
      if (sent <= 0) return std::string("wrong send: ") + std::strerror(errno);
      done += static_cast<std::size_t>(sent);
    }
    return "ok";
  }

  std::string read_line() const {
    std::string line;
    for (char c; ::recv(socket_, &c, 1, 0) == 1;) {
      if (c == '\n') return "ok " + line;
      line += c;
    }
    return "wrong end behind " + line;
  }

  /// Cloud Hypervisor's responses: status and type.
  std::string read_answer() const {
    unsigned char bytes[16];
    if (::recv(socket_, bytes, sizeof bytes, MSG_WAITALL) != sizeof bytes) return "wrong end";
    return "ok " + std::to_string(bytes[0] | bytes[1] << 8) + " " + std::to_string(bytes[2] | bytes[3] << 8);
  }

  std::string wait_closed() const {
    char c;
    while (::recv(socket_, &c, 1, 0) == 1) {
    }
    return "ok";
  }

  unsigned char* at(std::size_t offset) const {
    for (const Region& region : regions_)
      if (offset >= region.offset && offset < region.offset + region.bytes) return region.at + (offset - region.offset);
    std::abort();
  }

  /// While memory is being given back a page is one or the other.
  bool right(std::size_t number) const {
    static const unsigned char zeros[page] = {};
    const bool may_be_there = removed_[number] != Removed::yes;
    const unsigned char* const got = at(number * page);
    if (may_be_there && std::memcmp(got, expected_ + number * page, page) == 0) return true;
    return std::memcmp(got, zeros, page) == 0 && removed_[number] != Removed::no;
  }

  /// Pages in an order that the seed gives, each once, by several threads.
  std::string touch(std::uint64_t seed, std::uint64_t count, std::uint64_t threads) const {
    std::vector<std::uint32_t> order(bytes_ / page);
    for (std::uint32_t i = 0; i < order.size(); ++i) order[i] = i;
    std::mt19937_64 dice(seed);
    std::ranges::shuffle(order, dice);
    order.resize(std::min<std::size_t>(order.size(), count));
    std::atomic<std::size_t> next = 0, wrong = 0;
    std::vector<std::thread> all;
    for (std::uint64_t i = 0; i < threads; ++i)
      all.emplace_back([&] {
        for (std::size_t n; (n = next++) < order.size();)
          if (!right(order[n])) ++wrong;
      });
    for (std::thread& each : all) each.join();
    return wrong == 0 ? "ok " + std::to_string(order.size()) : "wrong pages: " + std::to_string(wrong.load());
  }

  std::string check() const {
    for (std::size_t i = 0; i < bytes_ / page; ++i)
      if (!right(i)) return "wrong page " + std::to_string(i);
    return "ok";
  }

  /// As a balloon does; inside of one region.
  std::string remove(std::size_t offset, std::size_t bytes) {
    const auto mark = [&](Removed how) {
      for (std::size_t i = offset / page; i < (offset + bytes) / page; ++i) removed_[i] = how;
    };
    mark(Removed::soon);
    {
      // Ahead of the call: a pager that is started anew has to know of it.
      const std::lock_guard lock(mutex_);
      dropped_.emplace_back(offset, bytes);
    }
    if (::madvise(at(offset), bytes, minor_ ? MADV_REMOVE : MADV_DONTNEED) != 0) return "wrong madvise";
    mark(Removed::yes);
    return "ok";
  }

  std::uint64_t resident() const {
    std::uint64_t count = 0;
    for (const Region& region : regions_) {
      std::vector<unsigned char> pages(region.bytes / page);
      if (::mincore(region.at, region.bytes, pages.data()) != 0) die("mincore");
      count += static_cast<std::uint64_t>(std::ranges::count_if(pages, [](unsigned char c) { return (c & 1) != 0; }));
    }
    return count;
  }

  /// Reads faults and serves none, as a pager does that is killed in between.
  std::string swallow(std::uint64_t count) const {
    for (int i = 0; i < 20'000 && count > 0; ++i) {
      uffd_msg message{};
      if (::read(uffd_, &message, sizeof message) == sizeof message)
        --count;
      else
        ::usleep(1000);
    }
    return count == 0 ? "ok" : "wrong: no fault came";
  }

  /// Gives memory back and touches it again, all the time.
  std::string flood(std::uint64_t seconds, std::uint64_t pages) {
    const auto end = std::chrono::steady_clock::now() + std::chrono::seconds(seconds);
    std::uint64_t rounds = 0;
    for (std::size_t i = 0; i < pages; ++i) removed_[i] = Removed::yes;
    while (std::chrono::steady_clock::now() < end) {
      if (::madvise(at(0), pages * page, MADV_DONTNEED) != 0) return "wrong madvise";
      for (std::size_t i = 0; i < pages; ++i)
        if (!right(i)) return "wrong page " + std::to_string(i);
      ++rounds;
    }
    return "ok " + std::to_string(rounds);
  }

  const std::string protocol_, path_, idstr_;
  const bool minor_;
  int uffd_ = -1;
  int memory_ = -1;
  int socket_ = -1;
  std::size_t bytes_ = 0;
  const unsigned char* expected_ = nullptr;
  std::vector<Region> regions_;
  std::vector<std::atomic<Removed>> removed_;
  std::mutex mutex_;
  std::vector<std::pair<std::size_t, std::size_t>> dropped_;
};

}  // namespace

int main(int argc, char** argv) {
  if (argc < 4) return 2;
  Vmm vmm(argv[1], argv[2], argv[3], argc > 4 ? static_cast<std::size_t>(std::atoi(argv[4])) : 1,
          argc > 5 ? argv[5] : "", argc > 6);
  std::puts("ok");
  std::fflush(stdout);
  std::vector<std::thread> beside;
  std::vector<std::string> said;
  std::mutex mutex;
  for (std::string line; std::getline(std::cin, line);) {
    std::string reply = "ok";
    if (line.starts_with('&')) {
      beside.emplace_back([&, line] {
        std::string text = vmm.run(line.substr(1));
        const std::lock_guard lock(mutex);
        said.push_back(std::move(text));
      });
    } else if (line == "join") {
      for (std::thread& each : beside) each.join();
      beside.clear();
      for (const std::string& each : said)
        if (!each.starts_with("ok")) reply = each;
      said.clear();
    } else {
      reply = vmm.run(line);
    }
    std::puts(reply.c_str());
    std::fflush(stdout);
  }
  std::_Exit(0);  // threads may wait for memory
}

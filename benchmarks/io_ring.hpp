// SPDX-License-Identifier: MIT
//
// Ways of a packet into and out of a socket by io_uring, for kernel_ways.cpp: by the bare system calls, because Debian 12's
// liburing knows no bundles. One ring per connection and thread.
#pragma once

#include <linux/io_uring.h>
#include <sys/mman.h>
#include <sys/syscall.h>

#include "kernel_ways.hpp"

namespace ways {

/// Flags that are younger than Debian 12's linux/io_uring.h; they are part of the kernel's interface.
inline constexpr std::uint16_t recvsend_bundle = 1U << 4;

/// A ring for one thread.
class IoRing {
 public:
  explicit IoRing(unsigned entries) {
    io_uring_params params{};
    params.flags = IORING_SETUP_SINGLE_ISSUER | IORING_SETUP_DEFER_TASKRUN;
    ring_ = static_cast<int>(::syscall(SYS_io_uring_setup, entries, &params));
    if (ring_ < 0) fail_errno("io_uring_setup");
    const std::size_t bytes = std::max(params.sq_off.array + params.sq_entries * sizeof(unsigned),
                                       params.cq_off.cqes + params.cq_entries * sizeof(io_uring_cqe));
    auto* const rings = static_cast<std::byte*>(map(bytes, IORING_OFF_SQ_RING));
    const auto at = [rings](std::uint32_t offset) { return reinterpret_cast<unsigned*>(rings + offset); };
    sq_tail_ = at(params.sq_off.tail);
    sq_mask_ = *at(params.sq_off.ring_mask);
    cq_head_ = at(params.cq_off.head);
    cq_tail_ = at(params.cq_off.tail);
    cq_mask_ = *at(params.cq_off.ring_mask);
    cqes_ = reinterpret_cast<io_uring_cqe*>(rings + params.cq_off.cqes);
    for (unsigned i = 0; i < params.sq_entries; ++i) at(params.sq_off.array)[i] = i;
    sqes_ = static_cast<io_uring_sqe*>(map(params.sq_entries * sizeof(io_uring_sqe), IORING_OFF_SQES));
  }
  IoRing(const IoRing&) = delete;
  IoRing& operator=(const IoRing&) = delete;
  ~IoRing() {
    for (const auto& [memory, bytes] : maps_) ::munmap(memory, bytes);
    ::close(ring_);
  }

  void enroll(unsigned what, const void* argument, unsigned count) {
    if (::syscall(SYS_io_uring_register, ring_, what, argument, count) < 0) fail_errno("io_uring_register");
  }

  /// The next request, to be filled in before enter().
  io_uring_sqe& add(std::uint8_t opcode, int fd) {
    io_uring_sqe& sqe = sqes_[(*sq_tail_ + added_++) & sq_mask_];
    sqe = {};
    sqe.opcode = opcode;
    sqe.fd = fd;
    return sqe;
  }

  /// Hands over what was added, and waits for `wanted` answers; `each(cqe)` gets all that there are.
  template <class Each>
  void enter(unsigned wanted, Each each) {
    std::atomic_ref(*sq_tail_).store(*sq_tail_ + added_, std::memory_order_release);
    const long taken = ::syscall(SYS_io_uring_enter, ring_, added_, wanted, IORING_ENTER_GETEVENTS, nullptr, 0);
    ++calls_;
    if (taken < 0 && errno != EINTR) fail_errno("io_uring_enter");
    if (taken > 0) added_ -= static_cast<unsigned>(taken);
    unsigned head = *cq_head_;
    for (; head != std::atomic_ref(*cq_tail_).load(std::memory_order_acquire); ++head) each(cqes_[head & cq_mask_]);
    std::atomic_ref(*cq_head_).store(head, std::memory_order_release);
  }

  std::uint64_t calls() const { return calls_; }

 private:
  void* map(std::size_t bytes, off_t offset) {
    void* const memory = ::mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_POPULATE, ring_, offset);
    if (memory == MAP_FAILED) fail_errno("map a ring");
    maps_.emplace_back(memory, bytes);
    return memory;
  }

  int ring_ = -1;
  unsigned *sq_tail_ = nullptr, *cq_head_ = nullptr, *cq_tail_ = nullptr;
  unsigned sq_mask_ = 0, cq_mask_ = 0, added_ = 0;
  io_uring_cqe* cqes_ = nullptr;
  io_uring_sqe* sqes_ = nullptr;
  std::vector<std::pair<void*, std::size_t>> maps_;
  std::uint64_t calls_ = 0;
};

/// Some packets, that one system call hands over.
class RingWay {
 public:
  virtual ~RingWay() = default;
  void finish() {
    if (filled_ > 0) flush();
  }
  std::uint64_t calls() const { return ring_.calls(); }

 protected:
  struct Packet {
    iovec parts[2] = {};
    std::size_t count = 0;
    msghdr message = {};
    std::size_t bytes() const { return parts[0].iov_len + (count > 1 ? parts[1].iov_len : 0); }
  };

  RingWay(int fd, unsigned depth) : ring_(8 * depth), packets_(depth), fd_(fd) {
    ring_.enroll(IORING_REGISTER_FILES, &fd_, 1);
  }

  /// Returns whether there are as many packets as one call is to take.
  bool keep(std::span<iovec> parts) {
    Packet& packet = packets_[filled_++];
    packet.count = parts.size();
    packet.parts[0] = headers_.keep(parts[0]);
    if (parts.size() > 1) packet.parts[1] = parts[1];
    return filled_ == packets_.size();
  }
  /// Waits for the answers to `requests` requests, and for the notices that some announce. All have to have sent everything.
  void enter(unsigned requests, std::size_t bytes) {
    std::size_t sent = 0;
    unsigned notices = 0;
    for (unsigned answers = 0; answers < requests || notices > 0;) {
      ring_.enter(std::max(1U, requests - answers + notices), [&](const io_uring_cqe& cqe) {
        if ((cqe.flags & IORING_CQE_F_NOTIF) != 0) {
          --notices;
          return;
        }
        if (cqe.res < 0) fail_errno("a request of io_uring", -cqe.res);
        sent += static_cast<std::size_t>(cqe.res);
        ++answers;
        if ((cqe.flags & IORING_CQE_F_MORE) != 0) ++notices;
      });
    }
    if (sent != bytes) throw std::runtime_error("io_uring: a request has sent less than it was told to");
    filled_ = 0;
  }
  virtual void flush() = 0;
  /// Links a request to the one behind it.
  static void link(io_uring_sqe& sqe, bool last) {
    sqe.flags = static_cast<std::uint8_t>(sqe.flags | IOSQE_FIXED_FILE | (last ? 0 : IOSQE_IO_LINK));
  }

  IoRing ring_;
  std::vector<Packet> packets_;
  std::size_t filled_ = 0;

 private:
  int fd_;
  Headers headers_;
};

/// A sendmsg request for each packet.
class RingSendmsg : public RingWay {
 public:
  RingSendmsg(int fd, unsigned depth) : RingWay(fd, depth) {}
  void send(std::span<iovec> parts) {
    if (keep(parts)) flush();
  }

 private:
  void flush() override {
    std::size_t bytes = 0;
    for (std::size_t i = 0; i < filled_; ++i) {
      Packet& packet = packets_[i];
      packet.message.msg_iov = packet.parts;
      packet.message.msg_iovlen = packet.count;
      io_uring_sqe& sqe = ring_.add(IORING_OP_SENDMSG, 0);
      sqe.addr = reinterpret_cast<std::uintptr_t>(&packet.message);
      sqe.len = 1;
      sqe.msg_flags = MSG_WAITALL | MSG_NOSIGNAL;
      link(sqe, i + 1 == filled_);
      bytes += packet.bytes();
    }
    enter(static_cast<unsigned>(filled_), bytes);
  }
};

/// All packets as one request that takes a bundle of buffers.
class RingBundle : public RingWay {
 public:
  RingBundle(int fd, unsigned depth) : RingWay(fd, depth) {
    void* const memory =
        ::mmap(nullptr, entries * sizeof(io_uring_buf), PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (memory == MAP_FAILED) fail_errno("map a ring of buffers");
    buffers_ = static_cast<io_uring_buf_ring*>(memory);
    io_uring_buf_reg ring{};
    ring.ring_addr = reinterpret_cast<std::uintptr_t>(memory);
    ring.ring_entries = entries;
    ring_.enroll(IORING_REGISTER_PBUF_RING, &ring, 1);
  }
  ~RingBundle() override { ::munmap(buffers_, entries * sizeof(io_uring_buf)); }
  void send(std::span<iovec> parts) {
    if (keep(parts)) flush();
  }

 private:
  static constexpr unsigned entries = 64;

  void flush() override {
    std::size_t bytes = 0;
    for (std::size_t i = 0; i < filled_; ++i) {
      for (std::size_t part = 0; part < packets_[i].count; ++part) {
        auto* const all = reinterpret_cast<io_uring_buf*>(buffers_);  // `bufs` is an array that C++ does not take
        io_uring_buf& buffer = all[tail_++ % entries];
        buffer.addr = reinterpret_cast<std::uintptr_t>(packets_[i].parts[part].iov_base);
        buffer.len = static_cast<std::uint32_t>(packets_[i].parts[part].iov_len);
        buffer.bid = static_cast<std::uint16_t>(tail_ - 1U) % entries;
      }
      bytes += packets_[i].bytes();
    }
    std::atomic_ref(buffers_->tail).store(tail_, std::memory_order_release);
    io_uring_sqe& sqe = ring_.add(IORING_OP_SEND, 0);
    sqe.ioprio = recvsend_bundle;
    sqe.flags = IOSQE_BUFFER_SELECT;
    sqe.msg_flags = MSG_WAITALL | MSG_NOSIGNAL;
    link(sqe, true);
    enter(1, bytes);
  }

  io_uring_buf_ring* buffers_ = nullptr;
  std::uint16_t tail_ = 0;
};

/// Headers as copies, pages by SEND_ZC from registered memory.
class RingZerocopy : public RingWay {
 public:
  /// Registering pins all of `memory`, in pieces as large as the kernel takes.
  RingZerocopy(int fd, unsigned depth, std::span<const std::byte> memory) : RingWay(fd, depth), memory_(memory) {
    std::vector<iovec> pieces;
    for (std::size_t at = 0; at < memory.size(); at += piece_bytes)
      pieces.push_back({const_cast<std::byte*>(memory.data() + at), std::min(piece_bytes, memory.size() - at)});
    ring_.enroll(IORING_REGISTER_BUFFERS, pieces.data(), static_cast<unsigned>(pieces.size()));
  }
  void send(std::span<iovec> parts) {
    if (keep(parts)) flush();
  }

 private:
  static constexpr std::size_t piece_bytes = std::size_t{512} << 20;

  void flush() override {
    std::size_t bytes = 0;
    unsigned requests = 0;
    for (std::size_t i = 0; i < filled_; ++i) {
      for (std::size_t part = 0; part < packets_[i].count; ++part, ++requests) {
        const iovec& from = packets_[i].parts[part];
        io_uring_sqe& sqe = ring_.add(part == 0 ? IORING_OP_SEND : IORING_OP_SEND_ZC, 0);
        sqe.addr = reinterpret_cast<std::uintptr_t>(from.iov_base);
        sqe.len = static_cast<std::uint32_t>(from.iov_len);
        sqe.msg_flags = MSG_WAITALL | MSG_NOSIGNAL;
        if (part == 0 && packets_[i].count > 1) sqe.msg_flags |= MSG_MORE;
        if (part > 0) {
          sqe.ioprio = IORING_RECVSEND_FIXED_BUF;
          const auto at = static_cast<std::size_t>(static_cast<const std::byte*>(from.iov_base) - memory_.data());
          sqe.buf_index = static_cast<std::uint16_t>(at / piece_bytes);
        }
        link(sqe, i + 1 == filled_ && part + 1 == packets_[i].count);
      }
      bytes += packets_[i].bytes();
    }
    enter(requests, bytes);
  }

  std::span<const std::byte> memory_;
};

/// The other end: a recvmsg request for each packet, because only its header says where its pages go.
class RingRecvmsg {
 public:
  explicit RingRecvmsg(int fd) : ring_(4) { ring_.enroll(IORING_REGISTER_FILES, &fd, 1); }
  void receive(std::span<iovec> parts) {
    while (!parts.empty()) {
      msghdr message{};
      message.msg_iov = parts.data();
      message.msg_iovlen = parts.size();
      io_uring_sqe& sqe = ring_.add(IORING_OP_RECVMSG, 0);
      sqe.addr = reinterpret_cast<std::uintptr_t>(&message);
      sqe.len = 1;
      sqe.msg_flags = MSG_WAITALL;
      sqe.flags = IOSQE_FIXED_FILE;
      int count = -1;
      for (bool answered = false; !answered;)
        ring_.enter(1, [&](const io_uring_cqe& cqe) {
          count = cqe.res;
          answered = true;
        });
      if (count < 0) fail_errno("recvmsg by io_uring", -count);
      if (count == 0) throw std::runtime_error("the other side has closed");
      parts = pump::drop(parts, static_cast<std::size_t>(count));
    }
  }
  std::uint64_t calls() const { return ring_.calls(); }

 private:
  IoRing ring_;
};

}  // namespace ways

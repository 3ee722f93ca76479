// SPDX-License-Identifier: MIT
//
// Two rivals that lock. Semaphores is the scheme as it is described for QEMU: a channel holds one batch at a time; a
// semaphore counts free channels, each channel has one of its own, a mutex guards the slot. CondVar is what most people
// would write: one queue, one mutex, two condition variables.
#pragma once

#include <semaphore.h>

#include <condition_variable>
#include <deque>
#include <memory>
#include <mutex>
#include <vector>

#include "multifd/engine/batch_handoff.hpp"

namespace rivals {

using multifd::PageBatch;
using multifd::engine::Work;

class Semaphores {
 public:
  Semaphores(unsigned channels, std::size_t packet_pages) : channels_(channels) {
    for (unsigned i = 0; i <= channels; ++i) {
      slots_.push_back(std::make_unique<std::uint64_t[]>(packet_pages));
      batches_.push_back(std::make_unique<PageBatch>(std::span(slots_[i].get(), packet_pages)));
    }
    for (unsigned i = 0; i < channels; ++i) channels_[i].batch = batches_[i + 1].get();
    sem_init(&ready_, 0, 0);
  }
  ~Semaphores() { sem_destroy(&ready_); }

  PageBatch* first_batch() { return batches_[0].get(); }

  PageBatch* put(PageBatch* full) {
    wait(ready_);
    for (;;) {
      Channel& channel = channels_[next_];
      next_ = (next_ + 1) % channels_.size();
      const std::lock_guard lock(channel.mutex);
      if (channel.pending) continue;
      channel.pending = true;
      std::swap(channel.batch, full);
      sem_post(&channel.work);
      return full;
    }
  }

  void end() {
    for (std::size_t i = 0; i < channels_.size(); ++i) wait(ready_);  // all are idle
    for (Channel& channel : channels_) {
      channel.ended = true;
      sem_post(&channel.work);
    }
  }

  Work take(unsigned c) {
    Channel& mine = channels_[c];
    sem_post(&ready_);
    wait(mine.work);
    const std::lock_guard lock(mine.mutex);
    if (mine.ended) return {.kind = Work::Kind::end};
    return {.kind = Work::Kind::batch, .batch = mine.batch};
  }

  void give_back(unsigned c, PageBatch* batch) {
    const std::lock_guard lock(channels_[c].mutex);
    batch->clear();
    channels_[c].pending = false;
  }

 private:
  struct Channel {
    Channel() { sem_init(&work, 0, 0); }
    ~Channel() { sem_destroy(&work); }
    sem_t work;
    std::mutex mutex;
    PageBatch* batch = nullptr;
    bool pending = false;
    bool ended = false;
  };

  static void wait(sem_t& semaphore) {
    while (sem_wait(&semaphore) != 0) {
    }
  }

  std::vector<Channel> channels_;
  std::vector<std::unique_ptr<std::uint64_t[]>> slots_;
  std::vector<std::unique_ptr<PageBatch>> batches_;
  std::size_t next_ = 0;
  sem_t ready_;
};

class CondVar {
 public:
  CondVar(unsigned channels, unsigned depth, std::size_t packet_pages) {
    for (unsigned i = 0; i <= channels * depth; ++i) {
      slots_.push_back(std::make_unique<std::uint64_t[]>(packet_pages));
      batches_.push_back(std::make_unique<PageBatch>(std::span(slots_[i].get(), packet_pages)));
      if (i != 0) empty_.push_back(batches_[i].get());
    }
  }

  PageBatch* first_batch() { return batches_[0].get(); }

  PageBatch* put(PageBatch* full) {
    std::unique_lock lock(mutex_);
    full_.push_back(full);
    work_.notify_one();
    room_.wait(lock, [&] { return !empty_.empty(); });
    PageBatch* const batch = empty_.back();
    empty_.pop_back();
    return batch;
  }

  void end() {
    const std::lock_guard lock(mutex_);
    ended_ = true;
    work_.notify_all();
  }

  Work take(unsigned) {
    std::unique_lock lock(mutex_);
    work_.wait(lock, [&] { return ended_ || !full_.empty(); });
    if (full_.empty()) return {.kind = Work::Kind::end};
    PageBatch* const batch = full_.front();
    full_.pop_front();
    return {.kind = Work::Kind::batch, .batch = batch};
  }

  void give_back(unsigned, PageBatch* batch) {
    batch->clear();
    const std::lock_guard lock(mutex_);
    empty_.push_back(batch);
    room_.notify_one();
  }

 private:
  std::mutex mutex_;
  std::condition_variable work_;
  std::condition_variable room_;
  std::deque<PageBatch*> full_;
  std::vector<PageBatch*> empty_;
  std::vector<std::unique_ptr<std::uint64_t[]>> slots_;
  std::vector<std::unique_ptr<PageBatch>> batches_;
  bool ended_ = false;
};

}  // namespace rivals

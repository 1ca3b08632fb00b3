// SPDX-License-Identifier: Apache-2.0
// File operations on their way through libuv's thread pool.
//
// Contract: operations are put in on the loop's thread and collected until `handOver`, then drained
// by a few pool jobs (never more than kJobs, so that the pool stays usable for others). Each one is
// either run once and given back through `done`, or, after `stop`, given back unrun. `done` is called
// on the loop's thread with whole batches: at the end of a job, or earlier when a job takes long. An
// operation that blocks holds up neither the results of those before it nor, while jobs are left,
// those behind it, for longer than kTickMs.
// An operation's memory and descriptor are its owner's and stay until it is back. No N-API.
#pragma once

#include <uv.h>

#include <array>
#include <cstdint>
#include <mutex>

#include "operation.h"

namespace tcmu {

struct QueuedOperation : Operation {
  QueuedOperation* next = nullptr;
  int64_t result = 0;
};

class OperationList {
 public:
  bool empty() const { return !first_; }
  uint32_t size() const { return size_; }
  void push(QueuedOperation* operation) {
    operation->next = nullptr;
    (first_ ? last_->next : first_) = operation;
    last_ = operation;
    size_++;
  }
  QueuedOperation* pop() {
    QueuedOperation* operation = first_;
    if (operation) {
      first_ = operation->next;
      size_--;
    }
    return operation;
  }
  void append(OperationList& other) {
    if (other.empty()) return;
    (first_ ? last_->next : first_) = other.first_;
    last_ = other.last_;
    size_ += other.size_;
    other = {};
  }

 private:
  QueuedOperation* first_ = nullptr;
  QueuedOperation* last_ = nullptr;
  uint32_t size_ = 0;
};

class Queue {
 public:
  struct Owner {
    virtual void done(OperationList& operations) = 0;
    virtual void jobStarted() = 0;  // in libuv's pool
    virtual void jobEnded() = 0;    // may destroy the queue when none is left
    virtual ~Owner() = default;
  };

  Queue(uv_loop_t* loop, Owner& owner) : loop_(loop), owner_(owner) {}

  // Both are the owner's, valid until `stop`. `wake`'s callback calls `deliver`, `timer` is free.
  void start(uv_async_t* wake, uv_timer_t* timer);
  void push(QueuedOperation* operation) { collected_.push(operation); }
  void handOver();
  void tick();
  void deliver();
  // Takes back what has not been started; from now on `done` gets only what is running.
  void stop();
  uint32_t jobs() const { return jobs_running_; }

 private:
  static constexpr uint32_t kJobs = 4;
  // A job that has run this long reports what it has so far, and is worth a thread of its own.
  static constexpr uint64_t kSliceNs = 50'000;
  static constexpr uint64_t kTickMs = 1;

  struct Job {
    uv_work_t request;
    Queue* queue;
    bool running = false;
    uint32_t operations = 0;
    uint64_t took = 0;
  };
  void startJobs(uint64_t wanted);
  void work(Job& job);
  void ended(Job& job);

  uv_loop_t* loop_;
  Owner& owner_;
  std::array<Job, kJobs> jobs_;
  uint32_t jobs_running_ = 0;
  uint64_t mean_ns_ = 0;  // of recent operations
  OperationList collected_;
  uv_timer_t* timer_ = nullptr;

  std::mutex mutex_;  // guards what follows
  OperationList ready_;
  OperationList finished_;
  uv_async_t* wake_ = nullptr;
};

}  // namespace tcmu

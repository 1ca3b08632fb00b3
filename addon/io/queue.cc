// SPDX-License-Identifier: Apache-2.0
#include "queue.h"

#include <algorithm>

namespace tcmu {

void Queue::start(uv_async_t* wake, uv_timer_t* timer) {
  const std::lock_guard lock(mutex_);
  wake_ = wake;
  timer_ = timer;
  timer_->data = this;
}

void Queue::handOver() {
  if (collected_.empty()) return;
  uint64_t waiting;
  {
    const std::lock_guard lock(mutex_);
    ready_.append(collected_);
    waiting = ready_.size();
  }
  // Waking a thread costs as much as many quick operations: take as many as have a slice to do each.
  startJobs(std::clamp<uint64_t>(waiting * mean_ns_ / kSliceNs, 1, kJobs));
}

void Queue::startJobs(uint64_t wanted) {
  if (jobs_running_ == 0 && timer_) {
    uv_timer_start(
        timer_, [](uv_timer_t* timer) { static_cast<Queue*>(timer->data)->tick(); }, kTickMs,
        kTickMs);
  }
  for (Job& job : jobs_) {
    if (jobs_running_ >= wanted) return;
    if (job.running) continue;
    job.queue = this;
    job.request.data = &job;
    const int error = uv_queue_work(
        loop_, &job.request,
        [](uv_work_t* request) {
          Job& job = *static_cast<Job*>(request->data);
          job.queue->work(job);
        },
        [](uv_work_t* request, int) {
          Job& job = *static_cast<Job*>(request->data);
          job.queue->ended(job);
        });
    if (error != 0) return;
    job.running = true;
    jobs_running_++;
    owner_.jobStarted();
  }
}

// Some job has been at it for a while: perhaps an operation blocks.
void Queue::tick() {
  bool waiting;
  {
    const std::lock_guard lock(mutex_);
    waiting = !ready_.empty();
  }
  if (waiting && jobs_running_ < kJobs) startJobs(jobs_running_ + 1);
  deliver();
}

// On a pool thread.
void Queue::work(Job& job) {
  const uint64_t start = uv_hrtime();
  job.operations = 0;
  uint64_t now = start;
  std::unique_lock lock(mutex_);
  while (QueuedOperation* operation = ready_.pop()) {
    lock.unlock();
    operation->result = operation->run();
    now = uv_hrtime();
    job.operations++;
    lock.lock();
    finished_.push(operation);
    if (now - start > kSliceNs && wake_ && !ready_.empty()) uv_async_send(wake_);
  }
  job.took = now - start;
}

void Queue::ended(Job& job) {
  job.running = false;
  if (--jobs_running_ == 0 && timer_) uv_timer_stop(timer_);
  if (job.operations > 0) mean_ns_ = (mean_ns_ * 3 + job.took / job.operations) / 4;
  deliver();
  // Put in after the job last looked.
  bool left;
  {
    const std::lock_guard lock(mutex_);
    collected_.append(ready_);
    left = !collected_.empty();
  }
  if (left) handOver();
  owner_.jobEnded();
}

void Queue::deliver() {
  OperationList operations;
  {
    const std::lock_guard lock(mutex_);
    operations.append(finished_);
  }
  if (!operations.empty()) owner_.done(operations);
}

void Queue::stop() {
  timer_ = nullptr;
  OperationList operations;
  {
    const std::lock_guard lock(mutex_);
    wake_ = nullptr;
    operations.append(ready_);
  }
  operations.append(collected_);
  if (!operations.empty()) owner_.done(operations);
}

}  // namespace tcmu

// SPDX-License-Identifier: Apache-2.0
// The mapping of one device and the descriptors that go with it.
//
// Owns both from construction on; unmaps and closes when destroyed, so whoever may still touch the
// memory keeps it alive. Never destroying it is how memory under a stuck operation is leaked: the
// descriptor of the uio device stays open too, and no other process can be handed the same pages.
#pragma once

#include <cstddef>
#include <memory>
#include <optional>
#include <span>

#include "guard.h"

namespace tcmu {

class Mapping {
 public:
  // Null and errno when mmap fails; the descriptors then stay the caller's. Equal ones are closed once.
  static std::unique_ptr<Mapping> make(int memory_fd, int event_fd, int doorbell_fd, size_t bytes);
  ~Mapping();
  Mapping(const Mapping&) = delete;
  Mapping& operator=(const Mapping&) = delete;

  std::span<std::byte> bytes() const { return {static_cast<std::byte*>(start_), bytes_}; }
  int eventFd() const { return event_fd_; }
  int doorbellFd() const { return doorbell_fd_; }
  bool poisoned() const { return range_->poisoned(); }
  const void* poisonedAt() const { return range_->poisonedAt(); }
  // Forgets the descriptors: they are the caller's again.
  void disownFds() { memory_fd_ = event_fd_ = doorbell_fd_ = -1; }

 private:
  Mapping(int memory_fd, int event_fd, int doorbell_fd, void* start, size_t bytes);

  int memory_fd_, event_fd_, doorbell_fd_;
  void* start_;
  size_t bytes_;
  std::optional<GuardedRange> range_;
};

}  // namespace tcmu

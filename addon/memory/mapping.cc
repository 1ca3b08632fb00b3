// SPDX-License-Identifier: Apache-2.0
#include "mapping.h"

#include <sys/mman.h>
#include <unistd.h>

#include "mapping_watch.h"

namespace tcmu {

std::unique_ptr<Mapping> Mapping::make(int memory_fd, int event_fd, int doorbell_fd, size_t bytes) {
  void* start = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_SHARED, memory_fd, 0);
  if (start == MAP_FAILED) return nullptr;
  return std::unique_ptr<Mapping>(new Mapping(memory_fd, event_fd, doorbell_fd, start, bytes));
}

Mapping::Mapping(int memory_fd, int event_fd, int doorbell_fd, void* start, size_t bytes)
    : memory_fd_(memory_fd),
      event_fd_(event_fd),
      doorbell_fd_(doorbell_fd),
      start_(start),
      bytes_(bytes) {
  range_.emplace(start, bytes);
  MappingWatch::announce(memory_fd, start, bytes);
}

Mapping::~Mapping() {
  MappingWatch::withdraw(start_);
  range_.reset();
  munmap(start_, bytes_);
  if (memory_fd_ >= 0) close(memory_fd_);
  if (event_fd_ >= 0 && event_fd_ != memory_fd_) close(event_fd_);
  if (doorbell_fd_ >= 0 && doorbell_fd_ != memory_fd_ && doorbell_fd_ != event_fd_)
    close(doorbell_fd_);
}

}  // namespace tcmu

// SPDX-License-Identifier: Apache-2.0
// The zero-copy window: the part of the handler's mapping behind the data area that shows
// initiators' pages while their commands are in flight.
//
// The window is the initiators' buffer pool, page for page, mapped without any access right; a
// command's pages get theirs for its time, Data-Out read-only. A touch without the right raises
// SIGBUS as on a kernel with zero copy, though a userspace mapping gives SIGSEGV (see
// onSegmentationFault); system calls fail with EFAULT.
//
// Works in every mapping of this process that MappingWatch knows, also in one made later, while a
// command is in flight. A handler in another process can't be reached. Thread-safe against mappings
// that come and go; otherwise the caller serialises.
#pragma once

#include <cstddef>
#include <cstdint>
#include <map>
#include <mutex>
#include <span>
#include <vector>

#include "../memory/mapping_watch.h"

namespace tcmu::sim {

class Window : private MappingWatch {
 public:
  // Whole pages, from the start of the pool and of the window alike.
  struct Range {
    size_t offset;
    size_t bytes;
  };

  // The window is `[offset, offset + bytes)` of the mapping of `ringFd`; `poolFd` has as many
  // bytes.
  Window(int ringFd, int poolFd, size_t offset, size_t bytes);
  ~Window();

  // Where in the mapping the window begins.
  size_t offset() const { return offset_; }
  // False, and the command has to be copied: nobody in this process has the memory mapped, or
  // another command in flight shows some of these pages.
  bool expose(const Range& range, bool writable);
  // Takes the rights from all of `ranges`, neighbours together. Sorts them.
  void conceal(std::span<Range> ranges);
  // Calls of the system it took.
  uint64_t zaps() const { return zaps_; }
  // Stores into Data-Out and touches of concealed pages, of all windows in the process.
  static uint64_t denied();

 private:
  void mapped(void* start, size_t bytes) override;
  void unmapping(void* start) override;
  bool protect(const Range& range, int protection);
  void forget(uint8_t* base);

  const int ringFd_;
  const int poolFd_;
  const size_t offset_;
  const size_t bytes_;
  uint64_t zaps_ = 0;

  std::mutex lock_;  // guards the rest
  bool closing_ = false;
  std::vector<uint8_t*> bases_;
  struct Exposure {
    size_t bytes;
    int protection;
  };
  std::map<size_t, Exposure> exposed_;  // by offset
};

}  // namespace tcmu::sim

/**
 * The zero-copy window: the part of the handler's mapping behind the data area that shows the pages
 * of initiators while their commands are in flight.
 *
 * Pages of the window that are not exposed lie behind the end of the ring's memory file: touching
 * them raises SIGBUS, system calls fail with EFAULT. Ranges are given round robin, so that a late
 * access meets nothing. Data-Out is exposed read-only; a store into it raises SIGBUS, as in the
 * kernel, though a userspace mapping gives SIGSEGV: see onSegmentationFault.
 *
 * Works in every mapping of this process that MappingWatch knows, also in one made later, while a
 * command is in flight. A handler in another process can't be reached. Thread-safe against mappings
 * that come and go; otherwise the caller serialises.
 */
#pragma once

#include <cstddef>
#include <cstdint>
#include <map>
#include <mutex>
#include <optional>
#include <span>
#include <vector>

#include "../memory/mapping_watch.h"

namespace tcmu::sim {

class Window : private MappingWatch {
public:
  struct Range {
    uint32_t first; // page in the window
    uint32_t pages;
  };

  /** The window is `[offset, offset + bytes)` of the mapping of `ringFd`; initiators' pages are `poolFd`'s. */
  Window(int ringFd, int poolFd, size_t offset, size_t bytes);
  ~Window();

  size_t offsetOf(const Range& range) const;
  /** Nothing when no such run is free. */
  std::optional<Range> reserve(size_t pages);
  /**
   * Shows pages of the pool from `poolOffset` in (part of) a reserved range. False when nobody in this
   * process has the memory mapped, or it can't be: copy then.
   */
  bool expose(const Range& range, size_t poolOffset, bool writable);
  /** Takes the pages out of all of `ranges`, neighbours together. Sorts them. */
  void zap(std::span<Range> ranges);
  void release(const Range& range);
  uint64_t zaps() const { return zaps_; }
  /** Stores into Data-Out, of all windows in the process. */
  static uint64_t denied();

private:
  struct Exposure {
    uint32_t pages;
    bool writable;
    size_t poolOffset;
  };

  void mapped(void* start, size_t bytes) override;
  void unmapping(void* start) override;
  void forget(uint8_t* base);
  bool show(uint8_t* base, uint32_t first, const Exposure& exposure) const;

  const int ringFd_;
  const int poolFd_;
  const size_t offset_;
  const uint32_t pages_;
  std::vector<bool> taken_;
  uint32_t cursor_ = 0;
  uint64_t zaps_ = 0;

  std::mutex lock_; // guards the rest
  bool closing_ = false;
  std::vector<uint8_t*> bases_;
  std::map<uint32_t, Exposure> exposed_; // by first page
};

} // namespace tcmu::sim

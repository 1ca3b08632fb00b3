/**
 * Memory of the initiators of a zero-copy device: page-aligned ranges of one memfd, so that the same
 * pages can be shown to the handler. Thread-safe.
 */
#pragma once

#include <cstddef>
#include <cstdint>
#include <map>
#include <mutex>
#include <optional>
#include <span>

namespace tcmu::sim {

class BufferPool {
public:
  /** @throws std::system_error */
  BufferPool();
  ~BufferPool();
  BufferPool(const BufferPool&) = delete;
  BufferPool& operator=(const BufferPool&) = delete;

  int fd() const { return fd_; }
  /** Bytes rounded up to whole pages, not cleared. @throws std::bad_alloc */
  std::span<uint8_t> allocate(size_t bytes);
  void free(std::span<uint8_t> range);
  /** Where in the file a range lies, when all of it is ours and starts and ends at page bounds. */
  std::optional<size_t> offsetOf(std::span<const uint8_t> range) const;

private:
  static constexpr size_t kBytes = size_t{16} << 30; // of addresses; memory only where it is used

  int fd_ = -1;
  uint8_t* base_ = nullptr;
  std::mutex lock_;
  std::map<size_t, size_t> free_; // offset → length, no two adjacent
};

} // namespace tcmu::sim

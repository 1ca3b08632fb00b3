// SPDX-License-Identifier: Apache-2.0
// Memory of the initiators of a zero-copy device: page-aligned ranges of one memfd, so that the
// same pages can be shown to the handler. Given round robin, so that who touches a range late meets
// nobody's. Thread-safe.
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
  // `bytes`: whole pages; memory only where it is used. @throws std::system_error
  explicit BufferPool(size_t bytes);
  ~BufferPool();
  BufferPool(const BufferPool&) = delete;
  BufferPool& operator=(const BufferPool&) = delete;

  int fd() const { return fd_; }
  // Bytes rounded up to whole pages, not cleared. Empty when there is no room.
  std::span<uint8_t> allocate(size_t bytes);
  void free(std::span<uint8_t> range);
  // Where in the file a range lies, when all of it is ours and starts and ends at page bounds.
  std::optional<size_t> offsetOf(std::span<const uint8_t> range) const;

 private:
  const size_t bytes_;
  int fd_ = -1;
  uint8_t* base_ = nullptr;
  std::mutex lock_;
  std::map<size_t, size_t> free_;  // offset → length, no two adjacent
  size_t cursor_ = 0;
};

}  // namespace tcmu::sim

// SPDX-License-Identifier: Apache-2.0
#include "buffer_pool.h"

#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <system_error>

#include "abi.h"

namespace tcmu::sim {

namespace {
size_t wholePages(size_t bytes) { return (bytes + kPage - 1) / kPage * kPage; }
}  // namespace

BufferPool::BufferPool(size_t bytes) : bytes_(bytes), free_{{0, bytes}} {
  const auto failure = [this](const char* call) {
    const int error = errno;
    if (fd_ >= 0) close(fd_);
    return std::system_error(error, std::generic_category(), call);
  };
  fd_ = memfd_create("tcmu-sim-initiator", MFD_CLOEXEC);
  if (fd_ < 0) throw failure("memfd_create");
  if (ftruncate(fd_, static_cast<off_t>(bytes_)) < 0) throw failure("ftruncate");
  void* base = mmap(nullptr, bytes_, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_NORESERVE, fd_, 0);
  if (base == MAP_FAILED) throw failure("mmap");
  base_ = static_cast<uint8_t*>(base);
}

BufferPool::~BufferPool() {
  munmap(base_, bytes_);
  close(fd_);
}

std::span<uint8_t> BufferPool::allocate(size_t bytes) {
  const size_t size = wholePages(bytes);
  std::lock_guard guard(lock_);
  // Behind the cursor first, also within the free range it stands in; then from the start.
  for (const size_t from : {cursor_, size_t{0}}) {
    auto it = free_.upper_bound(from);
    if (it != free_.begin() && std::prev(it)->first + std::prev(it)->second > from) --it;
    for (; it != free_.end(); ++it) {
      const auto [offset, length] = *it;
      const size_t start = std::max(offset, from);
      if (offset + length - start < size) continue;
      free_.erase(it);
      if (start > offset) free_.emplace(offset, start - offset);
      if (offset + length > start + size)
        free_.emplace(start + size, offset + length - start - size);
      cursor_ = start + size;
      return {base_ + start, bytes};
    }
  }
  return {};
}

void BufferPool::free(std::span<uint8_t> range) {
  if (range.empty()) return;
  auto offset = static_cast<size_t>(range.data() - base_);
  size_t size = wholePages(range.size());
  std::lock_guard guard(lock_);
  auto next = free_.lower_bound(offset);
  if (next != free_.end() && next->first == offset + size) {
    size += next->second;
    next = free_.erase(next);
  }
  if (next != free_.begin()) {
    const auto before = std::prev(next);
    if (before->first + before->second == offset) {
      before->second += size;
      return;
    }
  }
  free_.emplace(offset, size);
}

std::optional<size_t> BufferPool::offsetOf(std::span<const uint8_t> range) const {
  const auto start = reinterpret_cast<uintptr_t>(range.data());
  const auto base = reinterpret_cast<uintptr_t>(base_);
  if (range.empty() || start < base || start - base > bytes_ ||
      range.size() > bytes_ - (start - base) || (start | range.size()) % kPage)
    return {};
  return start - base;
}

}  // namespace tcmu::sim

// SPDX-License-Identifier: Apache-2.0
// The shared mapping: mailbox, ring, data area, over a memfd. The file is only as long as the part
// of the data area that was ever allocated, so a handler that touches memory no command gave it
// gets SIGBUS, as on a page the kernel never allocated. Owns the fd and its own mapping.
#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <cstring>

namespace tcmu::sim {

class SharedMemory {
 public:
  // @throws std::system_error
  SharedMemory(size_t mapped, size_t present);
  ~SharedMemory();
  SharedMemory(const SharedMemory&) = delete;
  SharedMemory& operator=(const SharedMemory&) = delete;

  int fd() const { return fd_; }
  size_t size() const { return mapped_; }
  // Bytes from the start that exist; the rest of the mapping raises SIGBUS.
  size_t present() const { return present_; }
  // @throws std::system_error when the memory can't be had
  void setPresent(size_t bytes);

  uint8_t* at(size_t offset) const { return base_ + offset; }

  template <class T>
  T get(size_t offset) const {
    T value;
    std::memcpy(&value, base_ + offset, sizeof value);
    return value;
  }
  template <class T>
  void put(size_t offset, T value) {
    std::memcpy(base_ + offset, &value, sizeof value);
  }
  uint32_t loadAcquire(size_t offset) const {
    return std::atomic_ref(*reinterpret_cast<uint32_t*>(base_ + offset))
        .load(std::memory_order_acquire);
  }
  void storeRelease(size_t offset, uint32_t value) {
    std::atomic_ref(*reinterpret_cast<uint32_t*>(base_ + offset))
        .store(value, std::memory_order_release);
  }

 private:
  int fd_ = -1;
  uint8_t* base_ = nullptr;
  size_t mapped_;
  size_t present_ = 0;
};

}  // namespace tcmu::sim

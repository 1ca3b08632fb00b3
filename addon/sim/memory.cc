// SPDX-License-Identifier: Apache-2.0
#include "memory.h"

#include <sys/mman.h>
#include <unistd.h>

#include <cerrno>
#include <system_error>

namespace tcmu::sim {

namespace {
std::system_error failure(const char* call) {
  return std::system_error(errno, std::generic_category(), call);
}
}  // namespace

SharedMemory::SharedMemory(size_t mapped, size_t present) : mapped_(mapped) {
  fd_ = memfd_create("tcmu-sim", MFD_CLOEXEC);
  if (fd_ < 0) throw failure("memfd_create");
  try {
    setPresent(present);
    void* base = mmap(nullptr, mapped, PROT_READ | PROT_WRITE, MAP_SHARED, fd_, 0);
    if (base == MAP_FAILED) throw failure("mmap");
    base_ = static_cast<uint8_t*>(base);
  } catch (...) {
    close(fd_);
    throw;
  }
}

SharedMemory::~SharedMemory() {
  munmap(base_, mapped_);
  close(fd_);
}

void SharedMemory::setPresent(size_t bytes) {
  if (ftruncate(fd_, static_cast<off_t>(bytes)) < 0) throw failure("ftruncate");
  present_ = bytes;
}

}  // namespace tcmu::sim

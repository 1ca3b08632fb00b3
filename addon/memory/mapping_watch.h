// SPDX-License-Identifier: Apache-2.0
// Tells the owner of a shared file where this process has it mapped as a device's memory.
//
// The simulated kernel needs it: with zero copy it puts its initiators' pages into the handler's
// mapping, and takes them out again. `Mapping` announces itself; files that nobody watches cost an
// fstat. Any thread; `unmapping` returns before the memory goes, and nothing is called after it.
#pragma once

#include <sys/types.h>

#include <cstddef>

namespace tcmu {

class MappingWatch {
 public:
  // `fd`: the file. @throws std::system_error
  explicit MappingWatch(int fd);
  MappingWatch(const MappingWatch&) = delete;
  MappingWatch& operator=(const MappingWatch&) = delete;

  static void announce(int fd, void* start, size_t bytes);
  static void withdraw(void* start);

 protected:
  ~MappingWatch() = default;
  // To be called once the derived object can take calls. What is mapped already is not told.
  void begin();
  // To be called before the derived object goes.
  void end();

 private:
  // Under a lock of this class: they may not announce or withdraw.
  virtual void mapped(void* start, size_t bytes) = 0;
  virtual void unmapping(void* start) = 0;

  dev_t device_;
  ino_t inode_;
};

}  // namespace tcmu

// SPDX-License-Identifier: Apache-2.0
// One file operation, run by whoever holds it: the JavaScript thread (at once) or a pool thread.
//
// It owns neither the descriptor nor the memory; both stay valid until it has run. No N-API.
#pragma once

#include <sys/uio.h>

#include <cstdint>

#include "../memory/segments.h"

namespace tcmu {

struct Operation {
  enum class Kind : uint8_t { Read, Write, Sync, Allocate, Seek, Truncate, Copy };

  Kind kind;
  int fd;
  // Read, Write: the part of `segments` that is still to be moved, and the file position it goes to.
  // Position -1: the descriptor's own, for pipes.
  // Allocate: `position` and `length`; Seek: `position`; Truncate: `length`. Copy: `length` bytes at
  // `source_position` of `argument`, a descriptor, to `position`.
  Segments segments;
  uint64_t offset;
  uint64_t length;
  int64_t position;
  int argument;     // Allocate: FALLOC_FL_*; Seek: whence
  int64_t moved;    // bytes moved so far
  bool at_end;      // Read: the end of the file was met, what is left is zeroed already
  int64_t source_position;

  // Blocks until it is done. The result: bytes moved, the position found, 0, or -errno.
  int64_t run();

  // Read, Write: moves what can be moved without waiting. True: done, `result` is what `run` would
  // have answered. False: the rest has to wait; `run` goes on from where this came to.
  bool tryNow(int64_t& result);

 private:
  int64_t transfer(int flags);
  int64_t bounce(int flags);
  int64_t zeroRest();
  int64_t copy();
};

}  // namespace tcmu

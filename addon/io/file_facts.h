// SPDX-License-Identifier: Apache-2.0
// What the kernel says of an open file: kind, size, blocks, and whether I/O can be tried without waiting.
#pragma once

#include <cstdint>

namespace tcmu {

struct FileFacts {
  enum class Kind { File, Block, Other } kind = Kind::Other;
  uint64_t size = 0;
  uint32_t block_size = 0;
  uint32_t physical_block_size = 0;
  bool nowait_read = false;
  bool nowait_write = false;
  bool memory = false;
  bool direct = false;
};

// 0, or a positive errno and the call that failed.
int fileFacts(int fd, FileFacts& facts, const char*& call);

// Open file description lock on [start, start + length), to the end for length 0. 1: taken, 0: held by
// somebody else, negative: -errno.
int lockFile(int fd, bool exclusive, int64_t start, int64_t length);

// Gives up what this descriptor holds on the range. 0, or negative: -errno.
int unlockFile(int fd, int64_t start, int64_t length);

// Whether an exclusive lock on the range would meet one of somebody else. 1, 0, or negative: -errno.
int lockedByOthers(int fd, int64_t start, int64_t length);

}  // namespace tcmu

// SPDX-License-Identifier: Apache-2.0
// What the express lane needs to know: the plain READ and WRITE, told from every other command, and
// where in files the bytes of a disk lie.
//
// Plain: READ or WRITE (10) or (16) that moves at least one block and asks for nothing besides. Every other
// command is for a handler to judge: here nothing is refused, only left alone. Pure.
#pragma once

#include <cstddef>
#include <cstdint>
#include <optional>

namespace tcmu {

struct PlainMove {
  bool write;
  uint64_t lba;
  uint32_t blocks;
};

// `bytes` of the CDB are there.
std::optional<PlainMove> plainMove(const uint8_t* cdb, uint32_t bytes);

// A table that JavaScript writes (lib/io/file-map.ts) and this reads, both on the same thread: first
// kFiles files of kFileWords words, then entries of two words: the number of a unit of the disk (or -1), and its
// place: an offset, a multiple of 512, plus twice the number of the file, plus one when it may be written there.
// Unit n can only be in entry n modulo the number of entries, a power of two. It owns nothing.
class FileMap {
 public:
  static constexpr size_t kFiles = 16;
  enum FileWord { kFd, kReadMode, kWriteMode, kFileWords };

  struct Run {
    const double* file;  // its words
    uint64_t position;
    uint64_t length;
  };

  FileMap() = default;
  // Empty when the numbers can't be a table's.
  FileMap(const double* words, size_t count, uint32_t unit_bits);

  bool empty() const { return words_ == nullptr; }
  // Where the range lies, in order, next to each other where one run does not go on in the other. 0: not
  // all of it is known, or not for writing, or it takes more than `most` runs.
  uint32_t find(uint64_t position, uint64_t length, bool write, Run* runs, uint32_t most) const;

 private:
  const double* words_ = nullptr;
  uint64_t mask_ = 0;
  uint32_t unit_bits_ = 0;
};

}  // namespace tcmu

// SPDX-License-Identifier: Apache-2.0
// A command's data: memory in pieces, addressed as if it were one.
//
// The pieces lie in shared memory, so every function touches them under the SIGBUS guard and says
// whether it got through. Ranges were checked against the pieces' total by the caller. Pure: any
// thread, no ownership.
#pragma once

#include <sys/uio.h>

#include <cstddef>
#include <cstdint>

namespace tcmu {

struct Segments {
  const iovec* pieces;
  uint32_t count;
};

// Calls `visit(address, bytes, done)` for each contiguous part of the range; stops when it returns false.
template <class F>
inline void eachPart(Segments segments, uint64_t offset, uint64_t length, F&& visit) {
  uint64_t done = 0;
  for (uint32_t i = 0; i < segments.count && done < length; i++) {
    const iovec& piece = segments.pieces[i];
    if (offset >= piece.iov_len) {
      offset -= piece.iov_len;
      continue;
    }
    uint64_t bytes = piece.iov_len - offset;
    if (bytes > length - done) bytes = length - done;
    if (!visit(static_cast<uint8_t*>(piece.iov_base) + offset, static_cast<size_t>(bytes), done))
      return;
    done += bytes;
    offset = 0;
  }
}

// Fills `out` with the parts of the range, at most `limit`; returns how many.
int gather(Segments segments, uint64_t offset, uint64_t length, iovec* out, int limit);

[[nodiscard]] bool copyIn(Segments to, uint64_t offset, const uint8_t* from, uint64_t length);
[[nodiscard]] bool copyOut(Segments from, uint64_t offset, uint64_t length, uint8_t* to);
[[nodiscard]] bool fill(Segments to, uint64_t offset, uint64_t length, int value);
[[nodiscard]] bool isZero(Segments from, uint64_t offset, uint64_t length, bool& zero);
// `where`: offset of the first difference within the range, or -1.
[[nodiscard]] bool mismatch(Segments from, uint64_t offset, const uint8_t* other, uint64_t length,
                            int64_t& where);

}  // namespace tcmu

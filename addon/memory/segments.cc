// SPDX-License-Identifier: Apache-2.0
#include "segments.h"

#include <cstring>

#include "guard.h"

namespace tcmu {
namespace {

bool allZero(const uint8_t* bytes, size_t length) {
  // Sixteen bytes by hand; then each byte is compared to the one sixteen before it, by the C library.
  const size_t first = length < 16 ? length : 16;
  for (size_t i = 0; i < first; i++) {
    if (bytes[i] != 0) return false;
  }
  return std::memcmp(bytes, bytes + first, length - first) == 0;
}

int64_t firstDifference(const uint8_t* a, const uint8_t* b, size_t length) {
  constexpr size_t kStep = 256;
  for (size_t start = 0; start < length; start += kStep) {
    const size_t bytes = length - start < kStep ? length - start : kStep;
    if (std::memcmp(a + start, b + start, bytes) == 0) continue;
    for (size_t i = start; i < start + bytes; i++) {
      if (a[i] != b[i]) return static_cast<int64_t>(i);
    }
  }
  return -1;
}

}  // namespace

int gather(Segments segments, uint64_t offset, uint64_t length, iovec* out, int limit) {
  int count = 0;
  eachPart(segments, offset, length, [&](uint8_t* part, size_t bytes, uint64_t) {
    out[count++] = {part, bytes};
    return count < limit;
  });
  return count;
}

bool copyIn(Segments to, uint64_t offset, const uint8_t* from, uint64_t length) {
  return guarded([&] {
    eachPart(to, offset, length, [&](uint8_t* part, size_t bytes, uint64_t done) {
      std::memcpy(part, from + done, bytes);
      return true;
    });
  });
}

bool copyOut(Segments from, uint64_t offset, uint64_t length, uint8_t* to) {
  return guarded([&] {
    eachPart(from, offset, length, [&](uint8_t* part, size_t bytes, uint64_t done) {
      std::memcpy(to + done, part, bytes);
      return true;
    });
  });
}

bool fill(Segments to, uint64_t offset, uint64_t length, int value) {
  return guarded([&] {
    eachPart(to, offset, length, [&](uint8_t* part, size_t bytes, uint64_t) {
      std::memset(part, value, bytes);
      return true;
    });
  });
}

bool isZero(Segments from, uint64_t offset, uint64_t length, bool& zero) {
  volatile bool result = true;
  const bool reached = guarded([&] {
    eachPart(from, offset, length, [&](uint8_t* part, size_t bytes, uint64_t) {
      result = allZero(part, bytes);
      return static_cast<bool>(result);
    });
  });
  zero = result;
  return reached;
}

bool mismatch(Segments from, uint64_t offset, const uint8_t* other, uint64_t length,
              int64_t& where) {
  volatile int64_t result = -1;
  const bool reached = guarded([&] {
    eachPart(from, offset, length, [&](uint8_t* part, size_t bytes, uint64_t done) {
      const int64_t at = firstDifference(part, other + done, bytes);
      if (at >= 0) result = at + static_cast<int64_t>(done);
      return at < 0;
    });
  });
  where = result;
  return reached;
}

}  // namespace tcmu

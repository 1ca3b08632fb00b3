// SPDX-License-Identifier: Apache-2.0
#include "express.h"

#include <algorithm>

namespace tcmu {
namespace {

uint64_t bigEndian(const uint8_t* bytes, uint32_t count) {
  uint64_t value = 0;
  for (uint32_t i = 0; i < count; i++) value = value << 8 | bytes[i];
  return value;
}

}  // namespace

// SBC-4, READ (10), READ (16), WRITE (10), WRITE (16): protection, DPO and FUA in byte 1, the group number
// and the CONTROL byte behind the transfer length or around it.
std::optional<PlainMove> plainMove(const uint8_t* cdb, uint32_t bytes) {
  PlainMove move;
  uint8_t asks;
  if (bytes >= 10 && (cdb[0] == 0x28 || cdb[0] == 0x2a)) {
    move = {cdb[0] == 0x2a, bigEndian(cdb + 2, 4), static_cast<uint32_t>(bigEndian(cdb + 7, 2))};
    asks = cdb[1] | cdb[6] | cdb[9];
  } else if (bytes >= 16 && (cdb[0] == 0x88 || cdb[0] == 0x8a)) {
    move = {cdb[0] == 0x8a, bigEndian(cdb + 2, 8), static_cast<uint32_t>(bigEndian(cdb + 10, 4))};
    asks = cdb[1] | cdb[14] | cdb[15];
  } else {
    return std::nullopt;
  }
  if (asks != 0 || move.blocks == 0) return std::nullopt;
  return move;
}

FileMap::FileMap(const double* words, size_t count, uint32_t unit_bits) {
  constexpr size_t kHead = kFiles * kFileWords;
  if (count < kHead + 2 || count % 2 != 0 || unit_bits < 9 || unit_bits > 52) return;
  const size_t entries = (count - kHead) / 2;
  if ((entries & (entries - 1)) != 0) return;
  words_ = words;
  mask_ = entries - 1;
  unit_bits_ = unit_bits;
}

uint32_t FileMap::find(uint64_t position, uint64_t length, bool write, Run* runs,
                       uint32_t most) const {
  const double* entries = words_ + kFiles * kFileWords;
  const uint64_t unit_bytes = uint64_t{1} << unit_bits_;
  const uint64_t end = position + length;
  uint32_t count = 0;
  while (position < end) {
    const uint64_t unit = position >> unit_bits_;
    const double* entry = entries + 2 * (unit & mask_);
    if (entry[0] != static_cast<double>(unit)) return 0;
    const auto place = static_cast<uint64_t>(entry[1]);
    if (write && (place & 1) == 0) return 0;
    const double* file = words_ + kFileWords * (place >> 1 & (kFiles - 1));
    const uint64_t within = position & (unit_bytes - 1);
    const uint64_t at = (place & ~uint64_t{511}) + within;
    const uint64_t bytes = std::min(unit_bytes - within, end - position);
    Run* last = count > 0 ? &runs[count - 1] : nullptr;
    if (last && last->file == file && last->position + last->length == at) {
      last->length += bytes;
    } else {
      if (count == most) return 0;
      runs[count++] = {file, at, bytes};
    }
    position += bytes;
  }
  return count;
}

}  // namespace tcmu

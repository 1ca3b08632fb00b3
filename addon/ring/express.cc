#include "express.h"

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

}  // namespace tcmu

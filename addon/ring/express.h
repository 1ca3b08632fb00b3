// The plain READ and WRITE, told from every other command.
//
// Plain: READ or WRITE (10) or (16) that moves at least one block and asks for nothing besides. Every other
// command is for a handler to judge: here nothing is refused, only left alone. Pure.
#pragma once

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

}  // namespace tcmu

// SPDX-License-Identifier: Apache-2.0
// What a client is told of the disk behind the export, and what the translation to SCSI has to know
// of it. Found out by lib/ with SCSI commands, anew for each client.
#pragma once

#include <cstdint>
#include <string>

#include "protocol.h"

namespace tcmu::nbd {

// Most bytes of one read or write; larger ones are refused. The usual limit of servers, and what a
// client that asks for no block sizes has to assume.
inline constexpr uint32_t kMaxPayload = 32u << 20;

struct Disk {
  uint64_t size = 0;
  uint32_t blockSize = 512;
  uint32_t preferredSize = 4096;
  uint16_t flags = flag::kHasFlags;  // transmission flags but for kDontFragment
  // Bytes one SCSI command may move; a multiple of blockSize.
  uint32_t pieceBytes = kMaxPayload;
  // FUA is a bit of WRITE; otherwise a SYNCHRONIZE CACHE follows.
  bool fuaInWrite = false;
  // GET LBA STATUS is there.
  bool tellsStatus = false;
  // WRITE SAME may unmap, and what is unmapped reads as zeros (LBPRZ).
  bool unmapsToZero = false;
  // Blocks of one UNMAP and of one WRITE SAME.
  uint64_t unmapBlocks = 0xffffffff;
  uint64_t writeSameBlocks = 0xffffffff;
};

enum class TlsPolicy { none, offered, required };

struct Config {
  std::string name;  // the empty name means this export too
  std::string description;
  TlsPolicy tls = TlsPolicy::none;
  uint32_t maxConnections = 64;
};

}  // namespace tcmu::nbd

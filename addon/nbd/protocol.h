// SPDX-License-Identifier: Apache-2.0
// The NBD protocol in numbers (NetworkBlockDevice/nbd, doc/proto.md): fixed newstyle negotiation,
// simple and structured replies. All fields are big-endian.
#pragma once

#include <bit>
#include <concepts>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <string_view>
#include <vector>

namespace tcmu::nbd {

inline constexpr uint64_t kGreeting = 0x4e42444d41474943;     // "NBDMAGIC"
inline constexpr uint64_t kOptionMagic = 0x49484156454f5054;  // "IHAVEOPT"
inline constexpr uint64_t kOptionReplyMagic = 0x3e889045565a9;
inline constexpr uint32_t kRequestMagic = 0x25609513;
inline constexpr uint32_t kSimpleReplyMagic = 0x67446698;
inline constexpr uint32_t kStructuredReplyMagic = 0x668e33ef;

inline constexpr size_t kClientFlagsBytes = 4;
inline constexpr size_t kOptionHeaderBytes = 16;
inline constexpr size_t kRequestBytes = 28;
inline constexpr size_t kSimpleReplyBytes = 16;
inline constexpr size_t kChunkHeaderBytes = 20;
inline constexpr size_t kStringLimit = 4096;

// Of server and client alike.
inline constexpr uint16_t kFixedNewstyle = 1 << 0;
inline constexpr uint16_t kNoZeroes = 1 << 1;

enum class Option : uint32_t {
  exportName = 1,
  abort = 2,
  list = 3,
  startTls = 5,
  info = 6,
  go = 7,
  structuredReply = 8,
  listMetaContext = 9,
  setMetaContext = 10,
};

enum class OptionReply : uint32_t {
  ack = 1,
  server = 2,
  info = 3,
  metaContext = 4,
  unsupported = 0x80000001,
  policy = 0x80000002,
  invalid = 0x80000003,
  tlsRequired = 0x80000005,
  unknown = 0x80000006,
  blockSizeRequired = 0x80000008,
};

enum class Info : uint16_t { exportSize = 0, name = 1, description = 2, blockSize = 3 };

// Transmission flags.
namespace flag {
inline constexpr uint16_t kHasFlags = 1 << 0;
inline constexpr uint16_t kReadOnly = 1 << 1;
inline constexpr uint16_t kFlush = 1 << 2;
inline constexpr uint16_t kFua = 1 << 3;
inline constexpr uint16_t kRotational = 1 << 4;
inline constexpr uint16_t kTrim = 1 << 5;
inline constexpr uint16_t kWriteZeroes = 1 << 6;
inline constexpr uint16_t kDontFragment = 1 << 7;
inline constexpr uint16_t kMultiConnection = 1 << 8;
inline constexpr uint16_t kCache = 1 << 10;
inline constexpr uint16_t kFastZero = 1 << 11;
}  // namespace flag

enum class CommandType : uint16_t {
  read = 0,
  write = 1,
  disconnect = 2,
  flush = 3,
  trim = 4,
  cache = 5,
  writeZeroes = 6,
  blockStatus = 7,
};

namespace command_flag {
inline constexpr uint16_t kFua = 1 << 0;
inline constexpr uint16_t kNoHole = 1 << 1;
inline constexpr uint16_t kDontFragment = 1 << 2;
inline constexpr uint16_t kOneExtent = 1 << 3;
inline constexpr uint16_t kFastZero = 1 << 4;
}  // namespace command_flag

enum class Chunk : uint16_t { none = 0, offsetData = 1, blockStatus = 5, error = 0x8001 };
inline constexpr uint16_t kChunkDone = 1;

// What an error field may say.
enum class Errno : uint32_t {
  none = 0,
  permission = 1,
  io = 5,
  invalid = 22,
  noSpace = 28,
  notSupported = 95,
  shutdown = 108,
};

// base:allocation
inline constexpr std::string_view kAllocationContext = "base:allocation";
inline constexpr uint32_t kAllocationId = 1;
inline constexpr uint32_t kStateHole = 1;
inline constexpr uint32_t kStateZero = 2;

template <std::unsigned_integral T>
T bigEndian(T value) {
  if constexpr (std::endian::native == std::endian::big || sizeof value == 1)
    return value;
  else if constexpr (sizeof value == 2)
    return __builtin_bswap16(value);
  else if constexpr (sizeof value == 4)
    return __builtin_bswap32(value);
  else
    return __builtin_bswap64(value);
}

template <std::unsigned_integral T>
T load(const uint8_t* from) {
  T value;
  std::memcpy(&value, from, sizeof value);
  return bigEndian(value);
}

template <std::unsigned_integral T>
void store(uint8_t* to, T value) {
  value = bigEndian(value);
  std::memcpy(to, &value, sizeof value);
}

// Builds a message.
class Writer {
 public:
  explicit Writer(std::vector<uint8_t>& out) : out_(out) {}
  template <std::unsigned_integral T>
  Writer& put(T value) {
    const size_t at = out_.size();
    out_.resize(at + sizeof value);
    store(out_.data() + at, value);
    return *this;
  }
  Writer& text(std::string_view text) {
    out_.insert(out_.end(), text.begin(), text.end());
    return *this;
  }
  Writer& zeroes(size_t count) {
    out_.resize(out_.size() + count);
    return *this;
  }

 private:
  std::vector<uint8_t>& out_;
};

}  // namespace tcmu::nbd

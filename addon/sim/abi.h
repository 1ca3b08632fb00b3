// SPDX-License-Identifier: Apache-2.0
// The TCMU ring as the kernel header <linux/target_core_user.h> (mailbox version 2) lays it out,
// for the simulated kernel's side. Kept apart from the handler's side in addon/ring on purpose: an
// offset that is wrong on one side must show up as a failing test, not cancel itself out.
#pragma once

#include <cstddef>
#include <cstdint>

namespace tcmu::sim {

inline constexpr size_t kPage = 4096;

namespace mailbox {
inline constexpr size_t kVersion = 0;        // u16
inline constexpr size_t kFlags = 2;          // u16
inline constexpr size_t kRingOffset = 4;     // u32
inline constexpr size_t kRingSize = 8;       // u32
inline constexpr size_t kHead = 12;          // u32, written by the kernel
inline constexpr size_t kWindowOffset = 16;  // u64, with kZeroCopy
inline constexpr size_t kWindowBytes = 24;   // u64, with kZeroCopy
inline constexpr size_t kTail = 64;          // u32, written by the handler
inline constexpr size_t kBytes = 128;        // the ring begins here
inline constexpr uint16_t kVersionValue = 2;
inline constexpr uint16_t kOutOfOrder = 1;
inline constexpr uint16_t kReadLength = 2;
inline constexpr uint16_t kTmr = 4;
inline constexpr uint16_t kKeepBuffer = 8;
// Of a kernel with the zero-copy patch.
inline constexpr uint16_t kZeroCopy = 16;
inline constexpr uint16_t kKeepBufferPerCommand = 32;
}  // namespace mailbox

namespace entry {
inline constexpr size_t kLengthAndOp = 0;  // u32
inline constexpr size_t kId = 4;           // u16
inline constexpr size_t kKernelFlags = 6;  // u8
inline constexpr size_t kUserFlags = 7;    // u8
inline constexpr size_t kHeaderBytes = 8;
inline constexpr uint32_t kOpMask = 7;
inline constexpr uint32_t kPad = 0;
inline constexpr uint32_t kCommand = 1;
inline constexpr uint32_t kTaskManagement = 2;
inline constexpr size_t kAlign = 8;

// Kernel flags of a kernel with the zero-copy patch.
inline constexpr uint8_t kZeroCopy = 1;
inline constexpr uint8_t kKeepBufferPossible = 2;
inline constexpr uint8_t kDirectIo = 4;
inline constexpr uint8_t kDataIn = 8;

inline constexpr uint8_t kUnknownOp = 1;
inline constexpr uint8_t kReadLengthValid = 2;
inline constexpr uint8_t kKeepBuffer = 4;

inline constexpr size_t kIovCount = 8;       // u32
inline constexpr size_t kBidiIovCount = 12;  // u32
inline constexpr size_t kCdbOffset = 24;     // u64, from the start of the mapping
inline constexpr size_t kIov = 48;           // pairs of u64: offset in the mapping, length
inline constexpr size_t kIovBytes = 16;
inline constexpr size_t kMinBytes = 112;  // room for the response, which overlays the request

inline constexpr size_t kStatus = 8;       // u8
inline constexpr size_t kReadLength = 12;  // u32
inline constexpr size_t kSense = 16;
inline constexpr size_t kSenseBytes = 96;

inline constexpr size_t kTmrType = 8;    // u8
inline constexpr size_t kTmrCount = 12;  // u32
inline constexpr size_t kTmrIds = 32;    // u16 each
}  // namespace entry

// SAM-5 5.3.1.
namespace status {
inline constexpr uint8_t kGood = 0x00;
inline constexpr uint8_t kCheckCondition = 0x02;
inline constexpr uint8_t kBusy = 0x08;
inline constexpr uint8_t kTaskSetFull = 0x28;
inline constexpr uint8_t kTaskAborted = 0x40;
}  // namespace status

// Kernel header: enum tcmu_tmr_type.
enum class Tmr : uint8_t {
  unknown = 0,
  abortTask = 1,
  abortTaskSet = 2,
  clearAca = 3,
  clearTaskSet = 4,
  lunReset = 5,
  targetWarmReset = 6,
  targetColdReset = 7,
  lunResetPro = 128,
};

}  // namespace tcmu::sim

// SPDX-License-Identifier: Apache-2.0
// The shared memory of a TCMU device as the kernel lays it out, and nothing else.
//
// Source: include/uapi/linux/target_core_user.h and drivers/target/target_core_user.c of Linux 6.1.
// The memory is written by another party at any time. No code may keep a pointer to one of these
// structs inside the mapping: fields are copied out once and judged in private memory.
#pragma once

#include <cstddef>
#include <cstdint>

namespace tcmu::layout {

inline constexpr uint16_t kMailboxVersion = 2;

enum MailboxFlag : uint16_t {
  kCapOutOfOrder = 1,
  kCapReadLength = 2,
  kCapTaskManagement = 4,
  kCapKeepBuffer = 8,
  kCapKeepBufferPerCommand = 32,  // with zero copy
};

struct Mailbox {
  uint16_t version;
  uint16_t flags;
  uint32_t ring_offset;
  uint32_t ring_size;
  uint32_t head;               // written by the kernel
  uint8_t padding[64 - 16];    // the tail has a cache line of its own
  uint32_t tail;               // written by us, and zeroed by the kernel's reset_ring
};
static_assert(offsetof(Mailbox, flags) == 2 && offsetof(Mailbox, ring_offset) == 4);
static_assert(offsetof(Mailbox, ring_size) == 8 && offsetof(Mailbox, head) == 12);
static_assert(offsetof(Mailbox, tail) == 64 && sizeof(Mailbox) == 68);

enum class Op : uint8_t { Pad = 0, Command = 1, TaskManagement = 2 };

// Entries start and end at multiples of 8: the low bits of the length hold the operation.
inline constexpr uint32_t kOpMask = 7;
inline constexpr uint32_t kEntryAlign = 8;

enum KernelFlag : uint8_t {
  kKernelZeroCopy = 1,
};

enum UserFlag : uint8_t {
  kUserUnknownOp = 1,
  kUserReadLength = 2,
  kUserKeepBuffer = 4,
};

struct EntryHeader {
  uint32_t length_op;
  uint16_t id;
  uint8_t kernel_flags;
  uint8_t user_flags;
};
static_assert(sizeof(EntryHeader) == 8 && offsetof(EntryHeader, user_flags) == 7);

struct Iovec {
  uint64_t base;  // offset from the start of the mapping
  uint64_t length;
};

// A command as the kernel writes it; Iovec[iov_count + bidi_count] follow.
struct CommandRequest {
  EntryHeader header;
  uint32_t iov_count;
  uint32_t bidi_count;
  uint32_t dif_count;
  uint32_t padding;
  uint64_t cdb_offset;  // from the start of the mapping
  uint64_t padding2[2];
};
static_assert(offsetof(CommandRequest, iov_count) == 8 && offsetof(CommandRequest, dif_count) == 16);
static_assert(offsetof(CommandRequest, cdb_offset) == 24 && sizeof(CommandRequest) == 48);

inline constexpr uint32_t kSenseBytes = 96;

// A response as we write it. It lies over the request, iovecs included.
struct CommandResponse {
  EntryHeader header;
  uint8_t status;
  uint8_t padding1;
  uint16_t padding2;
  uint32_t read_length;
  uint8_t sense[kSenseBytes];
};
static_assert(offsetof(CommandResponse, status) == 8 && offsetof(CommandResponse, read_length) == 12);
static_assert(offsetof(CommandResponse, sense) == 16 && sizeof(CommandResponse) == 112);

// Shortest entry the kernel writes for a command: a response must fit.
inline constexpr uint32_t kCommandBytes = sizeof(CommandResponse);

// A task management function; uint16_t ids[count] follow.
struct TaskManagementEntry {
  EntryHeader header;
  uint8_t type;
  uint8_t padding1;
  uint16_t padding2;
  uint32_t count;
  uint64_t padding3[2];
};
static_assert(offsetof(TaskManagementEntry, type) == 8 && offsetof(TaskManagementEntry, count) == 12);
static_assert(sizeof(TaskManagementEntry) == 32);

}  // namespace tcmu::layout

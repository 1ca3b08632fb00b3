// SPDX-License-Identifier: Apache-2.0
// One TCMU command ring: commands out of shared memory in batches, completions back in batches.
//
// Contract:
// - Nothing is believed. Ring bytes are copied to private memory once and judged there; every offset
//   and length is checked. What no kernel writes ends the ring: `fault()` says what was found where,
//   nothing more is fetched, and what was fetched before can still be completed.
// - Between our tail and the fetch position, entries are known from our own record alone: completing
//   never reads an entry. A response goes into the oldest uncompleted command's place, which may
//   still hold another command's request; that is why CDB and iovecs are copied out at fetch.
// - A slot stands for one command from fetch to publish. Pins postpone publishing: while a slot has
//   one, its completion is kept, its memory stays valid, and the kernel hears nothing.
// - One thread calls everything. Other threads may read `segments()` of a pinned slot.
// - The mapping is the caller's and outlives the ring. No N-API, no system call in here.
#pragma once

#include <sys/uio.h>

#include <cstdint>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <vector>

#include "../memory/segments.h"
#include "layout.h"

namespace tcmu {

struct RingFault {
  enum class Kind { Version, Corrupt, Memory };
  Kind kind;
  std::string message;
};

// Rows that `fetch` fills, one a slot; the layout is lib/native.ts's.
struct RingTables {
  static constexpr uint32_t kInfoWords = 8;
  static constexpr uint32_t kCdbBytes = 32;
  static constexpr int32_t kEventTaskManagement = -1;
  static constexpr int32_t kEventReset = -2;
  int32_t* events;
  uint32_t* info;
  uint8_t* cdbs;
};

struct TaskManagement {
  uint8_t type;
  std::vector<uint32_t> slots;
};

struct Completion {
  static constexpr uint8_t kSense = 1, kReadLength = 2, kKeepBuffer = 4;
  static constexpr uint32_t kNoZero = 0xffffffff;
  uint32_t slot;
  uint8_t status;
  uint8_t flags;
  uint32_t read_length;
  uint32_t zero_from;
  const uint8_t* sense;  // layout::kSenseBytes, looked at with kSense
};

struct RingStats {
  uint64_t commands = 0, completions = 0, unknown_ops = 0, task_managements = 0;
};

class Ring {
 public:
  // Told before a slot's memory goes back to the kernel.
  using Revoke = void (*)(void* owner, uint32_t slot);

  // Throws RingFault.
  Ring(std::span<std::byte> mapping, Revoke revoke, void* owner);

  uint32_t capacity() const { return capacity_; }
  uint16_t mailboxFlags() const { return flags_; }
  uint32_t inFlight() const { return in_flight_; }
  const RingStats& stats() const { return stats_; }
  const std::optional<RingFault>& fault() const { return fault_; }
  void fail(RingFault fault);

  // Takes up to `limit` (at least 1) events off the ring.
  uint32_t fetch(const RingTables& tables, uint32_t limit);
  // `fetch` may find something although the kernel rings no more: a reset was seen while completing,
  // or commands waited for a slot and one has come free.
  bool wantsFetch() const { return reset_seen_ || (starved_ && !free_.empty()); }
  // The next task management function announced by kEventTaskManagement.
  TaskManagement takeTaskManagement();

  // Takes the answer for the next `moveTail`, or keeps it while pinned; either way the slot's memory
  // is revoked before the kernel hears of it. False: the slot awaits no completion.
  [[nodiscard]] bool complete(const Completion& completion);
  // Kept completions whose last pin is gone.
  void completeUnpinned();
  bool hasUnpinned() const { return !unpinned_.empty(); }
  // Writes the answers and moves the tail over them. True: it moved, the kernel is to be told.
  bool moveTail();

  bool pin(uint32_t slot);
  bool unpin(uint32_t slot);
  bool releaseKept(uint32_t slot);
  uint64_t pinsHeld() const { return pins_held_; }

  // Whether the slot's memory may be touched, and how much there is.
  bool valid(uint32_t slot) const { return slot < slot_count_ && at(slot).state != State::Free; }
  uint64_t bytes(uint32_t slot) const { return at(slot).bytes; }
  Segments segments(uint32_t slot) const { return {at(slot).iovecs(), at(slot).iov_count}; }
  // For diagnosis: whose memory an address of the mapping is, in words.
  std::string owner(const void* address, const RingTables& tables) const;
  std::span<const uint8_t> cdb(uint32_t slot, const RingTables& tables) const;
  uint32_t pins(uint32_t slot) const { return at(slot).pins; }
  uint32_t slots() const { return slot_count_; }

 private:
  enum class State : uint8_t { Free, InFlight, Kept };
  struct Postponed {
    Completion completion;
    uint8_t sense[layout::kSenseBytes];
  };
  struct Slot {
    static constexpr uint32_t kFew = 4;
    State state = State::Free;
    bool orphan = false;      // the kernel forgot the command in a reset
    bool kept_done = false;   // released while pinned
    uint16_t id = 0;
    uint32_t pins = 0;
    uint32_t iov_count = 0;
    uint32_t many_capacity = 0;
    uint64_t bytes = 0;
    std::unique_ptr<iovec[]> many;
    std::unique_ptr<uint8_t[]> long_cdb;
    std::unique_ptr<Postponed> postponed;
    iovec few[kFew];
    const iovec* iovecs() const { return iov_count <= kFew ? few : many.get(); }
    iovec* room(uint32_t count);
  };
  // A response on its way into the ring, at `place` of it.
  struct Answer {
    uint32_t place;
    layout::CommandResponse response = {};
  };
  struct Entry {
    uint32_t length;
    layout::Op op;
  };
  // Entries between tail and fetch position, oldest first.
  class EntryQueue {
   public:
    bool empty() const { return first_ == last_; }
    const Entry& front() const { return entries_[first_ & (entries_.size() - 1)]; }
    void pop() { first_++; }
    void push(Entry entry);
    void clear() { first_ = last_ = 0; }

   private:
    std::vector<Entry> entries_ = std::vector<Entry>(256);
    uint64_t first_ = 0, last_ = 0;
  };

  static constexpr uint32_t kChunk = 256;
  // Bytes of the ring copied ahead.
  static constexpr uint32_t kAhead = 8192;
  Slot& at(uint32_t slot) { return chunks_[slot / kChunk][slot % kChunk]; }
  const Slot& at(uint32_t slot) const { return chunks_[slot / kChunk][slot % kChunk]; }
  bool takeSlot(uint32_t& slot);
  void freeSlot(uint32_t slot);

  uint32_t* mailboxField(size_t offset) const {
    return reinterpret_cast<uint32_t*>(base_ + offset);
  }
  bool look(uint32_t& tail, uint32_t& head);
  const std::byte* window(uint32_t position, uint32_t bytes, uint32_t end);
  bool takeCommand(const std::byte* entry, uint32_t position, uint32_t length,
                   const RingTables& tables, uint32_t slot);
  bool takeTaskManagement(const std::byte* entry, uint32_t position, uint32_t length);
  void publish(const Completion& completion);
  bool tailIsOurs();
  void write(const Answer& answer);
  bool memoryLost() const { return fault_ && fault_->kind == RingFault::Kind::Memory; }
  uint32_t popEntry();
  void passOver();
  void takeReset();
  void corrupt(uint32_t position, const char* format, ...) __attribute__((format(printf, 3, 4)));
  void lostMemory(const char* what);

  std::byte* const base_;
  const size_t map_bytes_;
  const Revoke revoke_;
  void* const owner_;
  std::byte* ring_;
  uint32_t ring_offset_, ring_size_;
  uint16_t flags_;
  uint32_t capacity_;

  uint32_t tail_ = 0;            // as we published it
  uint32_t next_tail_ = 0;       // where the oldest entry not passed over starts
  uint32_t position_ = 0;        // next entry to fetch
  EntryQueue entries_;
  std::vector<Answer> answers_;
  bool reset_seen_ = false;
  bool starved_ = false;
  std::optional<RingFault> fault_;

  std::vector<std::unique_ptr<Slot[]>> chunks_;
  uint32_t slot_count_ = 0;
  std::vector<uint32_t> free_;
  std::vector<int32_t> slot_of_id_;
  std::vector<TaskManagement> task_managements_;
  size_t task_managements_taken_ = 0;
  std::vector<uint32_t> unpinned_;
  uint32_t in_flight_ = 0;
  uint64_t pins_held_ = 0;
  RingStats stats_;

  std::vector<std::byte> copy_;  // of ring bytes [copy_start_, copy_start_ + copy_bytes_)
  uint32_t copy_start_ = 0, copy_bytes_ = 0;
};

}  // namespace tcmu

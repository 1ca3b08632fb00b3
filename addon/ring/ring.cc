// SPDX-License-Identifier: Apache-2.0
#include "ring.h"

#include <algorithm>
#include <cstdarg>
#include <cstdio>
#include <cstring>

#include "../memory/guard.h"

namespace tcmu {

using namespace layout;

namespace {

std::string describe(const char* format, va_list arguments) {
  char text[256];
  vsnprintf(text, sizeof text, format, arguments);
  return text;
}

[[gnu::format(printf, 2, 3)]] RingFault makeFault(RingFault::Kind kind, const char* format, ...) {
  va_list arguments;
  va_start(arguments, format);
  RingFault fault{kind, describe(format, arguments)};
  va_end(arguments);
  return fault;
}

// Bytes that a CDB has by its operation code (SPC-5 4.2.5.1), at most those that are there. Byte 7 of a
// variable length CDB counts what follows byte 7 (4.2.5.3). Groups 3, 6 and 7 have no length of their
// own: the kernel hands them over as 10 bytes (scsi_command_size), so does this.
uint32_t cdbLength(const uint8_t* cdb, uint32_t there) {
  static constexpr uint8_t kByGroup[8] = {6, 10, 10, 10, 16, 12, 10, 10};
  const uint32_t length = cdb[0] == 0x7f ? cdb[7] + 8u : kByGroup[cdb[0] >> 5];
  return std::min(length, there);
}

template <class T>
T read(const std::byte* from) {
  T value;
  std::memcpy(&value, from, sizeof value);
  return value;
}

}  // namespace

Ring::Ring(std::span<std::byte> mapping, Revoke revoke, void* owner)
    : base_(mapping.data()), map_bytes_(mapping.size()), revoke_(revoke), owner_(owner) {
  using Kind = RingFault::Kind;
  if (map_bytes_ < sizeof(Mailbox))
    throw makeFault(Kind::Corrupt, "the mapping has %zu bytes, less than a mailbox", map_bytes_);
  Mailbox mailbox;
  if (!guardedCopy(&mailbox, base_, sizeof mailbox))
    throw makeFault(Kind::Memory, "the mailbox's memory is gone");
  if (mailbox.version != kMailboxVersion)
    throw makeFault(Kind::Version, "mailbox version %u, only %u is known", mailbox.version,
                    kMailboxVersion);
  if (!(mailbox.flags & kCapOutOfOrder))
    throw makeFault(Kind::Version, "mailbox flags 0x%x: the kernel takes no completion out of order",
                    mailbox.flags);
  const uint64_t ring_end = uint64_t{mailbox.ring_offset} + mailbox.ring_size;
  if (mailbox.ring_offset < sizeof(Mailbox) || mailbox.ring_offset % kEntryAlign != 0 ||
      mailbox.ring_size % kEntryAlign != 0 || mailbox.ring_size < 2 * kCommandBytes ||
      ring_end > map_bytes_)
    throw makeFault(Kind::Corrupt, "ring of 0x%x bytes at 0x%x in a mapping of 0x%zx bytes",
                    mailbox.ring_size, mailbox.ring_offset, map_bytes_);
  if (mailbox.tail >= mailbox.ring_size || mailbox.tail % kEntryAlign != 0)
    throw makeFault(Kind::Corrupt, "tail 0x%x in a ring of 0x%x bytes", mailbox.tail,
                    mailbox.ring_size);
  ring_offset_ = mailbox.ring_offset;
  ring_size_ = mailbox.ring_size;
  ring_ = base_ + ring_offset_;
  flags_ = mailbox.flags;
  capacity_ = std::min<uint32_t>(65535, ring_size_ / kCommandBytes);
  tail_ = next_tail_ = position_ = mailbox.tail;
  slot_of_id_.assign(65536, -1);
  copy_.resize(kAhead);
}

std::string Ring::owner(const void* address, const RingTables& tables) const {
  const auto* byte = static_cast<const std::byte*>(address);
  for (uint32_t slot = 0; slot < slot_count_; slot++) {
    if (!valid(slot)) continue;
    uint64_t before = 0;
    const Segments all = segments(slot);
    for (uint32_t i = 0; i < all.count; i++) {
      const auto* start = static_cast<const std::byte*>(all.pieces[i].iov_base);
      if (byte >= start && byte < start + all.pieces[i].iov_len) {
        const bool zero_copy =
            tables.info[slot * RingTables::kInfoWords + 6] & kKernelZeroCopy;
        return makeFault(RingFault::Kind::Memory,
                         "byte %llu of the data of command id %u (operation code 0x%02x)%s",
                         static_cast<unsigned long long>(before) + (byte - start), at(slot).id,
                         tables.cdbs[slot * RingTables::kCdbBytes],
                         zero_copy ? ", the initiator's own memory: Data-Out can't be stored into "
                                     "with zero copy, and a reset takes it away"
                                   : "")
            .message;
      }
      before += all.pieces[i].iov_len;
    }
  }
  return "memory of no command in flight: it was touched after the command's completion";
}

void Ring::fail(RingFault fault) {
  if (!fault_) fault_ = std::move(fault);
}

void Ring::corrupt(uint32_t position, const char* format, ...) {
  va_list arguments;
  va_start(arguments, format);
  const std::string what = describe(format, arguments);
  va_end(arguments);
  fail(makeFault(RingFault::Kind::Corrupt, "at ring offset 0x%x: %s", position, what.c_str()));
}

void Ring::lostMemory(const char* what) {
  fail(makeFault(RingFault::Kind::Memory, "SIGBUS while %s: the mapping's pages are gone", what));
}

// ---- slots ----

iovec* Ring::Slot::room(uint32_t count) {
  iov_count = count;
  if (count <= kFew) return few;
  if (count > many_capacity) {
    many.reset(new iovec[count]);
    many_capacity = count;
  }
  return many.get();
}

bool Ring::takeSlot(uint32_t& slot) {
  if (free_.empty()) {
    if (slot_count_ == capacity_) return false;
    chunks_.push_back(std::make_unique<Slot[]>(kChunk));
    const uint32_t end = std::min(slot_count_ + kChunk, capacity_);
    for (uint32_t i = end; i > slot_count_; i--) free_.push_back(i - 1);
    slot_count_ = end;
  }
  slot = free_.back();
  free_.pop_back();
  return true;
}

void Ring::freeSlot(uint32_t slot) {
  Slot& s = at(slot);
  s.state = State::Free;
  s.orphan = s.kept_done = false;
  s.long_cdb.reset();
  free_.push_back(slot);
}

std::span<const uint8_t> Ring::cdb(uint32_t slot, const RingTables& tables) const {
  const uint32_t bytes = tables.info[slot * RingTables::kInfoWords + 1];
  const Slot& s = at(slot);
  if (s.long_cdb) return {s.long_cdb.get(), bytes};
  return {tables.cdbs + slot * RingTables::kCdbBytes, std::min(bytes, RingTables::kCdbBytes)};
}

bool Ring::pin(uint32_t slot) {
  if (!valid(slot)) return false;
  at(slot).pins++;
  pins_held_++;
  return true;
}

bool Ring::unpin(uint32_t slot) {
  if (!valid(slot)) return false;
  Slot& s = at(slot);
  if (s.pins == 0) return false;
  pins_held_--;
  if (--s.pins > 0) return true;
  if (s.kept_done) {
    revoke_(owner_, slot);
    freeSlot(slot);
  } else if (s.postponed) {
    unpinned_.push_back(slot);
  }
  return true;
}

bool Ring::releaseKept(uint32_t slot) {
  if (!valid(slot)) return false;
  Slot& s = at(slot);
  if (s.state != State::Kept || s.kept_done) return false;
  if (s.pins > 0) {
    s.kept_done = true;
  } else {
    revoke_(owner_, slot);
    freeSlot(slot);
  }
  return true;
}

void Ring::EntryQueue::push(Entry entry) {
  if (last_ - first_ == entries_.size()) {
    std::vector<Entry> larger(entries_.size() * 2);
    for (uint64_t i = first_; i < last_; i++)
      larger[i - first_] = entries_[i & (entries_.size() - 1)];
    last_ -= first_;
    first_ = 0;
    entries_.swap(larger);
  }
  entries_[last_++ & (entries_.size() - 1)] = entry;
}

// ---- fetch ----

// Tail and head, and with them, under the same guard, a private copy of what stands at our position.
bool Ring::look(uint32_t& tail, uint32_t& head) {
  volatile uint32_t tail_seen = 0, head_seen = 0, copied = 0;
  copy_start_ = position_;
  copy_bytes_ = 0;
  const bool reached = guarded([&] {
    tail_seen = __atomic_load_n(mailboxField(offsetof(Mailbox, tail)), __ATOMIC_ACQUIRE);
    const uint32_t end = __atomic_load_n(mailboxField(offsetof(Mailbox, head)), __ATOMIC_ACQUIRE);
    head_seen = end;
    if (end == position_ || end >= ring_size_) return;
    const uint32_t bytes = std::min(kAhead, (end > position_ ? end : ring_size_) - position_);
    std::memcpy(copy_.data(), ring_ + position_, bytes);
    copied = bytes;
  });
  if (!reached) {
    lostMemory("reading the mailbox or the ring");
    return false;
  }
  tail = tail_seen;
  head = head_seen;
  copy_bytes_ = copied;
  return true;
}

// Private copy of `bytes` bytes at `position`. Bytes copied before are not read again.
const std::byte* Ring::window(uint32_t position, uint32_t bytes, uint32_t end) {
  uint32_t skip = position - copy_start_;
  if (skip <= copy_bytes_ && copy_bytes_ - skip >= bytes) return copy_.data() + skip;
  skip = std::min(skip, copy_bytes_);
  const uint32_t have = copy_bytes_ - skip;
  const uint32_t want = std::min(std::max(bytes, kAhead), end - position);
  if (copy_.size() < want) copy_.resize(want);
  std::memmove(copy_.data(), copy_.data() + skip, have);
  copy_start_ = position;
  copy_bytes_ = have;
  if (!guardedCopy(copy_.data() + have, ring_ + position + have, want - have)) {
    lostMemory("reading the ring");
    return nullptr;
  }
  copy_bytes_ = want;
  return copy_.data();
}

uint32_t Ring::fetch(const RingTables& tables, uint32_t limit) {
  if (fault_) return 0;
  starved_ = false;
  uint32_t count = 0;
  uint32_t head, tail;
  if (!look(tail, head)) return 0;
  if (head >= ring_size_ || head % kEntryAlign != 0) {
    corrupt(position_, "head 0x%x in a ring of 0x%x bytes", head, ring_size_);
    return 0;
  }
  const auto ahead_of_tail = [&](uint32_t place) {
    return place >= tail_ ? place - tail_ : place + ring_size_ - tail_;
  };
  const bool moved_back = ahead_of_tail(head) < ahead_of_tail(position_);
  if (tail != tail_ || reset_seen_ || (moved_back && tail == 0)) {
    // Only the kernel's reset_ring writes the tail besides us, and it writes zeros to both. The head may
    // have moved on since.
    if (tail != 0) {
      corrupt(position_, "somebody else moved the tail from 0x%x to 0x%x", tail_, tail);
      return 0;
    }
    takeReset();
    copy_start_ = position_;
    copy_bytes_ = 0;
    tables.events[count++] = RingTables::kEventReset;
  } else if (moved_back) {
    corrupt(position_, "head moved back to 0x%x", head);
    return 0;
  }

  while (count < limit && position_ != head) {
    const uint32_t end = head > position_ ? head : ring_size_;
    const uint32_t left = end - position_;
    const std::byte* entry = window(position_, sizeof(EntryHeader), end);
    if (!entry) break;
    const auto header = read<EntryHeader>(entry);
    const uint32_t length = header.length_op & ~kOpMask;
    const auto op = static_cast<Op>(header.length_op & kOpMask);
    if (length < sizeof(EntryHeader) || length > left) {
      corrupt(position_, "entry of 0x%x bytes where 0x%x are left", length, left);
      break;
    }
    if (op == Op::Command) {
      uint32_t slot;
      if (!takeSlot(slot)) {
        starved_ = true;
        break;
      }
      entry = window(position_, length, end);
      if (!entry || !takeCommand(entry, position_, length, tables, slot)) {
        free_.push_back(slot);
        break;
      }
      tables.events[count++] = static_cast<int32_t>(slot);
      stats_.commands++;
    } else if (op == Op::TaskManagement) {
      entry = window(position_, length, end);
      if (!entry || !takeTaskManagement(entry, position_, length)) break;
      tables.events[count++] = RingTables::kEventTaskManagement;
      stats_.task_managements++;
    } else if (op != Op::Pad) {
      stats_.unknown_ops++;
    }
    entries_.push({length, op});
    position_ += length;
    if (position_ == ring_size_) {
      position_ = 0;
      copy_start_ = copy_bytes_ = 0;
    }
  }
  return count;
}

bool Ring::takeCommand(const std::byte* entry, uint32_t position, uint32_t length,
                       const RingTables& tables, uint32_t slot) {
  if (length < kCommandBytes) {
    corrupt(position, "command entry of 0x%x bytes has no room for a response", length);
    return false;
  }
  const auto request = read<CommandRequest>(entry);
  const uint16_t id = request.header.id;
  const uint64_t iovecs = uint64_t{request.iov_count} + request.bidi_count;
  const uint64_t fixed = sizeof(CommandRequest) + iovecs * sizeof(Iovec);
  if (request.dif_count != 0 || fixed > length) {
    corrupt(position, "%u + %u + %u iovecs in an entry of 0x%x bytes", request.iov_count,
            request.bidi_count, request.dif_count, length);
    return false;
  }
  const uint64_t entry_start = uint64_t{ring_offset_} + position;
  if (request.cdb_offset < entry_start + fixed || request.cdb_offset >= entry_start + length) {
    corrupt(position, "CDB at 0x%llx outside its entry",
            static_cast<unsigned long long>(request.cdb_offset));
    return false;
  }
  if (id == 0 || slot_of_id_[id] >= 0) {
    corrupt(position, id == 0 ? "command id %u" : "command id %u is in flight already", id);
    return false;
  }

  Slot& s = at(slot);
  iovec* pieces = s.room(static_cast<uint32_t>(iovecs));
  const uint64_t data_start = uint64_t{ring_offset_} + ring_size_;
  uint64_t totals[2] = {0, 0};
  for (uint32_t i = 0; i < iovecs; i++) {
    const auto iov = read<Iovec>(entry + sizeof(CommandRequest) + i * sizeof(Iovec));
    uint64_t& total = totals[i >= request.iov_count];
    if (iov.base < data_start || iov.base > map_bytes_ || iov.length > map_bytes_ - iov.base ||
        (total += iov.length) > UINT32_MAX) {
      corrupt(position, "iovec %u, 0x%llx bytes at 0x%llx, leaves the data area or 32 bits", i,
              static_cast<unsigned long long>(iov.length),
              static_cast<unsigned long long>(iov.base));
      return false;
    }
    pieces[i] = {base_ + iov.base, static_cast<size_t>(iov.length)};
  }

  const auto cdb_at = static_cast<uint32_t>(request.cdb_offset - entry_start);
  const uint32_t cdb_bytes = length - cdb_at;
  uint8_t* cdb = tables.cdbs + slot * RingTables::kCdbBytes;
  const uint32_t first = std::min(cdb_bytes, RingTables::kCdbBytes);
  std::memcpy(cdb, entry + cdb_at, first);
  std::memset(cdb + first, 0, RingTables::kCdbBytes - first);
  if (cdb_bytes > first) {
    s.long_cdb.reset(new uint8_t[cdb_bytes]);
    std::memcpy(s.long_cdb.get(), entry + cdb_at, cdb_bytes);
  }

  s.state = State::InFlight;
  s.id = id;
  s.bytes = totals[0] + totals[1];
  slot_of_id_[id] = static_cast<int32_t>(slot);
  in_flight_++;
  uint32_t* info = tables.info + slot * RingTables::kInfoWords;
  info[0] = id;
  info[1] = cdb_bytes;
  info[2] = static_cast<uint32_t>(totals[0]);
  info[3] = static_cast<uint32_t>(totals[1]);
  info[4] = request.iov_count;
  info[5] = request.bidi_count;
  info[6] = request.header.kernel_flags;
  info[7] = cdbLength(cdb, cdb_bytes);
  return true;
}

bool Ring::takeTaskManagement(const std::byte* entry, uint32_t position, uint32_t length) {
  if (length < sizeof(TaskManagementEntry)) {
    corrupt(position, "task management entry of 0x%x bytes", length);
    return false;
  }
  const auto head = read<TaskManagementEntry>(entry);
  if (head.count > (length - sizeof(TaskManagementEntry)) / sizeof(uint16_t)) {
    corrupt(position, "%u command ids in a task management entry of 0x%x bytes", head.count,
            length);
    return false;
  }
  TaskManagement tmr{head.type, {}};
  for (uint32_t i = 0; i < head.count; i++) {
    const auto id = read<uint16_t>(entry + sizeof(TaskManagementEntry) + i * sizeof(uint16_t));
    // An id no longer in flight has been completed meanwhile.
    if (slot_of_id_[id] >= 0) tmr.slots.push_back(static_cast<uint32_t>(slot_of_id_[id]));
  }
  task_managements_.push_back(std::move(tmr));
  return true;
}

TaskManagement Ring::takeTaskManagement() {
  if (task_managements_taken_ == task_managements_.size()) return {0, {}};
  TaskManagement tmr = std::move(task_managements_[task_managements_taken_++]);
  if (task_managements_taken_ == task_managements_.size()) {
    task_managements_.clear();
    task_managements_taken_ = 0;
  }
  return tmr;
}

// The kernel has freed every command and starts at the ring's beginning. What was fetched before
// keeps its slot until the handler is done with it, but is answered to nobody.
void Ring::takeReset() {
  for (uint32_t slot = 0; slot < slot_count_; slot++) {
    Slot& s = at(slot);
    if (s.state != State::InFlight || s.orphan) continue;
    s.orphan = true;
    slot_of_id_[s.id] = -1;
  }
  entries_.clear();
  answers_.clear();
  tail_ = next_tail_ = position_ = 0;
  reset_seen_ = false;
}

// ---- complete ----

bool Ring::tailIsOurs() {
  if (reset_seen_ || memoryLost()) return false;
  volatile uint32_t tail = 0;
  if (!guarded([&] {
        tail = __atomic_load_n(mailboxField(offsetof(Mailbox, tail)), __ATOMIC_ACQUIRE);
      })) {
    lostMemory("reading the mailbox");
    return false;
  }
  if (tail != tail_) reset_seen_ = true;
  return !reset_seen_;
}

bool Ring::complete(const Completion& completion) {
  if (!valid(completion.slot)) return false;
  Slot& s = at(completion.slot);
  if (s.state != State::InFlight || s.postponed) return false;
  if (s.pins > 0) {
    s.postponed = std::make_unique<Postponed>();
    s.postponed->completion = completion;
    if (completion.flags & Completion::kSense)
      std::memcpy(s.postponed->sense, completion.sense, kSenseBytes);
    s.postponed->completion.sense = s.postponed->sense;
    return true;
  }
  publish(completion);
  return true;
}

void Ring::completeUnpinned() {
  if (unpinned_.empty()) return;
  std::vector<uint32_t> slots;
  slots.swap(unpinned_);
  for (uint32_t slot : slots) {
    Slot& s = at(slot);
    if (s.state != State::InFlight || !s.postponed || s.pins > 0) continue;  // pinned once more
    const auto postponed = std::move(s.postponed);
    publish(postponed->completion);
  }
}

void Ring::publish(const Completion& completion) {
  Slot& s = at(completion.slot);
  in_flight_--;
  const bool zero = completion.zero_from < s.bytes;
  const bool wants_keep =
      (completion.flags & Completion::kKeepBuffer) &&
      (flags_ & (kCapKeepBuffer | kCapKeepBufferPerCommand));
  // A command of the time before a reset: its pages may be another command's by now.
  bool answer = !s.orphan && !reset_seen_ && !memoryLost();
  if (answer && (zero || wants_keep)) answer = tailIsOurs();
  if (answer && zero &&
      !fill(segments(completion.slot), completion.zero_from, s.bytes - completion.zero_from, 0))
    lostMemory("zeroing a command's data");
  const bool keep = answer && wants_keep;
  if (!keep) revoke_(owner_, completion.slot);
  if (!s.orphan) slot_of_id_[s.id] = -1;

  if (answer) {
    passOver();
    Answer& out = answers_.emplace_back();
    out.place = popEntry();
    out.response.header.id = s.id;
    out.response.header.user_flags = keep ? kUserKeepBuffer : 0;
    out.response.status = completion.status;
    if ((completion.flags & Completion::kReadLength) && (flags_ & kCapReadLength)) {
      out.response.header.user_flags |= kUserReadLength;
      out.response.read_length = completion.read_length;
    }
    if (completion.flags & Completion::kSense)
      std::memcpy(out.response.sense, completion.sense, kSenseBytes);
  }
  if (keep)
    s.state = State::Kept;
  else
    freeSlot(completion.slot);
}

uint32_t Ring::popEntry() {
  const uint32_t place = next_tail_;
  next_tail_ += entries_.front().length;
  if (next_tail_ == ring_size_) next_tail_ = 0;
  entries_.pop();
  return place;
}

// Steps over entries at the front of the record that need no answer.
void Ring::passOver() {
  while (!entries_.empty() && entries_.front().op != Op::Command) {
    const bool unknown = entries_.front().op > Op::TaskManagement;
    const uint32_t place = popEntry();
    if (unknown) {
      answers_.emplace_back().place = place;
      answers_.back().response.header.user_flags = kUserUnknownOp;
    }
  }
}

// Everything the kernel is told is written here, under one guard, after a look whether the ring is
// still the one that the answers are for.
bool Ring::moveTail() {
  passOver();
  const bool moves = next_tail_ != tail_ && !reset_seen_ && !memoryLost();
  volatile bool ours = false;
  if (moves) {
    uint32_t* const field = mailboxField(offsetof(Mailbox, tail));
    const bool reached = guarded([&] {
      if (__atomic_load_n(field, __ATOMIC_ACQUIRE) != tail_) return;
      ours = true;
      for (const Answer& answer : answers_) write(answer);
      __atomic_store_n(field, next_tail_, __ATOMIC_RELEASE);
    });
    if (!reached)
      lostMemory("writing responses");
    else if (!ours)
      reset_seen_ = true;
    ours = ours && reached;
  }
  if (ours) {
    tail_ = next_tail_;
    for (const Answer& answer : answers_)
      stats_.completions += answer.response.header.user_flags != kUserUnknownOp;
  }
  answers_.clear();
  return ours;
}

// The length and the kernel's flags stay: they are the entry's, not the command's.
void Ring::write(const Answer& answer) {
  auto* out = reinterpret_cast<CommandResponse*>(ring_ + answer.place);
  const CommandResponse& response = answer.response;
  out->header.user_flags = response.header.user_flags;
  if (response.header.user_flags == kUserUnknownOp) return;
  out->header.id = response.header.id;
  std::memcpy(&out->status, &response.status, sizeof response - offsetof(CommandResponse, status));
}

}  // namespace tcmu

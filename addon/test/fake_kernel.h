// SPDX-License-Identifier: Apache-2.0
// The kernel's side of a ring, as far as the ring's tests need it: writes entries as the kernel lays
// them out, and reads completions as the kernel does, from its own tail. Shares no code with the ring
// but the layout; addon/sim is the one that behaves like a kernel.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <optional>
#include <span>
#include <vector>

#include "../ring/layout.h"

namespace fake {

namespace layout = tcmu::layout;

struct Answer {
  uint16_t id;
  uint8_t user_flags;
  uint8_t status;
  uint32_t read_length;
  uint8_t sense[layout::kSenseBytes];
};

class Kernel {
 public:
  static constexpr uint32_t kRingOffset = 128;

  explicit Kernel(uint32_t ring_bytes = 4096, uint32_t data_bytes = 65536)
      : ring_bytes_(ring_bytes), memory_(kRingOffset + ring_bytes + data_bytes) {
    auto& m = mailbox();
    m.version = 2;
    m.flags = 0xf;
    m.ring_offset = kRingOffset;
    m.ring_size = ring_bytes;
  }

  std::span<std::byte> memory() { return memory_; }
  layout::Mailbox& mailbox() { return *reinterpret_cast<layout::Mailbox*>(memory_.data()); }
  uint64_t dataStart() const { return kRingOffset + ring_bytes_; }
  uint8_t* data(uint64_t offset = 0) {
    return reinterpret_cast<uint8_t*>(memory_.data()) + dataStart() + offset;
  }
  template <class T>
  T& at(uint32_t place) {
    return *reinterpret_cast<T*>(memory_.data() + kRingOffset + place);
  }

  // Bytes free behind the head, the last 8 never used.
  uint32_t room() {
    const uint32_t tail = mailbox().tail % ring_bytes_ & ~7u;
    return (tail > head_ ? tail - head_ : tail + ring_bytes_ - head_) - 8;
  }

  // Place for an entry, padding the ring's end if it does not fit there. None: the ring is full.
  std::optional<uint32_t> reserve(uint32_t bytes) {
    const uint32_t to_end = ring_bytes_ - head_;
    const uint32_t pad = bytes > to_end ? to_end : 0;
    if (bytes + pad > room()) return {};
    if (pad > 0) {
      at<layout::EntryHeader>(head_) = {pad, 0, 0, 0};
      head_ = 0;
    }
    return head_;
  }
  void advance(uint32_t bytes) {
    head_ = head_ + bytes == ring_bytes_ ? 0 : head_ + bytes;
    mailbox().head = head_;
  }

  struct Piece {
    uint64_t offset, length;  // in the data area
  };
  // Where the entry stands.
  std::optional<uint32_t> command(uint16_t id, std::vector<uint8_t> cdb,
                                  std::vector<Piece> pieces = {}, std::vector<Piece> bidi = {}) {
    const uint32_t count = static_cast<uint32_t>(pieces.size() + bidi.size());
    const uint32_t fixed = std::max<uint32_t>(112, 48 + 16 * count);
    const uint32_t bytes = fixed + ((static_cast<uint32_t>(cdb.size()) + 7) & ~7u);
    const auto place = reserve(bytes);
    if (!place) return {};
    std::memset(&at<uint8_t>(*place), 0xee, bytes);  // what other entries left there
    auto& request = at<layout::CommandRequest>(*place);
    request = {};
    request.header = {bytes | 1, id, 0, 0xff};
    request.iov_count = static_cast<uint32_t>(pieces.size());
    request.bidi_count = static_cast<uint32_t>(bidi.size());
    request.cdb_offset = kRingOffset + *place + fixed;
    auto* iov = &at<layout::Iovec>(*place + 48);
    for (const auto* list : {&pieces, &bidi}) {
      for (const Piece& piece : *list) *iov++ = {dataStart() + piece.offset, piece.length};
    }
    std::copy(cdb.begin(), cdb.end(), &at<uint8_t>(*place + fixed));
    advance(bytes);
    return place;
  }

  std::optional<uint32_t> taskManagement(uint8_t type, std::vector<uint16_t> ids) {
    const uint32_t bytes = (32 + 2 * static_cast<uint32_t>(ids.size()) + 7) & ~7u;
    const auto place = reserve(bytes);
    if (!place) return {};
    auto& entry = at<layout::TaskManagementEntry>(*place);
    entry = {};
    entry.header = {bytes | 2, 0, 0, 0};
    entry.type = type;
    entry.count = static_cast<uint32_t>(ids.size());
    std::copy(ids.begin(), ids.end(), &at<uint16_t>(*place + 32));
    advance(bytes);
    return place;
  }

  std::optional<uint32_t> raw(uint32_t bytes, uint32_t op) {
    const auto place = reserve(bytes);
    if (!place) return {};
    at<layout::EntryHeader>(*place) = {bytes | op, 0, 0, 0};
    advance(bytes);
    return place;
  }

  // What the doorbell does: walks from the kernel's own tail to ours.
  std::vector<Answer> collect() {
    std::vector<Answer> answers;
    while (tail_ != mailbox().tail) {
      const auto header = at<layout::EntryHeader>(tail_);
      if ((header.length_op & 7) == 1) {
        const auto response = at<layout::CommandResponse>(tail_);
        Answer answer = {response.header.id, response.header.user_flags, response.status,
                         response.read_length, {}};
        std::memcpy(answer.sense, response.sense, sizeof answer.sense);
        answers.push_back(answer);
      } else if ((header.length_op & 7) > 2) {
        unknown_marked += header.user_flags == layout::kUserUnknownOp;
      }
      tail_ += header.length_op & ~7u;
      if (tail_ == ring_bytes_) tail_ = 0;
    }
    return answers;
  }

  void reset() {
    mailbox().head = mailbox().tail = 0;
    head_ = tail_ = 0;
  }

  int unknown_marked = 0;

 private:
  uint32_t ring_bytes_;
  // Its own; what the mailbox says may be a test's lie.
  uint32_t head_ = 0, tail_ = 0;
  // Exactly as long as it is: the sanitizer sees the first byte behind it.
  std::vector<std::byte> memory_;
};

}  // namespace fake

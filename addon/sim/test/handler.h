// SPDX-License-Identifier: Apache-2.0
// The other side of the ring, as small as can be: for tests of the simulated kernel alone.
#pragma once

#include <poll.h>
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <cstring>
#include <optional>
#include <span>
#include <vector>

#include "../abi.h"
#include "../uio.h"

namespace tcmu::sim {

class TestHandler {
 public:
  struct Iov {
    uint64_t offset;
    uint64_t length;
  };
  struct Entry {
    uint32_t op;
    uint32_t length;
    uint32_t at;  // in the ring
    uint16_t id;
    std::vector<Iov> iovs;
    std::vector<Iov> bidi;
    uint64_t cdbOffset;
    uint8_t cdb[16];
    uint8_t tmrType;
    std::vector<uint16_t> tmrIds;
  };

  explicit TestHandler(Uio::Handle handle, size_t mapSize) : handle_(handle), size_(mapSize) {
    base_ = static_cast<uint8_t*>(
        mmap(nullptr, mapSize, PROT_READ | PROT_WRITE, MAP_SHARED, handle.memory, 0));
    position_ = word(mailbox::kTail);
  }
  // Over memory that is mapped already; doorbells are the caller's business.
  explicit TestHandler(uint8_t* base) : base_(base) { position_ = word(mailbox::kTail); }
  ~TestHandler() { close(); }
  TestHandler(const TestHandler&) = delete;
  TestHandler& operator=(const TestHandler&) = delete;

  void close() {
    if (size_ == 0) return;
    munmap(base_, size_);
    for (const int fd : {handle_.memory, handle_.event, handle_.doorbell}) ::close(fd);
    size_ = 0;
  }

  // The next entry, or nothing.
  std::optional<Entry> fetch() {
    if (position_ == word(mailbox::kHead)) return {};
    const size_t at = mailbox::kBytes + position_;
    Entry e{};
    e.at = position_;
    e.op = word(at) & entry::kOpMask;
    e.length = word(at) & ~entry::kOpMask;
    e.id = load<uint16_t>(at + entry::kId);
    if (e.op == entry::kCommand) {
      const uint32_t count = word(at + entry::kIovCount);
      const uint32_t bidi = word(at + entry::kBidiIovCount);
      for (uint32_t i = 0; i < count + bidi; i++) {
        const size_t iov = at + entry::kIov + i * entry::kIovBytes;
        (i < count ? e.iovs : e.bidi).push_back({load<uint64_t>(iov), load<uint64_t>(iov + 8)});
      }
      e.cdbOffset = load<uint64_t>(at + entry::kCdbOffset);
      // Never past the entry: behind the ring's end there may be no memory.
      std::memcpy(e.cdb, base_ + e.cdbOffset, std::min<size_t>(16, at + e.length - e.cdbOffset));
    } else if (e.op == entry::kTaskManagement) {
      e.tmrType = load<uint8_t>(at + entry::kTmrType);
      for (uint32_t i = 0; i < word(at + entry::kTmrCount); i++)
        e.tmrIds.push_back(load<uint16_t>(at + entry::kTmrIds + 2 * i));
    }
    position_ = (position_ + e.length) % word(mailbox::kRingSize);
    return e;
  }

  // The next command; PADs and TMRs on the way are passed over.
  std::optional<Entry> command() {
    for (;;) {
      std::optional<Entry> e = fetch();
      if (!e || e->op == entry::kCommand) return e;
    }
  }

  struct Response {
    uint8_t status = 0;
    uint8_t flags = 0;
    uint32_t readLength = 0;
    const char* sense = nullptr;
  };

  // Writes the response for `id` into the entry at our tail and moves the tail past it.
  void complete(uint16_t id) { complete(id, Response{}); }
  void complete(uint16_t id, Response response) {
    passOver();
    const size_t at = mailbox::kBytes + word(mailbox::kTail);
    store<uint16_t>(at + entry::kId, id);
    store<uint8_t>(at + entry::kUserFlags, response.flags);
    store<uint8_t>(at + entry::kStatus, response.status);
    store<uint32_t>(at + entry::kReadLength, response.readLength);
    if (response.sense) std::memcpy(base_ + at + entry::kSense, response.sense, entry::kSenseBytes);
    advance();
  }

  // Moves the tail over PADs and TMRs.
  void passOver() {
    while (word(mailbox::kTail) != position_ &&
           (word(mailbox::kBytes + word(mailbox::kTail)) & entry::kOpMask) != entry::kCommand)
      advance();
  }

  void ring() {
    const uint32_t one = 1;
    if (write(handle_.doorbell, &one, sizeof one) != sizeof one) std::abort();
  }

  // Waits for a wake-up and takes it. Returns the event count, 0 at end of file, -1 for none.
  int64_t wait(int milliseconds = 2000) {
    pollfd fd{handle_.event, POLLIN, 0};
    if (poll(&fd, 1, milliseconds) <= 0) return -1;
    uint32_t count;
    const ssize_t n = read(handle_.event, &count, sizeof count);
    return n == sizeof count ? count : n;
  }

  std::span<uint8_t> data(const Iov& iov) { return {base_ + iov.offset, iov.length}; }
  template <class T>
  void store(size_t at, T value) {
    std::memcpy(base_ + at, &value, sizeof value);
  }
  template <class T>
  T load(size_t at) const {
    T value;
    std::memcpy(&value, base_ + at, sizeof value);
    return value;
  }
  uint32_t word(size_t at) const {
    return std::atomic_ref(*reinterpret_cast<uint32_t*>(base_ + at))
        .load(std::memory_order_acquire);
  }

 private:
  void advance() {
    const uint32_t tail = word(mailbox::kTail);
    const uint32_t length = word(mailbox::kBytes + tail) & ~entry::kOpMask;
    std::atomic_ref(*reinterpret_cast<uint32_t*>(base_ + mailbox::kTail))
        .store((tail + length) % word(mailbox::kRingSize), std::memory_order_release);
  }

  Uio::Handle handle_{};
  uint8_t* base_;
  size_t size_ = 0;
  uint32_t position_;
};

}  // namespace tcmu::sim

// SPDX-License-Identifier: Apache-2.0
// Feeds the ring what no kernel writes, and checks that what it says stays true.
//
// The input is a program: bytes are put into the mailbox and the ring, honest entries are queued,
// events are fetched, slots are completed, pinned, kept, released, the ring is reset. A model beside
// it knows what must hold whatever the memory says: each slot is handed out once until it comes free,
// every completion is taken exactly when one is due, the tail only moves over what was fetched, all
// memory named lies in the data area, and (with an honest kernel) every command is answered once. The
// sanitizers watch for everything out of bounds.
//
// With libFuzzer: clang++ -fsanitize=fuzzer. Without: -DSTANDALONE, random programs from a fixed seed
// for the number of seconds given.
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <map>
#include <set>
#include <vector>

#include "../ring/ring.h"
#include "fake_kernel.h"

using namespace tcmu;

namespace {

#define MUST(...)                                                   \
  do {                                                              \
    if (!(__VA_ARGS__)) {                                           \
      std::fprintf(stderr, "broken: %s (line %d)\n", #__VA_ARGS__, __LINE__); \
      std::abort();                                                 \
    }                                                               \
  } while (0)

class Input {
 public:
  Input(const uint8_t* data, size_t size) : data_(data), size_(size) {}
  bool empty() const { return at_ >= size_; }
  uint8_t byte() { return at_ < size_ ? data_[at_++] : 0; }
  uint32_t word() {
    uint32_t value = 0;
    for (int i = 0; i < 4; i++) value |= static_cast<uint32_t>(byte()) << (8 * i);
    return value;
  }

 private:
  const uint8_t* data_;
  size_t size_;
  size_t at_ = 0;
};

// Values that are on some edge more often than chance.
uint32_t edge(Input& input, uint32_t near) {
  const uint8_t kind = input.byte();
  switch (kind % 8) {
    case 0: return 0;
    case 1: return 0xffffffff;
    case 2: return 0xfffffff8;
    case 3: return 0x80000000;
    case 4: return near + input.byte() % 16 - 8;
    case 5: return (near + (input.byte() % 16 - 8) * 8u) & ~7u;
    case 6: return input.byte();
    default: return input.word();
  }
}

class Run {
 public:
  Run(Input& input, bool honest)
      : input_(input), honest_(honest), kernel_(ring_bytes(input), 4096) {}

  void go() {
    if (!honest_ && input_.byte() % 4 == 0) corruptMailbox();
    try {
      Ring ring(kernel_.memory(), onRevoke, this);
      ring_ = &ring;
      play();
      if (honest_) finish();
    } catch (const RingFault&) {
      MUST(!honest_);
    }
  }

 private:
  static uint32_t ring_bytes(Input& input) { return 448 + input.byte() % 64 * 8; }

  static void onRevoke(void* self, uint32_t slot) {
    Run& run = *static_cast<Run*>(self);
    MUST(run.held_.count(slot) == 1);
    MUST(run.held_[slot].pins == 0);
    run.held_.erase(slot);
  }

  void corruptMailbox() {
    auto& m = kernel_.mailbox();
    const uint32_t value = edge(input_, 4096);
    switch (input_.byte() % 5) {
      case 0: m.version = static_cast<uint16_t>(value); break;
      case 1: m.flags = static_cast<uint16_t>(value); break;
      case 2: m.ring_offset = value; break;
      case 3: m.ring_size = value; break;
      default: m.tail = value; break;
    }
  }

  void play() {
    info_.resize(ring_->capacity() * RingTables::kInfoWords);
    cdbs_.resize(ring_->capacity() * RingTables::kCdbBytes);
    for (int step = 0; step < 4000 && !input_.empty(); step++) {
      switch (input_.byte() % 12) {
        case 0:
        case 1: queueCommand(); break;
        case 2: queueOther(); break;
        case 3:
        case 4: fetch(1 + input_.byte() % 16); break;
        case 5:
        case 6: complete(pick()); break;
        case 7: pin(pick(), true); break;
        case 8: pin(pick(), false); break;
        case 9: release(pick()); break;
        case 10: flush(); break;
        default:
          if (!honest_) disturb();
      }
      MUST(ring_->pinsHeld() == pins_);
    }
  }

  // Everything comes to its end.
  void finish() {
    const auto& m = kernel_.mailbox();
    for (int i = 0; i < 100 && (!held_.empty() || !due_.empty() || m.tail != m.head); i++) {
      fetch(16);
      const auto held = held_;
      for (const auto& [slot, state] : held) {
        for (uint32_t i = state.pins; i > 0; i--) pin(slot, false);
        if (held_.count(slot) && held_[slot].completed) release(slot);
        if (held_.count(slot) && !held_[slot].completed) complete(slot);
      }
      flush();
    }
    MUST(held_.empty());
    MUST(due_.empty());
    MUST(ring_->inFlight() == 0);
    MUST(m.tail == m.head);
  }

  void queueCommand() {
    const uint16_t id = honest_ ? next_id_ : static_cast<uint16_t>(edge(input_, next_id_));
    if (honest_ && due_.count(id)) return;
    std::vector<uint8_t> cdb(1 + input_.byte() % 40);
    for (uint8_t& byte : cdb) byte = input_.byte();
    std::vector<fake::Kernel::Piece> pieces[2];
    for (auto& list : pieces) {
      for (int i = input_.byte() % 6; i > 0; i--) {
        const uint64_t offset = input_.byte() * 16u;
        list.push_back({offset, input_.byte() % 16u});
      }
    }
    if (!kernel_.command(id, cdb, pieces[0], pieces[1])) return;
    if (honest_) due_.insert(id);
    next_id_ = next_id_ == 300 ? 1 : next_id_ + 1;
  }

  void queueOther() {
    if (input_.byte() % 2 == 0) {
      std::vector<uint16_t> ids(input_.byte() % 8);
      for (uint16_t& id : ids) id = input_.byte();
      kernel_.taskManagement(input_.byte(), ids);
    } else {
      kernel_.raw(8 + input_.byte() % 16 * 8, honest_ ? (input_.byte() % 2 ? 0 : 5) : input_.byte() % 8);
    }
  }

  void disturb() {
    auto memory = kernel_.memory();
    const uint32_t value = edge(input_, kernel_.mailbox().head);
    switch (input_.byte() % 5) {
      case 0: kernel_.mailbox().head = value; break;
      case 1: kernel_.mailbox().tail = value; break;
      case 2: kernel_.reset(); break;
      default: {
        // A word of some entry.
        const size_t place = 128 + (input_.word() % (memory.size() - 132) & ~3u);
        std::memcpy(memory.data() + place % (memory.size() - 4), &value, 4);
      }
    }
  }

  void fetch(uint32_t limit) {
    std::vector<int32_t> events(limit);
    const uint32_t count = ring_->fetch({events.data(), info_.data(), cdbs_.data()}, limit);
    MUST(count <= limit);
    MUST(!honest_ || !ring_->fault());
    for (uint32_t i = 0; i < count; i++) {
      if (events[i] == RingTables::kEventTaskManagement) {
        for (uint32_t slot : ring_->takeTaskManagement().slots) MUST(slot < ring_->capacity());
        continue;
      }
      if (events[i] == RingTables::kEventReset) {
        MUST(!honest_ && i == 0);
        continue;
      }
      const auto slot = static_cast<uint32_t>(events[i]);
      MUST(slot < ring_->capacity());
      MUST(held_.emplace(slot, Held{}).second);
      MUST(ring_->valid(slot));
      const uint32_t* info = info_.data() + slot * RingTables::kInfoWords;
      MUST(info[0] >= 1 && info[0] <= 65535);
      MUST(ring_->bytes(slot) == uint64_t{info[2]} + info[3]);
      const Segments segments = ring_->segments(slot);
      MUST(segments.count == info[4] + info[5]);
      const auto memory = kernel_.memory();
      uint64_t bytes = 0;
      for (uint32_t s = 0; s < segments.count; s++) {
        const auto* start = static_cast<std::byte*>(segments.pieces[s].iov_base);
        MUST(start >= memory.data() + 128 && start <= memory.data() + memory.size());
        MUST(segments.pieces[s].iov_len <=
             static_cast<size_t>(memory.data() + memory.size() - start));
        bytes += segments.pieces[s].iov_len;
      }
      MUST(bytes == ring_->bytes(slot));
      MUST(!ring_->cdb(slot, {events.data(), info_.data(), cdbs_.data()}).empty());
    }
  }

  uint32_t pick() {
    if (held_.empty() || input_.byte() % 16 == 0) return edge(input_, 4);
    auto it = held_.begin();
    std::advance(it, input_.byte() % held_.size());
    return it->first;
  }

  void complete(uint32_t slot) {
    const bool due = held_.count(slot) && !held_[slot].completed;
    static const uint8_t sense[layout::kSenseBytes] = {0x70};
    const bool keep = input_.byte() % 8 == 0;
    if (due) held_[slot].completed = true;
    const bool pinned = due && held_[slot].pins > 0;
    const bool taken = ring_->complete(
        {slot, input_.byte(), static_cast<uint8_t>((input_.byte() & 3) | (keep ? 4 : 0)), input_.word(),
         edge(input_, 16), sense});
    MUST(taken == due);
    if (due && pinned) MUST(held_.count(slot));
  }

  void pin(uint32_t slot, bool on) {
    const bool held = held_.count(slot) != 0;
    if (on) {
      if (held && held_[slot].released) return;
      MUST(ring_->pin(slot) == held);
      if (held) {
        held_[slot].pins++;
        pins_++;
      }
    } else {
      const bool due = held && held_[slot].pins > 0;
      if (due) {
        held_[slot].pins--;
        pins_--;
      }
      MUST(ring_->unpin(slot) == due);
    }
  }

  void release(uint32_t slot) {
    const bool held = held_.count(slot) != 0;
    const bool released = ring_->releaseKept(slot);
    if (!held) MUST(!released);
    if (released) {
      auto it = held_.find(slot);
      if (it != held_.end()) {
        MUST(it->second.completed && it->second.pins > 0);
        it->second.released = true;
      }
    }
  }

  void flush() {
    ring_->completeUnpinned();
    ring_->moveTail();
    if (!honest_) return;
    for (const fake::Answer& answer : kernel_.collect()) MUST(due_.erase(answer.id) == 1);
  }

  struct Held {
    uint32_t pins = 0;
    bool completed = false;
    bool released = false;
  };

  Input& input_;
  const bool honest_;
  fake::Kernel kernel_;
  Ring* ring_ = nullptr;
  std::vector<uint32_t> info_;
  std::vector<uint8_t> cdbs_;
  std::map<uint32_t, Held> held_;
  std::set<uint16_t> due_;
  uint64_t pins_ = 0;
  uint16_t next_id_ = 1;
};

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  Input input(data, size);
  const bool honest = input.byte() % 2;
  Run(input, honest).go();
  return 0;
}

#ifdef STANDALONE
#include <chrono>

int main(int argc, char** argv) {
  const int seconds = argc > 1 ? std::atoi(argv[1]) : 20;
  const auto end = std::chrono::steady_clock::now() + std::chrono::seconds(seconds);
  uint64_t state = 0x9e3779b97f4a7c15;
  uint64_t runs = 0;
  std::vector<uint8_t> program;
  while (std::chrono::steady_clock::now() < end) {
    program.resize(64 + runs % 64 * 64);
    for (uint8_t& byte : program) {
      state ^= state << 13;
      state ^= state >> 7;
      state ^= state << 17;
      byte = static_cast<uint8_t>(state >> 32);
    }
    LLVMFuzzerTestOneInput(program.data(), program.size());
    runs++;
  }
  std::fprintf(stderr, "%llu programs\n", static_cast<unsigned long long>(runs));
}
#endif

// SPDX-License-Identifier: Apache-2.0
// The ring against hand-written entries: what is fetched, what is written back, and what is refused.
#include "../ring/ring.h"

#include <algorithm>
#include <cstring>

#include "check.h"
#include "fake_kernel.h"

using namespace tcmu;
using fake::Kernel;

namespace {

struct Fixture {
  explicit Fixture(uint32_t ring_bytes = 4096, uint32_t data_bytes = 65536)
      : kernel(ring_bytes, data_bytes), ring(kernel.memory(), onRevoke, this) {
    info.resize(ring.capacity() * RingTables::kInfoWords);
    cdbs.resize(ring.capacity() * RingTables::kCdbBytes, 0xee);
    events.resize(256);
  }
  static void onRevoke(void* self, uint32_t slot) {
    static_cast<Fixture*>(self)->revoked.push_back(slot);
  }
  RingTables tables() { return {events.data(), info.data(), cdbs.data()}; }
  std::vector<int32_t> fetch(uint32_t limit = 256) {
    const uint32_t count = ring.fetch(tables(), limit);
    return {events.begin(), events.begin() + count};
  }
  uint32_t fetchOne() {
    const auto got = fetch(1);
    return got.size() == 1 ? static_cast<uint32_t>(got[0]) : 0xffff;
  }
  bool complete(uint32_t slot, uint8_t status = 0, uint8_t flags = 0, uint32_t read_length = 0,
                uint32_t zero_from = Completion::kNoZero, const uint8_t* sense = nullptr) {
    return ring.complete({slot, status, flags, read_length, zero_from, sense});
  }
  const uint32_t* infoOf(uint32_t slot) { return info.data() + slot * RingTables::kInfoWords; }
  bool corrupt() {
    return fetch().empty() && ring.fault() && ring.fault()->kind == RingFault::Kind::Corrupt;
  }

  Kernel kernel;
  std::vector<uint32_t> revoked;
  Ring ring;
  std::vector<uint32_t> info;
  std::vector<uint8_t> cdbs;
  std::vector<int32_t> events;
};

std::optional<RingFault> openFault(Kernel& kernel, size_t bytes = SIZE_MAX) {
  try {
    Ring ring(kernel.memory().subspan(0, std::min(bytes, kernel.memory().size())),
              [](void*, uint32_t) {}, nullptr);
    return {};
  } catch (const RingFault& fault) {
    return fault;
  }
}

}  // namespace

TEST(fetchesACommandWithItsMemory) {
  Fixture f;
  f.kernel.command(7, {0x2a, 0, 0, 0, 0, 9, 0, 0, 1, 0}, {{0, 512}, {4096, 1024}});
  std::memset(f.kernel.data(), 1, 512);
  std::memset(f.kernel.data(4096), 2, 1024);
  const uint32_t slot = f.fetchOne();
  EXPECT(slot == 0);
  EXPECT(f.ring.inFlight() == 1);
  const uint32_t* info = f.infoOf(slot);
  EXPECT(info[0] == 7 && info[1] == 16 && info[2] == 1536 && info[3] == 0);
  EXPECT(info[4] == 2 && info[5] == 0);
  EXPECT(f.cdbs[0] == 0x2a && f.cdbs[5] == 9);
  EXPECT(std::all_of(f.cdbs.begin() + 16, f.cdbs.begin() + 32, [](uint8_t b) { return b == 0; }));
  uint8_t bytes[1536];
  EXPECT(copyOut(f.ring.segments(slot), 0, 1536, bytes));
  EXPECT(bytes[0] == 1 && bytes[511] == 1 && bytes[512] == 2 && bytes[1535] == 2);
  EXPECT(f.fetch().empty());
}

TEST(keepsALongCdbWhole) {
  Fixture f;
  std::vector<uint8_t> cdb(40);
  for (int i = 0; i < 40; i++) cdb[i] = static_cast<uint8_t>(i);
  f.kernel.command(1, cdb);
  const uint32_t slot = f.fetchOne();
  EXPECT(f.infoOf(slot)[1] == 40);
  const auto whole = f.ring.cdb(slot, f.tables());
  EXPECT(whole.size() == 40 && std::equal(whole.begin(), whole.end(), cdb.begin()));
  EXPECT(f.cdbs[31] == 31);
}

TEST(countsBothBuffersOfABidirectionalCommand) {
  Fixture f;
  f.kernel.command(1, {0x53}, {{0, 512}}, {{1024, 256}, {2048, 256}});
  const uint32_t slot = f.fetchOne();
  EXPECT(f.infoOf(slot)[2] == 512 && f.infoOf(slot)[3] == 512);
  EXPECT(f.infoOf(slot)[4] == 1 && f.infoOf(slot)[5] == 2);
  EXPECT(f.ring.bytes(slot) == 1024);
  EXPECT(fill(f.ring.segments(slot), 512, 512, 0x5a));
  EXPECT(f.kernel.data()[511] == 0 && f.kernel.data(1024)[0] == 0x5a && f.kernel.data(2048)[255] == 0x5a);
}

TEST(writesEveryResponseFieldAnew) {
  Fixture f;
  f.kernel.command(3, {0});
  uint8_t sense[96];
  std::memset(sense, 0x77, sizeof sense);
  const uint32_t slot = f.fetchOne();
  EXPECT(f.complete(slot, 2, Completion::kSense, 0, Completion::kNoZero, sense));
  EXPECT(f.ring.moveTail());
  auto answers = f.kernel.collect();
  EXPECT(answers.size() == 1 && answers[0].id == 3 && answers[0].status == 2);
  EXPECT(answers[0].user_flags == 0 && answers[0].read_length == 0 && answers[0].sense[95] == 0x77);
  EXPECT(f.ring.inFlight() == 0 && f.revoked == std::vector<uint32_t>{slot});

  // Without sense: nothing of what stood there before is left.
  f.kernel.command(4, {0}, {{0, 16}, {16, 16}, {32, 16}, {48, 16}});
  EXPECT(f.complete(f.fetchOne(), 0, Completion::kReadLength, 12));
  EXPECT(f.ring.moveTail());
  answers = f.kernel.collect();
  EXPECT(answers.size() == 1 && answers[0].status == 0 && answers[0].read_length == 12);
  EXPECT(answers[0].user_flags == layout::kUserReadLength);
  EXPECT(std::all_of(answers[0].sense, answers[0].sense + 96, [](uint8_t b) { return b == 0; }));
}

TEST(answersOutOfOrderInTheOldestPlace) {
  Fixture f;
  // The first command's iovecs lie where the second one's answer goes.
  f.kernel.command(1, {0x28}, {{0, 16}, {100, 16}, {200, 16}, {300, 16}});
  f.kernel.command(2, {0x28}, {{1000, 16}});
  f.kernel.command(3, {0x28}, {{2000, 16}});
  const auto slots = f.fetch();
  EXPECT(slots.size() == 3);
  EXPECT(f.complete(slots[1]));
  EXPECT(f.ring.moveTail());
  auto answers = f.kernel.collect();
  EXPECT(answers.size() == 1 && answers[0].id == 2);
  EXPECT(f.complete(slots[2]));
  EXPECT(f.ring.moveTail());
  answers = f.kernel.collect();
  EXPECT(answers.size() == 1 && answers[0].id == 3);
  // Its request has been written over; it works from its copy.
  EXPECT(fill(f.ring.segments(slots[0]), 48, 16, 9));
  EXPECT(f.kernel.data(300)[0] == 9 && f.kernel.data(300)[15] == 9);
  EXPECT(f.infoOf(slots[0])[0] == 1 && f.cdbs[slots[0] * 32] == 0x28);
  EXPECT(f.complete(slots[0]));
  EXPECT(f.ring.moveTail());
  answers = f.kernel.collect();
  EXPECT(answers.size() == 1 && answers[0].id == 1);
  EXPECT(f.kernel.mailbox().tail == f.kernel.mailbox().head);
}

TEST(movesTheTailOncePerBatch) {
  Fixture f;
  for (uint16_t id = 1; id <= 5; id++) f.kernel.command(id, {0});
  const auto slots = f.fetch();
  for (int32_t slot : slots) EXPECT(f.complete(slot));
  EXPECT(f.kernel.mailbox().tail == 0);
  EXPECT(f.ring.moveTail());
  EXPECT(f.kernel.mailbox().tail == f.kernel.mailbox().head);
  EXPECT(!f.ring.moveTail());
  EXPECT(f.kernel.collect().size() == 5);
}

TEST(goesRoundTheRingManyTimes) {
  Fixture f(1024);
  uint16_t id = 0;
  size_t done = 0;
  std::vector<uint32_t> open;
  for (int i = 0; i < 2000; i++) {
    const size_t pieces = static_cast<size_t>(i % 9);
    std::vector<Kernel::Piece> iov(pieces, {static_cast<uint64_t>(i), 8});
    if (f.kernel.command(static_cast<uint16_t>(id % 60000 + 1), {1, 2, 3, 4, 5, 6}, iov)) id++;
    for (int32_t slot : f.fetch()) open.push_back(static_cast<uint32_t>(slot));
    EXPECT(!f.ring.fault());
    if (i % 3 == 0 && !open.empty()) {
      EXPECT(f.complete(open.back()));
      open.pop_back();
      if (!open.empty()) {
        EXPECT(f.complete(open.front()));
        open.erase(open.begin());
      }
      f.ring.moveTail();
      done += f.kernel.collect().size();
    }
  }
  EXPECT(done > 1000);
  EXPECT(done + open.size() == id);
}

TEST(passesOverPadTaskManagementAndUnknown) {
  Fixture f(1024);
  f.kernel.raw(64, 0);
  f.kernel.raw(24, 5);
  f.kernel.taskManagement(1, {});
  EXPECT(f.fetch() == std::vector<int32_t>{RingTables::kEventTaskManagement});
  EXPECT(f.ring.moveTail());
  EXPECT(f.kernel.mailbox().tail == f.kernel.mailbox().head);
  f.kernel.collect();
  EXPECT(f.kernel.unknown_marked == 1);
  EXPECT(f.ring.stats().unknown_ops == 1 && f.ring.stats().task_managements == 1);
}

TEST(marksAnUnknownEntryOnlyAtItsTurn) {
  Fixture f;
  f.kernel.command(1, {0});
  const auto unknown = f.kernel.raw(16, 7);
  const uint32_t slot = f.fetchOne();
  EXPECT(f.fetch().empty());
  EXPECT(!f.ring.moveTail());
  EXPECT(f.kernel.at<layout::EntryHeader>(*unknown).user_flags == 0);
  EXPECT(f.complete(slot));
  EXPECT(f.ring.moveTail());
  EXPECT(f.kernel.collect().size() == 1);
  EXPECT(f.kernel.unknown_marked == 1);
}

TEST(neverReadsAnEntryAgain) {
  Fixture f;
  const auto place = f.kernel.command(1, {0});
  f.kernel.command(2, {0});
  const auto slots = f.fetch();
  const uint32_t head = f.kernel.mailbox().head;
  // The kernel gone mad: lengths and operations of fetched entries change.
  f.kernel.at<layout::EntryHeader>(*place).length_op = 0xfffffff8;
  EXPECT(f.complete(slots[0]));
  EXPECT(f.complete(slots[1]));
  EXPECT(f.ring.moveTail());
  EXPECT(f.kernel.mailbox().tail == head);
}

TEST(namesTheSlotsATaskManagementFunctionMeans) {
  Fixture f;
  f.kernel.command(11, {0});
  f.kernel.command(12, {0});
  f.kernel.command(13, {0});
  const auto slots = f.fetch();
  EXPECT(f.complete(slots[1]));
  f.ring.moveTail();
  f.kernel.taskManagement(5, {13, 12, 11, 999});
  f.kernel.taskManagement(6, {});
  EXPECT(f.fetch().size() == 2);
  TaskManagement tmr = f.ring.takeTaskManagement();
  EXPECT(tmr.type == 5 && tmr.slots.size() == 2);
  EXPECT(tmr.slots[0] == static_cast<uint32_t>(slots[2]) && tmr.slots[1] == static_cast<uint32_t>(slots[0]));
  EXPECT(f.ring.takeTaskManagement().type == 6);
  EXPECT(f.ring.takeTaskManagement().type == 0);
}

TEST(completesOnce) {
  Fixture f;
  f.kernel.command(1, {0});
  const uint32_t slot = f.fetchOne();
  EXPECT(!f.complete(slot + 1) && !f.complete(100000));
  EXPECT(f.complete(slot));
  EXPECT(!f.complete(slot));
  EXPECT(f.ring.moveTail());
  EXPECT(f.kernel.collect().size() == 1);
}

TEST(aPinPostponesTheCompletion) {
  Fixture f;
  f.kernel.command(1, {0}, {{0, 64}});
  std::memset(f.kernel.data(), 0xaa, 64);
  const uint32_t slot = f.fetchOne();
  uint8_t sense[96];
  std::memset(sense, 0x70, sizeof sense);
  EXPECT(f.ring.pin(slot) && f.ring.pin(slot) && f.ring.pinsHeld() == 2);
  EXPECT(f.complete(slot, 2, Completion::kSense, 0, 32, sense));
  std::memset(sense, 0, sizeof sense);  // the caller's buffer is used for the next one
  EXPECT(!f.complete(slot));
  EXPECT(!f.ring.moveTail() && f.revoked.empty() && f.ring.inFlight() == 1);
  EXPECT(f.kernel.data()[63] == 0xaa);
  EXPECT(f.ring.unpin(slot) && !f.ring.hasUnpinned());
  EXPECT(f.ring.unpin(slot) && f.ring.hasUnpinned());
  // Pinned once more before anybody looked.
  EXPECT(f.ring.pin(slot));
  f.ring.completeUnpinned();
  EXPECT(!f.ring.moveTail());
  EXPECT(f.ring.unpin(slot) && f.ring.hasUnpinned());
  f.ring.completeUnpinned();
  EXPECT(f.ring.moveTail() && f.revoked.size() == 1 && f.ring.inFlight() == 0);
  const auto answers = f.kernel.collect();
  EXPECT(answers.size() == 1 && answers[0].status == 2 && answers[0].sense[0] == 0x70);
  EXPECT(f.kernel.data()[31] == 0xaa && f.kernel.data()[32] == 0 && f.kernel.data()[63] == 0);
  EXPECT(!f.ring.unpin(slot) && f.ring.pinsHeld() == 0);
}

TEST(zeroesTheRestAcrossPieces) {
  Fixture f;
  std::memset(f.kernel.data(), 0xaa, 4096);
  f.kernel.command(1, {0}, {{0, 100}, {1000, 100}});
  EXPECT(f.complete(f.fetchOne(), 0, 0, 0, 50));
  EXPECT(f.kernel.data()[49] == 0xaa && f.kernel.data()[50] == 0 && f.kernel.data()[99] == 0);
  EXPECT(f.kernel.data()[100] == 0xaa && f.kernel.data(1000)[0] == 0 && f.kernel.data(1099)[0] == 0);
  EXPECT(f.kernel.data(1100)[0] == 0xaa);
}

TEST(keepsABufferUntilItIsReleased) {
  Fixture f;
  f.kernel.command(5, {0}, {{0, 64}});
  const uint32_t slot = f.fetchOne();
  EXPECT(f.complete(slot, 0, Completion::kKeepBuffer));
  EXPECT(f.ring.moveTail());
  const auto answers = f.kernel.collect();
  EXPECT(answers.size() == 1 && answers[0].user_flags == layout::kUserKeepBuffer);
  EXPECT(f.ring.valid(slot) && f.revoked.empty() && f.ring.inFlight() == 0);
  EXPECT(!f.complete(slot));
  // The kernel may give the id to the next command as soon as it has freed it: before we hear.
  f.kernel.command(5, {0});
  const uint32_t next = f.fetchOne();
  EXPECT(next != slot && !f.ring.fault());
  EXPECT(f.ring.pin(slot));
  EXPECT(f.ring.releaseKept(slot) && f.ring.valid(slot));
  EXPECT(!f.ring.releaseKept(slot));
  EXPECT(f.ring.unpin(slot) && !f.ring.valid(slot) && f.revoked.size() == 1);
  EXPECT(!f.ring.releaseKept(next));
}

TEST(keepsNothingWhereTheKernelCannot) {
  Fixture f;
  Kernel kernel;
  kernel.mailbox().flags = layout::kCapOutOfOrder;
  Ring ring(kernel.memory(), [](void*, uint32_t) {}, nullptr);
  kernel.command(5, {0}, {{0, 64}});
  EXPECT(ring.fetch(f.tables(), 1) == 1);
  EXPECT(ring.complete({0, 0, Completion::kKeepBuffer | Completion::kReadLength, 5,
                        Completion::kNoZero, nullptr}));
  EXPECT(ring.moveTail());
  const auto answers = kernel.collect();
  EXPECT(answers.size() == 1 && answers[0].user_flags == 0 && answers[0].read_length == 0);
  EXPECT(!ring.valid(0));
}

TEST(reusesSlotsLastInFirstOut) {
  Fixture f;
  for (uint16_t id = 1; id <= 3; id++) f.kernel.command(id, {0});
  const auto slots = f.fetch();
  EXPECT((slots == std::vector<int32_t>{0, 1, 2}));
  EXPECT(f.complete(1));
  f.ring.moveTail();
  f.kernel.command(4, {0});
  EXPECT(f.fetchOne() == 1);
}

TEST(waitsForASlotWhenKeptBuffersTakeAll) {
  Fixture f(480);  // four commands
  EXPECT(f.ring.capacity() == 4);
  for (uint16_t id = 1; id <= 4; id++) {
    f.kernel.command(id, {0});
    EXPECT(f.complete(f.fetchOne(), 0, Completion::kKeepBuffer));
    EXPECT(f.ring.moveTail());
    f.kernel.collect();
  }
  f.kernel.command(5, {0});
  EXPECT(f.fetch().empty() && !f.ring.fault() && !f.ring.wantsFetch());
  EXPECT(f.ring.releaseKept(2));
  EXPECT(f.ring.wantsFetch());
  EXPECT(f.fetchOne() == 2);
  EXPECT(!f.ring.wantsFetch());
}

TEST(takesUpWhereAnotherProcessLeftOff) {
  Kernel kernel;
  kernel.command(1, {0});
  kernel.mailbox().tail = kernel.mailbox().head;
  kernel.command(2, {0x12});
  Fixture f;
  Ring ring(kernel.memory(), [](void*, uint32_t) {}, nullptr);
  EXPECT(ring.fetch(f.tables(), 8) == 1 && f.info[0] == 2 && f.cdbs[0] == 0x12);
}

TEST(noticesAResetWhenFetching) {
  Fixture f;
  f.kernel.command(1, {0}, {{0, 64}});
  f.kernel.command(2, {0});
  const auto old = f.fetch();
  EXPECT(f.complete(old[1]));
  f.ring.moveTail();
  f.kernel.reset();
  f.kernel.command(1, {0x99}, {{0, 64}});
  std::memset(f.kernel.data(), 0xaa, 64);
  const auto got = f.fetch();
  EXPECT(got.size() == 2 && got[0] == RingTables::kEventReset && got[1] != old[0]);
  // The old command is answered to nobody and touches nothing; the new one has the same id.
  EXPECT(f.complete(old[0], 0, 0, 0, 0));
  EXPECT(!f.ring.moveTail());
  EXPECT(f.kernel.data()[0] == 0xaa && f.revoked.back() == static_cast<uint32_t>(old[0]));
  f.kernel.taskManagement(1, {1});
  EXPECT(f.fetch().size() == 1);
  EXPECT(f.ring.takeTaskManagement().slots == std::vector<uint32_t>{static_cast<uint32_t>(got[1])});
  EXPECT(f.complete(got[1], 0, 0, 0, 0));
  EXPECT(f.ring.moveTail());
  const auto answers = f.kernel.collect();
  EXPECT(answers.size() == 1 && answers[0].id == 1);
  EXPECT(f.kernel.data()[0] == 0);
}

TEST(noticesAResetWhenCompleting) {
  Fixture f;
  f.kernel.command(1, {0});
  const auto first = f.fetchOne();
  EXPECT(f.complete(first));
  f.ring.moveTail();
  f.kernel.command(2, {0}, {{0, 64}});
  const auto old = f.fetchOne();
  f.kernel.reset();
  std::memset(f.kernel.data(), 0xaa, 64);
  EXPECT(f.complete(old, 0, 0, 0, 0));
  EXPECT(!f.ring.moveTail());
  EXPECT(f.kernel.mailbox().tail == 0 && f.kernel.data()[0] == 0xaa);
  EXPECT(f.ring.wantsFetch());
  EXPECT(f.fetch() == std::vector<int32_t>{RingTables::kEventReset});
  EXPECT(!f.ring.wantsFetch());
}

// Without a byte to zero nothing looks at the tail before the answers are written.
TEST(writesNoAnswerIntoARingThatWasReset) {
  Fixture f;
  f.kernel.command(1, {0});
  EXPECT(f.complete(f.fetchOne()));
  EXPECT(f.ring.moveTail());
  f.kernel.command(2, {0});
  const auto old = f.fetchOne();
  f.kernel.reset();
  EXPECT(f.complete(old));
  EXPECT(!f.ring.moveTail());
  EXPECT(f.kernel.mailbox().tail == 0);
  EXPECT(f.ring.wantsFetch() && f.ring.stats().completions == 1);
}

TEST(noticesAResetBeforeTheFirstCompletion) {
  Fixture f;
  f.kernel.command(1, {0});
  f.fetchOne();
  f.kernel.reset();
  EXPECT(f.fetch() == std::vector<int32_t>{RingTables::kEventReset});

  // With a new command already there.
  Fixture other;
  other.kernel.command(1, {0});
  other.kernel.command(2, {0});
  other.fetch();
  other.kernel.reset();
  other.kernel.command(3, {0x99});
  const auto got = other.fetch();
  EXPECT(got.size() == 2 && got[0] == RingTables::kEventReset && other.infoOf(got[1])[0] == 3);
}

// ---- what no kernel writes ----

TEST(refusesAMailboxOfAnotherVersion) {
  for (uint16_t version : {0, 1, 3, 0xffff}) {
    Kernel kernel;
    kernel.mailbox().version = version;
    const auto fault = openFault(kernel);
    EXPECT(fault && fault->kind == RingFault::Kind::Version);
  }
  Kernel in_order;
  in_order.mailbox().flags = 0;
  EXPECT(openFault(in_order)->kind == RingFault::Kind::Version);
}

TEST(refusesARingThatLeavesTheMapping) {
  struct Case {
    uint32_t offset, size;
  };
  for (const Case c : {Case{0, 4096}, {64, 4096}, {132, 4096}, {128, 0}, {128, 100}, {128, 4097},
                       {128, 0xfffffff8}, {0xfffffff8, 4096}, {0xfffffff8, 0xfffffff8},
                       {128 + 65536 + 8, 4096}}) {
    Kernel kernel;
    kernel.mailbox().ring_offset = c.offset;
    kernel.mailbox().ring_size = c.size;
    const auto fault = openFault(kernel);
    EXPECT(fault && fault->kind == RingFault::Kind::Corrupt);
  }
  Kernel kernel;
  EXPECT(openFault(kernel, 67)->kind == RingFault::Kind::Corrupt);
  EXPECT(openFault(kernel, 128 + 4095)->kind == RingFault::Kind::Corrupt);
  for (const uint32_t tail : {4096u, 4u, 0xfffffff8u}) {
    Kernel other;
    other.mailbox().tail = tail;
    EXPECT(openFault(other)->kind == RingFault::Kind::Corrupt);
  }
}

TEST(refusesAHeadOutsideTheRing) {
  for (const uint32_t head : {4096u, 4u, 0xffffffffu, 0x80000000u}) {
    Fixture f;
    f.kernel.command(1, {0});
    f.kernel.mailbox().head = head;
    EXPECT(f.corrupt());
  }
}

TEST(refusesAHeadThatMovesBack) {
  Fixture f;
  for (uint16_t id = 1; id <= 3; id++) f.kernel.command(id, {0});
  EXPECT(f.complete(f.fetchOne()));
  f.fetch();
  EXPECT(f.ring.moveTail());
  f.kernel.mailbox().head = 240;
  EXPECT(f.corrupt());
}

TEST(refusesATailThatSomebodyElseMoves) {
  Fixture f;
  f.kernel.command(1, {0});
  f.kernel.mailbox().tail = 64;
  EXPECT(f.corrupt());
}

TEST(refusesEntryLengthsThatCannotBe) {
  for (const uint32_t length_op :
       {1u, 0u, 8u | 1, 104u | 1, 128u | 1, 4096u | 1, 0xfffffff8u | 1, 0xfffffff8u, 128u | 2,
        24u | 2}) {
    Fixture f;
    const auto place = f.kernel.command(1, {0});  // 120 bytes
    f.kernel.at<uint32_t>(*place) = length_op;
    EXPECT(f.corrupt());
    EXPECT(f.ring.fault()->message.find("0x") != std::string::npos);
    EXPECT(!f.ring.moveTail());
  }
}

TEST(refusesACommandEntryThatAResponseOverflows) {
  Fixture f;
  const auto place = f.kernel.command(1, {0});
  f.kernel.at<uint32_t>(*place) = 104 | 1;
  f.kernel.at<layout::CommandRequest>(*place).cdb_offset = Kernel::kRingOffset + 48;
  EXPECT(f.corrupt());
}

TEST(refusesIovecsThatCannotBe) {
  struct Case {
    uint32_t count, bidi, dif;
  };
  for (const Case c : {Case{5, 0, 0}, {0, 5, 0}, {0xffffffff, 0, 0}, {0xffffffff, 1, 0},
                       {0x10000000, 0xf0000000, 0}, {1, 0, 1}}) {
    Fixture f;
    const auto place = f.kernel.command(1, {0});
    auto& request = f.kernel.at<layout::CommandRequest>(*place);
    request.iov_count = c.count;
    request.bidi_count = c.bidi;
    request.dif_count = c.dif;
    EXPECT(f.corrupt());
  }
  Fixture reference;
  const uint64_t data = reference.kernel.dataStart(), end = reference.kernel.memory().size();
  for (const layout::Iovec iov :
       {layout::Iovec{0, 1}, {data - 1, 2}, {data, 65537}, {end, 1}, {end + 1, 0}, {end - 8, 9},
        {UINT64_MAX, 1}, {UINT64_MAX, 0}, {data, UINT64_MAX}, {data + 16, UINT64_MAX - data},
        {0x8000000000000000, 0x8000000000000000}}) {
    Fixture f;
    const auto place = f.kernel.command(1, {0}, {{0, 16}, {16, 16}});
    f.kernel.at<layout::Iovec>(*place + 48 + 16) = iov;
    EXPECT(f.corrupt());
    EXPECT(f.ring.inFlight() == 0);
  }
  // The last byte of the data area, and nothing at its very end, are fine.
  Fixture f;
  f.kernel.command(1, {0}, {{65535, 1}, {65536, 0}});
  EXPECT(f.fetch().size() == 1);
}

TEST(refusesACdbOutsideItsEntry) {
  for (const int64_t shift : {-1000, -72, 8, 1000}) {
    Fixture f;
    const auto place = f.kernel.command(1, {0});
    f.kernel.at<layout::CommandRequest>(*place).cdb_offset += static_cast<uint64_t>(shift);
    EXPECT(f.corrupt());
  }
  Fixture f;
  const auto place = f.kernel.command(1, {0});
  f.kernel.at<layout::CommandRequest>(*place).cdb_offset = UINT64_MAX;
  EXPECT(f.corrupt());
}

TEST(refusesIdsThatCannotBe) {
  Fixture zero;
  zero.kernel.command(0, {0});
  EXPECT(zero.corrupt());
  Fixture twice;
  twice.kernel.command(9, {0});
  twice.kernel.command(9, {0});
  EXPECT(twice.fetch().size() == 1);
  EXPECT(twice.corrupt());
}

TEST(refusesMoreIdsThanATaskManagementEntryHolds) {
  for (const uint32_t count : {5u, 0x80000000u, 0xffffffffu}) {
    Fixture f;
    const auto place = f.kernel.taskManagement(1, {1, 2, 3, 4});
    f.kernel.at<layout::TaskManagementEntry>(*place).count = count;
    EXPECT(f.corrupt());
  }
}

TEST(completesWhatWasFetchedBeforeTheCorruption) {
  Fixture f;
  f.kernel.command(1, {0});
  const auto bad = f.kernel.command(2, {0});
  f.kernel.at<uint32_t>(*bad) = 9;
  const auto slots = f.fetch();
  EXPECT(slots.size() == 1 && f.ring.fault());
  EXPECT(f.complete(slots[0]));
  EXPECT(f.ring.moveTail());
  EXPECT(f.kernel.collect().size() == 1);
  f.kernel.at<uint32_t>(*bad) = 120 | 1;
  EXPECT(f.fetch().empty());
}

TEST(sumsOver32BitsAreRefused) {
  // Five pieces of 1 GiB in a data area of that size; reserved, never touched.
  const size_t data = size_t{1} << 30;
  Fixture f;
  std::vector<Kernel::Piece> pieces(4, {0, data});
  Kernel kernel(4096, static_cast<uint32_t>(data));
  Ring ring(kernel.memory(), [](void*, uint32_t) {}, nullptr);
  kernel.command(1, {0}, pieces);
  EXPECT(ring.fetch(f.tables(), 1) == 0 && ring.fault()->kind == RingFault::Kind::Corrupt);
}

int main() { return check::runAll(); }

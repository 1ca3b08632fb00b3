// SPDX-License-Identifier: Apache-2.0
// The state machine alone: no threads, a clock of our own.
#include "../kernel.h"

#include <numeric>
#include <type_traits>

#include "check.h"
#include "handler.h"

using namespace tcmu::sim;
using namespace std::chrono_literals;

namespace {

// A kernel, a handler on the same memory, and what the initiator got.
struct Bench : Initiator {
  explicit Bench(Geometry g = {.ringBytes = 64 << 10, .dataBytes = 1 << 20})
      : kernel(g), handler(kernel.memory().at(0)) {}

  void finished(const Completion&) override {}
  void batchEnd() override {}

  void submit(uint64_t tag, std::vector<uint8_t> cdb, std::span<const uint8_t> out = {},
              std::span<uint8_t> in = {}, bool bidi = false) {
    kernel.submit({tag, this, cdb, out, in, bidi}, now);
  }
  void read(uint64_t tag, std::span<uint8_t> in) { submit(tag, {0x28}, {}, in); }
  void write(uint64_t tag, std::span<const uint8_t> out) { submit(tag, {0x2a}, out); }
  template <class T>
  void set(T Attributes::*attribute, std::type_identity_t<T> value) {
    Attributes changed = kernel.attributes();
    changed.*attribute = value;
    CHECK(kernel.setAttributes(changed));
  }
  void doorbell() { kernel.doorbell(now); }

  // What finished since the last call.
  std::vector<Completion> take() {
    std::vector<std::pair<Initiator*, Completion>> list;
    kernel.takeFinished(list);
    std::vector<Completion> result;
    for (auto& [initiator, completion] : list) result.push_back(completion);
    return result;
  }

  TimePoint now{1h};
  Kernel kernel;
  TestHandler handler;
};

std::vector<uint8_t> pattern(size_t bytes, uint8_t first = 1) {
  std::vector<uint8_t> data(bytes);
  for (size_t i = 0; i < bytes; i++) data[i] = static_cast<uint8_t>(first + i * 7 + i / 251);
  return data;
}

bool hasSense(const Completion& c, uint8_t key, uint8_t asc) {
  return c.status == 2 && c.hasSense && c.sense[2] == key && c.sense[12] == asc && c.sense[13] == 0;
}

TEST(mailboxIsWhatTheKernelWrites) {
  Kernel kernel({});
  const SharedMemory& m = kernel.memory();
  CHECK_EQ(m.get<uint16_t>(0), 2);
  CHECK_EQ(m.get<uint16_t>(2), 15);
  CHECK_EQ(m.get<uint32_t>(4), 128);
  CHECK_EQ(m.get<uint32_t>(8), (8u << 20) - 128);
  CHECK_EQ(m.size(), (8u << 20) + (1u << 30));
  CHECK_EQ(m.present(), 8u << 20);
}

TEST(entryOfACommandWithoutData) {
  Bench b;
  b.submit(1, {0x00, 1, 2, 3, 4, 5, 6, 7});
  const auto e = b.handler.fetch();
  CHECK(e.has_value());
  CHECK_EQ(e->op, entry::kCommand);
  CHECK_EQ(e->length, 112 + 8);
  CHECK_EQ(e->id, 1);
  CHECK_EQ(e->iovs.size(), 0u);
  CHECK_EQ(e->cdbOffset, 128 + 112);
  const uint8_t expected[16] = {0, 1, 2, 3, 4, 5};
  CHECK(std::memcmp(e->cdb, expected, 8) == 0);  // cut to what group 0 says
  CHECK(b.kernel.takeEvent());
  CHECK(!b.kernel.takeEvent());
}

TEST(cdbLengthsFollowTheGroup) {
  const struct {
    uint8_t opcode;
    uint32_t bytes;
  } cases[] = {{0x12, 8},  {0x28, 16}, {0x5a, 16}, {0x60, 16},
               {0x88, 16}, {0xa8, 16}, {0xc0, 16}, {0xe0, 16}};
  for (const auto& c : cases) {
    Bench b;
    b.submit(1, {c.opcode});
    CHECK_EQ(b.handler.fetch()->length, 112 + c.bytes);
  }
  Bench b;
  std::vector<uint8_t> variable(32, 0x11);
  variable[0] = 0x7f;
  variable[7] = 24;
  b.submit(1, variable);
  CHECK_EQ(b.handler.fetch()->length, 112 + 32);
  variable[7] = 253;  // longer than any CDB may be
  b.submit(2, variable);
  const auto done = b.take();
  CHECK(done.size() == 1 && hasSense(done[0], 5, 0x24));
}

TEST(iovecsMergeNeighbours) {
  Bench b;
  std::vector<uint8_t> in(3 * 4096 + 100);
  b.read(1, in);
  auto e = *b.handler.fetch();
  CHECK_EQ(e.iovs.size(), 1u);
  CHECK_EQ(e.iovs[0].offset, 64 << 10);
  CHECK_EQ(e.iovs[0].length, in.size());

  std::vector<uint8_t> small(1), two(2 * 4096 + 1);
  b.read(2, small);  // block 4
  b.read(3, small);  // block 5
  const auto second = *b.handler.fetch();
  b.handler.fetch();
  b.handler.complete(second.id);  // frees block 4, in the first one's slot
  b.doorbell();
  b.read(4, two);  // blocks 4, 6, 7
  e = *b.handler.fetch();
  CHECK_EQ(e.iovs.size(), 2u);
  CHECK_EQ(e.iovs[0].offset, (64 << 10) + 4 * 4096);
  CHECK_EQ(e.iovs[0].length, 4096);
  CHECK_EQ(e.iovs[1].offset, (64 << 10) + 6 * 4096);
  CHECK_EQ(e.iovs[1].length, 4097);
  CHECK_EQ(e.id, 2);  // the lowest free one
}

TEST(manyIovecsMakeALongEntry) {
  Bench b;
  std::vector<uint8_t> block(4096);
  for (uint64_t i = 0; i < 20; i++) b.read(i, block);
  std::vector<uint16_t> ids;
  for (uint64_t i = 0; i < 20; i++) ids.push_back(b.handler.fetch()->id);
  for (size_t i = 0; i < 20; i += 2) b.handler.complete(ids[i]);
  b.doorbell();
  std::vector<uint8_t> in(10 * 4096);
  b.read(99, in);
  const auto e = *b.handler.fetch();
  CHECK_EQ(e.iovs.size(), 10u);
  CHECK_EQ(e.length, 48 + 160 + 16);
  CHECK_EQ(e.cdbOffset, 128 + e.at + 48 + 160);
}

TEST(dataGoesOutAndComesBack) {
  for (const uint32_t pages : {1u, 3u}) {
    Bench b({.ringBytes = 64 << 10, .dataBytes = 768 << 10, .pagesPerBlock = pages});
    const auto out = pattern(50'001);
    b.write(1, out);
    auto e = *b.handler.fetch();
    std::vector<uint8_t> seen;
    for (const auto& iov : e.iovs) {
      const auto part = b.handler.data(iov);
      seen.insert(seen.end(), part.begin(), part.end());
    }
    CHECK(seen == out);
    b.handler.complete(e.id);

    std::vector<uint8_t> in(50'001);
    b.read(2, in);
    e = *b.handler.fetch();
    size_t at = 0;
    for (const auto& iov : e.iovs) {
      std::memcpy(b.handler.data(iov).data(), out.data() + at, iov.length);
      at += iov.length;
    }
    b.handler.complete(e.id);
    b.doorbell();
    const auto done = b.take();
    CHECK_EQ(done.size(), 2u);
    CHECK_EQ(done[0].dataBytes, 0);
    CHECK_EQ(done[1].dataBytes, in.size());
    CHECK(in == out);
    CHECK_EQ(b.kernel.blocksInUse(), 0u);
    CHECK_EQ(b.kernel.idsInUse(), 0u);
  }
}

TEST(bidirectionalPutsDataOutFirst) {
  Bench b;
  const auto out = pattern(5000);
  std::vector<uint8_t> in(3000);
  b.submit(1, {0x53}, out, in, true);
  const auto e = *b.handler.fetch();
  CHECK_EQ(e.iovs.size(), 1u);
  CHECK_EQ(e.bidi.size(), 1u);  // never merged with Data-Out, though it follows
  CHECK_EQ(e.bidi[0].offset, e.iovs[0].offset + 8192);
  CHECK_EQ(e.bidi[0].length, 3000);
  const auto answer = pattern(3000, 9);
  std::memcpy(b.handler.data(e.bidi[0]).data(), answer.data(), 3000);
  b.handler.complete(e.id, {.flags = entry::kReadLengthValid, .readLength = 5});  // not for bidi
  b.doorbell();
  const auto done = b.take();
  CHECK_EQ(done[0].residual, 0);
  CHECK(in == answer);
}

TEST(readLengthCutsAndReportsTheResidual) {
  Bench b;
  std::vector<uint8_t> in(8192, 0xee);
  b.read(1, in);
  auto e = *b.handler.fetch();
  std::memset(b.handler.data(e.iovs[0]).data(), 0x55, 8192);
  b.handler.complete(e.id, {.flags = entry::kReadLengthValid, .readLength = 5000});
  b.doorbell();
  auto done = b.take();
  CHECK_EQ(done[0].dataBytes, 5000);
  CHECK_EQ(done[0].residual, 3192);
  CHECK_EQ(in[4999], 0x55);
  CHECK_EQ(in[5000], 0xee);

  for (const uint32_t length : {0u, 9000u}) {  // zero is no READ_LEN; more than asked is all
    b.read(2, in);
    e = *b.handler.fetch();
    b.handler.complete(e.id, {.flags = entry::kReadLengthValid, .readLength = length});
    b.doorbell();
    done = b.take();
    CHECK_EQ(done[0].dataBytes, 8192);
    CHECK_EQ(done[0].residual, 0);
  }
}

TEST(senseIsDeliveredAndWithReadLengthTheDataToo) {
  Bench b;
  char sense[96] = {0x70, 0, 3, 0, 0, 0, 0, 10, 0, 0, 0, 0, 0x11};
  std::vector<uint8_t> in(4096, 0xee);
  b.read(1, in);
  auto e = *b.handler.fetch();
  std::memset(b.handler.data(e.iovs[0]).data(), 0x55, 4096);
  b.handler.complete(e.id, {.status = 2, .sense = sense});
  b.doorbell();
  auto done = b.take();
  CHECK(hasSense(done[0], 3, 0x11));
  CHECK_EQ(done[0].dataBytes, 0);
  CHECK_EQ(in[0], 0xee);

  b.read(2, in);
  e = *b.handler.fetch();
  b.handler.complete(
      e.id, {.status = 2, .flags = entry::kReadLengthValid, .readLength = 512, .sense = sense});
  b.doorbell();
  done = b.take();
  CHECK(hasSense(done[0], 3, 0x11));
  CHECK_EQ(done[0].dataBytes, 512);
  CHECK_EQ(in[511], 0x55);  // the page's old bytes: nobody wrote it this time
  CHECK_EQ(in[512], 0xee);
}

TEST(otherStatusesCarryNoValidData) {
  Bench b;
  std::vector<uint8_t> in(512, 0xee);
  b.read(1, in);
  b.handler.complete(b.handler.fetch()->id, {.status = 0x28});
  b.doorbell();
  const auto done = b.take();
  CHECK_EQ(done[0].status, 0x28);
  CHECK(!done[0].hasSense);
  CHECK_EQ(done[0].dataBytes, 0);
}

TEST(unknownOpIsACommunicationFailure) {
  Bench b;
  b.submit(1, {0});
  b.handler.complete(b.handler.fetch()->id, {.flags = entry::kUnknownOp});
  b.doorbell();
  CHECK(hasSense(b.take()[0], 2, 0x08));
  CHECK_EQ(b.kernel.stats().unknownOps, 1);
}

TEST(freedPagesKeepTheirBytes) {
  Bench b;
  const auto secret = pattern(4096);
  b.write(1, secret);
  b.handler.complete(b.handler.fetch()->id);
  b.doorbell();
  std::vector<uint8_t> in(4096);
  b.read(2, in);
  b.handler.complete(b.handler.fetch()->id);  // writes nothing
  b.doorbell();
  CHECK(in == secret);
}

TEST(poisonReplacesThem) {
  Bench b({.ringBytes = 64 << 10, .dataBytes = 1 << 20, .poison = 0xdb});
  const auto secret = pattern(4096);
  b.write(1, secret);
  b.handler.complete(b.handler.fetch()->id);
  b.doorbell();
  std::vector<uint8_t> in(4096);
  b.read(2, in);
  b.handler.complete(b.handler.fetch()->id);
  b.doorbell();
  CHECK(in == std::vector<uint8_t>(4096, 0xdb));
}

TEST(padsFillTheEndOfTheRing) {
  Bench b({.ringBytes = 4096, .dataBytes = 1 << 20});  // 3968 bytes of ring
  uint32_t pads = 0;
  for (uint64_t i = 0; i < 400; i++) {
    b.submit(i, {i % 3 ? uint8_t{0x88} : uint8_t{0x00}});  // 128 bytes, or 120
    auto e = *b.handler.fetch();
    if (e.op == entry::kPad) {
      pads++;
      CHECK_EQ(e.at + e.length, 3968);
      e = *b.handler.fetch();
      CHECK_EQ(e.at, 0);
    }
    b.handler.complete(e.id);
    b.doorbell();
  }
  CHECK_EQ(b.take().size(), 400u);
  CHECK(pads >= 10);
  CHECK_EQ(b.kernel.stats().pads, pads);
  CHECK(b.kernel.broken() == nullptr);
}

TEST(aFullRingMakesCommandsWaitInOrder) {
  Bench b({.ringBytes = 4096, .dataBytes = 1 << 20});
  for (uint64_t i = 0; i < 50; i++) b.submit(i, {0x88});
  CHECK_EQ(b.kernel.inFlight(), 30u);  // one byte stays unused
  CHECK_EQ(b.kernel.waiting(), 20u);
  std::vector<uint64_t> order;
  for (uint64_t i = 0; i < 50; i++) {
    b.handler.complete(b.handler.command()->id);
    b.doorbell();
    for (const auto& c : b.take()) order.push_back(c.tag);
  }
  std::vector<uint64_t> expected(50);
  std::iota(expected.begin(), expected.end(), 0);
  CHECK(order == expected);
  CHECK_EQ(b.kernel.waiting(), 0u);
}

TEST(aFullDataAreaMakesCommandsWait) {
  Bench b({.ringBytes = 64 << 10, .dataBytes = 16 << 10});
  const auto first = pattern(12 << 10), second = pattern(8 << 10, 77);
  b.write(1, first);
  b.write(2, second);
  CHECK_EQ(b.kernel.waiting(), 1u);
  b.submit(3, {0});  // needs no data, still waits behind the other
  CHECK_EQ(b.kernel.waiting(), 2u);
  b.handler.complete(b.handler.fetch()->id);
  b.doorbell();
  const auto e = *b.handler.fetch();
  CHECK(std::memcmp(b.handler.data(e.iovs[0]).data(), second.data(), second.size()) == 0);
  CHECK_EQ(b.kernel.inFlight(), 2u);
}

TEST(whatCanNeverFitIsRefused) {
  Bench b({.ringBytes = 4096, .dataBytes = 512 << 10});
  std::vector<uint8_t> in((512 << 10) + 1);
  b.read(1, in);
  auto done = b.take();
  CHECK(done.size() == 1 && hasSense(done[0], 5, 0x24));

  // A data area so scattered that the iovecs alone take more than half the ring.
  Bench scattered({.ringBytes = 4096, .dataBytes = 1 << 20});
  std::vector<uint8_t> block(4096), many(125 * 4096);
  for (uint64_t i = 0; i < 256; i++) {
    scattered.read(i, block);
    scattered.handler.complete(scattered.handler.command()->id, {.flags = entry::kKeepBuffer});
    scattered.doorbell();
  }
  scattered.take();
  for (uint16_t id = 1; id < 256; id += 2) scattered.kernel.freeKeptBuffer(id, scattered.now);
  CHECK_EQ(scattered.kernel.blocksInUse(), 128);
  scattered.read(999, many);
  done = scattered.take();
  CHECK(done.size() == 1 && hasSense(done[0], 5, 0x24));
  CHECK_EQ(scattered.kernel.blocksInUse(), 128);
}

TEST(queueFullTimeouts) {
  Bench b({.ringBytes = 64 << 10, .dataBytes = 4096});
  std::vector<uint8_t> in(4096);
  b.set(&Attributes::queueFullTimeout, 0ms);
  b.read(1, in);
  b.read(2, in);
  auto done = b.take();
  CHECK(done.size() == 1 && done[0].tag == 2 && done[0].status == 0x28);

  b.set(&Attributes::queueFullTimeout, 500ms);
  b.read(3, in);
  b.now += 499ms;
  b.kernel.tick(b.now);
  CHECK(b.take().empty());
  CHECK(b.kernel.nextDeadline() == b.now + 1ms);
  b.now += 1ms;
  b.kernel.tick(b.now);
  done = b.take();
  CHECK(done.size() == 1 && done[0].tag == 3 && done[0].status == 0x28);

  b.set(&Attributes::queueFullTimeout, -1ms);  // the command time-out then
  b.set(&Attributes::commandTimeout, 2s);
  b.read(4, in);
  b.now += 2s;
  b.kernel.tick(b.now);
  done = b.take();
  CHECK(done.size() == 1 && done[0].tag == 4 && done[0].status == 0x28);
}

TEST(anExpiredCommandKeepsSlotAndPages) {
  Bench b;
  b.set(&Attributes::commandTimeout, 1s);
  std::vector<uint8_t> in(4096, 0xee);
  b.read(1, in);
  const auto e = *b.handler.fetch();
  b.now += 1s;
  b.kernel.tick(b.now);
  const auto done = b.take();
  CHECK(done.size() == 1 && hasSense(done[0], 2, 0x08));
  CHECK_EQ(b.kernel.blocksInUse(), 1u);
  CHECK_EQ(b.kernel.idsInUse(), 1u);
  b.read(2, in);
  CHECK_EQ(b.handler.fetch()->id, 2);
  std::memset(b.handler.data(e.iovs[0]).data(), 0x55, 4096);
  b.handler.complete(e.id);
  b.doorbell();
  CHECK(b.take().empty());  // answered once already
  CHECK_EQ(in[0], 0xee);
  CHECK_EQ(b.kernel.blocksInUse(), 1u);
  CHECK_EQ(b.kernel.idsInUse(), 1u);
}

TEST(completionOutOfOrderUsesTheOldestSlot) {
  Bench b;
  std::vector<uint8_t> one(512), two(512), three(512);
  b.read(1, one);
  b.read(2, two);
  b.read(3, three);
  const uint16_t ids[3] = {b.handler.fetch()->id, b.handler.fetch()->id, b.handler.fetch()->id};
  for (const int i : {2, 0, 1}) b.handler.complete(ids[i]);
  b.doorbell();
  const auto done = b.take();
  CHECK(done[0].tag == 3 && done[1].tag == 1 && done[2].tag == 2);
}

TEST(anUnknownIdBreaksTheDevice) {
  Bench b;
  std::vector<uint8_t> in(512);
  b.read(1, in);
  const auto e = *b.handler.fetch();
  b.handler.complete(77);
  b.doorbell();
  CHECK(b.kernel.broken() != nullptr);
  b.read(2, in);
  auto done = b.take();
  CHECK(done.size() == 1 && done[0].tag == 2 && hasSense(done[0], 2, 0x08));

  b.kernel.resetRing(1, b.now);
  done = b.take();
  CHECK(done.size() == 1 && done[0].tag == 1 && done[0].status == 8);
  CHECK(b.kernel.broken() == nullptr);
  CHECK_EQ(b.kernel.blocksInUse(), 0u);
  CHECK_EQ(b.handler.word(mailbox::kTail), 0);
  b.read(3, in);
  CHECK_EQ(b.handler.word(mailbox::kHead), 128);
  b.kernel.resetRing(2, b.now);
  done = b.take();
  CHECK(done.size() == 1 && done[0].tag == 3 && hasSense(done[0], 2, 0x08));
  static_cast<void>(e);
}

TEST(keptBuffers) {
  Bench b;
  std::vector<uint8_t> in(4096);
  b.read(1, in);
  const auto e = *b.handler.fetch();
  CHECK(!b.kernel.freeKeptBuffer(e.id, b.now));  // still in flight
  b.handler.complete(e.id, {.flags = entry::kKeepBuffer});
  b.doorbell();
  CHECK_EQ(b.take().size(), 1u);
  CHECK_EQ(b.kernel.blocksInUse(), 1u);
  CHECK(b.kernel.freeKeptBuffer(e.id, b.now));
  CHECK(!b.kernel.freeKeptBuffer(e.id, b.now));
  CHECK(!b.kernel.freeKeptBuffer(60000, b.now));
  CHECK_EQ(b.kernel.blocksInUse(), 0u);

  b.read(2, in);
  b.handler.complete(b.handler.fetch()->id, {.flags = entry::kKeepBuffer});
  b.doorbell();
  b.kernel.released(b.now);
  CHECK_EQ(b.kernel.blocksInUse(), 0u);

  b.read(3, in);
  b.handler.complete(b.handler.fetch()->id, {.flags = entry::kKeepBuffer});
  b.read(4, in);
  b.handler.fetch();
  b.handler.complete(1);  // the kept one a second time
  b.doorbell();
  CHECK(b.kernel.broken() != nullptr);
}

TEST(aKeptBufferReleasedLetsWaitingCommandsIn) {
  Bench b({.ringBytes = 64 << 10, .dataBytes = 4096});
  std::vector<uint8_t> in(4096);
  b.read(1, in);
  b.handler.complete(b.handler.fetch()->id, {.flags = entry::kKeepBuffer});
  b.doorbell();
  b.read(2, in);
  CHECK_EQ(b.kernel.waiting(), 1u);
  b.kernel.takeEvent();
  CHECK(b.kernel.freeKeptBuffer(1, b.now));
  CHECK_EQ(b.kernel.inFlight(), 1u);
  CHECK(b.kernel.takeEvent());
}

TEST(blockedMeansBusy) {
  Bench b({.ringBytes = 64 << 10, .dataBytes = 4096});
  std::vector<uint8_t> in(4096);
  b.read(1, in);
  b.read(2, in);
  b.read(3, in);
  b.handler.complete(b.handler.fetch()->id);
  b.kernel.block(b.now);  // takes what is completed, without a doorbell
  auto done = b.take();
  CHECK_EQ(done.size(), 3u);
  CHECK(done[0].tag == 1 && done[0].status == 0);
  CHECK(done[1].tag == 2 && done[1].status == 8);
  CHECK(done[2].tag == 3 && done[2].status == 8);
  b.read(4, in);
  CHECK_EQ(b.take()[0].status, 8);
  b.kernel.unblock();
  b.read(5, in);
  CHECK_EQ(b.kernel.inFlight(), 1u);
}

TEST(taskManagement) {
  Bench b({.ringBytes = 4096, .dataBytes = 1 << 20});
  b.set(&Attributes::tmrNotification, true);
  for (uint64_t i = 0; i < 30; i++) b.submit(i, {0x88});
  for (uint64_t i = 30; i < 33; i++) b.submit(i, {0x00});  // one of them fills the ring
  CHECK_EQ(b.kernel.waiting(), 2u);
  const auto all = [](const Command&) { return true; };
  CHECK_EQ(b.kernel.taskManagement(Tmr::lunReset, all), 33u);
  auto done = b.take();  // those that waited are aborted at once
  CHECK(done.size() == 2 && done[0].status == 0x40 && done[0].tag == 31);
  CHECK_EQ(b.kernel.stats().tmrs, 0);  // no room for the entry yet

  for (int i = 0; i < 2; i++) b.handler.complete(b.handler.fetch()->id);
  b.doorbell();
  done = b.take();
  CHECK(done.size() == 2 && done[0].status == 0x40);
  CHECK_EQ(b.kernel.stats().tmrs, 1);
  for (int i = 0; i < 29; i++) b.handler.complete(b.handler.fetch()->id);
  auto tmr = *b.handler.fetch();
  if (tmr.op == entry::kPad) tmr = *b.handler.fetch();
  CHECK_EQ(tmr.op, entry::kTaskManagement);
  CHECK_EQ(tmr.tmrType, 5);
  CHECK_EQ(tmr.tmrIds.size(), 31u);
  CHECK_EQ(tmr.length, 32 + 64);
  b.handler.passOver();
  b.doorbell();
  CHECK_EQ(b.take().size(), 29u);
  CHECK(b.kernel.broken() == nullptr);
  CHECK_EQ(b.kernel.cleaned(), b.kernel.head());

  b.set(&Attributes::tmrNotification, false);
  CHECK_EQ(b.kernel.taskManagement(Tmr::lunReset, all), 0u);
  CHECK(!b.handler.fetch());
}

TEST(abortOfOneCommand) {
  Bench b;
  b.set(&Attributes::tmrNotification, true);
  std::vector<uint8_t> in(512, 0xee);
  b.read(1, in);
  b.read(2, in);
  const uint16_t first = b.handler.fetch()->id;
  const uint16_t second = b.handler.fetch()->id;
  CHECK_EQ(b.kernel.taskManagement(Tmr::abortTask, [](const Command& c) { return c.tag == 2; }),
           1u);
  CHECK(b.take().empty());
  const auto tmr = *b.handler.fetch();
  CHECK(tmr.tmrType == 1 && tmr.tmrIds == std::vector<uint16_t>{second});
  b.handler.complete(first);
  b.handler.complete(second);
  b.handler.passOver();
  b.doorbell();
  const auto done = b.take();
  CHECK(done[0].status == 0 && done[1].status == 0x40 && done[1].dataBytes == 0);
}

TEST(holdAndExpireOnDemand) {
  Bench b;
  const std::vector<uint8_t> cdb{0};
  b.kernel.submit({1, &b, cdb, {}, {}}, b.now, b.now + 5ms);
  b.kernel.submit({2, &b, cdb, {}, {}}, b.now, b.now + 2ms);
  CHECK(!b.handler.fetch());
  CHECK(b.kernel.nextDeadline() == b.now + 2ms);
  b.now += 5ms;
  b.kernel.tick(b.now);
  CHECK_EQ(b.kernel.inFlight(), 2u);
  CHECK(b.kernel.expireNow(&b, 1));
  CHECK(!b.kernel.expireNow(&b, 1));
  auto done = b.take();
  CHECK(done.size() == 1 && done[0].tag == 1);
  b.handler.complete(b.handler.fetch()->id);  // 2 went first
  b.doorbell();
  done = b.take();
  CHECK(done.size() == 1 && done[0].tag == 2);
}

TEST(corruptRingsBreakTheDeviceAndNothingElse) {
  const std::vector<uint8_t> cdb{0};
  const auto corrupt = [&](auto damage) {
    Bench b;
    for (uint64_t i = 0; i < 3; i++) b.submit(i, {0});
    damage(b.handler);
    b.doorbell();
    CHECK(b.kernel.broken() != nullptr);
    b.kernel.resetRing(2, b.now);
    CHECK_EQ(b.take().size(), 3u);
    CHECK_EQ(b.kernel.idsInUse(), 0u);
  };
  corrupt([](TestHandler& h) { h.store<uint32_t>(mailbox::kTail, 0xffffffff); });
  corrupt([](TestHandler& h) { h.store<uint32_t>(mailbox::kTail, 12); });
  corrupt([](TestHandler& h) {
    h.store<uint32_t>(mailbox::kBytes, 0);  // a PAD of no length
    h.store<uint32_t>(mailbox::kTail, 120);
  });
  corrupt([](TestHandler& h) {
    h.store<uint32_t>(mailbox::kBytes, 0x7ffffff8);
    h.store<uint32_t>(mailbox::kTail, 120);
  });
  corrupt([](TestHandler& h) {
    h.store<uint32_t>(mailbox::kBytes, 16 | entry::kCommand);
    h.store<uint32_t>(mailbox::kTail, 120);
  });
  corrupt([](TestHandler& h) { h.store<uint32_t>(mailbox::kTail, 60000); });  // beyond the head
}

TEST(damageToTheHeadIsOverwritten) {
  Bench b;
  b.submit(1, {0});
  b.handler.store<uint32_t>(mailbox::kHead, 0xdeadbeef);
  b.submit(2, {0});
  CHECK_EQ(b.handler.word(mailbox::kHead), 240);
}

TEST(idsRunOutBeforeTheRingDoes) {
  Bench b({.ringBytes = 16 << 20, .dataBytes = 1 << 20});
  const std::vector<uint8_t> cdb{0};
  for (uint64_t i = 0; i < 65536; i++) b.kernel.submit({i, &b, cdb, {}, {}}, b.now);
  CHECK_EQ(b.kernel.inFlight(), 65535u);
  const auto done = b.take();
  CHECK(done.size() == 1 && done[0].status == 0x28 && done[0].tag == 65535);
  b.kernel.failAll();
  CHECK_EQ(b.take().size(), 65535u);
}

TEST(idleDataPagesCanBeTakenAway) {
  Bench b;
  std::vector<uint8_t> in(64 << 10), small(512);
  b.read(1, in);
  b.read(2, small);
  const uint16_t first = b.handler.fetch()->id;
  const uint16_t second = b.handler.fetch()->id;
  CHECK_EQ(b.kernel.reclaim(b.now), 0u);  // the highest block is in use
  b.handler.complete(second);
  b.handler.complete(first);
  CHECK_EQ(b.kernel.reclaim(b.now), 17u * 4096);  // takes the completions first
  CHECK_EQ(b.kernel.memory().present(), b.kernel.dataOffset());
  b.read(3, small);
  const auto e = *b.handler.fetch();
  CHECK_EQ(b.handler.data(e.iovs[0])[0], 0);
}

TEST(refusedAfterRemoval) {
  Bench b;
  b.kernel.refuseAll();
  b.submit(1, {0});
  CHECK(hasSense(b.take()[0], 5, 0x25));
}

TEST(badGeometryIsRefused) {
  for (const Geometry& g :
       {Geometry{.ringBytes = 4000}, Geometry{.ringBytes = 0}, Geometry{.dataBytes = 100},
        Geometry{.dataBytes = 4096, .pagesPerBlock = 2}, Geometry{.pagesPerBlock = 0}}) {
    bool refused = false;
    try {
      Kernel kernel(g);
    } catch (const std::invalid_argument&) {
      refused = true;
    }
    CHECK(refused);
  }
}

}  // namespace

int main() { return check::run(); }

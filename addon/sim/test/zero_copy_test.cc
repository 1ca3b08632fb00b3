// SPDX-License-Identifier: Apache-2.0
// Zero copy: initiators' pages in the handler's mapping for the time of a command.
#include <fcntl.h>
#include <sys/wait.h>

#include <csetjmp>
#include <csignal>

#include "../kernel.h"
#include "check.h"
#include "handler.h"

using namespace tcmu::sim;
using namespace std::chrono_literals;

namespace {

thread_local sigjmp_buf jump;
void onBusError(int) { siglongjmp(jump, 1); }

template <class F>
bool raisesBusError(F touch) {
  if (sigsetjmp(jump, 1)) return true;
  touch();
  return false;
}

// A kernel with zero copy and a handler that has the memory mapped apart from it.
struct Bench : Initiator {
  explicit Bench(size_t windowBytes = 64 << 10)
      : kernel({.ringBytes = 64 << 10,
                .dataBytes = 1 << 20,
                .zeroCopy = true,
                .windowBytes = windowBytes}) {
    map();
  }
  ~Bench() { unmap(); }

  void map() {
    const SharedMemory& memory = kernel.memory();
    base = static_cast<uint8_t*>(
        mmap(nullptr, memory.size(), PROT_READ | PROT_WRITE, MAP_SHARED, memory.fd(), 0));
    tcmu::MappingWatch::announce(memory.fd(), base, memory.size());
    handler = std::make_unique<TestHandler>(base);
  }
  void unmap() {
    if (!base) return;
    tcmu::MappingWatch::withdraw(base);
    munmap(base, kernel.memory().size());
    base = nullptr;
  }

  void finished(const Completion&) override {}
  void batchEnd() override {}
  std::span<uint8_t> buffer(size_t bytes, int fill = 0xee) {
    const auto range = kernel.pool()->allocate(bytes);
    std::memset(range.data(), fill, bytes);
    return range;
  }
  void read(uint64_t tag, std::span<uint8_t> in) {
    static constexpr uint8_t cdb[10] = {0x28};
    kernel.submit({tag, this, cdb, {}, in}, now);
  }
  void write(uint64_t tag, std::span<const uint8_t> out) {
    static constexpr uint8_t cdb[10] = {0x2a};
    kernel.submit({tag, this, cdb, out, {}}, now);
  }
  uint8_t kernelFlags(const TestHandler::Entry& e) {
    return handler->load<uint8_t>(mailbox::kBytes + e.at + entry::kKernelFlags);
  }
  std::vector<Completion> complete(const TestHandler::Entry& e,
                                   TestHandler::Response response = {}) {
    handler->complete(e.id, response);
    kernel.doorbell(now);
    return take();
  }
  std::vector<Completion> take() {
    std::vector<std::pair<Initiator*, Completion>> list;
    kernel.takeFinished(list);
    std::vector<Completion> result;
    for (auto& [initiator, completion] : list) result.push_back(completion);
    return result;
  }
  size_t window() const { return (64 << 10) + (1 << 20); }

  TimePoint now{1h};
  Kernel kernel;
  uint8_t* base = nullptr;
  std::unique_ptr<TestHandler> handler;
};

TEST(theMailboxSaysSo) {
  Bench b;
  CHECK_EQ(b.kernel.memory().get<uint16_t>(2), 1 | 2 | 4 | 16 | 32);
  CHECK_EQ(b.kernel.memory().get<uint64_t>(16), b.window());
  CHECK_EQ(b.kernel.memory().get<uint64_t>(24), 64 << 10);
  CHECK_EQ(b.kernel.memory().size(), b.window() + (64 << 10));
  CHECK_EQ(b.kernel.attributes().commandTimeout.count(), 0);
  CHECK(!b.kernel.setAttributes({.commandTimeout = 1s}));
  CHECK(b.kernel.setAttributes({.commandTimeout = 0s, .scrub = false}));
  Kernel plain({});
  CHECK_EQ(plain.memory().get<uint16_t>(2), 15);
  CHECK_EQ(plain.memory().get<uint64_t>(16), 0);
  CHECK(plain.pool() == nullptr);
}

TEST(aReadIsTheInitiatorsMemory) {
  Bench b;
  const auto in = b.buffer(8192);
  b.read(1, in);
  const auto e = *b.handler->fetch();
  CHECK_EQ(b.kernelFlags(e), entry::kZeroCopy | entry::kDirectIo | entry::kDataIn);
  CHECK_EQ(e.iovs.size(), 1);
  CHECK_EQ(e.iovs[0].offset, b.window());
  CHECK_EQ(e.iovs[0].length, 8192);
  CHECK_EQ(b.kernel.blocksInUse(), 0);
  const auto data = b.handler->data(e.iovs[0]);
  CHECK_EQ(data[0], 0);  // scrubbed
  data[5] = 42;
  CHECK_EQ(in[5], 42);  // before it is completed
  const auto done = b.complete(e);
  CHECK_EQ(done[0].dataBytes, 8192);
  CHECK(raisesBusError([&] { data[5] = 1; }));
  CHECK(raisesBusError([&] { check::failed() |= data[8191] != 0; }));
  CHECK_EQ(in[5], 42);
  CHECK_EQ(b.kernel.stats().exposed, 1);
  CHECK_EQ(b.kernel.stats().scrubbed, 8192);
}

TEST(systemCallsOnConcealedPagesFail) {
  Bench b;
  b.read(1, b.buffer(4096));
  const auto e = *b.handler->fetch();
  const auto data = b.handler->data(e.iovs[0]);
  const int zero = open("/dev/zero", O_RDONLY);
  CHECK_EQ(read(zero, data.data(), data.size()), 4096);
  b.complete(e);
  CHECK(read(zero, data.data(), data.size()) < 0 && errno == EFAULT);
  close(zero);
}

TEST(dataOutIsReadOnly) {
  Bench b;
  const uint64_t denied = Window::denied();
  const auto out = b.buffer(4096, 7);
  b.write(1, out);
  const auto e = *b.handler->fetch();
  const auto data = b.handler->data(e.iovs[0]);
  CHECK_EQ(data[100], 7);
  CHECK(raisesBusError([&] { data[100] = 8; }));
  CHECK_EQ(out[100], 7);
  CHECK_EQ(Window::denied(), denied + 1);
  b.complete(e);
  CHECK(raisesBusError([&] { check::failed() |= data[100] != 0; }));
}

TEST(scrubbingCanBeSwitchedOff) {
  Bench b;
  b.kernel.setAttributes({.commandTimeout = 0s, .scrub = false});
  b.read(1, b.buffer(4096));
  CHECK_EQ(b.handler->data(b.handler->fetch()->iovs[0])[0], 0xee);
}

TEST(whatIsNotWholePagesIsCopied) {
  Bench b;
  const auto room = b.buffer(16384);
  b.read(1, room.first(100));
  b.read(2, room.subspan(512, 4096));
  b.read(3, room.first(4096 + 512));
  std::vector<uint8_t> foreign(8192);
  b.read(4, foreign);
  b.kernel.setAttributes({.commandTimeout = 0s, .zeroCopyBytes = 8192});
  b.read(5, room.first(4096));
  for (int i = 0; i < 5; i++) {
    const auto e = *b.handler->fetch();
    CHECK_EQ(b.kernelFlags(e), entry::kKeepBufferPossible);
    CHECK(e.iovs[0].offset < b.window());
  }
  CHECK_EQ(b.kernel.stats().copied, 5);
  b.read(6, room.first(8192));
  CHECK_EQ(b.kernelFlags(*b.handler->fetch()) & entry::kZeroCopy, 1);
}

TEST(pagesShownAlreadyMeanCopying) {
  Bench b;
  const auto in = b.buffer(16384);
  b.read(1, in.subspan(4096, 8192));
  const auto first = *b.handler->fetch();
  for (const auto part : {in, in.first(8192), in.subspan(8192, 8192), in.subspan(4096, 4096)}) {
    b.read(2, part);
    CHECK_EQ(b.kernelFlags(*b.handler->fetch()), entry::kKeepBufferPossible);
  }
  for (const auto part : {in.first(4096), in.subspan(12288, 4096)}) {
    b.read(3, part);
    CHECK_EQ(b.kernelFlags(*b.handler->fetch()) & entry::kZeroCopy, 1);
  }
  b.complete(first);
  b.read(4, in.subspan(4096, 8192));
  CHECK_EQ(b.kernelFlags(*b.handler->fetch()) & entry::kZeroCopy, 1);
}

TEST(aCommandThatWaitedIsStillNotCopied) {
  Bench b;
  static constexpr uint8_t cdb[10] = {0x2a};
  const auto out = b.buffer(4096, 1);
  b.kernel.submit({1, &b, cdb, out, {}}, b.now, b.now + 5ms);
  out[0] = 2;
  b.now += 5ms;
  b.kernel.tick(b.now);
  const auto e = *b.handler->fetch();
  CHECK_EQ(b.kernelFlags(e) & entry::kZeroCopy, 1);
  CHECK_EQ(b.handler->data(e.iovs[0])[0], 2);  // live memory, as on a real kernel
}

TEST(memoryIsGivenRoundRobin) {
  BufferPool pool(16 * 4096);
  std::vector<size_t> offsets;
  for (int i = 0; i < 17; i++) {
    const auto range = pool.allocate(4096);
    offsets.push_back(*pool.offsetOf(range));
    pool.free(range);
  }
  for (size_t i = 0; i < 17; i++) CHECK_EQ(offsets[i], i % 16 * 4096);
}

TEST(bidirectional) {
  Bench b;
  const auto out = b.buffer(4096, 3);
  const auto in = b.buffer(8192);
  static constexpr uint8_t cdb[10] = {0x53};
  b.kernel.submit({1, &b, cdb, out, in, true}, b.now);
  const auto e = *b.handler->fetch();
  CHECK_EQ(e.iovs[0].offset, b.window());
  CHECK_EQ(e.bidi[0].offset, b.window() + 4096);  // the next buffer of the pool
  CHECK_EQ(e.bidi[0].length, 8192);
  CHECK_EQ(b.handler->data(e.iovs[0])[0], 3);
  CHECK(raisesBusError([&] { b.handler->data(e.iovs[0])[0] = 1; }));
  b.handler->data(e.bidi[0])[8191] = 9;
  CHECK_EQ(b.complete(e)[0].dataBytes, 8192);
  CHECK_EQ(in[8191], 9);

  b.kernel.submit({2, &b, cdb, out, in.first(100), true}, b.now);  // both must qualify
  CHECK_EQ(b.kernelFlags(*b.handler->fetch()), entry::kKeepBufferPossible);
}

TEST(keepBufOnlyForCopiedCommands) {
  Bench b;
  b.read(1, b.buffer(4096));
  b.read(2, b.buffer(4096).first(512));
  const auto exposed = *b.handler->fetch();
  const auto copied = *b.handler->fetch();
  b.complete(exposed, {.flags = entry::kKeepBuffer});
  CHECK_EQ(b.kernel.idsInUse(), 1);
  CHECK(raisesBusError([&] { check::failed() |= b.handler->data(exposed.iovs[0])[0] != 0; }));
  b.complete(copied, {.flags = entry::kKeepBuffer});
  CHECK_EQ(b.kernel.idsInUse(), 1);
  CHECK(b.kernel.freeKeptBuffer(copied.id, b.now));
}

TEST(neighboursAreConcealedTogether) {
  Bench b;
  std::vector<TestHandler::Entry> entries;
  for (uint64_t i = 0; i < 8; i++) {
    b.read(i, b.buffer(8192));  // side by side in the pool
    entries.push_back(*b.handler->fetch());
  }
  for (const size_t i : {3, 1, 0, 2}) b.handler->complete(entries[i].id);
  b.kernel.doorbell(b.now);
  CHECK_EQ(b.take().size(), 4);
  CHECK_EQ(b.kernel.zaps(), 1);
  for (size_t i = 0; i < 8; i++) {
    const auto data = b.handler->data(entries[i].iovs[0]);
    CHECK_EQ(raisesBusError([&] { data[4096] = 1; }), i < 4);
  }
}

TEST(resetTakesThePagesAway) {
  Bench b;
  const auto in = b.buffer(4096);
  b.read(1, in);
  const auto e = *b.handler->fetch();
  b.kernel.resetRing(1, b.now);
  CHECK(raisesBusError([&] { b.handler->data(e.iovs[0])[0] = 1; }));
  CHECK_EQ(b.take()[0].status, 8);
  CHECK_EQ(in[0], 0);
}

TEST(nothingExpires) {
  Bench b;
  b.read(1, b.buffer(4096));
  b.now += 24h;
  b.kernel.tick(b.now);
  CHECK(!b.kernel.expireNow(&b, 1));
  CHECK(b.take().empty());
}

TEST(aLaterMappingSeesThePages) {
  Bench b;
  const auto in = b.buffer(4096);
  b.read(1, in);
  const auto e = *b.handler->fetch();
  b.unmap();
  b.read(2, b.buffer(4096));  // nobody is there to show it to
  b.map();
  b.handler->fetch();  // the first again
  CHECK_EQ(b.kernelFlags(*b.handler->fetch()), entry::kKeepBufferPossible);
  b.handler->data(e.iovs[0])[7] = 5;
  CHECK_EQ(in[7], 5);
  b.complete(e);
  CHECK(raisesBusError([&] { b.handler->data(e.iovs[0])[7] = 1; }));
}

TEST(anotherSegmentationFaultStaysOne) {
  Bench b;
  const pid_t child = fork();
  if (child == 0) {
    dup2(open("/dev/null", O_WRONLY), 2);  // what a sanitizer has to say of it
    void* page = mmap(nullptr, 4096, PROT_READ, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    *static_cast<volatile char*>(page) = 1;
    _exit(0);
  }
  int status = 0;
  waitpid(child, &status, 0);
  CHECK(status != 0);  // not taken for a store into the window
}

TEST(thePoolReusesItsRanges) {
  BufferPool pool(16 << 20);
  const auto a = pool.allocate(4096);
  const auto b = pool.allocate(5000);
  const auto c = pool.allocate(4096);
  CHECK_EQ(b.data() - a.data(), 4096);
  CHECK_EQ(c.data() - b.data(), 8192);
  pool.free(a);
  pool.free(c);
  CHECK(pool.allocate(16 << 20).empty());
  pool.free(b);
  CHECK(pool.allocate(16 << 20).data() == a.data());
  CHECK(pool.allocate(1).empty());
  CHECK(pool.offsetOf(a) == 0u);
  CHECK(!pool.offsetOf(a.first(100)));
  CHECK(!pool.offsetOf({}));
  CHECK(!pool.offsetOf(std::vector<uint8_t>(4096)));
}

}  // namespace

int main() {
  std::signal(SIGBUS, onBusError);
  return check::run();
}

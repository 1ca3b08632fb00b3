// SPDX-License-Identifier: Apache-2.0
// Command memory in pieces, and what happens when its pages are gone.
#include <fcntl.h>
#include <signal.h>
#include <sys/mman.h>
#include <sys/wait.h>
#include <unistd.h>

#include <cstdio>
#include <cstring>
#include <thread>
#include <vector>

#include "../memory/guard.h"
#include "../memory/mapping.h"
#include "../memory/segments.h"
#include "../ring/ring.h"
#include "check.h"
#include "fake_kernel.h"

using namespace tcmu;

namespace {

struct Pieces {
  explicit Pieces(std::initializer_list<size_t> lengths) {
    for (size_t length : lengths) {
      // On their own each: a byte too far is seen by the sanitizer.
      blocks.emplace_back(length);
      iovecs.push_back({blocks.back().data(), length});
    }
  }
  Segments segments() const { return {iovecs.data(), static_cast<uint32_t>(iovecs.size())}; }
  std::vector<std::vector<uint8_t>> blocks;
  std::vector<iovec> iovecs;
};

// A memory file of two pages and a mapping of it, to be truncated.
struct Truncatable {
  static constexpr size_t kBytes = 8192;
  int fd = memfd_create("tcmu-test", MFD_CLOEXEC);
  std::unique_ptr<Mapping> mapping;
  Truncatable() {
    if (ftruncate(fd, kBytes) == 0) mapping = Mapping::make(fd, fd, fd, kBytes);
    std::memset(mapping->bytes().data(), 1, kBytes);
  }
  void truncate() { EXPECT(ftruncate(fd, 4096) == 0); }
  uint8_t* data() { return reinterpret_cast<uint8_t*>(mapping->bytes().data()); }
};

// Exit status of `f` in a process of its own; -signal when one ended it.
template <class F>
int inChild(F&& f) {
  fflush(stdout);
  const pid_t child = fork();
  if (child == 0) _exit(f());
  int status = 0;
  waitpid(child, &status, 0);
  return WIFSIGNALED(status) ? -WTERMSIG(status) : WEXITSTATUS(status);
}

}  // namespace

TEST(copiesAcrossPieces) {
  Pieces pieces{3, 0, 5, 1, 7};
  std::vector<uint8_t> source(16), back(16, 0xff);
  for (size_t i = 0; i < source.size(); i++) source[i] = static_cast<uint8_t>(i + 1);
  EXPECT(copyIn(pieces.segments(), 0, source.data(), 16));
  EXPECT(pieces.blocks[0][2] == 3 && pieces.blocks[2][0] == 4 && pieces.blocks[3][0] == 9 &&
         pieces.blocks[4][6] == 16);
  for (size_t offset = 0; offset <= 16; offset++) {
    for (size_t length = 0; offset + length <= 16; length++) {
      std::fill(back.begin(), back.end(), 0xff);
      EXPECT(copyOut(pieces.segments(), offset, length, back.data()));
      EXPECT(std::memcmp(back.data(), source.data() + offset, length) == 0);
      EXPECT(length == 16 || back[length] == 0xff);
    }
  }
}

TEST(fillsAndFindsZeros) {
  Pieces pieces{40, 1, 40};
  bool zero = false;
  EXPECT(isZero(pieces.segments(), 0, 81, zero) && zero);
  for (size_t at = 0; at < 81; at++) {
    EXPECT(fill(pieces.segments(), at, 1, 0x80));
    EXPECT(isZero(pieces.segments(), 0, 81, zero) && !zero);
    EXPECT(isZero(pieces.segments(), at, 1, zero) && !zero);
    EXPECT(isZero(pieces.segments(), 0, at, zero) && zero);
    EXPECT(isZero(pieces.segments(), at + 1, 80 - at, zero) && zero);
    EXPECT(fill(pieces.segments(), at, 1, 0));
  }
  EXPECT(isZero(pieces.segments(), 81, 0, zero) && zero);
}

TEST(findsTheFirstDifference) {
  Pieces pieces{300, 300};
  std::vector<uint8_t> other(600);
  int64_t where = 0;
  EXPECT(mismatch(pieces.segments(), 0, other.data(), 600, where) && where == -1);
  for (const size_t at : {0, 1, 255, 256, 299, 300, 599}) {
    other[at] = 1;
    EXPECT(mismatch(pieces.segments(), 0, other.data(), 600, where));
    EXPECT(where == static_cast<int64_t>(at));
    EXPECT(mismatch(pieces.segments(), at, other.data() + at, 600 - at, where) && where == 0);
    EXPECT(mismatch(pieces.segments(), 0, other.data(), at, where) && where == -1);
    other[at] = 0;
  }
}

TEST(gathersTheRangeOnly) {
  Pieces pieces{10, 10, 10};
  iovec out[3];
  EXPECT(gather(pieces.segments(), 5, 10, out, 3) == 2);
  EXPECT(out[0].iov_base == pieces.blocks[0].data() + 5 && out[0].iov_len == 5);
  EXPECT(out[1].iov_base == pieces.blocks[1].data() && out[1].iov_len == 5);
  EXPECT(gather(pieces.segments(), 0, 30, out, 2) == 2);
  EXPECT(gather(pieces.segments(), 30, 0, out, 3) == 0);
}

TEST(aMissingPageIsAnErrorForNativeCode) {
  Truncatable memory;
  memory.truncate();
  const iovec piece = {memory.data(), Truncatable::kBytes};
  const Segments segments = {&piece, 1};
  std::vector<uint8_t> bytes(Truncatable::kBytes);
  bool zero;
  int64_t where;
  EXPECT(!copyIn(segments, 0, bytes.data(), bytes.size()));
  EXPECT(!copyOut(segments, 0, bytes.size(), bytes.data()));
  EXPECT(!fill(segments, 4096, 1, 0));
  EXPECT(!isZero(segments, 4096, 4096, zero));
  EXPECT(!mismatch(segments, 4096, bytes.data(), 1, where));
  EXPECT(copyOut(segments, 0, 4096, bytes.data()) && bytes[4095] == 0);
  EXPECT(currentGuard == nullptr);
  EXPECT(!memory.mapping->poisoned());
}

TEST(guardsNestAndAreAThreadsOwn) {
  Truncatable memory;
  memory.truncate();
  volatile uint8_t* gone = memory.data() + 4096;
  volatile bool inner = true, after = false;
  EXPECT(guarded([&] {
    inner = guarded([&] { *gone = 1; });
    after = true;
  }));
  EXPECT(!inner && after);
  std::vector<std::thread> threads;
  std::atomic<int> caught{0};
  for (int i = 0; i < 4; i++) {
    threads.emplace_back([&] {
      for (int j = 0; j < 1000; j++) caught += !guarded([&] { *gone = 1; });
    });
  }
  for (std::thread& thread : threads) thread.join();
  EXPECT(caught == 4000);
}

TEST(aMissingPageIsReplacedForEverybodyElse) {
  Truncatable memory;
  memory.truncate();
  volatile uint8_t* gone = memory.data() + 4096;
  EXPECT(*gone == 0);
  *gone = 5;
  EXPECT(*gone == 5 && memory.mapping->poisoned());
  EXPECT(memory.data()[0] == 1);
  Truncatable other;
  EXPECT(!other.mapping->poisoned());
}

TEST(otherBusErrorsEndTheProcessAsEver) {
  // Not a mapping of ours.
  EXPECT(inChild([] {
           signal(SIGBUS, SIG_DFL);
           installGuard();
           const int fd = memfd_create("foreign", 0);
           auto* page = static_cast<volatile uint8_t*>(
               mmap(nullptr, 4096, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0));
           Truncatable ours;
           *page = 1;
           return 0;
         }) == -SIGBUS);
  // One that was unmapped again.
  EXPECT(inChild([] {
           Truncatable ours;
           ours.mapping.reset();
           raise(SIGBUS);
           return 0;
         }) == -SIGBUS);
}

TEST(theRingSurvivesTheLossOfItsMemory) {
  fake::Kernel kernel;
  const int fd = memfd_create("ring", MFD_CLOEXEC);
  const size_t bytes = kernel.memory().size();
  EXPECT(ftruncate(fd, static_cast<off_t>(bytes)) == 0);
  kernel.command(1, {0}, {{0, 512}});
  kernel.command(2, {0}, {{512, 512}});
  EXPECT(pwrite(fd, kernel.memory().data(), bytes, 0) == static_cast<ssize_t>(bytes));
  const auto mapping = Mapping::make(fd, fd, fd, bytes);
  Ring ring(mapping->bytes(), [](void*, uint32_t) {}, nullptr);
  std::vector<int32_t> events(8);
  std::vector<uint32_t> info(ring.capacity() * 8);
  std::vector<uint8_t> cdbs(ring.capacity() * 32);
  EXPECT(ring.fetch({events.data(), info.data(), cdbs.data()}, 1) == 1);
  EXPECT(ftruncate(fd, 0) == 0);
  EXPECT(ring.complete({0, 0, 0, 0, 0, nullptr}));
  EXPECT(!ring.moveTail());
  EXPECT(ring.fault() && ring.fault()->kind == RingFault::Kind::Memory);
  EXPECT(ring.fetch({events.data(), info.data(), cdbs.data()}, 1) == 0);
  EXPECT(!ring.valid(0));
}

int main() {
  installGuard();
  return check::runAll();
}

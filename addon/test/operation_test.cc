// SPDX-License-Identifier: Apache-2.0
// File operations on real files: short transfers, ends of files, holes, full devices, many pieces.
#include "../io/operation.h"

#include <errno.h>
#include <fcntl.h>
#include <linux/falloc.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <sys/resource.h>
#include <unistd.h>
#include <signal.h>

#include <cstring>
#include <string>
#include <thread>
#include <vector>

#include "../io/file_facts.h"
#include "../util/unique_fd.h"
#include "check.h"

using namespace tcmu;
using Kind = Operation::Kind;

namespace {

UniqueFd temporary(const char* folder) {
  std::string path = std::string(folder) + "/tcmu-test-XXXXXX";
  const int fd = mkostemp(path.data(), O_CLOEXEC);
  unlink(path.c_str());
  return UniqueFd(fd);
}

struct Flat {
  explicit Flat(size_t length, uint8_t value = 0xee) : bytes(length, value) {
    piece = {bytes.data(), length};
  }
  Operation operation(Kind kind, int fd, int64_t position) {
    return {.kind = kind, .fd = fd, .segments = {&piece, 1}, .length = bytes.size(),
            .position = position};
  }
  std::vector<uint8_t> bytes;
  iovec piece;
};

}  // namespace

TEST(readsAndZeroesBehindTheEnd) {
  const UniqueFd file = temporary("/tmp");
  EXPECT(pwrite(file.get(), "abcdef", 6, 0) == 6);
  Flat target(10);
  EXPECT(target.operation(Kind::Read, file.get(), 2).run() == 4);
  EXPECT(std::memcmp(target.bytes.data(), "cdef\0\0\0\0\0\0", 10) == 0);
  Flat behind(10);
  EXPECT(behind.operation(Kind::Read, file.get(), 100).run() == 0);
  EXPECT(behind.bytes == std::vector<uint8_t>(10));
}

TEST(readsAtOnceWhatIsCached) {
  const UniqueFd file = temporary("/tmp");
  FileFacts facts;
  const char* call;
  EXPECT(fileFacts(file.get(), facts, call) == 0 && facts.kind == FileFacts::Kind::File);
  EXPECT(pwrite(file.get(), "abcdef", 6, 0) == 6);
  Flat target(10);
  Operation operation = target.operation(Kind::Read, file.get(), 0);
  int64_t result = 0;
  const bool finished = operation.tryNow(result);
  EXPECT(finished == facts.nowait_read);
  if (!finished) result = operation.run();
  EXPECT(result == 6 && std::memcmp(target.bytes.data(), "abcdef\0\0\0\0", 10) == 0);
}

TEST(goesOnWhereTheAttemptCameTo) {
  // A pipe gives what it has: the attempt moves a part, the rest waits.
  int ends[2];
  EXPECT(pipe2(ends, O_CLOEXEC) == 0);
  const UniqueFd out(ends[0]), in(ends[1]);
  Flat target(6);
  Operation operation = target.operation(Kind::Read, out.get(), -1);
  EXPECT(write(in.get(), "abc", 3) == 3);
  int64_t result = 0;
  EXPECT(!operation.tryNow(result) && operation.moved == 3);
  std::thread writer([&] { EXPECT(write(in.get(), "def", 3) == 3); });
  EXPECT(operation.run() == 6);
  writer.join();
  EXPECT(std::memcmp(target.bytes.data(), "abcdef", 6) == 0);
}

TEST(movesMorePiecesThanOneCallTakes) {
  const UniqueFd file = temporary("/tmp");
  constexpr size_t kPieces = 3000;
  std::vector<uint8_t> bytes(kPieces * 3);
  for (size_t i = 0; i < bytes.size(); i++) bytes[i] = static_cast<uint8_t>(i * 7);
  std::vector<iovec> pieces;
  for (size_t i = 0; i < kPieces; i++) pieces.push_back({bytes.data() + i * 3, 3});
  Operation write = {.kind = Kind::Write, .fd = file.get(), .segments = {pieces.data(), kPieces},
                     .offset = 1, .length = bytes.size() - 2, .position = 10};
  EXPECT(write.run() == static_cast<int64_t>(bytes.size() - 2));
  std::vector<uint8_t> back(bytes.size());
  std::vector<iovec> targets;
  for (size_t i = 0; i < kPieces; i++) targets.push_back({back.data() + i * 3, 3});
  Operation read = {.kind = Kind::Read, .fd = file.get(), .segments = {targets.data(), kPieces},
                    .offset = 1, .length = bytes.size() - 2, .position = 10};
  EXPECT(read.run() == static_cast<int64_t>(bytes.size() - 2));
  EXPECT(std::memcmp(back.data() + 1, bytes.data() + 1, bytes.size() - 2) == 0);
  EXPECT(back.front() == 0 && back.back() == 0);
}

TEST(tellsErrnos) {
  Flat memory(512);
  EXPECT(memory.operation(Kind::Read, 9999, 0).run() == -EBADF);
  const UniqueFd full(open("/dev/full", O_RDWR | O_CLOEXEC));
  EXPECT(memory.operation(Kind::Write, full.get(), 0).run() == -ENOSPC);
  const UniqueFd file = temporary("/tmp");
  Operation seek = {.kind = Kind::Seek, .fd = file.get(), .argument = SEEK_DATA};
  EXPECT(seek.run() == -ENXIO);
  // Memory that is gone, as the kernel sees it.
  void* page = mmap(nullptr, 4096, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  const iovec piece = {page, 4096};
  EXPECT(pwrite(file.get(), "abc", 3, 0) == 3);
  Operation read = {.kind = Kind::Read, .fd = file.get(), .segments = {&piece, 1}, .length = 4096};
  EXPECT(read.run() == -EFAULT);
  munmap(page, 4096);
}

TEST(stopsAtTheFileSizeLimit) {
  const UniqueFd file = temporary("/tmp");
  signal(SIGXFSZ, SIG_IGN);
  rlimit before;
  getrlimit(RLIMIT_FSIZE, &before);
  const rlimit limit = {1000, before.rlim_max};
  setrlimit(RLIMIT_FSIZE, &limit);
  Flat memory(2000);
  // The first call writes 1000 bytes, the next one none.
  EXPECT(memory.operation(Kind::Write, file.get(), 0).run() == -EFBIG);
  setrlimit(RLIMIT_FSIZE, &before);
  EXPECT(lseek(file.get(), 0, SEEK_END) == 1000);
}

TEST(findsHolesAndPutsTheOffsetBack) {
  const UniqueFd file = temporary("/dev/shm");
  EXPECT(ftruncate(file.get(), 1 << 20) == 0);
  EXPECT(pwrite(file.get(), "x", 1, 65536) == 1);
  EXPECT(lseek(file.get(), 77, SEEK_SET) == 77);
  Operation data = {.kind = Kind::Seek, .fd = file.get(), .argument = SEEK_DATA};
  EXPECT(data.run() == 65536);
  Operation hole = {.kind = Kind::Seek, .fd = file.get(), .position = 65536, .argument = SEEK_HOLE};
  EXPECT(hole.run() == 65536 + 4096);
  EXPECT(lseek(file.get(), 0, SEEK_CUR) == 77);
  Operation punch = {.kind = Kind::Allocate, .fd = file.get(), .length = 4096, .position = 65536,
                     .argument = FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE};
  EXPECT(punch.run() == 0);
  Operation again = {.kind = Kind::Seek, .fd = file.get(), .argument = SEEK_DATA};
  EXPECT(again.run() == -ENXIO);
  Operation truncate = {.kind = Kind::Truncate, .fd = file.get(), .length = 5};
  EXPECT(truncate.run() == 0 && lseek(file.get(), 0, SEEK_END) == 5);
  Operation sync = {.kind = Kind::Sync, .fd = file.get()};
  EXPECT(sync.run() == 0);
}

TEST(knowsAFileByItsFacts) {
  FileFacts facts;
  const char* call = "";
  EXPECT(fileFacts(9999, facts, call) == EBADF && std::string(call) == "fstat");
  const UniqueFd memory = temporary("/dev/shm");
  EXPECT(ftruncate(memory.get(), 12345) == 0);
  EXPECT(fileFacts(memory.get(), facts, call) == 0);
  EXPECT(facts.memory && facts.size == 12345 && facts.block_size > 0 && !facts.direct);
  EXPECT(lseek(memory.get(), 0, SEEK_END) == 12345);
  FileFacts other;
  const UniqueFd null(open("/dev/null", O_RDWR | O_CLOEXEC));
  EXPECT(fileFacts(null.get(), other, call) == 0 && other.kind == FileFacts::Kind::Other);
  // A probe that changed the file would be no probe.
  FileFacts third;
  const UniqueFd file = temporary("/tmp");
  EXPECT(pwrite(file.get(), "abc", 3, 0) == 3);
  EXPECT(fileFacts(file.get(), third, call) == 0 && third.size == 3);
  char bytes[4] = {};
  EXPECT(pread(file.get(), bytes, 4, 0) == 3 && std::string(bytes) == "abc");
}

TEST(locksBelongToTheOpenFile) {
  std::string path = "/tmp/tcmu-test-XXXXXX";
  const UniqueFd one(mkostemp(path.data(), O_CLOEXEC));
  const UniqueFd two(open(path.c_str(), O_RDWR | O_CLOEXEC));
  EXPECT(lockFile(one.get(), true, 0, 0) == 1);
  EXPECT(lockFile(two.get(), true, 0, 0) == 0 && lockFile(two.get(), false, 0, 0) == 0);
  EXPECT(lockFile(one.get(), false, 0, 0) == 1 && lockFile(two.get(), false, 0, 0) == 1);
  EXPECT(lockFile(9999, true, 0, 0) == -EBADF);
  unlink(path.c_str());
}

int main() { return check::runAll(); }

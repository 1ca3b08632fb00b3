// SPDX-License-Identifier: Apache-2.0
#include "operation.h"

#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <linux/falloc.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cstdlib>
#include <memory>
#include <mutex>

namespace tcmu {
namespace {

// One system call moves at most this much anyway (MAX_RW_COUNT).
constexpr uint64_t kMostBytes = 0x7ffff000;
constexpr int kMostPieces = 1024;  // IOV_MAX of the kernel

template <class Call>
int64_t retried(Call&& call) {
  for (;;) {
    const int64_t result = call();
    if (result >= 0) return result;
    if (errno != EINTR) return -errno;
  }
}

// Block devices know hole punching too, as zeroing that deallocates (BLKDISCARD promises no zeros).
int64_t allocate(int fd, int flags, int64_t position, uint64_t length) {
  struct stat facts;
  if (flags == 0 && fstat(fd, &facts) == 0 && S_ISBLK(facts.st_mode)) return 0;  // it has its blocks
  return retried([&] { return fallocate(fd, flags, position, static_cast<off_t>(length)); });
}

// Finds data or a hole and puts the file's offset back, which other users of the descriptor may use.
int64_t seek(int fd, int64_t position, int whence) {
  static std::mutex oneAtATime;
  const std::lock_guard lock(oneAtATime);
  const off_t before = lseek(fd, 0, SEEK_CUR);
  if (before < 0) return -errno;
  const off_t found = lseek(fd, position, whence);
  const int64_t result = found < 0 ? -errno : found;
  lseek(fd, before, SEEK_SET);
  return result;
}

}  // namespace

int64_t Operation::zeroRest() {
  at_end = true;
  return fill(segments, offset, length, 0) ? 0 : -EFAULT;
}

// One step of `transfer` through memory of our own: O_DIRECT can't pin the pages of every command with
// zero copy (EFAULT or EEXIST). Answers as the system call, -EFAULT when the memory really is gone.
int64_t Operation::bounce(int flags) {
  constexpr size_t kAlign = 4096, kMost = 1 << 20;
  const size_t bytes = std::min<uint64_t>(length, kMost);
  const std::unique_ptr<void, void (*)(void*)> memory(
      aligned_alloc(kAlign, (bytes + kAlign - 1) / kAlign * kAlign), std::free);
  if (!memory) return -ENOMEM;
  auto* start = static_cast<uint8_t*>(memory.get());
  iovec piece = {start, bytes};
  if (kind == Kind::Write) {
    if (!copyOut(segments, offset, bytes, start)) return -EFAULT;
    return retried([&] { return pwritev2(fd, &piece, 1, position, flags); });
  }
  const int64_t result = retried([&] { return preadv2(fd, &piece, 1, position, flags); });
  if (result > 0 && !copyIn(segments, offset, start, static_cast<size_t>(result))) return -EFAULT;
  return result;
}

// Moves until done, failed, or (with RWF_NOWAIT) it would have to wait. Answers the total or -errno.
int64_t Operation::transfer(int flags) {
  iovec pieces[kMostPieces];
  while (length > 0) {
    const int count = gather(segments, offset, std::min(length, kMostBytes), pieces, kMostPieces);
    int64_t result = retried([&]() -> ssize_t {
      // One piece, as most small commands have, is cheaper without an array for the kernel to copy.
      if (count == 1 && flags == 0 && position >= 0)
        return kind == Kind::Read ? pread(fd, pieces[0].iov_base, pieces[0].iov_len, position)
                                  : pwrite(fd, pieces[0].iov_base, pieces[0].iov_len, position);
      return kind == Kind::Read ? preadv2(fd, pieces, count, position, flags)
                                : pwritev2(fd, pieces, count, position, flags);
    });
    if ((result == -EFAULT || result == -EEXIST) && (fcntl(fd, F_GETFL) & O_DIRECT))
      result = bounce(flags);
    if (result < 0) return result;
    if (result == 0) {
      if (kind == Kind::Write) return -ENOSPC;
      const int64_t error = zeroRest();
      return error < 0 ? error : moved;
    }
    moved += result;
    offset += static_cast<uint64_t>(result);
    length -= static_cast<uint64_t>(result);
    if (position >= 0) position += result;
  }
  return moved;
}

// The file system shares the blocks if it can. Answers what it copied before an error, if anything.
int64_t Operation::copy() {
  // In pieces: one call for all of a large range can't be interrupted.
  constexpr uint64_t kPiece = 64 << 20;
  while (length > 0) {
    loff_t from = source_position, to = position;
    const int64_t result = retried(
        [&] { return copy_file_range(argument, &from, fd, &to, std::min(length, kPiece), 0); });
    if (result < 0) return moved > 0 ? moved : result;
    if (result == 0) break;
    moved += result;
    source_position += result;
    position += result;
    length -= static_cast<uint64_t>(result);
  }
  return moved;
}

bool Operation::tryNow(int64_t& result) {
  result = transfer(RWF_NOWAIT);
  // Would wait; or the file system, or this kind of access, knows no RWF_NOWAIT.
  return result != -EAGAIN && result != -EOPNOTSUPP && result != -EINVAL;
}

int64_t Operation::run() {
  switch (kind) {
    case Kind::Read:
    case Kind::Write:
      return transfer(0);
    case Kind::Sync:
      return retried([&] { return fdatasync(fd); });
    case Kind::Allocate:
      return allocate(fd, argument, position, length);
    case Kind::Seek:
      return seek(fd, position, argument);
    case Kind::Truncate:
      return retried([&] { return ftruncate(fd, static_cast<off_t>(length)); });
    case Kind::Copy:
      return copy();
  }
  return -EINVAL;
}

}  // namespace tcmu

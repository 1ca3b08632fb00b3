// SPDX-License-Identifier: Apache-2.0
#include "file_facts.h"

#include <errno.h>
#include <fcntl.h>
#include <linux/fs.h>
#include <linux/magic.h>
#include <sys/ioctl.h>
#include <sys/stat.h>
#include <sys/uio.h>
#include <sys/vfs.h>

#include <cstdlib>
#include <memory>

namespace tcmu {
namespace {

// RWF_NOWAIT is refused per file system, and on some of them only for buffered writes: only trying
// tells. Nothing is asked of a zero-length transfer, so one block is read; the write offers memory
// that does not exist, and fails on that (EFAULT) exactly when it was not refused before.
void probeNoWait(int fd, int access, FileFacts& facts) {
  const size_t bytes = facts.direct ? facts.block_size : 1;
  if (access != O_WRONLY) {
    const size_t room = bytes < 4096 ? 4096 : bytes;
    const std::unique_ptr<void, decltype(&std::free)> block(std::aligned_alloc(4096, room),
                                                            &std::free);
    const iovec piece = {block.get(), bytes};
    facts.nowait_read = preadv2(fd, &piece, 1, 0, RWF_NOWAIT) >= 0 || errno == EAGAIN;
  }
  if (access != O_RDONLY) {
    const iovec nowhere = {nullptr, bytes};
    facts.nowait_write = pwritev2(fd, &nowhere, 1, 0, RWF_NOWAIT) < 0 &&
                         (errno == EFAULT || errno == EAGAIN);
  }
}

}  // namespace

int fileFacts(int fd, FileFacts& facts, const char*& call) {
  struct stat status;
  call = "fstat";
  if (fstat(fd, &status) != 0) return errno;
  const int flags = fcntl(fd, F_GETFL);
  call = "fcntl";
  if (flags < 0) return errno;
  facts.direct = flags & O_DIRECT;
  facts.block_size = facts.physical_block_size = static_cast<uint32_t>(status.st_blksize);
  if (S_ISREG(status.st_mode)) {
    facts.kind = FileFacts::Kind::File;
    facts.size = static_cast<uint64_t>(status.st_size);
    struct statfs system;
    call = "fstatfs";
    if (fstatfs(fd, &system) != 0) return errno;
    const auto type = static_cast<unsigned long>(system.f_type);
    facts.memory = type == TMPFS_MAGIC || type == RAMFS_MAGIC || type == HUGETLBFS_MAGIC;
  } else if (S_ISBLK(status.st_mode)) {
    facts.kind = FileFacts::Kind::Block;
    int logical;
    unsigned physical;
    call = "ioctl";
    if (ioctl(fd, BLKGETSIZE64, &facts.size) != 0 || ioctl(fd, BLKSSZGET, &logical) != 0 ||
        ioctl(fd, BLKPBSZGET, &physical) != 0)
      return errno;
    facts.block_size = static_cast<uint32_t>(logical);
    facts.physical_block_size = physical;
  } else {
    return 0;
  }
  probeNoWait(fd, flags & O_ACCMODE, facts);
  return 0;
}

namespace {

struct flock rangeLock(short type, int64_t start, int64_t length) {
  struct flock lock = {};
  lock.l_type = type;
  lock.l_whence = SEEK_SET;
  lock.l_start = start;
  lock.l_len = length;
  return lock;
}

}  // namespace

int lockFile(int fd, bool exclusive, int64_t start, int64_t length) {
  struct flock lock = rangeLock(exclusive ? F_WRLCK : F_RDLCK, start, length);
  if (fcntl(fd, F_OFD_SETLK, &lock) == 0) return 1;
  return errno == EAGAIN || errno == EACCES ? 0 : -errno;
}

int unlockFile(int fd, int64_t start, int64_t length) {
  struct flock lock = rangeLock(F_UNLCK, start, length);
  return fcntl(fd, F_OFD_SETLK, &lock) == 0 ? 0 : -errno;
}

int lockedByOthers(int fd, int64_t start, int64_t length) {
  struct flock lock = rangeLock(F_WRLCK, start, length);
  if (fcntl(fd, F_OFD_GETLK, &lock) != 0) return -errno;
  return lock.l_type == F_UNLCK ? 0 : 1;
}

}  // namespace tcmu

// SPDX-License-Identifier: Apache-2.0
#include "uio.h"

#include <fcntl.h>
#include <unistd.h>

#include <cerrno>
#include <system_error>
#include <utility>

namespace tcmu::sim {

namespace {

std::system_error failure(int error, const char* call) {
  return std::system_error(error, std::generic_category(), call);
}

class OwnedFd {
 public:
  OwnedFd() = default;
  ~OwnedFd() {
    if (fd_ >= 0) close(fd_);
  }
  OwnedFd(const OwnedFd&) = delete;
  OwnedFd& operator=(const OwnedFd&) = delete;
  void reset(int fd) { fd_ = fd; }
  int get() const { return fd_; }
  int release() { return std::exchange(fd_, -1); }

 private:
  int fd_ = -1;
};

void openPipe(OwnedFd& read, OwnedFd& write) {
  int ends[2];
  if (pipe2(ends, O_CLOEXEC) < 0) throw failure(errno, "pipe2");
  read.reset(ends[0]);
  write.reset(ends[1]);
  fcntl(ends[0], F_SETFL, O_NONBLOCK);
}

void duplicate(int fd, OwnedFd& copy) {
  copy.reset(fcntl(fd, F_DUPFD_CLOEXEC, 0));
  if (copy.get() < 0) throw failure(errno, "dup");
}

void closeAndForget(int& fd) {
  if (fd >= 0) close(std::exchange(fd, -1));
}

}  // namespace

Uio::~Uio() { closeEnds(); }

Uio::Handle Uio::open(int memoryFd) {
  if (gone_) throw failure(ENODEV, "open");
  if (isOpen()) throw failure(EBUSY, "open");
  OwnedFd eventRead, eventWrite, eventReadCopy, doorbellRead, doorbellWrite, memory;
  openPipe(eventRead, eventWrite);
  openPipe(doorbellRead, doorbellWrite);
  duplicate(eventRead.get(), eventReadCopy);
  duplicate(memoryFd, memory);
  eventRead_ = eventReadCopy.release();
  eventWrite_ = eventWrite.release();
  doorbellRead_ = doorbellRead.release();
  return {memory.release(), eventRead.release(), doorbellWrite.release()};
}

void Uio::notify() {
  events_++;
  if (eventWrite_ < 0) return;
  // One read takes all events: a count that nobody has read yet gives way to this one.
  dropUnread();
  while (write(eventWrite_, &events_, sizeof events_) < 0 && errno == EINTR) {
  }
}

Uio::Doorbell Uio::takeDoorbells() {
  Doorbell result;
  if (doorbellRead_ < 0) return result;
  uint8_t bytes[1024];
  ssize_t n;
  do {
    n = read(doorbellRead_, bytes, sizeof bytes);
  } while (n < 0 && errno == EINTR);
  if (n > 0) result.rung = true;
  if (n == 0) {
    result.closed = true;
    closeEnds();
  }
  return result;
}

void Uio::unregister() {
  gone_ = true;
  // uio looks for the device before it looks for events: unread ones go with it.
  if (isOpen()) dropUnread();
  closeEnds();
}

void Uio::dropUnread() {
  int32_t unread;
  while (read(eventRead_, &unread, sizeof unread) > 0) {
  }
}

void Uio::closeEnds() {
  closeAndForget(eventRead_);
  closeAndForget(eventWrite_);
  closeAndForget(doorbellRead_);
}

}  // namespace tcmu::sim

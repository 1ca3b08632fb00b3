// SPDX-License-Identifier: Apache-2.0
// The character device the handler holds: an event pipe it polls and reads 4 bytes from, a doorbell
// pipe it writes 4 bytes to. One opener at a time. Wake-ups merge as uio's do: at most one 4-byte
// event count is waiting to be read. A device that is gone reads as end of file (uio: EIO).
//
// The opener closes by closing its fds, which the simulated kernel sees as the end of the doorbell.
// Not thread-safe: the owner serialises.
#pragma once

#include <cstdint>

namespace tcmu::sim {

class Uio {
 public:
  // fds that belong to the opener.
  struct Handle {
    int memory;
    int event;
    int doorbell;
  };

  Uio() = default;
  ~Uio();
  Uio(const Uio&) = delete;
  Uio& operator=(const Uio&) = delete;

  // @throws std::system_error EBUSY while open, ENODEV once gone
  Handle open(int memoryFd);
  bool isOpen() const { return doorbellRead_ >= 0; }
  // What to poll for doorbells, or -1.
  int doorbellFd() const { return doorbellRead_; }

  // Tells the opener that something happened.
  void notify();

  struct Doorbell {
    bool rung = false;
    bool closed = false;
  };
  // Takes doorbells, perhaps not all: call again until nothing was rung. `closed` when the opener
  // has closed, after which another may open.
  Doorbell takeDoorbells();

  // The device is gone for good: the opener reads end of file, even with an event unread, and its
  // doorbells fail.
  void unregister();

 private:
  void dropUnread();
  void closeEnds();

  int eventRead_ = -1;  // our own copy: keeps a write to a closed opener from raising SIGPIPE
  int eventWrite_ = -1;
  int doorbellRead_ = -1;
  uint32_t events_ = 0;
  bool gone_ = false;
};

}  // namespace tcmu::sim

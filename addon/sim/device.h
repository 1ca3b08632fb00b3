// SPDX-License-Identifier: Apache-2.0
// One simulated TCMU device: the kernel's state machine, its uio face, and the thread that hears
// doorbells and time-outs.
//
// Thread-safe. On a real kernel a doorbell is handled inside the handler's write(); here a thread
// of ours hears it, so every call below first handles the doorbells already rung: whoever rang one
// and then calls sees its effect. Completions are delivered to their Initiator outside the lock, on
// the calling thread or on ours. Request buffers must outlive their commands, Initiators the device
// or its `stop()`, which ends every command and after which nothing comes from our thread any more.
#pragma once

#include <poll.h>

#include <mutex>
#include <span>
#include <thread>
#include <vector>

#include "faults.h"
#include "kernel.h"
#include "uio.h"

namespace tcmu::sim {

// Something else that the device's thread serves beside the device, so that no other thread has to be
// woken between it and the ring. Neither call may block.
class Guest {
 public:
  virtual ~Guest() = default;
  // To be polled for reading.
  virtual int fd() const = 0;
  // Served then without anything to read; TimePoint::max() for never.
  virtual TimePoint deadline() const = 0;
  // `readable`: the fd is. Called whenever the thread is awake, outside the lock. False: there was
  // nothing to do.
  virtual bool serve(bool readable, TimePoint now) = 0;
};

struct DeviceStats {
  uint64_t wakeups = 0;
  uint64_t doorbells = 0;
};

class Device {
 public:
  // @throws std::invalid_argument, std::system_error
  Device(const Geometry& geometry, const Attributes& attributes);
  ~Device();
  Device(const Device&) = delete;
  Device& operator=(const Device&) = delete;

  // Queues the requests, then wakes the handler once.
  void submit(std::span<const Request> requests);

  // open(2) of the uio device. @throws std::system_error EBUSY, ENODEV
  Uio::Handle open();

  // Runs `f(kernel, now)` under the lock, as an action of the kernel.
  template <class F>
  void act(F f) {
    run([&](TimePoint now) { f(kernel_, now); });
  }

  // Wakes the handler for nothing.
  void kick();
  void setFaults(const FaultOptions& options);
  // uio_unregister_device: the opener reads end of file from now on.
  void unregister();
  // Ends every command with NOT READY, unregisters, ends the thread. Idempotent.
  void stop();

  void attach(Guest* guest);
  // When it returns, the guest is not being served and will not be again. Not from `serve`.
  void detach(Guest* guest);
  // Whether the caller is the device's thread, which serves every guest before it sleeps.
  bool onOwnThread() const { return std::this_thread::get_id() == thread_.get_id(); }

  DeviceStats stats();
  // Initiators' memory for zero copy, or null.
  BufferPool* pool() { return kernel_.pool(); }
  size_t mapSize() const { return kernel_.memory().size(); }

 private:
  using Finished = std::vector<std::pair<Initiator*, Completion>>;

  // `fromLoop`: the thread itself runs it, and works out its next sleep afterwards.
  template <class F>
  void run(F f, bool fromLoop = false) {
    Finished finished;
    {
      std::lock_guard guard(lock_);
      const TimePoint now = Clock::now();
      catchUp(now);
      f(now);
      wakeHandler(now);
      if (!fromLoop && nextWake() < sleepUntil_) interrupt();
      kernel_.takeFinished(finished);
    }
    deliver(finished);
  }

  void catchUp(TimePoint now);
  void wakeHandler(TimePoint now);
  void notify();
  TimePoint nextWake() const;
  void interrupt();
  void loop();
  void serveGuests(std::span<const pollfd> polled);
  static void deliver(const Finished& finished);

  std::mutex lock_;  // guards everything below, but for the thread's own poll
  Kernel kernel_;
  Uio uio_;
  Faults faults_;
  std::vector<TimePoint> wakeups_;  // late and spurious ones to come
  DeviceStats stats_;
  TimePoint sleepUntil_ = TimePoint::max();
  bool stopping_ = false;
  int control_ = -1;  // eventfd that interrupts the thread's sleep
  // Taken before `lock_`, by who holds both. Guards guests_.
  std::mutex serving_;
  std::vector<Guest*> guests_;
  std::thread thread_;
};

}  // namespace tcmu::sim

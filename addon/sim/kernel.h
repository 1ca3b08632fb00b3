// SPDX-License-Identifier: Apache-2.0
// The state machine of the simulated kernel: what target_core_user does to one device, as facts
// read from Linux 6.1 (drivers/target/target_core_user.c). Commands go onto the ring or wait for
// room, completions are taken from it, time-outs expire, task management and the recovery actions
// work.
//
// No threads, no fds, no clock: the owner serialises all calls, passes the time in, rings the event
// when `takeEvent` says so, and delivers what `takeFinished` returns after it has left its lock.
//
// Trusts nothing it reads back from the ring. Where the kernel would follow a bad length out of the
// ring, the device becomes BROKEN here.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <memory>
#include <utility>
#include <vector>

#include "abi.h"
#include "bitmap.h"
#include "buffer_pool.h"
#include "command.h"
#include "memory.h"
#include "window.h"

namespace tcmu::sim {

struct Geometry {
  size_t ringBytes = 8 << 20;   // mailbox and ring (control: cmd_ring_size_mb)
  size_t dataBytes = 1u << 30;  // control: max_data_area_mb
  uint32_t pagesPerBlock = 1;   // control: data_pages_per_blk
  uint16_t capabilities =
      mailbox::kOutOfOrder | mailbox::kReadLength | mailbox::kTmr | mailbox::kKeepBuffer;
  // Behaves as a kernel with the zero-copy patch and this switched on: no KEEP_BUF, no time-out.
  bool zeroCopy = false;
  size_t windowBytes = 256 << 20;  // control: zc_area_mb
  // Byte that data blocks are filled with when they are freed, or -1: left as they are.
  int poison = -1;
};

// attrib/ of the device.
struct Attributes {
  Milliseconds commandTimeout{30000};  // 0: none
  Milliseconds queueFullTimeout{-1};   // 0: refused at once; below 0: the command time-out
  bool tmrNotification = false;
  bool scrub = true;           // zc_scrub: Data-In pages are zeroed before the handler sees them
  uint32_t zeroCopyBytes = 0;  // zc_min_bytes: shorter commands are copied
};

struct KernelStats {
  uint64_t commands = 0;  // put on the ring
  uint64_t completions = 0;
  uint64_t pads = 0;
  uint64_t tmrs = 0;
  uint64_t waited = 0;  // times a command found no room
  uint64_t expired = 0;
  uint64_t unknownOps = 0;
  uint64_t resets = 0;
  // Of zero copy, the patch's zc_stats.
  uint64_t exposed = 0;
  uint64_t copied = 0;    // commands with data that were not
  uint64_t scrubbed = 0;  // bytes
};

class Kernel {
 public:
  // @throws std::invalid_argument, std::system_error
  explicit Kernel(const Geometry& geometry);

  // Queues a command; what is refused is among the finished at once. `holdUntil`: not before then.
  void submit(const Request& request, TimePoint now, TimePoint holdUntil = {});

  // A doorbell: takes the completions, then retries what waits.
  void doorbell(TimePoint now);

  // When `tick` has something to do, or TimePoint::max().
  TimePoint nextDeadline() const;
  // No command submitted from now on can expire sooner than this.
  Milliseconds shortestTimeout() const;
  void tick(TimePoint now);
  // Lets the command's time-out pass now: in flight or waiting for room. False: no such command, or
  // zero copy, which has no time-out.
  bool expireNow(const Initiator* initiator, uint64_t tag);

  using Selector = std::function<bool(const Command&)>;
  // A task management function on the commands selected: those waiting are aborted at once, the
  // others when their completion arrives. The handler is told only with tmrNotification. Returns
  // how many.
  size_t taskManagement(Tmr type, const Selector& affects);

  void block(TimePoint now);
  void unblock() { blocked_ = false; }
  // action/reset_ring: 1 finishes what is in flight with BUSY, 2 with CHECK CONDITION.
  void resetRing(int level, TimePoint now);
  // action/free_kept_buf. False (the kernel: EINVAL) when the id is unknown or not kept.
  bool freeKeptBuffer(uint16_t id, TimePoint now);
  // The opener closed: nobody is left who could release kept buffers.
  void released(TimePoint now);
  // Takes idle data pages away, as the kernel does above its global limit. Returns the bytes freed.
  size_t reclaim(TimePoint now);
  // The logical unit is being removed: new commands are refused.
  void refuseAll() { removed_ = true; }
  // Ends everything that is left with NOT READY: the simulated kernel itself stops.
  void failAll();

  const Attributes& attributes() const { return attributes_; }
  // False (EINVAL): with zero copy there is no command time-out.
  bool setAttributes(const Attributes& attributes);
  // Initiators' memory that can be shown to the handler; null without zero copy.
  BufferPool* pool() { return pool_.get(); }
  uint64_t zaps() const { return window_ ? window_->zaps() : 0; }
  SharedMemory& memory() { return memory_; }
  const SharedMemory& memory() const { return memory_; }

  bool takeEvent() { return std::exchange(event_, false); }
  void takeFinished(std::vector<std::pair<Initiator*, Completion>>& into) { into.swap(finished_); }

  // Why the device is BROKEN, or null.
  const char* broken() const { return broken_; }
  bool blocked() const { return blocked_; }
  size_t inFlight() const { return inFlight_.size(); }
  size_t waiting() const { return waiting_.size(); }
  // Ids in use: in flight, expired, or kept.
  size_t idsInUse() const { return ids_.count() - 1; }
  size_t blocksInUse() const { return blocks_.count(); }
  size_t unfinished() const { return inFlight_.size() + waiting_.size() + held_.size(); }
  const KernelStats& stats() const { return stats_; }
  uint32_t ringSize() const { return ringSize_; }
  uint32_t head() const { return head_; }
  // Where the kernel has got to in taking completions.
  uint32_t cleaned() const { return cleaned_; }
  size_t dataOffset() const { return dataOffset_; }

 private:
  enum class Placed { onRing, waiting, busy, unreachable, tooBig, noRoom, noId, removed };

  struct PendingTmr {
    Tmr type;
    std::vector<uint16_t> ids;
  };

  Placed place(Command& c, TimePoint now, bool mayExpose = true);
  void keepDataOut(Command& c);
  Placed waitForRoom(Command& c, TimePoint now);
  Milliseconds waitLimit() const;
  bool canExpose(Command& c);
  bool expose(Command& c);
  static void addRanges(Command& c, std::vector<Window::Range>& ranges);
  void conceal(Command& c);
  void concealFrom(Command& c, uint32_t position);
  void releaseMemory(Command& c);
  bool allocateBlocks(Command& c);
  void allocateRun(Command& c, size_t bytes);
  void releaseBlocks(Command& c);
  uint32_t countIovs(const Command& c, size_t firstBlock, size_t endBlock) const;
  size_t writeIovs(const Command& c, size_t firstBlock, size_t endBlock, size_t bytes, size_t at);
  void putIov(size_t at, size_t offset, size_t length);
  void scatter(const Command& c);
  void gather(Command& c, size_t firstBlock, size_t bytes);

  bool hasRingSpace(size_t bytes) const;
  // Puts a PAD if the entry would not fit before the ring's end; returns where the entry goes.
  uint32_t startEntry(size_t bytes);
  void publish(uint32_t bytes);
  bool placeTmr(const PendingTmr& tmr);

  bool takeCompletions();
  bool complete(Command& c, size_t at, bool keep);
  bool runTmrQueue();
  void runWaiting(bool fail, TimePoint now);
  void breakDevice(const char* why);

  void expire(Command& c);
  void expireWaiting(Command& c);
  void refuse(Command& c, Placed why);
  void finish(Command& c, uint8_t status);
  void finishWithSense(Command& c, uint8_t key, uint8_t asc, uint8_t ascq);
  void finish(Command& c, Completion completion);
  Command& obtain();
  void recycle(Command& c);
  void forget(Command& c);

  Geometry geometry_;
  Attributes attributes_;
  SharedMemory memory_;
  uint32_t ringSize_;
  size_t dataOffset_;
  size_t blockBytes_;
  std::unique_ptr<BufferPool> pool_;
  std::unique_ptr<Window> window_;

  uint32_t head_ = 0;
  uint32_t cleaned_ = 0;
  const char* broken_ = nullptr;
  bool blocked_ = false;
  bool removed_ = false;
  bool event_ = false;

  Bitmap blocks_;
  uint32_t blockLimit_ = 0;  // grows as commands need it; the kernel's dbi_thresh
  uint32_t blockMax_ = 0;    // highest ever used since reclaim; the kernel's dbi_max
  Bitmap ids_;
  std::vector<Command*> byId_;

  CommandList inFlight_;
  CommandList waiting_;
  CommandList held_;  // by fault injection, not yet seen by the device
  std::vector<PendingTmr> waitingTmrs_;
  std::vector<std::pair<Initiator*, Completion>> finished_;

  std::vector<std::unique_ptr<Command>> commands_;
  std::vector<Command*> idle_;
  KernelStats stats_;
};

}  // namespace tcmu::sim

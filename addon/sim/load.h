// SPDX-License-Identifier: Apache-2.0
// An initiator that keeps `depth` commands of one size going, measures, and on wish verifies every
// byte. It runs where its completions arrive, mostly the device's thread: what finished in one
// batch is followed by as many new commands in one submission.
//
// Verification: the disk's range is cut into units of one command; no two commands on one unit are
// in flight together, each write has a version of its own in its bytes, and a read must give the
// version last written (a unit never written is not judged). A unit whose write failed is not
// judged again.
//
// Its buffers are in the device's pool where that has room: commands of whole pages go without
// copying. The device must outlive it.
//
// `ended` is called once, from whichever thread finished the last command; until then the generator
// must live, from then on it may go.
#pragma once

#include <atomic>
#include <functional>
#include <memory>
#include <mutex>
#include <vector>

#include "device.h"
#include "histogram.h"

namespace tcmu::sim {

struct LoadOptions {
  uint32_t depth = 1;
  uint32_t bytes = 4096;  // of one command; a multiple of blockSize
  uint32_t blockSize = 512;
  uint64_t firstBlock = 0;
  uint64_t blocks = 2048;  // of the range; at least depth commands must fit
  double readShare = 1;
  bool sequential = false;  // in order through the range, else at random
  bool verify = false;
  uint64_t count = 1000;  // commands to send
  Milliseconds duration = Milliseconds::max();
  uint64_t seed = 1;
};

struct LoadReport {
  uint64_t commands = 0;
  uint64_t reads = 0;
  uint64_t failed = 0;   // any status but GOOD
  uint64_t corrupt = 0;  // reads with wrong bytes
  double seconds = 0;
  Completion firstFailure{};
  Histogram latency;
};

class LoadGenerator : public Initiator {
 public:
  // @throws std::invalid_argument
  LoadGenerator(Device& device, const LoadOptions& options, std::function<void()> ended);

  void start();
  // No new commands; `ended` comes when the last has ended.
  void stop() { stopping_ = true; }
  // Once it has ended.
  const LoadReport& report() const { return report_; }

 private:
  struct Slot {
    std::unique_ptr<uint8_t[], std::function<void(uint8_t*)>> buffer;
    uint64_t unit = 0;
    bool read = false;
    std::array<uint8_t, 10> cdb{};
    TimePoint started;
  };

  void finished(const Completion& completion) override;
  void batchEnd() override;
  void judge(Slot& slot, const Completion& completion);
  // Fills the slot with the next command. False: no more.
  bool next(uint32_t index);
  void pump();
  uint64_t random();
  static uint64_t word(uint64_t unit, uint32_t version, size_t at);

  Device& device_;
  const LoadOptions options_;
  const std::function<void()> ended_;
  std::atomic<bool> stopping_ = false;

  std::mutex lock_;  // guards the rest
  std::vector<Slot> slots_;
  std::vector<uint32_t> free_;
  std::vector<uint32_t> versions_;  // by unit, with verify; 0: not known
  std::vector<bool> busy_;          // by unit
  uint64_t units_;
  uint64_t position_ = 0;
  uint64_t sent_ = 0;
  uint32_t inFlight_ = 0;
  uint32_t nextVersion_ = 1;
  uint64_t randomState_;
  bool pumping_ = false;
  bool over_ = false;
  TimePoint begun_;
  LoadReport report_;
};

}  // namespace tcmu::sim

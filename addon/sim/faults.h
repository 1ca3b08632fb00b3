// SPDX-License-Identifier: Apache-2.0
// Seeded decisions of fault injection. Each kind of fault draws from a sequence of its own, so that
// the n-th decision of a kind is the same in every run with the same seed.
#pragma once

#include <cstdint>

#include "command.h"

namespace tcmu::sim {

struct FaultOptions {
  uint64_t seed = 1;
  double holdCommand = 0;  // probability that a command reaches the device late: delay, reordering
  double lateWakeup = 0;   // that a wake-up comes late
  double lostWakeup = 0;   // that it never comes; the next one makes up for it
  double spuriousWakeup = 0;  // that one comes with nothing new
  Milliseconds maxDelay{10};
};

class Faults {
 public:
  explicit Faults(const FaultOptions& options = {}) : options_(options) {
    for (uint64_t i = 0; i < kKinds; i++) state_[i] = options.seed * kKinds + i;
  }

  // When a command is to reach the device; `now` for at once.
  TimePoint holdUntil(TimePoint now) { return delayed(kHold, options_.holdCommand, now); }
  bool loseWakeup() { return roll(kLost, options_.lostWakeup); }
  TimePoint wakeAt(TimePoint now) { return delayed(kLate, options_.lateWakeup, now); }
  // When to wake once more for nothing; TimePoint::max() for not at all.
  TimePoint spuriousAt(TimePoint now) {
    return roll(kSpurious, options_.spuriousWakeup) ? now + delay(kSpurious) : TimePoint::max();
  }

 private:
  enum Kind : uint64_t { kHold, kLate, kLost, kSpurious, kKinds };

  // splitmix64 (public domain, Vigna).
  uint64_t next(Kind kind) {
    uint64_t z = state_[kind] += 0x9e3779b97f4a7c15;
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9;
    z = (z ^ (z >> 27)) * 0x94d049bb133111eb;
    return z ^ (z >> 31);
  }
  bool roll(Kind kind, double probability) {
    return probability > 0 && static_cast<double>(next(kind) >> 11) * 0x1p-53 < probability;
  }
  Clock::duration delay(Kind kind) {
    const auto range = static_cast<uint64_t>(Clock::duration(options_.maxDelay).count());
    return Clock::duration(range ? static_cast<int64_t>(next(kind) % range) : 0);
  }
  TimePoint delayed(Kind kind, double probability, TimePoint now) {
    return roll(kind, probability) ? now + delay(kind) : now;
  }

  FaultOptions options_;
  uint64_t state_[kKinds];
};

}  // namespace tcmu::sim

// SPDX-License-Identifier: Apache-2.0
// What travels through the simulated kernel: a request from an initiator, the command it becomes,
// and the completion that goes back.
//
// Memory: the buffers of a request belong to the initiator. Data-In must stay valid and unread until
// the completion is delivered; Data-Out is needed only during submit(), but until the completion when
// it is the device's pool's.
#pragma once

#include <array>
#include <chrono>
#include <cstdint>
#include <span>
#include <vector>

#include "abi.h"
#include "window.h"

namespace tcmu::sim {

using Clock = std::chrono::steady_clock;
using TimePoint = Clock::time_point;
using Milliseconds = std::chrono::milliseconds;

// Longest CDB there is (SPC-5 4.2.3: variable length, 8 + 252).
inline constexpr size_t kMaxCdb = 260;

struct Completion {
  uint64_t tag;
  uint8_t status;
  bool hasSense;
  uint32_t dataBytes;  // of Data-In, valid for the initiator
  uint32_t residual;   // underflow reported by READ_LEN
  std::array<uint8_t, entry::kSenseBytes> sense;
};

// Where completions go. Called without any lock, on whichever thread finished the command.
class Initiator {
 public:
  virtual ~Initiator() = default;
  virtual void finished(const Completion& completion) = 0;
  // After the last finished() of a batch.
  virtual void batchEnd() = 0;
};

struct Request {
  uint64_t tag;
  Initiator* initiator;
  std::span<const uint8_t> cdb;
  std::span<const uint8_t> dataOut;
  std::span<uint8_t> dataIn;
  // Data-Out and Data-In both; otherwise at most one of them is used.
  bool bidirectional = false;
};

struct Command {
  enum class State : uint8_t { idle, staged, waiting, inFlight, expired, kept };

  Command* previous = nullptr;
  Command* next = nullptr;
  State state = State::idle;
  bool aborted = false;
  bool bidirectional = false;
  bool zeroCopy = false;  // its pages are in the window instead of in data blocks
  bool concealed = false;
  uint16_t id = 0;  // 0: not on the ring
  uint16_t cdbBytes = 0;
  uint32_t bidiBlocks = 0;  // the last ones of `blocks`
  uint64_t tag = 0;
  Initiator* initiator = nullptr;
  std::span<const uint8_t> dataOut;
  std::span<uint8_t> dataIn;
  std::vector<uint8_t> ownDataOut;  // dataOut, once the command has to wait
  std::vector<uint32_t> blocks;
  Window::Range windowOut{};  // with zeroCopy
  Window::Range windowIn{};
  TimePoint deadline = TimePoint::max();
  std::array<uint8_t, kMaxCdb> cdb;

  // The kernel's se_cmd data_length: Data-Out of a bidirectional command.
  size_t dataBytes() const {
    return dataOut.empty() && !bidirectional ? dataIn.size() : dataOut.size();
  }
  bool reads() const { return !bidirectional && dataOut.empty() && !dataIn.empty(); }
};

// Commands in order, each in at most one list.
class CommandList {
 public:
  bool empty() const { return first_ == nullptr; }
  size_t size() const { return size_; }
  Command* first() const { return first_; }

  void pushBack(Command& c) {
    c.previous = last_;
    c.next = nullptr;
    (last_ ? last_->next : first_) = &c;
    last_ = &c;
    size_++;
  }

  void remove(Command& c) {
    (c.previous ? c.previous->next : first_) = c.next;
    (c.next ? c.next->previous : last_) = c.previous;
    c.previous = c.next = nullptr;
    size_--;
  }

  // Calls `f` for each; `f` may remove the one it is called with.
  template <class F>
  void each(F f) {
    for (Command* c = first_; c;) {
      Command* next = c->next;
      f(*c);
      c = next;
    }
  }

 private:
  Command* first_ = nullptr;
  Command* last_ = nullptr;
  size_t size_ = 0;
};

}  // namespace tcmu::sim

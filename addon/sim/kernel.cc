// SPDX-License-Identifier: Apache-2.0
#include "kernel.h"

#include <algorithm>
#include <cstring>
#include <stdexcept>
#include <system_error>

namespace tcmu::sim {

namespace {

constexpr uint32_t kIdLimit = 65536;
// Above it, memory of a command that once was large is given back.
constexpr size_t kKeptCapacity = 1024;

size_t roundUp(size_t value, size_t to) { return (value + to - 1) / to * to; }
size_t divideUp(size_t value, size_t by) { return (value + by - 1) / by; }

const Geometry& checked(const Geometry& g) {
  if (g.ringBytes % kPage || g.ringBytes < kPage || g.ringBytes > (size_t{1} << 31))
    throw std::invalid_argument("ring size must be a multiple of 4096, at most 2 GiB");
  if (g.pagesPerBlock < 1 || g.pagesPerBlock > 1u << 18)
    throw std::invalid_argument("pages per block must be 1 to 262144");
  if (g.zeroCopy && (g.windowBytes % kPage || !g.windowBytes || g.windowBytes > size_t{1} << 40))
    throw std::invalid_argument("zero-copy window must be a multiple of 4096, at most 1 TiB");
  if (g.dataBytes % kPage || g.dataBytes < g.pagesPerBlock * kPage ||
      g.dataBytes > (size_t{1} << 40))
    throw std::invalid_argument(
        "data area must be a multiple of 4096, at least one block, at most 1 TiB");
  return g;
}

// SPC-5 4.2.5.1: the length that the group code of the operation code implies.
size_t cdbBytes(std::span<const uint8_t> cdb) {
  static constexpr uint8_t bytes[8] = {6, 10, 10, 12, 16, 12, 10, 10};
  if (cdb.empty()) return 6;
  if (cdb[0] == 0x7f) return (cdb.size() > 7 ? cdb[7] : 0) + size_t{8};
  return bytes[cdb[0] >> 5];
}

}  // namespace

Kernel::Kernel(const Geometry& geometry)
    : geometry_(checked(geometry)),
      memory_(
          geometry.ringBytes + geometry.dataBytes + (geometry.zeroCopy ? geometry.windowBytes : 0),
          geometry.ringBytes),
      ringSize_(static_cast<uint32_t>(geometry.ringBytes - mailbox::kBytes)),
      dataOffset_(geometry.ringBytes),
      blockBytes_(geometry.pagesPerBlock * kPage),
      blocks_(static_cast<uint32_t>(geometry.dataBytes / blockBytes_)),
      ids_(kIdLimit) {
  ids_.set(0);
  memory_.put<uint16_t>(mailbox::kVersion, mailbox::kVersionValue);
  uint16_t capabilities = geometry_.capabilities;
  if (geometry_.zeroCopy) {
    const size_t offset = geometry_.ringBytes + geometry_.dataBytes;
    pool_ = std::make_unique<BufferPool>(geometry_.windowBytes);
    window_ = std::make_unique<Window>(memory_.fd(), pool_->fd(), offset, geometry_.windowBytes);
    capabilities &= static_cast<uint16_t>(~mailbox::kKeepBuffer);
    capabilities |= mailbox::kZeroCopy | mailbox::kKeepBufferPerCommand;
    memory_.put<uint64_t>(mailbox::kWindowOffset, offset);
    memory_.put<uint64_t>(mailbox::kWindowBytes, geometry_.windowBytes);
    attributes_.commandTimeout = Milliseconds{0};
  }
  memory_.put<uint16_t>(mailbox::kFlags, capabilities);
  memory_.put<uint32_t>(mailbox::kRingOffset, mailbox::kBytes);
  memory_.put<uint32_t>(mailbox::kRingSize, ringSize_);
}

// --- submission ---

void Kernel::submit(const Request& request, TimePoint now, TimePoint holdUntil) {
  Command& c = obtain();
  c.tag = request.tag;
  c.initiator = request.initiator;
  c.bidirectional = request.bidirectional;
  c.dataOut = request.dataOut;
  c.dataIn = request.dataIn;
  const size_t bytes = cdbBytes(request.cdb);
  if (removed_) return refuse(c, Placed::removed);
  if (bytes > kMaxCdb) return refuse(c, Placed::tooBig);
  c.cdbBytes = static_cast<uint16_t>(bytes);
  c.cdb.fill(0);
  std::copy_n(request.cdb.begin(), std::min(bytes, request.cdb.size()), c.cdb.begin());

  if (holdUntil > now) {
    keepDataOut(c);
    c.state = Command::State::staged;
    c.deadline = holdUntil;
    held_.pushBack(c);
    return;
  }
  const Placed placed = place(c, now);
  if (placed == Placed::waiting)
    keepDataOut(c);
  else if (placed != Placed::onRing)
    refuse(c, placed);
}

// For a command that has to wait: its Data-Out is promised only during submit(), unless it is the
// pool's.
void Kernel::keepDataOut(Command& c) {
  if (pool_ && pool_->offsetOf(c.dataOut)) return;
  c.ownDataOut.assign(c.dataOut.begin(), c.dataOut.end());
  c.dataOut = c.ownDataOut;
}

Kernel::Placed Kernel::place(Command& c, TimePoint now, bool mayExpose) {
  if (blocked_) return Placed::busy;
  if (broken_) return Placed::unreachable;
  if (!waiting_.empty()) return waitForRoom(c, now);

  const size_t dataBytes = c.dataBytes();
  c.zeroCopy = mayExpose && window_ && canExpose(c);
  c.bidiBlocks = 0;
  if (!c.zeroCopy) {
    if (c.bidirectional)
      c.bidiBlocks = static_cast<uint32_t>(divideUp(c.dataIn.size(), blockBytes_));
    if (divideUp(dataBytes, blockBytes_) + c.bidiBlocks > blocks_.size()) return Placed::tooBig;
    if (!allocateBlocks(c)) return waitForRoom(c, now);
  }

  const size_t bidiStart = c.blocks.size() - c.bidiBlocks;
  const uint32_t iovs = c.zeroCopy ? 1 : countIovs(c, 0, bidiStart);
  const uint32_t bidiIovs = c.zeroCopy ? c.bidirectional : countIovs(c, bidiStart, c.blocks.size());
  const size_t base =
      std::max(entry::kIov + entry::kIovBytes * (iovs + bidiIovs), entry::kMinBytes);
  const size_t bytes = base + roundUp(c.cdbBytes, entry::kAlign);
  if (bytes > ringSize_ / 2) {
    releaseMemory(c);
    return Placed::tooBig;
  }
  if (!hasRingSpace(bytes)) {
    releaseMemory(c);
    return waitForRoom(c, now);
  }
  const uint32_t id = ids_.lowestFree(kIdLimit);
  if (id == Bitmap::kNone) {
    releaseMemory(c);
    return Placed::noId;
  }
  if (c.zeroCopy && !expose(c)) {
    releaseMemory(c);
    return place(c, now, false);
  }
  ids_.set(id);
  if (id >= byId_.size()) byId_.resize(std::min<size_t>(kIdLimit, std::max(64u, id * 2)));
  byId_[id] = &c;
  c.id = static_cast<uint16_t>(id);

  const size_t at = mailbox::kBytes + startEntry(bytes);
  std::memset(memory_.at(at), 0, bytes);
  if (c.zeroCopy) {
    size_t iov = at + entry::kIov;
    for (const Window::Range& range : {c.windowOut, c.windowIn}) {
      if (range.bytes == 0) continue;
      putIov(iov, window_->offset() + range.offset, range.bytes);
      iov += entry::kIovBytes;
    }
  } else {
    if (!c.dataOut.empty()) scatter(c);
    const size_t iov = writeIovs(c, 0, bidiStart, dataBytes, at + entry::kIov);
    if (c.bidirectional) writeIovs(c, bidiStart, c.blocks.size(), c.dataIn.size(), iov);
  }
  memory_.put<uint32_t>(at + entry::kLengthAndOp, static_cast<uint32_t>(bytes) | entry::kCommand);
  memory_.put<uint16_t>(at + entry::kId, c.id);
  if (window_) {
    const int flags = !c.zeroCopy ? entry::kKeepBufferPossible
                                  : entry::kZeroCopy | entry::kDirectIo |
                                        (c.reads() ? entry::kDataIn : 0);
    memory_.put<uint8_t>(at + entry::kKernelFlags, static_cast<uint8_t>(flags));
  }
  memory_.put<uint32_t>(at + entry::kIovCount, iovs);
  memory_.put<uint32_t>(at + entry::kBidiIovCount, bidiIovs);
  memory_.put<uint64_t>(at + entry::kCdbOffset, at + base);
  std::memcpy(memory_.at(at + base), c.cdb.data(), c.cdbBytes);

  c.deadline =
      attributes_.commandTimeout.count() > 0 ? now + attributes_.commandTimeout : TimePoint::max();
  c.state = Command::State::inFlight;
  inFlight_.pushBack(c);
  publish(static_cast<uint32_t>(bytes));
  stats_.commands++;
  if (window_ && c.dataBytes() > 0) (c.zeroCopy ? stats_.exposed : stats_.copied)++;
  return Placed::onRing;
}

// --- zero copy ---

// Whether the command's memory is whole pages of the pool: finds them.
bool Kernel::canExpose(Command& c) {
  c.windowOut = c.windowIn = {};
  c.concealed = true;
  const size_t bytes = c.dataOut.size() + c.dataIn.size();
  if (bytes == 0 || bytes < attributes_.zeroCopyBytes) return false;
  const auto find = [this](std::span<const uint8_t> part, Window::Range& range) {
    if (part.empty()) return true;
    const auto offset = pool_->offsetOf(part);
    if (offset) range = {*offset, part.size()};
    return offset.has_value();
  };
  if (!find(c.dataOut, c.windowOut) || !find(c.dataIn, c.windowIn)) return false;
  return !c.bidirectional || (!c.dataOut.empty() && !c.dataIn.empty());
}

bool Kernel::expose(Command& c) {
  if (c.windowOut.bytes > 0 && !window_->expose(c.windowOut, false)) return false;
  if (c.windowIn.bytes > 0 && !window_->expose(c.windowIn, true)) {
    if (c.windowOut.bytes > 0) window_->conceal({&c.windowOut, 1});
    return false;
  }
  c.concealed = false;
  if (attributes_.scrub && !c.dataIn.empty()) {
    std::memset(c.dataIn.data(), 0, c.dataIn.size());
    stats_.scrubbed += c.dataIn.size();
  }
  return true;
}

void Kernel::addRanges(Command& c, std::vector<Window::Range>& ranges) {
  if (std::exchange(c.concealed, true)) return;
  for (const Window::Range& range : {c.windowOut, c.windowIn})
    if (range.bytes > 0) ranges.push_back(range);
}

void Kernel::conceal(Command& c) {
  std::vector<Window::Range> ranges;
  addRanges(c, ranges);
  window_->conceal(ranges);
}

// Conceals the pages of a completed command, before its initiator hears of it, and with them those
// of up to 64 completed after it: only their ids are looked at, and whichever proves not to be
// completed has lost its pages by its handler's own doing.
void Kernel::concealFrom(Command& c, uint32_t position) {
  std::vector<Window::Range> ranges;
  addRanges(c, ranges);
  const uint32_t tail = memory_.loadAcquire(mailbox::kTail);
  for (int n = 0; n < 64 && position != tail; n++) {
    const size_t at = mailbox::kBytes + position;
    const uint32_t header = memory_.get<uint32_t>(at + entry::kLengthAndOp);
    const uint32_t length = header & ~entry::kOpMask;
    if (length < entry::kHeaderBytes || length > ringSize_ - position) break;
    if ((header & entry::kOpMask) == entry::kCommand) {
      const uint16_t id = memory_.get<uint16_t>(at + entry::kId);
      Command* other = id < byId_.size() ? byId_[id] : nullptr;
      if (other && other->zeroCopy) addRanges(*other, ranges);
    }
    position = (position + length) % ringSize_;
  }
  window_->conceal(ranges);
}

Kernel::Placed Kernel::waitForRoom(Command& c, TimePoint now) {
  const Milliseconds limit = waitLimit();
  if (limit.count() == 0) return Placed::noRoom;
  c.deadline = now + limit;
  c.state = Command::State::waiting;
  waiting_.pushBack(c);
  stats_.waited++;
  return Placed::waiting;
}

Milliseconds Kernel::waitLimit() const {
  if (attributes_.queueFullTimeout.count() >= 0) return attributes_.queueFullTimeout;
  return attributes_.commandTimeout.count() > 0 ? attributes_.commandTimeout : Milliseconds{30000};
}

bool Kernel::allocateBlocks(Command& c) {
  const size_t dataBytes = c.dataBytes();
  const size_t needed = divideUp(dataBytes, blockBytes_) + c.bidiBlocks;
  if (needed == 0) return true;
  const size_t free = blockLimit_ - blocks_.count();
  if (free < needed) {
    if (blocks_.size() - blocks_.count() < needed) return false;
    blockLimit_ = static_cast<uint32_t>(std::min<size_t>(blockLimit_ + needed, blocks_.size()));
  }
  try {
    allocateRun(c, dataBytes);
    if (c.bidirectional) allocateRun(c, c.dataIn.size());
    return true;
  } catch (const std::system_error&) {  // no memory: wait for some, as the kernel does
    releaseBlocks(c);
    return false;
  }
}

void Kernel::allocateRun(Command& c, size_t bytes) {
  while (bytes > 0) {
    const size_t part = std::min(bytes, blockBytes_);
    const uint32_t block = blocks_.lowestFree(blockLimit_);
    const size_t end = dataOffset_ + block * blockBytes_ + roundUp(part, kPage);
    if (end > memory_.present()) memory_.setPresent(end);
    blocks_.set(block);
    c.blocks.push_back(block);
    blockMax_ = std::max(blockMax_, block);
    bytes -= part;
  }
}

void Kernel::releaseMemory(Command& c) {
  if (c.zeroCopy) conceal(c);
  c.zeroCopy = false;
  releaseBlocks(c);
}

void Kernel::releaseBlocks(Command& c) {
  for (const uint32_t block : c.blocks) {
    blocks_.clear(block);
    if (geometry_.poison >= 0) {
      const size_t at = dataOffset_ + block * blockBytes_;
      std::memset(memory_.at(at), geometry_.poison, std::min(blockBytes_, memory_.present() - at));
    }
  }
  c.blocks.clear();
}

uint32_t Kernel::countIovs(const Command& c, size_t firstBlock, size_t endBlock) const {
  uint32_t count = 0;
  for (size_t i = firstBlock; i < endBlock; i++)
    if (i == firstBlock || c.blocks[i] != c.blocks[i - 1] + 1) count++;
  return count;
}

size_t Kernel::writeIovs(const Command& c, size_t firstBlock, size_t endBlock, size_t bytes,
                         size_t at) {
  for (size_t i = firstBlock; i < endBlock;) {
    const size_t start = i;
    size_t length = 0;
    do {
      const size_t part = std::min(bytes, blockBytes_);
      length += part;
      bytes -= part;
      i++;
    } while (i < endBlock && c.blocks[i] == c.blocks[i - 1] + 1);
    putIov(at, dataOffset_ + c.blocks[start] * blockBytes_, length);
    at += entry::kIovBytes;
  }
  return at;
}

void Kernel::putIov(size_t at, size_t offset, size_t length) {
  memory_.put<uint64_t>(at, offset);
  memory_.put<uint64_t>(at + 8, length);
}

void Kernel::scatter(const Command& c) {
  std::span<const uint8_t> rest = c.dataOut;
  for (size_t i = 0; !rest.empty(); i++) {
    const size_t part = std::min(rest.size(), blockBytes_);
    std::memcpy(memory_.at(dataOffset_ + c.blocks[i] * blockBytes_), rest.data(), part);
    rest = rest.subspan(part);
  }
}

void Kernel::gather(Command& c, size_t firstBlock, size_t bytes) {
  std::span<uint8_t> rest = c.dataIn.first(std::min(bytes, c.dataIn.size()));
  for (size_t i = firstBlock; !rest.empty(); i++) {
    const size_t part = std::min(rest.size(), blockBytes_);
    std::memcpy(rest.data(), memory_.at(dataOffset_ + c.blocks[i] * blockBytes_), part);
    rest = rest.subspan(part);
  }
}

// --- the ring ---

bool Kernel::hasRingSpace(size_t bytes) const {
  const size_t toEnd = ringSize_ - head_;
  const size_t needed = toEnd >= bytes ? bytes : bytes + toEnd;
  const size_t used = head_ >= cleaned_ ? head_ - cleaned_ : ringSize_ - cleaned_ + head_;
  return ringSize_ - used - 1 >= needed;
}

uint32_t Kernel::startEntry(size_t bytes) {
  const uint32_t toEnd = ringSize_ - head_;
  if (toEnd < bytes) {
    const size_t at = mailbox::kBytes + head_;
    memory_.put<uint32_t>(at + entry::kLengthAndOp, toEnd | entry::kPad);
    memory_.put<uint32_t>(at + entry::kId, 0);  // id and both flag bytes
    stats_.pads++;
    head_ = 0;
    memory_.storeRelease(mailbox::kHead, head_);
  }
  return head_;
}

void Kernel::publish(uint32_t bytes) {
  head_ = (head_ + bytes) % ringSize_;
  memory_.storeRelease(mailbox::kHead, head_);
  event_ = true;
}

bool Kernel::placeTmr(const PendingTmr& tmr) {
  if (broken_) return true;  // dropped
  const size_t bytes = roundUp(entry::kTmrIds + 2 * tmr.ids.size(), entry::kAlign);
  if (!hasRingSpace(bytes)) return false;
  const size_t at = mailbox::kBytes + startEntry(bytes);
  std::memset(memory_.at(at), 0, bytes);
  memory_.put<uint32_t>(at + entry::kLengthAndOp,
                        static_cast<uint32_t>(bytes) | entry::kTaskManagement);
  memory_.put<uint8_t>(at + entry::kTmrType, static_cast<uint8_t>(tmr.type));
  memory_.put<uint32_t>(at + entry::kTmrCount, static_cast<uint32_t>(tmr.ids.size()));
  for (size_t i = 0; i < tmr.ids.size(); i++)
    memory_.put<uint16_t>(at + entry::kTmrIds + 2 * i, tmr.ids[i]);
  publish(static_cast<uint32_t>(bytes));
  stats_.tmrs++;
  return true;
}

void Kernel::breakDevice(const char* why) { broken_ = why; }

void Kernel::doorbell(TimePoint now) {
  if (takeCompletions()) runWaiting(false, now);
}

// True when room was freed and no task management entry still waits for it.
bool Kernel::takeCompletions() {
  if (broken_) return false;
  bool freed = false;
  size_t walked = 0;
  while (cleaned_ != memory_.loadAcquire(mailbox::kTail)) {
    const size_t at = mailbox::kBytes + cleaned_;
    const size_t toEnd = ringSize_ - cleaned_;
    const uint32_t header = memory_.get<uint32_t>(at + entry::kLengthAndOp);
    const uint32_t length = header & ~entry::kOpMask;
    const uint32_t op = header & entry::kOpMask;
    walked += length;
    if (length < entry::kHeaderBytes || length > toEnd || walked > ringSize_) {
      breakDevice("cmd_tail or an entry's length is not what the kernel wrote");
      return false;
    }
    freed = true;
    if (op == entry::kPad || op == entry::kTaskManagement) {
      cleaned_ = (cleaned_ + length) % ringSize_;
      continue;
    }
    if (length < entry::kMinBytes) {
      breakDevice("an entry's length is not what the kernel wrote");
      return false;
    }
    const uint16_t id = memory_.get<uint16_t>(at + entry::kId);
    Command* c = id < byId_.size() ? byId_[id] : nullptr;
    if (!c) {
      breakDevice("completion of a cmd_id that is not in flight");
      return false;
    }
    if (c->zeroCopy && !c->concealed) concealFrom(*c, cleaned_);
    // An initiator's pages can't be kept.
    const bool keep =
        !c->zeroCopy && (memory_.get<uint8_t>(at + entry::kUserFlags) & entry::kKeepBuffer);
    if (!complete(*c, at, keep)) break;
    cleaned_ = (cleaned_ + length) % ringSize_;
  }
  return freed && runTmrQueue();
}

// False: the device is broken.
bool Kernel::complete(Command& c, size_t at, bool keep) {
  if (c.state == Command::State::kept) {
    breakDevice("second completion of a cmd_id that was completed with KEEP_BUF");
    if (!keep) forget(c);
    return false;
  }
  if (c.state == Command::State::inFlight) {
    stats_.completions++;
    inFlight_.remove(c);
    const uint8_t flags = memory_.get<uint8_t>(at + entry::kUserFlags);
    if (flags & entry::kUnknownOp) {
      stats_.unknownOps++;
      finishWithSense(c, 2, 0x08, 0);
    } else {
      Completion done{};
      done.status = memory_.get<uint8_t>(at + entry::kStatus);
      const size_t asked = c.dataBytes();
      size_t bytes = asked;
      const uint32_t readLength = memory_.get<uint32_t>(at + entry::kReadLength);
      const bool readLengthValid =
          c.reads() && (flags & entry::kReadLengthValid) && readLength != 0;
      if (readLengthValid) bytes = std::min<size_t>(bytes, readLength);
      const bool failed = done.status == status::kCheckCondition;
      if (failed) {
        done.hasSense = true;
        std::memcpy(done.sense.data(), memory_.at(at + entry::kSense), done.sense.size());
      }
      if (!c.zeroCopy && (!failed || readLengthValid)) {
        // Of a bidirectional command the kernel copies as much Data-In as there was Data-Out.
        if (c.bidirectional)
          gather(c, c.blocks.size() - c.bidiBlocks, asked);
        else if (c.reads())
          gather(c, 0, bytes);
      }
      if (done.status == status::kGood || (failed && readLengthValid)) {
        done.dataBytes = static_cast<uint32_t>(c.bidirectional ? c.dataIn.size()
                                               : c.reads()     ? bytes
                                                               : 0);
        if (readLengthValid) done.residual = static_cast<uint32_t>(asked - bytes);
      }
      finish(c, done);
    }
  }
  if (keep)
    c.state = Command::State::kept;
  else
    forget(c);
  return true;
}

bool Kernel::runTmrQueue() {
  size_t placed = 0;
  while (placed < waitingTmrs_.size() && placeTmr(waitingTmrs_[placed])) placed++;
  waitingTmrs_.erase(waitingTmrs_.begin(), waitingTmrs_.begin() + static_cast<long>(placed));
  return waitingTmrs_.empty();
}

void Kernel::runWaiting(bool fail, TimePoint now) {
  CommandList list = std::exchange(waiting_, {});
  while (Command* c = list.first()) {
    list.remove(*c);
    if (fail) {
      finish(*c, status::kBusy);
      recycle(*c);
      continue;
    }
    const Placed placed = place(*c, now);
    if (placed == Placed::waiting) {
      stats_.waited--;
      // place() gave it a new deadline, as the kernel does; the rest keep theirs.
      while (Command* rest = list.first()) {
        list.remove(*rest);
        waiting_.pushBack(*rest);
      }
    } else if (placed != Placed::onRing) {
      finishWithSense(*c, 2, 0x08, 0);
      recycle(*c);
    }
  }
}

// --- time ---

bool Kernel::setAttributes(const Attributes& attributes) {
  if (window_ && attributes.commandTimeout.count() != 0) return false;
  attributes_ = attributes;
  return true;
}

TimePoint Kernel::nextDeadline() const {
  // As the kernel's timers: the first of each queue decides when all of it is looked at.
  TimePoint next = TimePoint::max();
  for (const CommandList* list : {&inFlight_, &waiting_})
    if (const Command* c = list->first()) next = std::min(next, c->deadline);
  for (const Command* c = held_.first(); c; c = c->next) next = std::min(next, c->deadline);
  return next;
}

Milliseconds Kernel::shortestTimeout() const {
  Milliseconds shortest{30000};
  for (const Milliseconds timeout : {attributes_.commandTimeout, attributes_.queueFullTimeout})
    if (timeout.count() > 0) shortest = std::min(shortest, timeout);
  return shortest;
}

void Kernel::tick(TimePoint now) {
  std::vector<Command*> due;
  held_.each([&](Command& c) {
    if (c.deadline <= now) due.push_back(&c);
  });
  std::stable_sort(due.begin(), due.end(),
                   [](const Command* a, const Command* b) { return a->deadline < b->deadline; });
  for (Command* c : due) {
    held_.remove(*c);
    const Placed placed = place(*c, now);
    if (placed != Placed::onRing && placed != Placed::waiting) refuse(*c, placed);
  }
  if (attributes_.commandTimeout.count() > 0) {
    inFlight_.each([&](Command& c) {
      if (c.deadline <= now) expire(c);
    });
  }
  waiting_.each([&](Command& c) {
    if (c.deadline <= now) expireWaiting(c);
  });
}

bool Kernel::expireNow(const Initiator* initiator, uint64_t tag) {
  if (window_) return false;
  bool found = false;
  const auto matches = [&](const Command& c) {
    return !found && c.tag == tag && c.initiator == initiator;
  };
  inFlight_.each([&](Command& c) {
    if (!matches(c)) return;
    found = true;
    expire(c);
  });
  waiting_.each([&](Command& c) {
    if (!matches(c)) return;
    found = true;
    expireWaiting(c);
  });
  return found;
}

// Answered for the initiator; id, slot and blocks stay until the handler completes it.
void Kernel::expire(Command& c) {
  inFlight_.remove(c);
  if (c.zeroCopy) conceal(c);
  c.state = Command::State::expired;
  stats_.expired++;
  finishWithSense(c, 2, 0x08, 0);  // NOT READY, LOGICAL UNIT COMMUNICATION FAILURE
}

void Kernel::expireWaiting(Command& c) {
  waiting_.remove(c);
  stats_.expired++;
  finish(c, status::kTaskSetFull);
  recycle(c);
}

// --- task management and recovery ---

size_t Kernel::taskManagement(Tmr type, const Selector& affects) {
  PendingTmr tmr{type, {}};
  size_t count = 0;
  for (CommandList* list : {&held_, &waiting_}) {
    list->each([&](Command& c) {
      if (!affects(c)) return;
      count++;
      list->remove(c);
      finish(c, status::kTaskAborted);
      recycle(c);
    });
  }
  inFlight_.each([&](Command& c) {
    if (!affects(c)) return;
    count++;
    c.aborted = true;
    tmr.ids.push_back(c.id);
  });
  if (attributes_.tmrNotification && (!waitingTmrs_.empty() || !placeTmr(tmr)))
    waitingTmrs_.push_back(std::move(tmr));
  return count;
}

void Kernel::block(TimePoint now) {
  if (std::exchange(blocked_, true)) return;
  takeCompletions();
  runWaiting(true, now);
}

void Kernel::resetRing(int level, TimePoint now) {
  for (Command* c : byId_) {
    if (!c) continue;
    if (c->state == Command::State::inFlight) {
      inFlight_.remove(*c);
      if (level == 1)
        finish(*c, status::kBusy);
      else
        finishWithSense(*c, 2, 0x08, 0);
    }
    forget(*c);
  }
  head_ = cleaned_ = 0;
  memory_.storeRelease(mailbox::kTail, 0);
  memory_.storeRelease(mailbox::kHead, 0);
  broken_ = nullptr;
  waitingTmrs_.clear();
  stats_.resets++;
  runWaiting(false, now);
}

bool Kernel::freeKeptBuffer(uint16_t id, TimePoint now) {
  Command* c = id < byId_.size() ? byId_[id] : nullptr;
  if (!c || c->state != Command::State::kept) return false;
  forget(*c);
  if (waitingTmrs_.empty()) runWaiting(false, now);
  return true;
}

void Kernel::released(TimePoint now) {
  bool freed = false;
  for (Command* c : byId_) {
    if (!c || c->state != Command::State::kept) continue;
    forget(*c);
    freed = true;
  }
  if (freed && waitingTmrs_.empty()) runWaiting(false, now);
}

size_t Kernel::reclaim(TimePoint now) {
  doorbell(now);
  const uint32_t highest = blocks_.highest();
  if (highest == Bitmap::kNone) {
    blockLimit_ = blockMax_ = 0;
  } else if (highest < blockMax_) {
    blockLimit_ = highest + 1;
    blockMax_ = highest;
  } else {
    return 0;
  }
  const size_t before = memory_.present();
  memory_.setPresent(std::min(before, dataOffset_ + blockLimit_ * blockBytes_));
  return before - memory_.present();
}

void Kernel::failAll() {
  for (CommandList* list : {&held_, &waiting_}) {
    list->each([&](Command& c) {
      list->remove(c);
      finishWithSense(c, 2, 0x08, 0);
      recycle(c);
    });
  }
  inFlight_.each([&](Command& c) { expire(c); });
}

// --- ends ---

void Kernel::refuse(Command& c, Placed why) {
  switch (why) {
    case Placed::busy:
      finish(c, status::kBusy);
      break;
    case Placed::noRoom:
    case Placed::noId:
      finish(c, status::kTaskSetFull);
      break;
    case Placed::tooBig:
      finishWithSense(c, 5, 0x24, 0);  // INVALID FIELD IN CDB
      break;
    case Placed::removed:
      finishWithSense(c, 5, 0x25, 0);  // LOGICAL UNIT NOT SUPPORTED
      break;
    default:
      finishWithSense(c, 2, 0x08, 0);
  }
  recycle(c);
}

void Kernel::finish(Command& c, uint8_t status) {
  Completion done{};
  done.status = status;
  finish(c, done);
}

void Kernel::finishWithSense(Command& c, uint8_t key, uint8_t asc, uint8_t ascq) {
  Completion done{};
  done.status = status::kCheckCondition;
  done.hasSense = true;
  done.sense[0] = 0x70;  // SPC-5 4.4.3: current, fixed format
  done.sense[2] = key;
  done.sense[7] = 10;
  done.sense[12] = asc;
  done.sense[13] = ascq;
  finish(c, done);
}

void Kernel::finish(Command& c, Completion done) {
  if (c.aborted) {
    done = {};
    done.status = status::kTaskAborted;
  }
  done.tag = c.tag;
  finished_.emplace_back(c.initiator, done);
}

Command& Kernel::obtain() {
  if (idle_.empty()) {
    commands_.push_back(std::make_unique<Command>());
    idle_.push_back(commands_.back().get());
  }
  Command& c = *idle_.back();
  idle_.pop_back();
  return c;
}

// Gives up the id and the data blocks.
void Kernel::forget(Command& c) {
  byId_[c.id] = nullptr;
  ids_.clear(c.id);
  releaseMemory(c);
  recycle(c);
}

void Kernel::recycle(Command& c) {
  c.state = Command::State::idle;
  c.aborted = false;
  c.zeroCopy = false;
  c.id = 0;
  c.bidiBlocks = 0;
  c.dataOut = {};
  c.dataIn = {};
  if (c.ownDataOut.capacity() > 0) c.ownDataOut = {};
  if (c.blocks.capacity() > kKeptCapacity) c.blocks = {};
  idle_.push_back(&c);
}

}  // namespace tcmu::sim

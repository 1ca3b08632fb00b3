// SPDX-License-Identifier: Apache-2.0
#include "load.h"

#include <cstring>
#include <new>
#include <stdexcept>

namespace tcmu::sim {

LoadGenerator::LoadGenerator(Device& device, const LoadOptions& options,
                             std::function<void()> ended)
    : device_(device),
      options_(options),
      ended_(std::move(ended)),
      slots_(options.depth),
      randomState_(options.seed) {
  if (options.blockSize == 0 || options.bytes == 0 || options.bytes % options.blockSize)
    throw std::invalid_argument("a command's size must be a multiple of the block size, above 0");
  const uint64_t each = options.bytes / options.blockSize;
  if (each > 65535) throw std::invalid_argument("a command has at most 65535 blocks");
  units_ = options.blocks / each;
  if (options.depth == 0 || units_ < options.depth)
    throw std::invalid_argument("depth must be 1 or more, and as many commands must fit the range");
  if (options.firstBlock + options.blocks > uint64_t{1} << 32)
    throw std::invalid_argument("the range must end below block 2^32");
  busy_.resize(units_);
  if (options.verify) versions_.resize(units_);
  for (uint32_t i = options.depth; i-- > 0;) {
    BufferPool* pool = device.pool();
    const std::span<uint8_t> range = pool ? pool->allocate(options.bytes) : std::span<uint8_t>{};
    if (!range.empty()) {
      slots_[i].buffer = {range.data(), [pool, range](uint8_t*) { pool->free(range); }};
    } else {
      // Pages, as an initiator's memory is, and as the pool's: what is copied costs the same then.
      constexpr std::align_val_t kPages{kPage};
      slots_[i].buffer = {static_cast<uint8_t*>(operator new(options.bytes, kPages)),
                          [](uint8_t* memory) { operator delete(memory, kPages); }};
    }
    std::memset(slots_[i].buffer.get(), 0, options.bytes);
    free_.push_back(i);
  }
}

void LoadGenerator::start() {
  begun_ = Clock::now();
  pump();
}

void LoadGenerator::finished(const Completion& completion) {
  std::lock_guard guard(lock_);
  Slot& slot = slots_[completion.tag];
  report_.latency.add(static_cast<uint64_t>((Clock::now() - slot.started).count()));
  report_.commands++;
  if (slot.read) report_.reads++;
  if (completion.status != status::kGood && report_.failed++ == 0)
    report_.firstFailure = completion;
  judge(slot, completion);
  busy_[slot.unit] = false;
  free_.push_back(static_cast<uint32_t>(completion.tag));
  inFlight_--;
}

void LoadGenerator::judge(Slot& slot, const Completion& completion) {
  if (!options_.verify) return;
  const bool good = completion.status == status::kGood;
  if (!slot.read) {
    if (!good) versions_[slot.unit] = 0;  // the old bytes, the new ones, or some of each
    return;
  }
  const uint32_t version = versions_[slot.unit];
  if (!good || version == 0) return;
  uint64_t value;
  bool right = completion.dataBytes == options_.bytes;
  for (size_t at = 0; at + sizeof value <= options_.bytes; at += sizeof value) {
    std::memcpy(&value, slot.buffer.get() + at, sizeof value);
    right &= value == word(slot.unit, version, at);
  }
  if (!right) report_.corrupt++;
}

void LoadGenerator::batchEnd() { pump(); }

// Sends as long as there is something to send; one thread at a time, never nested.
void LoadGenerator::pump() {
  {
    std::lock_guard guard(lock_);
    if (pumping_) return;
    pumping_ = true;
  }
  std::vector<Request> batch;
  std::function<void()> finish;
  for (;;) {
    batch.clear();
    {
      std::lock_guard guard(lock_);
      while (!free_.empty() && next(free_.back())) {
        const uint32_t index = free_.back();
        free_.pop_back();
        inFlight_++;
        Slot& slot = slots_[index];
        const std::span<uint8_t> data{slot.buffer.get(), options_.bytes};
        batch.push_back({.tag = index,
                         .initiator = this,
                         .cdb = slot.cdb,
                         .dataOut = slot.read ? std::span<uint8_t>{} : data,
                         .dataIn = slot.read ? data : std::span<uint8_t>{}});
      }
      if (batch.empty()) {
        pumping_ = false;
        if (inFlight_ > 0 || over_) return;
        report_.seconds = std::chrono::duration<double>(Clock::now() - begun_).count();
        over_ = true;
        finish = ended_;
      }
    }
    if (finish) break;
    device_.submit(batch);
  }
  finish();  // we may be gone when it returns
}

bool LoadGenerator::next(uint32_t index) {
  if (stopping_ || sent_ == options_.count) return false;
  Slot& slot = slots_[index];
  slot.started = Clock::now();
  if (options_.duration != Milliseconds::max() && slot.started - begun_ >= options_.duration)
    return false;
  uint64_t unit = options_.sequential ? position_++ % units_ : random() % units_;
  while (busy_[unit]) unit = (unit + 1) % units_;
  busy_[unit] = true;
  slot.unit = unit;
  slot.read = static_cast<double>(random() >> 11) * 0x1p-53 < options_.readShare;
  // A read must write every byte: what the last one left may be the right answer by chance.
  if (slot.read && options_.verify) std::memset(slot.buffer.get(), 0xa5, options_.bytes);
  if (!slot.read && options_.verify) {
    const uint32_t version = versions_[unit] = nextVersion_++;
    for (size_t at = 0; at + sizeof(uint64_t) <= options_.bytes; at += sizeof(uint64_t)) {
      const uint64_t value = word(unit, version, at);
      std::memcpy(slot.buffer.get() + at, &value, sizeof value);
    }
  }
  const uint32_t each = options_.bytes / options_.blockSize;
  const uint64_t lba = options_.firstBlock + unit * each;
  slot.cdb[0] = slot.read ? 0x28 : 0x2a;  // READ (10), WRITE (10)
  for (size_t i = 0; i < 4; i++) slot.cdb[2 + i] = static_cast<uint8_t>(lba >> (24 - 8 * i));
  slot.cdb[7] = static_cast<uint8_t>(each >> 8);
  slot.cdb[8] = static_cast<uint8_t>(each);
  sent_++;
  return true;
}

// splitmix64 (public domain, Vigna).
uint64_t LoadGenerator::random() {
  uint64_t z = randomState_ += 0x9e3779b97f4a7c15;
  z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9;
  z = (z ^ (z >> 27)) * 0x94d049bb133111eb;
  return z ^ (z >> 31);
}

uint64_t LoadGenerator::word(uint64_t unit, uint32_t version, size_t at) {
  return (unit * 0x9e3779b97f4a7c15 ^ version * 0xbf58476d1ce4e5b9) + at * 0x94d049bb133111eb;
}

}  // namespace tcmu::sim

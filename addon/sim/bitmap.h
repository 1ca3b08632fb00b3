// SPDX-License-Identifier: Apache-2.0
// A set of numbers 0..size-1 that hands out the lowest free one, as the kernel's allocators do.
#pragma once

#include <bit>
#include <cstdint>
#include <vector>

namespace tcmu::sim {

class Bitmap {
 public:
  static constexpr uint32_t kNone = UINT32_MAX;

  explicit Bitmap(uint32_t size) : size_(size), words_((size + 63) / 64) {}

  uint32_t size() const { return size_; }
  uint32_t count() const { return count_; }
  bool test(uint32_t i) const { return words_[i / 64] >> (i % 64) & 1; }

  // Lowest number below `limit` that is not in the set, or kNone.
  uint32_t lowestFree(uint32_t limit) {
    while (hint_ < words_.size() && ~words_[hint_] == 0) hint_++;
    if (hint_ == words_.size()) return kNone;
    const uint32_t i = static_cast<uint32_t>(hint_ * 64) + std::countr_one(words_[hint_]);
    return i < limit && i < size_ ? i : kNone;
  }

  void set(uint32_t i) {
    words_[i / 64] |= uint64_t{1} << (i % 64);
    count_++;
  }

  void clear(uint32_t i) {
    words_[i / 64] &= ~(uint64_t{1} << (i % 64));
    count_--;
    if (i / 64 < hint_) hint_ = i / 64;
  }

  // Highest number in the set, or kNone.
  uint32_t highest() const {
    for (size_t w = words_.size(); w-- > 0;)
      if (words_[w]) return static_cast<uint32_t>(w * 64 + 63 - std::countl_zero(words_[w]));
    return kNone;
  }

 private:
  uint32_t size_;
  uint32_t count_ = 0;
  size_t hint_ = 0;  // every word before it is full
  std::vector<uint64_t> words_;
};

}  // namespace tcmu::sim

// SPDX-License-Identifier: Apache-2.0
// Latencies in nanoseconds, within 1.6 %: 64 buckets for each doubling.
#pragma once

#include <algorithm>
#include <array>
#include <bit>
#include <cmath>
#include <cstdint>

namespace tcmu::sim {

class Histogram {
 public:
  void add(uint64_t nanoseconds) {
    buckets_[bucket(nanoseconds)]++;
    count_++;
    sum_ += nanoseconds;
    max_ = std::max(max_, nanoseconds);
  }
  uint64_t count() const { return count_; }
  uint64_t max() const { return max_; }
  double mean() const {
    return count_ ? static_cast<double>(sum_) / static_cast<double>(count_) : 0;
  }
  // The least value that `share` of all are not above, to the bucket's upper end.
  uint64_t percentile(double share) const {
    const auto wanted = static_cast<uint64_t>(std::llround(share * static_cast<double>(count_)));
    uint64_t seen = 0;
    for (size_t i = 0; i < buckets_.size(); i++) {
      seen += buckets_[i];
      if (seen >= wanted && seen > 0) return std::min(upper(i), max_);
    }
    return max_;
  }

 private:
  static constexpr unsigned kBits = 6;
  static constexpr size_t kLinear = size_t{1} << kBits;

  static size_t bucket(uint64_t value) {
    if (value < kLinear) return value;
    const unsigned shift = static_cast<unsigned>(std::bit_width(value)) - kBits - 1;
    return (size_t{shift} + 1) * kLinear + (value >> shift) - kLinear;
  }
  static uint64_t upper(size_t bucket) {
    if (bucket < kLinear) return bucket;
    const unsigned shift = static_cast<unsigned>(bucket / kLinear) - 1;
    return ((bucket % kLinear + kLinear + 1) << shift) - 1;
  }

  std::array<uint64_t, (64 - kBits + 1) * kLinear> buckets_{};
  uint64_t count_ = 0;
  uint64_t sum_ = 0;
  uint64_t max_ = 0;
};

}  // namespace tcmu::sim

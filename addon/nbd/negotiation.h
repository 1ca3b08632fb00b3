// SPDX-License-Identifier: Apache-2.0
// The handshake with one client, from the greeting to transmission: a state machine over bytes, with
// no socket in it. One message is taken at a time; what to answer is appended to `out`.
//
// Nothing a client sends is trusted: lengths are checked before they are used, an option may have at
// most kOptionLimit bytes, and nothing agreed in plain text survives STARTTLS.
#pragma once

#include <optional>
#include <span>
#include <vector>

#include "export.h"

namespace tcmu::nbd {

class Negotiation {
 public:
  enum class Step {
    incomplete,    // more bytes are needed
    taken,         // one message was taken
    describe,      // taken; it goes on with `described`
    tls,           // taken; send `out`, then begin anew with `secured` inside TLS
    transmission,  // the handshake is over
    end,           // send `out`, then close
  };
  static constexpr size_t kOptionLimit = 64 << 10;

  explicit Negotiation(const Config& config) : config_(config) {}

  void greet(std::vector<uint8_t>& out) const;
  // `in` is advanced past what was taken.
  Step take(std::span<const uint8_t>& in, std::vector<uint8_t>& out);
  // The answer to `describe`; without a disk the export can't be had now.
  Step described(const std::optional<Disk>& disk, std::vector<uint8_t>& out);
  // The connection is inside TLS from now on.
  void secured();

  // Once in transmission.
  const Disk& disk() const { return disk_; }
  bool structured() const { return structured_; }
  bool allocationContext() const { return allocation_; }

 private:
  struct Wanted {
    Option option;
    bool blockSize = false;
    bool name = false;
    bool description = false;
  };

  Step takeOption(Option option, std::span<const uint8_t> data, std::vector<uint8_t>& out);
  Step selectExport(Option option, std::span<const uint8_t> data, std::vector<uint8_t>& out);
  Step metaContext(Option option, std::span<const uint8_t> data, std::vector<uint8_t>& out);
  bool isOurs(std::string_view name) const { return name.empty() || name == config_.name; }
  uint16_t flags() const;

  const Config& config_;
  bool greeted_ = false;  // the client's flags have come
  bool noZeroes_ = false;
  bool secure_ = false;
  bool structured_ = false;
  bool allocation_ = false;
  Wanted wanted_{};
  Disk disk_;
};

}  // namespace tcmu::nbd

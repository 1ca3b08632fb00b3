// SPDX-License-Identifier: Apache-2.0
// One NBD request and the SCSI commands it takes: none (a refusal), one, or several one after the
// other. No socket, no ring.
//
//   check()  may refuse the request at once
//   next()   the next command, or nothing: all is done
//   ended()  judges the completion of the last one
//
// Its memory (`buffer`) belongs to the simulated kernel between next() and ended().
#pragma once

#include <array>
#include <memory>
#include <span>
#include <string>
#include <vector>

#include "../sim/device.h"
#include "export.h"

namespace tcmu::nbd {

// Memory of a request: pages of the device's pool where it has one, so that zero copy is possible.
class Buffer {
 public:
  Buffer() = default;
  Buffer(Buffer&& other) noexcept;
  Buffer& operator=(Buffer&& other) noexcept;
  ~Buffer() { clear(); }

  // Not cleared. @throws std::bad_alloc
  void allocate(size_t bytes, sim::BufferPool* pool);
  void clear();
  std::span<uint8_t> bytes() const { return bytes_; }

 private:
  std::span<uint8_t> bytes_;
  sim::BufferPool* pool_ = nullptr;
};

struct Extent {
  uint32_t bytes;
  uint32_t flags;
};

class Request {
 public:
  CommandType type{};
  uint16_t flags = 0;
  uint64_t cookie = 0;
  uint64_t offset = 0;
  uint32_t length = 0;
  Buffer buffer;

  // Refuses what the protocol or the disk does not allow; a message for people goes with it.
  // `payloadFits`: the request is not longer than kMaxPayload.
  void check(const Disk& disk, bool allocationContext);
  // How many bytes `buffer` must have. For a write it is filled before next().
  size_t bufferBytes() const;

  // What one command needs; its spans stay valid until ended().
  struct Scsi {
    std::span<const uint8_t> cdb;
    std::span<const uint8_t> dataOut;
    std::span<uint8_t> dataIn;
  };
  bool next(const Disk& disk, Scsi& command);
  enum class Verdict { proceed, again, later };
  // `proceed`: call next() again; `again`, `later`: repeat the same command, later after a pause.
  Verdict ended(const Disk& disk, const sim::Completion& completion);
  // The command that `next` gave last.
  Scsi current() const { return {cdb(), dataOut_, dataIn_}; }

  Errno error() const { return error_; }
  const std::string& message() const { return message_; }
  const std::vector<Extent>& extents() const { return extents_; }
  void fail(Errno error, std::string message);

 private:
  std::span<const uint8_t> cdb() const { return {cdb_.data(), cdbBytes_}; }
  void setCdb(uint8_t opcode, uint8_t option, uint64_t lba, uint32_t blocks);
  void takeStatus(const Disk& disk, std::span<const uint8_t> data);
  void judge(const sim::Completion& completion);
  bool modifies() const {
    return type == CommandType::write || type == CommandType::trim ||
           type == CommandType::writeZeroes;
  }

  Errno error_ = Errno::none;
  std::string message_;
  std::vector<Extent> extents_;
  uint64_t done_ = 0;   // bytes of the range
  uint64_t piece_ = 0;  // bytes of the command under way
  bool flushed_ = false;
  uint8_t repeats_ = 0;
  uint8_t cdbBytes_ = 0;
  std::array<uint8_t, 16> cdb_;
  std::array<uint8_t, 24> unmapList_;
  std::span<const uint8_t> dataOut_;
  std::span<uint8_t> dataIn_;
};

}  // namespace tcmu::nbd

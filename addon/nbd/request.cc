// SPDX-License-Identifier: Apache-2.0
#include "request.h"

#include <algorithm>
#include <cstdio>
#include <utility>

namespace tcmu::nbd {

namespace {

// SPC-5, SBC-4.
constexpr uint8_t kRead16 = 0x88;
constexpr uint8_t kWrite16 = 0x8a;
constexpr uint8_t kPrefetch16 = 0x90;
constexpr uint8_t kSynchronizeCache16 = 0x91;
constexpr uint8_t kWriteSame16 = 0x93;
constexpr uint8_t kUnmap = 0x42;
constexpr uint8_t kServiceActionIn16 = 0x9e;
constexpr uint8_t kGetLbaStatus = 0x12;
constexpr uint8_t kFuaBit = 0x08;
constexpr uint8_t kUnmapBit = 0x08;
constexpr uint8_t kNoDataOut = 0x01;  // NDOB

namespace sense_key {
constexpr uint8_t kIllegalRequest = 0x5;
constexpr uint8_t kUnitAttention = 0x6;
constexpr uint8_t kDataProtect = 0x7;
}  // namespace sense_key

// GET LBA STATUS: a header and 16 bytes a descriptor.
constexpr size_t kStatusHeader = 8;
constexpr size_t kStatusDescriptor = 16;
constexpr size_t kStatusDescriptors = 64;

// Unit attentions in a row that are taken for news; more are an error.
constexpr uint8_t kRepeats = 8;

constexpr uint16_t kKnownFlags = command_flag::kFua | command_flag::kNoHole |
                                 command_flag::kDontFragment | command_flag::kOneExtent |
                                 command_flag::kFastZero;

// Flags besides FUA, which may come with every command.
uint16_t allowedFlags(CommandType type) {
  switch (type) {
    case CommandType::read: return command_flag::kDontFragment;
    case CommandType::writeZeroes: return command_flag::kNoHole | command_flag::kFastZero;
    case CommandType::blockStatus: return command_flag::kOneExtent;
    default: return 0;
  }
}

// What the disk must offer for a command.
uint16_t neededFlag(CommandType type) {
  switch (type) {
    case CommandType::flush: return flag::kFlush;
    case CommandType::trim: return flag::kTrim;
    case CommandType::cache: return flag::kCache;
    case CommandType::writeZeroes: return flag::kWriteZeroes;
    default: return 0;
  }
}

}  // namespace

Buffer::Buffer(Buffer&& other) noexcept
    : bytes_(std::exchange(other.bytes_, {})), pool_(std::exchange(other.pool_, nullptr)) {}

Buffer& Buffer::operator=(Buffer&& other) noexcept {
  if (this != &other) {
    clear();
    bytes_ = std::exchange(other.bytes_, {});
    pool_ = std::exchange(other.pool_, nullptr);
  }
  return *this;
}

void Buffer::allocate(size_t bytes, sim::BufferPool* pool) {
  clear();
  if (bytes == 0) return;
  if (pool && bytes % sim::kPage == 0) bytes_ = pool->allocate(bytes);
  if (!bytes_.empty())
    pool_ = pool;
  else
    bytes_ = {new uint8_t[bytes], bytes};
}

void Buffer::clear() {
  if (pool_)
    pool_->free(bytes_);
  else
    delete[] bytes_.data();
  bytes_ = {};
  pool_ = nullptr;
}

void Request::fail(Errno error, std::string message) {
  if (error_ != Errno::none) return;
  error_ = error;
  message_ = std::move(message);
}

void Request::check(const Disk& disk, bool allocationContext) {
  const bool write = modifies();
  const bool ranged = type != CommandType::flush;
  if (type > CommandType::blockStatus || type == CommandType::disconnect)
    return fail(Errno::invalid, "unknown command");
  const uint16_t allowed =
      static_cast<uint16_t>(allowedFlags(type) | (disk.flags & flag::kFua ? command_flag::kFua : 0));
  if (flags & ~allowed || flags & ~kKnownFlags)
    return fail(Errno::invalid, "a flag that this command does not have");
  if (write && disk.flags & flag::kReadOnly)
    return fail(Errno::permission, "the export is read-only");
  const uint16_t needed = neededFlag(type);
  if ((disk.flags & needed) != needed) return fail(Errno::invalid, "a command that was not offered");
  if (type == CommandType::blockStatus && !allocationContext)
    return fail(Errno::invalid, "no metadata context was selected");
  if (!ranged) return;
  if (offset > disk.size || length > disk.size - offset)
    return fail(write ? Errno::noSpace : Errno::invalid, "the range ends beyond the export");
  if ((offset | length) % disk.blockSize)
    return fail(Errno::invalid, "offset and length must be multiples of the minimum block size");
  if ((type == CommandType::read || type == CommandType::write) && length > kMaxPayload)
    return fail(Errno::invalid, "longer than the maximum payload");
  if (type == CommandType::blockStatus && length == 0)
    return fail(Errno::invalid, "block status of nothing");
  if (flags & command_flag::kFastZero && (flags & command_flag::kNoHole || !disk.unmapsToZero))
    return fail(Errno::notSupported, "zeroing may be no faster than writing");
}

size_t Request::bufferBytes() const {
  if (type == CommandType::read || type == CommandType::write) return length;
  if (type == CommandType::blockStatus)
    return kStatusHeader +
           kStatusDescriptor * (flags & command_flag::kOneExtent ? 1 : kStatusDescriptors);
  return 0;
}

void Request::setCdb(uint8_t opcode, uint8_t option, uint64_t lba, uint32_t blocks) {
  cdb_.fill(0);
  cdb_[0] = opcode;
  cdb_[1] = option;
  store(&cdb_[2], lba);
  store(&cdb_[10], blocks);
  cdbBytes_ = 16;
}

bool Request::next(const Disk& disk, Scsi& command) {
  if (error_ != Errno::none) return false;
  dataOut_ = {};
  dataIn_ = {};
  const uint64_t rest = length - done_;
  const uint64_t lba = (offset + done_) / disk.blockSize;
  const auto take = [&](uint64_t most) {
    piece_ = std::min(rest, most);
    return static_cast<uint32_t>(piece_ / disk.blockSize);
  };
  const bool fua = flags & command_flag::kFua;
  const auto bytesOf = [&](uint64_t blocks) {
    return blocks > UINT32_MAX ? uint64_t{UINT32_MAX} * disk.blockSize : blocks * disk.blockSize;
  };
  repeats_ = 0;
  if (type == CommandType::flush || (rest == 0 && modifies() && fua && length > 0 &&
                                     !(type == CommandType::write && disk.fuaInWrite))) {
    if (std::exchange(flushed_, true)) return false;
    setCdb(kSynchronizeCache16, 0, 0, 0);
    piece_ = 0;
  } else if (rest == 0) {
    return false;
  } else {
    switch (type) {
      case CommandType::read: {
        const uint32_t blocks = take(disk.pieceBytes);
        setCdb(kRead16, 0, lba, blocks);
        dataIn_ = buffer.bytes().subspan(done_, piece_);
        break;
      }
      case CommandType::write: {
        const uint32_t blocks = take(disk.pieceBytes);
        setCdb(kWrite16, fua && disk.fuaInWrite ? kFuaBit : 0, lba, blocks);
        dataOut_ = buffer.bytes().subspan(done_, piece_);
        break;
      }
      case CommandType::trim: {
        const uint32_t blocks = take(bytesOf(disk.unmapBlocks));
        unmapList_.fill(0);
        store(&unmapList_[0], static_cast<uint16_t>(unmapList_.size() - 2));
        store(&unmapList_[2], static_cast<uint16_t>(16));
        store(&unmapList_[8], lba);
        store(&unmapList_[16], blocks);
        cdb_.fill(0);
        cdb_[0] = kUnmap;
        store(&cdb_[7], static_cast<uint16_t>(unmapList_.size()));
        cdbBytes_ = 10;
        dataOut_ = unmapList_;
        break;
      }
      case CommandType::writeZeroes: {
        const uint32_t blocks = take(bytesOf(disk.writeSameBlocks));
        const bool mayUnmap = disk.unmapsToZero && !(flags & command_flag::kNoHole);
        setCdb(kWriteSame16, kNoDataOut | (mayUnmap ? kUnmapBit : 0), lba, blocks);
        break;
      }
      case CommandType::cache: setCdb(kPrefetch16, 0, lba, take(rest)); break;
      default:  // blockStatus
        if (!disk.tellsStatus) {
          extents_.push_back({length, 0});
          done_ = length;
          return false;
        }
        piece_ = rest;
        dataIn_ = buffer.bytes();
        setCdb(kServiceActionIn16, kGetLbaStatus, lba, static_cast<uint32_t>(dataIn_.size()));
    }
  }
  command = current();
  return true;
}

Request::Verdict Request::ended(const Disk& disk, const sim::Completion& completion) {
  if (completion.status == sim::status::kBusy || completion.status == sim::status::kTaskSetFull)
    return Verdict::later;
  if (completion.status != sim::status::kGood) {
    const bool attention = completion.status == sim::status::kCheckCondition &&
                           (completion.sense[0] & 0x7e) == 0x70 &&
                           (completion.sense[2] & 0x0f) == sense_key::kUnitAttention;
    if (attention && repeats_++ < kRepeats) return Verdict::again;
    judge(completion);
    return Verdict::proceed;
  }
  if (type == CommandType::blockStatus) {
    takeStatus(disk, dataIn_.first(std::min<size_t>(completion.dataBytes, dataIn_.size())));
    done_ = length;
  } else if (type == CommandType::read && completion.dataBytes < piece_) {
    fail(Errno::io, "the disk answered with too little data");
  } else {
    done_ += piece_;
  }
  return Verdict::proceed;
}

// SBC-4, GET LBA STATUS parameter data. What makes no sense there is told as data.
void Request::takeStatus(const Disk& disk, std::span<const uint8_t> data) {
  uint64_t at = offset;
  const uint64_t end = offset + length;
  const size_t most = flags & command_flag::kOneExtent ? 1 : SIZE_MAX;
  for (size_t i = kStatusHeader; i + kStatusDescriptor <= data.size() && at < end;
       i += kStatusDescriptor) {
    const uint64_t start = load<uint64_t>(&data[i]) * disk.blockSize;
    const uint64_t stop = start + uint64_t{load<uint32_t>(&data[i + 8])} * disk.blockSize;
    if (start > at || stop <= at) break;
    uint32_t state = 0;
    switch (data[i + 12] & 0x0f) {
      case 1: state = kStateHole | (disk.unmapsToZero ? kStateZero : 0); break;
      case 2: state = disk.unmapsToZero ? kStateZero : 0; break;  // anchored
    }
    const auto bytes = static_cast<uint32_t>(std::min(stop, end) - at);
    if (!extents_.empty() && extents_.back().flags == state)
      extents_.back().bytes += bytes;
    else if (extents_.size() < most)
      extents_.push_back({bytes, state});
    else
      break;
    at += bytes;
  }
  if (extents_.empty()) extents_.push_back({length, 0});
}

void Request::judge(const sim::Completion& completion) {
  if (!completion.hasSense || completion.status != sim::status::kCheckCondition) {
    char text[64];
    std::snprintf(text, sizeof text, "SCSI status 0x%02x", completion.status);
    return fail(Errno::io, text);
  }
  // SPC-5 4.4: descriptor format has the key in byte 1, fixed format in byte 2.
  const auto& sense = completion.sense;
  const bool descriptor = (sense[0] & 0x7e) == 0x72;
  const uint8_t key = (descriptor ? sense[1] : sense[2]) & 0x0f;
  const uint8_t asc = descriptor ? sense[2] : sense[12];
  const uint8_t ascq = descriptor ? sense[3] : sense[13];
  Errno error = Errno::io;
  if (key == sense_key::kDataProtect)
    error = asc == 0x27 && ascq == 0x07 ? Errno::noSpace : Errno::permission;
  else if (key == sense_key::kIllegalRequest && asc == 0x20)
    error = Errno::notSupported;
  else if (key == sense_key::kIllegalRequest && asc == 0x21)
    error = modifies() ? Errno::noSpace : Errno::invalid;
  else if (key == sense_key::kIllegalRequest && asc == 0x25)
    error = Errno::shutdown;
  else if (key == sense_key::kIllegalRequest)
    error = Errno::invalid;
  char text[64];
  std::snprintf(text, sizeof text, "SCSI sense key 0x%x, additional sense 0x%02x%02x", key, asc,
                ascq);
  fail(error, text);
}

}  // namespace tcmu::nbd

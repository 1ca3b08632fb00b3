// SPDX-License-Identifier: Apache-2.0
#include "ring.h"

#include <errno.h>
#include <unistd.h>

#include <algorithm>

#include "registry.h"

namespace tcmu {

void RingObject::init(Napi::Env env, Napi::Object exports) {
  exports.Set("Ring", DefineClass(env, "Ring", {}));
}

static const Export exportRing(&RingObject::init);

template <class Element>
Element* RingObject::shareArray(Napi::Object self, const char* name, size_t length) {
  auto array = Napi::TypedArrayOf<Element>::New(self.Env(), length);
  self.DefineProperty(Napi::PropertyDescriptor::Value(name, array, napi_enumerable));
  arrays_.push_back(Napi::Persistent(array.template As<Napi::Object>()));
  return array.Data();
}

RingObject::RingObject(const Napi::CallbackInfo& info)
    : ObjectWrap(info),
      Member(Environment::of(info.Env())),
      buffers_(info.Env()),
      poller_(environment_, *this) {
  const Napi::Env env = info.Env();
  if (!info[0].IsObject()) throw Napi::TypeError::New(env, "Ring wants options");
  const auto options = info[0].As<Napi::Object>();
  Napi::Object self = info.This().As<Napi::Object>();
  const auto number = [&](const char* name) {
    const Napi::Value value = options.Get(name);
    if (!value.IsNumber())
      throw Napi::TypeError::New(env, std::string(name) + " is no number");
    return value.As<Napi::Number>().Int64Value();
  };
  const auto function = [&](const char* name) {
    const Napi::Value value = options.Get(name);
    if (!value.IsFunction())
      throw Napi::TypeError::New(env, std::string(name) + " is no function");
    return keepOn(self, name, value.As<Napi::Function>());
  };
  dispatch_ = function("dispatch");
  lost_ = function("lost");
  escaped_ = function("escaped");
  io_ = IoQueueObject::from(options.Get("io"));
  if (!io_) throw Napi::TypeError::New(env, "io is no IoQueue");
  keepOn(self, "io", options.Get("io").As<Napi::Object>());
  const int64_t map_size = number("mapSize");
  if (map_size <= 0) throw Napi::RangeError::New(env, "mapSize must be above 0");
  batch_size_ = static_cast<uint32_t>(std::clamp<int64_t>(number("batchSize"), 1, 65536));

  mapping_ = Mapping::make(static_cast<int>(number("memoryFd")),
                           static_cast<int>(number("eventFd")),
                           static_cast<int>(number("doorbellFd")), static_cast<size_t>(map_size));
  if (!mapping_) throw systemError(env, errno, "mmap");
  try {
    ring_ = std::make_unique<Ring>(
        mapping_->bytes(),
        [](void* self, uint32_t slot) { static_cast<RingObject*>(self)->revoke(slot); }, this);
  } catch (const RingFault& fault) {
    mapping_->disownFds();
    throw codedError(env, faultCode(fault), fault.message);
  }

  const size_t capacity = ring_->capacity();
  self.DefineProperties({
      Napi::PropertyDescriptor::Value(
          "capacity", Napi::Number::New(env, static_cast<double>(capacity)), napi_enumerable),
      Napi::PropertyDescriptor::Value("mailboxFlags", Napi::Number::New(env, ring_->mailboxFlags()),
                                      napi_enumerable),
  });
  events_ = shareArray<int32_t>(self, "events", 1 + batch_size_);
  tables_.events = events_ + 1;
  tables_.info = shareArray<uint32_t>(self, "info", capacity * RingTables::kInfoWords);
  tables_.cdbs = shareArray<uint8_t>(self, "cdbs", capacity * RingTables::kCdbBytes);
  completion_room_ = static_cast<uint32_t>(std::min<size_t>(capacity, kCompletionRecords));
  completions_ = shareArray<uint32_t>(self, "completions", 4 + completion_room_ * 4);
  sense_ = shareArray<uint8_t>(self, "sense", completion_room_ * layout::kSenseBytes);
  transfer_ = shareArray<double>(self, "transfer", kTransferWords);
  express_ = shareArray<double>(self, "express", kExpressWords);
  bindMethod<&RingObject::start>(self, this, "start");
  bindMethod<&RingObject::stopPolling>(self, this, "stop");
  bindMethod<&RingObject::flush>(self, this, "flush");
  bindMethod<&RingObject::longCdb>(self, this, "longCdb");
  bindMethod<&RingObject::takeTmr>(self, this, "takeTmr");
  bindMethod<&RingObject::inFlight>(self, this, "inFlight");
  bindMethod<&RingObject::releaseKept>(self, this, "releaseKept");
  bindMethod<&RingObject::copyIn>(self, this, "copyIn");
  bindMethod<&RingObject::copyOut>(self, this, "copyOut");
  bindMethod<&RingObject::fill>(self, this, "fill");
  bindMethod<&RingObject::isZero>(self, this, "isZero");
  bindMethod<&RingObject::mismatch>(self, this, "mismatch");
  bindMethod<&RingObject::segments>(self, this, "segments");
  bindMethod<&RingObject::pin>(self, this, "pin");
  bindMethod<&RingObject::unpin>(self, this, "unpin");
  bindMethod<&RingObject::readFile>(self, this, "readFile");
  bindMethod<&RingObject::writeFile>(self, this, "writeFile");
  bindMethod<&RingObject::useFileMap>(self, this, "useFileMap");
  bindMethod<&RingObject::close>(self, this, "close");
  bindMethod<&RingObject::stats>(self, this, "stats");
  io_->add(this);
}

RingObject::~RingObject() {
  // After the environment's end, or when nothing was under way: see retain().
  if (mapping_ && io_) io_->remove(this);
  if (ring_ && ring_->pinsHeld() > 0) static_cast<void>(mapping_.release());
}

void RingObject::retain() {
  if (retained_++ == 0) Ref();
}

void RingObject::release() {
  if (--retained_ == 0) Unref();
}

void RingObject::checkOpen() const {
  if (!ring_) throw codedError(environment_.env(), "ERR_TCMU_RING_CLOSED", "the ring was closed");
}

Segments RingObject::memory(uint32_t slot, uint64_t offset, uint64_t length) const {
  checkOpen();
  if (!ring_->valid(slot))
    throw codedError(environment_.env(), "ERR_TCMU_BUFFER_REVOKED",
                     "slot " + std::to_string(slot) + " holds no command");
  const uint64_t bytes = ring_->bytes(slot);
  if (offset > bytes || length > bytes - offset)
    throw codedError(environment_.env(), "ERR_TCMU_BUFFER_RANGE",
                     std::to_string(length) + " bytes at " + std::to_string(offset) +
                         " of a buffer of " + std::to_string(bytes));
  return ring_->segments(slot);
}

// ---- polling ----

napi_value RingObject::start(const Arguments<0>& arguments) {
  checkOpen();
  if (closing_) throw codedError(arguments.env, "ERR_TCMU_RING_CLOSED", "the ring is being closed");
  if (poller_.active() || lost_reported_) return nullptr;
  const int error = poller_.start(mapping_->eventFd());
  if (error != 0) throw systemError(arguments.env, -error, "uv_poll_start");
  poller_.again();
  if (!started_) {
    started_ = true;
    retain();
  }
  return nullptr;
}

napi_value RingObject::stopPolling(const Arguments<0>&) {
  poller_.stop();
  return nullptr;
}

// Takes the event off the descriptor. False: polling has ended.
bool RingObject::drainEvent() {
  int32_t count;
  const ssize_t got = read(mapping_->eventFd(), &count, sizeof count);
  wakeups_++;
  if (got > 0 || (got < 0 && (errno == EAGAIN || errno == EINTR))) return true;
  reportLost(got == 0 ? EIO : errno, "reading events");
  return false;
}

void RingObject::failPoisoned() {
  ring_->fail({RingFault::Kind::Memory, "SIGBUS at a page that may not be touched so, " +
                                            ring_->owner(mapping_->poisonedAt(), tables_)});
}

void RingObject::ready(bool readable) {
  const Napi::HandleScope scope(environment_.env());
  reportEscaped();
  if (!ring_ || !poller_.active()) return;
  if (readable && !drainEvent()) return;
  uint32_t taken = 0;
  Environment::Turn turn(environment_);
  for (int round = 0; round < kBatchesPerTurn && taken < kCommandsPerTurn; round++) {
    if (mapping_->poisoned())
      failPoisoned();
    const uint32_t count = ring_->fetch(tables_, batch_size_);
    taken += count;
    const uint32_t left = takeExpress(count);
    if (left > 0) {
      batches_++;
      if (!turn.begin()) return;
      events_[0] = static_cast<int32_t>(left);
      turn.call(dispatch_, 0, nullptr);
      if (!ring_) return;
    }
    flushFromLoop();
    // Handlers that have not answered yet may be waiting for a microtask.
    if (ring_ && ring_->inFlight() > 0) {
      turn.end();
      flushFromLoop();
    }
    if (!ring_ || !poller_.active()) return;
    if (const auto& fault = ring_->fault()) {
      reportLost(faultCode(*fault), fault->message);
      return;
    }
    if (doorbell_error_ != 0) {
      reportLost(doorbell_error_, "ringing the doorbell");
      return;
    }
    if (count == 0 && !ring_->wantsFetch()) return;
  }
  poller_.again();
}

// ---- the express lane ----

uint32_t RingObject::takeExpress(uint32_t count) {
  if (express_[kExpressReadBlocks] == 0 && express_[kExpressWriteBlocks] == 0) return count;
  uint32_t left = 0;
  bool open = true;
  for (uint32_t i = 0; i < count; i++) {
    const int32_t event = tables_.events[i];
    if (event < 0) {
      // JavaScript hears of it before anything that came later is done.
      open = false;
    } else if (open) {
      const Carried carried = carryOut(static_cast<uint32_t>(event));
      if (carried == Carried::Yes) continue;
      // What comes next probably would have to wait, too: each try costs a system call.
      open = carried == Carried::No;
    }
    tables_.events[left++] = event;
  }
  return left;
}

napi_value RingObject::useFileMap(const Arguments<2>& arguments) {
  const Napi::Env env = arguments.env;
  const Napi::Value words(env, arguments.values[0]);
  const uint32_t unit_bits = arguments.uint32(1);
  if (!words.IsTypedArray() || words.As<Napi::TypedArray>().TypedArrayType() != napi_float64_array)
    throw Napi::TypeError::New(env, "the file map is no Float64Array");
  const auto array = words.As<Napi::Float64Array>();
  const FileMap map(array.Data(), array.ElementLength(), unit_bits);
  if (map.empty()) throw Napi::RangeError::New(env, "the file map has no length or unit of one");
  file_map_words_ = Napi::Persistent(words.As<Napi::Object>());
  file_map_ = map;
  return nullptr;
}

// All of it at once, or not at all as far as anybody can tell.
bool RingObject::moveRun(const FileMap::Run& run, bool write, Segments segments, uint64_t offset) {
  Operation operation = {
      .kind = write ? Operation::Kind::Write : Operation::Kind::Read,
      .fd = static_cast<int>(run.file[FileMap::kFd]),
      .segments = segments,
      .offset = offset,
      .length = run.length,
      .position = static_cast<int64_t>(run.position),
  };
  const auto mode =
      static_cast<uint32_t>(run.file[write ? FileMap::kWriteMode : FileMap::kReadMode]);
  int64_t result = 0;
  if (mode & IoQueueObject::kInline)
    result = operation.run();
  else if (!(mode & IoQueueObject::kNoWait) || !operation.tryNow(result))
    return false;
  return result == static_cast<int64_t>(run.length);
}

// A move that fails, falls short, or would have to wait is left to the handler from its start: it may be
// done twice, and its outcome is what the handler makes of it.
RingObject::Carried RingObject::carryOut(uint32_t slot) {
  const uint32_t* info = tables_.info + slot * RingTables::kInfoWords;
  const auto move = plainMove(tables_.cdbs + slot * RingTables::kCdbBytes, info[7]);
  if (!move || info[3] != 0 || file_map_.empty()) return Carried::No;
  const double end = static_cast<double>(move->lba) + move->blocks;
  const double bytes = express_[kExpressBlockBytes] * move->blocks;
  if (end > express_[move->write ? kExpressWriteBlocks : kExpressReadBlocks] ||
      bytes > express_[kExpressMostBytes] || bytes != info[2])
    return Carried::No;
  const uint64_t position = static_cast<uint64_t>(express_[kExpressBlockBytes]) * move->lba;
  FileMap::Run runs[kExpressRuns];
  const uint32_t count = file_map_.find(position, info[2], move->write, runs, kExpressRuns);
  if (count == 0) return Carried::No;
  uint64_t offset = 0;
  for (uint32_t i = 0; i < count; i++) {
    if (!moveRun(runs[i], move->write, ring_->segments(slot), offset)) return Carried::MustWait;
    offset += runs[i].length;
  }
  (void)ring_->complete({.slot = slot,
                         .status = 0,
                         .flags = 0,
                         .read_length = 0,
                         .zero_from = Completion::kNoZero,
                         .sense = nullptr});
  carried_++;
  express_[move->write ? kExpressWrites : kExpressReads]++;
  express_[move->write ? kExpressBlocksWritten : kExpressBlocksRead] += move->blocks;
  return Carried::Yes;
}

void RingObject::reportLost(int error, const char* doing) {
  // A closed pipe, where the kernel is a simulated one, is what EIO is for a uio device.
  if (error == EPIPE) error = EIO;
  reportLost(uv_err_name(-error), std::string(doing) + ": " + uv_strerror(-error));
}

void RingObject::reportLost(const std::string& code, const std::string& message) {
  poller_.stop();
  if (lost_reported_) return;
  lost_reported_ = true;
  const Napi::Env env = environment_.env();
  const napi_value arguments[] = {Napi::String::New(env, code), Napi::String::New(env, message)};
  environment_.call(lost_, 2, arguments);
}

// ---- completing ----

uint32_t RingObject::publish() {
  uint32_t wrong = kAllPublished;
  const uint32_t count = std::min(completions_[0], completion_room_);
  completions_[0] = 0;
  if (mapping_->poisoned())
    failPoisoned();
  for (uint32_t i = 0; i < count; i++) {
    const uint32_t* record = completions_ + 4 + 4 * i;
    const Completion completion = {
        .slot = record[0],
        .status = static_cast<uint8_t>(record[1]),
        .flags = static_cast<uint8_t>(record[1] >> 8),
        .read_length = record[2],
        .zero_from = record[3],
        .sense = sense_ + layout::kSenseBytes * i,
    };
    if (!ring_->complete(completion)) wrong = completion.slot;
  }
  ring_->completeUnpinned();
  if (ring_->moveTail()) ringDoorbell();
  // Told, or looked at, from the loop.
  if (ring_->fault() || ring_->wantsFetch() || doorbell_error_ != 0 || !escaped_slots_.empty())
    poller_.again();
  return wrong;
}

Napi::Error RingObject::completionError(uint32_t slot) const {
  return codedError(environment_.env(), "ERR_TCMU_RING_COMPLETION",
                    "slot " + std::to_string(slot) + " awaits no completion");
}

void RingObject::ringDoorbell() {
  const int32_t one = 1;
  ssize_t wrote;
  do {
    wrote = write(mapping_->doorbellFd(), &one, sizeof one);
  } while (wrote < 0 && errno == EINTR);
  doorbells_++;
  // EAGAIN: it has been rung and not been heard yet.
  if (wrote < 0 && errno != EAGAIN) doorbell_error_ = errno;
}

napi_value RingObject::flush(const Arguments<0>&) {
  if (!ring_) return nullptr;
  const uint32_t wrong = publish();
  if (closing_) finishClose();
  if (wrong != kAllPublished) throw completionError(wrong);
  return nullptr;
}

void RingObject::flushFromLoop() {
  if (!ring_ || environment_.stopping()) return;
  const uint32_t wrong = publish();
  if (wrong != kAllPublished)
    napi_fatal_exception(environment_.env(), completionError(wrong).Value());
  reportEscaped();
  if (closing_) finishClose();
}

void RingObject::revoke(uint32_t slot) {
  if (environment_.stopping()) return;
  if (!buffers_.revoke(slot)) escaped_slots_.push_back(slot);
}

void RingObject::reportEscaped() {
  if (escaped_slots_.empty()) return;
  std::vector<uint32_t> slots;
  slots.swap(escaped_slots_);
  for (uint32_t slot : slots) {
    const napi_value argument = toNumber(environment_.env(), slot);
    environment_.call(escaped_, 1, &argument);
  }
}

napi_value RingObject::longCdb(const Arguments<1>& arguments) {
  const uint32_t slot = arguments.uint32(0);
  memory(slot, 0, 0);
  const auto cdb = ring_->cdb(slot, tables_);
  auto copy = Napi::Uint8Array::New(arguments.env, cdb.size());
  std::copy(cdb.begin(), cdb.end(), copy.Data());
  return copy;
}

napi_value RingObject::takeTmr(const Arguments<0>& arguments) {
  checkOpen();
  const TaskManagement tmr = ring_->takeTaskManagement();
  auto result = Napi::Object::New(arguments.env);
  auto slots = Napi::Array::New(arguments.env, tmr.slots.size());
  for (uint32_t i = 0; i < tmr.slots.size(); i++) slots.Set(i, tmr.slots[i]);
  result.Set("type", Napi::Number::New(arguments.env, tmr.type));
  result.Set("slots", slots);
  return result;
}

napi_value RingObject::inFlight(const Arguments<0>& arguments) {
  return toNumber(arguments.env, ring_ ? ring_->inFlight() : 0);
}

napi_value RingObject::releaseKept(const Arguments<1>& arguments) {
  checkOpen();
  if (!ring_->releaseKept(arguments.uint32(0)))
    throw codedError(arguments.env, "ERR_TCMU_BUFFER_REVOKED", "the slot keeps no buffer");
  if (ring_->wantsFetch() || !escaped_slots_.empty()) poller_.again();
  return nullptr;
}

// ---- memory ----

napi_value RingObject::copyIn(const Arguments<3>& arguments) {
  const uint32_t slot = arguments.uint32(0);
  const uint64_t offset = arguments.size(1);
  const Bytes source = arguments.bytes(2);
  if (!tcmu::copyIn(memory(slot, offset, source.length), offset, source.data, source.length))
    throw memoryError(arguments.env);
  return nullptr;
}

napi_value RingObject::copyOut(const Arguments<5>& arguments) {
  const uint32_t slot = arguments.uint32(0);
  const uint64_t offset = arguments.size(1), length = arguments.size(2);
  const Bytes target = arguments.bytes(3);
  const uint64_t start = arguments.size(4);
  const Segments segments = memory(slot, offset, length);
  if (start > target.length || length > target.length - start)
    throw codedError(arguments.env, "ERR_TCMU_BUFFER_RANGE", "the target is too short");
  if (!tcmu::copyOut(segments, offset, length, target.data + start))
    throw memoryError(arguments.env);
  return nullptr;
}

napi_value RingObject::fill(const Arguments<4>& arguments) {
  const uint64_t offset = arguments.size(1), length = arguments.size(2);
  if (!tcmu::fill(memory(arguments.uint32(0), offset, length), offset, length, arguments.int32(3)))
    throw memoryError(arguments.env);
  return nullptr;
}

napi_value RingObject::isZero(const Arguments<3>& arguments) {
  const uint64_t offset = arguments.size(1), length = arguments.size(2);
  bool zero;
  if (!tcmu::isZero(memory(arguments.uint32(0), offset, length), offset, length, zero))
    throw memoryError(arguments.env);
  napi_value result;
  napi_get_boolean(arguments.env, zero, &result);
  return result;
}

napi_value RingObject::mismatch(const Arguments<3>& arguments) {
  const uint64_t offset = arguments.size(1);
  const Bytes other = arguments.bytes(2);
  int64_t where;
  if (!tcmu::mismatch(memory(arguments.uint32(0), offset, other.length), offset, other.data,
                      other.length, where))
    throw memoryError(arguments.env);
  return toNumber(arguments.env, where);
}

napi_value RingObject::segments(const Arguments<3>& arguments) {
  const uint32_t slot = arguments.uint32(0);
  const uint64_t offset = arguments.size(1), length = arguments.size(2);
  return buffers_.views(slot, memory(slot, offset, length), offset, length);
}

napi_value RingObject::pin(const Arguments<1>& arguments) {
  const uint32_t slot = arguments.uint32(0);
  memory(slot, 0, 0);
  ring_->pin(slot);
  return nullptr;
}

napi_value RingObject::unpin(const Arguments<1>& arguments) {
  checkOpen();
  const uint32_t slot = arguments.uint32(0);
  if (!ring_->unpin(slot))
    throw codedError(arguments.env, "ERR_TCMU_BUFFER_REVOKED",
                     "slot " + std::to_string(slot) + " holds no pin");
  // Inside a callback of ours the flush at its end does it.
  if ((ring_->hasUnpinned() || closing_) && !environment_.inCallback()) {
    const uint32_t wrong = publish();
    if (closing_) finishClose();
    if (wrong != kAllPublished) throw completionError(wrong);
  }
  return nullptr;
}

void RingObject::pinForOperation(uint32_t slot) {
  ring_->pin(slot);
  retain();
}

void RingObject::unpinAfterOperation(uint32_t slot) {
  ring_->unpin(slot);
  release();
}

// ---- files ----

// The arguments come through `transfer` and the result goes there: as arguments of the call they would
// cost more than all the rest of it.
napi_value RingObject::moveFile(Operation::Kind kind) {
  const Napi::Env env = environment_.env();
  for (int word = 0; word < kTransferResult; word++) {
    const double value = transfer_[word];
    if (value >= 0 && value <= 9007199254740991.0) continue;
    // A file position; -1 is the descriptor's own.
    if (word == kTransferPosition && value == -1) continue;
    throw Napi::RangeError::New(env, "transfer: word " + std::to_string(word) +
                                         " is no safe integer >= 0");
  }
  const auto whole = [this](TransferWord word) { return static_cast<int64_t>(transfer_[word]); };
  const auto slot = static_cast<uint32_t>(std::min<int64_t>(whole(kTransferSlot), UINT32_MAX));
  const auto offset = static_cast<uint64_t>(whole(kTransferOffset));
  const auto length = static_cast<uint64_t>(whole(kTransferLength));
  Operation operation = {
      .kind = kind,
      .fd = static_cast<int>(std::min<int64_t>(whole(kTransferFd), INT32_MAX)),
      .segments = memory(slot, offset, length),
      .offset = offset,
      .length = length,
      .position = whole(kTransferPosition),
  };
  const auto mode = static_cast<uint32_t>(whole(kTransferMode));
  transfer_[kTransferResult] =
      static_cast<double>(io_->submit(operation, mode, this, slot, nullptr));
  return nullptr;
}

napi_value RingObject::readFile(const Arguments<0>&) { return moveFile(Operation::Kind::Read); }

napi_value RingObject::writeFile(const Arguments<0>&) { return moveFile(Operation::Kind::Write); }

// ---- the end ----

napi_value RingObject::close(const Arguments<0>& arguments) {
  bool closed = true;
  if (ring_) {
    if (!closing_) {
      closing_ = true;
      poller_.stop();
      publish();
    }
    closed = finishClose();
  }
  napi_value result;
  napi_get_boolean(arguments.env, closed, &result);
  return result;
}

// Unmaps if nobody may touch the memory any more.
bool RingObject::finishClose() {
  const bool pinned = ring_->pinsHeld() > 0;
  for (uint32_t slot = 0; slot < ring_->slots(); slot++) {
    if (ring_->valid(slot) && ring_->pins(slot) == 0) revoke(slot);
  }
  if (pinned) return false;
  final_stats_ = ring_->stats();
  ring_.reset();
  io_->remove(this);
  mapping_.reset();
  if (started_) release();
  return true;
}

void RingObject::stop() { poller_.stop(); }

napi_value RingObject::stats(const Arguments<0>& arguments) {
  const Napi::Env env = arguments.env;
  const RingStats& counts = ring_ ? ring_->stats() : final_stats_;
  const auto result = Napi::Object::New(env);
  const auto set = [&](const char* name, uint64_t value) {
    result.Set(name, Napi::Number::New(env, static_cast<double>(value)));
  };
  set("wakeups", wakeups_);
  set("batches", batches_);
  set("commands", counts.commands);
  set("completions", counts.completions);
  set("doorbells", doorbells_);
  set("express", carried_);
  set("unknownOps", counts.unknown_ops);
  set("tmrs", counts.task_managements);
  set("externalBuffers", buffers_.made());
  return result;
}

}  // namespace tcmu

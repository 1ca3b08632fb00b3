// SPDX-License-Identifier: Apache-2.0
#include "io_queue.h"

#include <errno.h>

#include "registry.h"

namespace tcmu {
namespace {

constexpr napi_type_tag kTag = {0x7463'6d75'496f'5175ULL, 0x8f1b'52c6'04a7'9e3dULL};

const char* callName(Operation::Kind kind) {
  switch (kind) {
    case Operation::Kind::Read: return "read";
    case Operation::Kind::Write: return "write";
    case Operation::Kind::Sync: return "fdatasync";
    case Operation::Kind::Allocate: return "fallocate";
    case Operation::Kind::Seek: return "lseek";
    case Operation::Kind::Truncate: return "ftruncate";
    case Operation::Kind::Copy: return "copy_file_range";
  }
  return "";
}

}  // namespace

void IoQueueObject::init(Napi::Env env, Napi::Object exports) {
  exports.Set("IoQueue", DefineClass(env, "IoQueue", {}));
}

static const Export exportIoQueue(&IoQueueObject::init);

IoQueueObject* IoQueueObject::from(Napi::Value value) {
  bool ours = false;
  if (!value.IsObject() ||
      napi_check_object_type_tag(value.Env(), value, &kTag, &ours) != napi_ok || !ours)
    return nullptr;
  return Unwrap(value.As<Napi::Object>());
}

IoQueueObject::IoQueueObject(const Napi::CallbackInfo& info)
    : ObjectWrap(info),
      Member(Environment::of(info.Env())),
      queue_(environment_.loop(), *this) {
  if (!info[0].IsFunction()) throw Napi::TypeError::New(info.Env(), "IoQueue wants a function");
  const auto self = info.This().As<Napi::Object>();
  napi_type_tag_object(info.Env(), self, &kTag);
  bindMethod<&IoQueueObject::read>(self, this, "read");
  bindMethod<&IoQueueObject::write>(self, this, "write");
  bindMethod<&IoQueueObject::datasync>(self, this, "datasync");
  bindMethod<&IoQueueObject::allocate>(self, this, "allocate");
  bindMethod<&IoQueueObject::seek>(self, this, "seek");
  bindMethod<&IoQueueObject::truncate>(self, this, "truncate");
  bindMethod<&IoQueueObject::copy>(self, this, "copy");
  done_ = keepOn(self, "done", info[0].As<Napi::Function>());
  auto results = Napi::Float64Array::New(info.Env(), kResultPairs * 2);
  results_ = Napi::Persistent(results);
  self.DefineProperty(
      Napi::PropertyDescriptor::Value("results", results, napi_enumerable));

  wake_.open(environment_, &queue_, [](uv_loop_t* loop, uv_async_t* handle) {
    return uv_async_init(loop, handle, [](uv_async_t* async) {
      static_cast<Queue*>(async->data)->deliver();
    });
  });
  timer_.open(environment_, &queue_, [](uv_loop_t* loop, uv_timer_t* handle) {
    return uv_timer_init(loop, handle);
  });
  // A running job keeps the loop going; these don't.
  uv_unref(reinterpret_cast<uv_handle_t*>(wake_.get()));
  uv_unref(reinterpret_cast<uv_handle_t*>(timer_.get()));
  queue_.start(wake_.get(), timer_.get());
  environment_.add(this);
}

IoQueueObject::~IoQueueObject() {
  environment_.remove(this);
  for (MemoryOwner* ring : rings_) ring->queueGone();
}

void IoQueueObject::stop() {
  queue_.stop();
  wake_.close();
  timer_.close();
}

void IoQueueObject::retain() {
  if (retained_++ == 0) Ref();
}

void IoQueueObject::release() {
  if (--retained_ == 0) Unref();
}

void IoQueueObject::jobStarted() {
  environment_.opened();
  retain();
}

void IoQueueObject::jobEnded() {
  Environment& environment = environment_;
  release();
  environment.closed();
}

int64_t IoQueueObject::submit(Operation& operation, uint32_t mode, MemoryOwner* ring, uint32_t slot,
                              napi_value keep) {
  const napi_env env = environment_.env();
  if (mode & (kInline | kNoWait)) {
    int64_t result = 0;
    bool finished = true;
    if (mode & kInline)
      result = operation.run();
    else if (operation.kind <= Operation::Kind::Write)
      finished = operation.tryNow(result);
    else
      finished = false;
    if (finished) {
      if (result >= 0) return result;
      if (result == -EFAULT && ring) throw memoryError(env);
      throw systemError(env, static_cast<int>(-result), callName(operation.kind));
    }
  }

  uint32_t id;
  if (free_ids_.empty()) {
    operations_.push_back(std::make_unique<Pending>());
    id = static_cast<uint32_t>(operations_.size());
    operations_.back()->id = id;
  } else {
    id = free_ids_.back();
    free_ids_.pop_back();
  }
  Pending& pending = *operations_[id - 1];
  static_cast<Operation&>(pending) = operation;
  pending.ring = ring;
  pending.slot = slot;
  pending.keep = nullptr;
  if (ring) {
    ring->pinForOperation(slot);
  } else if (keep) {
    pending.flat = operation.segments.pieces[0];
    pending.segments = {&pending.flat, 1};
    napi_create_reference(env, keep, 1, &pending.keep);
  }
  retain();
  queue_.push(&pending);
  if (!environment_.inCallback()) queue_.handOver();
  return -static_cast<int64_t>(id);
}

void IoQueueObject::done(OperationList& operations) {
  const napi_env env = environment_.env();
  const Napi::HandleScope scope(env);
  // Ids come free only after the callback that reports them, or a new operation could carry one that
  // is still to be read from the results.
  std::vector<uint32_t> ids;
  retain();
  while (!operations.empty()) {
    ids.clear();
    double* results = environment_.stopping() ? nullptr : results_.Value().Data();
    while (ids.size() < kResultPairs) {
      auto* pending = static_cast<Pending*>(operations.pop());
      if (!pending) break;
      if (results) {
        results[ids.size() * 2] = pending->id;
        results[ids.size() * 2 + 1] = static_cast<double>(pending->result);
      }
      ids.push_back(pending->id);
      if (pending->ring) pending->ring->unpinAfterOperation(pending->slot);
      if (pending->keep) napi_delete_reference(env, pending->keep);
    }
    const napi_value count = toNumber(env, static_cast<int64_t>(ids.size()));
    if (results) environment_.call(done_, 1, &count);
    free_ids_.insert(free_ids_.end(), ids.begin(), ids.end());
    for (size_t i = 0; i < ids.size(); i++) release();
  }
  const std::vector<MemoryOwner*> rings = rings_;
  for (MemoryOwner* ring : rings) ring->flushFromLoop();
  release();
}

napi_value IoQueueObject::moveBytes(Operation::Kind kind, const Arguments<4>& arguments) {
  const Bytes bytes = arguments.bytes(0);
  const iovec piece = {bytes.data, bytes.length};
  Operation operation = {
      .kind = kind,
      .fd = arguments.int32(1),
      .segments = {&piece, 1},
      .length = bytes.length,
      .position = arguments.position(2),
  };
  return toNumber(arguments.env,
                  submit(operation, arguments.uint32(3), nullptr, 0, arguments.values[0]));
}

napi_value IoQueueObject::read(const Arguments<4>& arguments) {
  return moveBytes(Operation::Kind::Read, arguments);
}

napi_value IoQueueObject::write(const Arguments<4>& arguments) {
  return moveBytes(Operation::Kind::Write, arguments);
}

napi_value IoQueueObject::datasync(const Arguments<2>& arguments) {
  Operation operation = {.kind = Operation::Kind::Sync, .fd = arguments.int32(0)};
  return toNumber(arguments.env, submit(operation, arguments.uint32(1), nullptr, 0, nullptr));
}

napi_value IoQueueObject::allocate(const Arguments<5>& arguments) {
  Operation operation = {
      .kind = Operation::Kind::Allocate,
      .fd = arguments.int32(0),
      .length = arguments.size(3),
      .position = static_cast<int64_t>(arguments.size(2)),
      .argument = arguments.int32(1),
  };
  return toNumber(arguments.env, submit(operation, arguments.uint32(4), nullptr, 0, nullptr));
}

napi_value IoQueueObject::seek(const Arguments<4>& arguments) {
  Operation operation = {
      .kind = Operation::Kind::Seek,
      .fd = arguments.int32(0),
      .position = static_cast<int64_t>(arguments.size(1)),
      .argument = arguments.int32(2),
  };
  return toNumber(arguments.env, submit(operation, arguments.uint32(3), nullptr, 0, nullptr));
}

napi_value IoQueueObject::copy(const Arguments<6>& arguments) {
  Operation operation = {
      .kind = Operation::Kind::Copy,
      .fd = arguments.int32(2),
      .length = arguments.size(4),
      .position = static_cast<int64_t>(arguments.size(3)),
      .argument = arguments.int32(0),
      .source_position = static_cast<int64_t>(arguments.size(1)),
  };
  return toNumber(arguments.env, submit(operation, arguments.uint32(5), nullptr, 0, nullptr));
}

napi_value IoQueueObject::truncate(const Arguments<3>& arguments) {
  Operation operation = {
      .kind = Operation::Kind::Truncate,
      .fd = arguments.int32(0),
      .length = arguments.size(1),
  };
  return toNumber(arguments.env, submit(operation, arguments.uint32(2), nullptr, 0, nullptr));
}

}  // namespace tcmu

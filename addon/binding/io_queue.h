// SPDX-License-Identifier: Apache-2.0
// `IoQueue`: file operations asked for by JavaScript, and their results.
//
// An operation on command memory pins its slot until its result is taken; one on ordinary memory
// keeps that memory's object. Results reach JavaScript in batches, the pins gone by then; after each
// batch every ring of this queue is flushed. The object keeps itself alive while anything is under way.
#pragma once

#include <napi.h>

#include <memory>
#include <vector>

#include "../io/queue.h"
#include "environment.h"
#include "method.h"

namespace tcmu {

// A ring, as seen by the queue it uses.
class MemoryOwner {
 public:
  virtual void pinForOperation(uint32_t slot) = 0;
  virtual void unpinAfterOperation(uint32_t slot) = 0;
  virtual void flushFromLoop() = 0;
  // Both are being collected, and the queue is first.
  virtual void queueGone() = 0;

 protected:
  ~MemoryOwner() = default;
};

class IoQueueObject : public Napi::ObjectWrap<IoQueueObject>,
                      private Environment::Member,
                      private Environment::AfterCallback,
                      private Queue::Owner {
 public:
  enum Mode : uint32_t { kNoWait = 1, kInline = 2 };

  static void init(Napi::Env env, Napi::Object exports);
  // Null when it is something else.
  static IoQueueObject* from(Napi::Value value);

  explicit IoQueueObject(const Napi::CallbackInfo& info);
  ~IoQueueObject() override;

  void add(MemoryOwner* ring) { rings_.push_back(ring); }
  void remove(MemoryOwner* ring) { std::erase(rings_, ring); }

  // Runs the operation at once if `mode` allows, or queues it. Either `ring` and `slot` or `keep`
  // name whose memory it is. Answers the result or -id; throws Napi::Error. `operation` is used up.
  int64_t submit(Operation& operation, uint32_t mode, MemoryOwner* ring, uint32_t slot,
                 napi_value keep);

 private:
  struct Pending : QueuedOperation {
    uint32_t id;
    MemoryOwner* ring;
    uint32_t slot;
    iovec flat;  // what `segments` points to for ordinary memory
    napi_ref keep;
  };
  static constexpr uint32_t kResultPairs = 1024;

  napi_value read(const Arguments<4>& arguments);
  napi_value write(const Arguments<4>& arguments);
  napi_value datasync(const Arguments<2>& arguments);
  napi_value allocate(const Arguments<5>& arguments);
  napi_value seek(const Arguments<4>& arguments);
  napi_value truncate(const Arguments<3>& arguments);
  napi_value copy(const Arguments<6>& arguments);
  napi_value moveBytes(Operation::Kind kind, const Arguments<4>& arguments);

  void stop() override;
  void afterCallback() override { queue_.handOver(); }
  void done(OperationList& operations) override;
  void jobStarted() override;
  void jobEnded() override;
  void retain();
  void release();

  Queue queue_;
  UvHandle<uv_async_t> wake_;
  UvHandle<uv_timer_t> timer_;
  Napi::Reference<Napi::Function> done_;
  Napi::Reference<Napi::Float64Array> results_;
  std::vector<MemoryOwner*> rings_;
  std::vector<std::unique_ptr<Pending>> operations_;  // by id - 1
  std::vector<uint32_t> free_ids_;
  uint32_t retained_ = 0;
};

}  // namespace tcmu

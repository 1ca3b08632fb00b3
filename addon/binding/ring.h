// SPDX-License-Identifier: Apache-2.0
// `Ring`: one device's ring, its polling, and its commands' memory, for JavaScript.
//
// Owns the mapping and the three descriptors. Alive from start() until close() whatever JavaScript
// does with the object, and while an operation of the queue uses its memory. The mapping goes when
// close() finds no pin, or when the last pin goes after it, or never: not under an operation. When
// the environment ends, polling stops, nothing is published any more, and the mapping goes unless
// JavaScript holds a pin.
#pragma once

#include <napi.h>

#include <memory>
#include <string>
#include <vector>

#include "../memory/external_buffers.h"
#include "../memory/mapping.h"
#include "../ring/express.h"
#include "../ring/ring.h"
#include "../uio/poller.h"
#include "io_queue.h"

namespace tcmu {

class RingObject : public Napi::ObjectWrap<RingObject>,
                   private Environment::Member,
                   private MemoryOwner,
                   private Poller::Owner {
 public:
  static void init(Napi::Env env, Napi::Object exports);
  explicit RingObject(const Napi::CallbackInfo& info);
  ~RingObject() override;

 private:
  // What is taken before other handles of the loop get their turn. Looking again is much cheaper than
  // going through the loop: under load, single commands come as fast as they are answered.
  static constexpr int kBatchesPerTurn = 64;
  static constexpr uint32_t kCommandsPerTurn = 1024;

  // Words of the `transfer` table.
  enum TransferWord {
    kTransferSlot,
    kTransferOffset,
    kTransferLength,
    kTransferFd,
    kTransferPosition,
    kTransferMode,
    kTransferResult,
    kTransferWords,
  };

  // Words of the `express` table: the terms on which plain reads and writes are carried out here. Whole
  // numbers up to 2^53; a lane with no blocks is closed.
  enum ExpressWord {
    kExpressBlockBytes,
    kExpressReadBlocks,
    kExpressWriteBlocks,
    kExpressMostBytes,
    // Counted here.
    kExpressReads,
    kExpressWrites,
    kExpressBlocksWritten,
    kExpressBlocksRead,
    kExpressWords,
  };

  // Pieces that a plain command may lie in.
  static constexpr uint32_t kExpressRuns = 64;

  // Completions between two flushes, at most.
  static constexpr uint32_t kCompletionRecords = 4096;

  template <class Element>
  Element* shareArray(Napi::Object self, const char* name, size_t length);

  napi_value start(const Arguments<0>&);
  napi_value stopPolling(const Arguments<0>&);
  napi_value flush(const Arguments<0>&);
  napi_value longCdb(const Arguments<1>&);
  napi_value takeTmr(const Arguments<0>&);
  napi_value inFlight(const Arguments<0>&);
  napi_value releaseKept(const Arguments<1>&);
  napi_value copyIn(const Arguments<3>&);
  napi_value copyOut(const Arguments<5>&);
  napi_value fill(const Arguments<4>&);
  napi_value isZero(const Arguments<3>&);
  napi_value mismatch(const Arguments<3>&);
  napi_value segments(const Arguments<3>&);
  napi_value pin(const Arguments<1>&);
  napi_value unpin(const Arguments<1>&);
  napi_value readFile(const Arguments<0>&);
  napi_value writeFile(const Arguments<0>&);
  napi_value useFileMap(const Arguments<2>&);
  napi_value close(const Arguments<0>&);
  napi_value stats(const Arguments<0>&);

  napi_value moveFile(Operation::Kind kind);
  // The slot's memory, after checking slot and range. Throws Napi::Error.
  Segments memory(uint32_t slot, uint64_t offset, uint64_t length) const;
  void checkOpen() const;

  void ready(bool readable) override;
  // Carries out what the express lane takes of the events fetched. How many are left for JavaScript.
  uint32_t takeExpress(uint32_t count);
  enum class Carried { Yes, No, MustWait };
  Carried carryOut(uint32_t slot);
  bool moveRun(const FileMap::Run& run, bool write, Segments segments, uint64_t offset);
  bool drainEvent();
  void failPoisoned();
  void reportLost(int error, const char* doing);
  void reportLost(const std::string& code, const std::string& message);
  static constexpr uint32_t kAllPublished = UINT32_MAX;
  // A slot that awaited no completion, or kAllPublished. Needs a handle scope.
  uint32_t publish();
  Napi::Error completionError(uint32_t slot) const;
  void ringDoorbell();
  void revoke(uint32_t slot);
  void reportEscaped();
  bool finishClose();

  void stop() override;
  void pinForOperation(uint32_t slot) override;
  void unpinAfterOperation(uint32_t slot) override;
  void flushFromLoop() override;
  void queueGone() override { io_ = nullptr; }
  void retain();
  void release();

  std::unique_ptr<Mapping> mapping_;
  std::unique_ptr<Ring> ring_;  // in the mapping
  ExternalBuffers buffers_;     // on the mapping
  Poller poller_;
  IoQueueObject* io_ = nullptr;  // a property of ours keeps it
  Napi::Reference<Napi::Function> dispatch_, lost_, escaped_;

  // Arrays shared with JavaScript: ours while the references are.
  std::vector<Napi::ObjectReference> arrays_;
  int32_t* events_ = nullptr;
  RingTables tables_ = {};
  uint32_t batch_size_ = 0;
  uint32_t completion_room_ = 0;
  uint32_t* completions_ = nullptr;
  double* transfer_ = nullptr;
  double* express_ = nullptr;
  FileMap file_map_;  // in an array of JavaScript's, which `file_map_words_` keeps
  Napi::ObjectReference file_map_words_;
  uint8_t* sense_ = nullptr;

  bool started_ = false;
  bool lost_reported_ = false;
  bool closing_ = false;
  int doorbell_error_ = 0;
  uint32_t retained_ = 0;
  std::vector<uint32_t> escaped_slots_;
  RingStats final_stats_;
  uint64_t wakeups_ = 0, batches_ = 0, doorbells_ = 0, carried_ = 0;
};

}  // namespace tcmu

// SPDX-License-Identifier: Apache-2.0
// SimDevice: the simulated kernel for JavaScript (lib/native-sim.ts).
//
// The device's own thread finishes commands; what is finished waits here, and one uv_async carries
// it to the environment's thread, where lib/ is called with tables of results. The Data-In memory
// of a command is the caller's ArrayBuffer, written by the device's thread: lib/ keeps it reachable
// and out of everybody's hands until the result is there. While commands are pending the event loop
// is kept alive. `close`, or the end of the environment, joins the thread before anything is freed.
#pragma once

#include <napi.h>
#include <uv.h>

#include <memory>
#include <mutex>
#include <span>
#include <unordered_map>
#include <vector>

#include "../nbd/server.h"
#include "../sim/device.h"
#include "../sim/load.h"
#include "environment.h"
#include "method.h"

namespace tcmu {

class SimDevice : public Napi::ObjectWrap<SimDevice>,
                  private Environment::Member,
                  private sim::Initiator {
 public:
  static void init(Napi::Env env, Napi::Object exports);

  explicit SimDevice(const Napi::CallbackInfo& info);
  ~SimDevice() override;

  // The device, for those that serve it. Throws once it is closed.
  std::shared_ptr<sim::Device> shared(Napi::Env env) const;
  // Ends the server with the device, and keeps it until its commands have ended.
  void keep(std::shared_ptr<nbd::Server> server);

 private:
  static constexpr uint32_t kBatch = 256;
  static constexpr uint32_t kResultWords = 4;

  // Any thread.
  void finished(const sim::Completion& completion) override;
  void batchEnd() override;

  void stop() override;
  // Hands what is finished to lib/.
  void deliver(bool fromLoop);
  sim::Device& device(Napi::Env env) const;

  napi_value submit(const Arguments<5>& arguments);
  Napi::Value open(const Napi::CallbackInfo& info);
  Napi::Value taskManagement(const Napi::CallbackInfo& info);
  Napi::Value expire(const Napi::CallbackInfo& info);
  Napi::Value setBlocked(const Napi::CallbackInfo& info);
  Napi::Value resetRing(const Napi::CallbackInfo& info);
  Napi::Value freeKeptBuffer(const Napi::CallbackInfo& info);
  Napi::Value reclaim(const Napi::CallbackInfo& info);
  Napi::Value setAttributes(const Napi::CallbackInfo& info);
  Napi::Value setFaults(const Napi::CallbackInfo& info);
  Napi::Value kick(const Napi::CallbackInfo& info);
  Napi::Value refuseAll(const Napi::CallbackInfo& info);
  Napi::Value unregister(const Napi::CallbackInfo& info);
  Napi::Value peek(const Napi::CallbackInfo& info);
  Napi::Value poke(const Napi::CallbackInfo& info);
  Napi::Value entries(const Napi::CallbackInfo& info);
  Napi::Value state(const Napi::CallbackInfo& info);
  Napi::Value startLoad(const Napi::CallbackInfo& info);
  Napi::Value stopLoad(const Napi::CallbackInfo& info);
  Napi::Value close(const Napi::CallbackInfo& info);
  void deliverLoad(bool fromLoop);
  // Enters lib/. `fromLoop`: nothing of JavaScript is below us on the stack.
  void enter(const Napi::FunctionReference& function, napi_value argument, bool fromLoop);
  void hold();
  void release(uint32_t count);

  Napi::FunctionReference callback_;
  Napi::Reference<Napi::Uint32Array> results_table_;
  Napi::Reference<Napi::Uint8Array> sense_table_;
  uint32_t* results_ = nullptr;
  uint8_t* sense_ = nullptr;
  Napi::FunctionReference load_callback_;
  uint32_t pending_ = 0;  // submitted and not yet delivered; a load counts as one

  void wake();

  std::mutex lock_;  // guards the next three
  std::vector<sim::Completion> finished_;
  bool load_ended_ = false;
  bool awake_ = false;  // the async is open: other threads may send
  UvHandle<uv_async_t> async_;
  // With zero copy a command's data is in the device's pool, and copied for JavaScript.
  struct Lent {
    std::span<uint8_t> out;
    std::span<uint8_t> in;
    uint8_t* target;
  };
  std::span<uint8_t> lend(size_t bytes);
  void giveBack(uint32_t tag);
  std::unordered_map<uint32_t, Lent> lent_;

  std::shared_ptr<sim::Device> device_;  // stopped before anything goes: its thread calls us
  std::vector<std::shared_ptr<nbd::Server>> servers_;
  std::unique_ptr<sim::LoadGenerator> load_;
};

}  // namespace tcmu

// SPDX-License-Identifier: Apache-2.0
// NbdServer: the NBD server for JavaScript (lib/native-sim.ts).
//
// The server runs on its simulated device's thread; what it wants of lib/ waits here, and a uv_async
// carries it over. While it listens it keeps the event loop and itself alive, as a net.Server does.
#pragma once

#include <napi.h>
#include <uv.h>

#include <memory>
#include <mutex>
#include <vector>

#include "../nbd/server.h"
#include "environment.h"

namespace tcmu {

class NbdServer : public Napi::ObjectWrap<NbdServer>,
                  private Environment::Member,
                  private nbd::Observer {
 public:
  static void init(Napi::Env env, Napi::Object exports);

  explicit NbdServer(const Napi::CallbackInfo& info);
  ~NbdServer() override;

 private:
  // The device's thread.
  void happened(Event event) override;

  void stop() override;
  void deliver();
  Napi::Value described(const Napi::CallbackInfo& info);
  Napi::Value close(const Napi::CallbackInfo& info);
  Napi::Value counts(const Napi::CallbackInfo& info);

  Napi::FunctionReference callback_;
  Napi::ObjectReference device_;  // the SimDevice: it must not be collected
  bool open_ = false;             // until lib/ has been told that it is closed
  std::mutex lock_;               // guards the next two
  std::vector<Event> events_;
  bool awake_ = false;  // the async is open
  UvHandle<uv_async_t> async_;
  std::shared_ptr<nbd::Server> server_;
};

}  // namespace tcmu

// SPDX-License-Identifier: Apache-2.0
// `fileFacts` and locks: questions about a descriptor that node:fs has no answer to.
#include <napi.h>

#include "../io/file_facts.h"
#include "error.h"
#include "registry.h"

namespace tcmu {
namespace {

Napi::Value factsOf(const Napi::CallbackInfo& info) {
  const Napi::Env env = info.Env();
  FileFacts facts;
  const char* call = "";
  const int error = fileFacts(info[0].ToNumber().Int32Value(), facts, call);
  if (error != 0) throw systemError(env, error, call);
  static constexpr const char* kKinds[] = {"file", "block", "other"};
  auto result = Napi::Object::New(env);
  result["kind"] = Napi::String::New(env, kKinds[static_cast<int>(facts.kind)]);
  result["size"] = Napi::Number::New(env, static_cast<double>(facts.size));
  result["blockSize"] = Napi::Number::New(env, facts.block_size);
  result["physicalBlockSize"] = Napi::Number::New(env, facts.physical_block_size);
  result["nowaitRead"] = Napi::Boolean::New(env, facts.nowait_read);
  result["nowaitWrite"] = Napi::Boolean::New(env, facts.nowait_write);
  result["memory"] = Napi::Boolean::New(env, facts.memory);
  result["direct"] = Napi::Boolean::New(env, facts.direct);
  return result;
}

Napi::Value lock(const Napi::CallbackInfo& info) {
  const int taken = lockFile(info[0].ToNumber().Int32Value(), info[1].ToBoolean(),
                             info[2].ToNumber().Int64Value(), info[3].ToNumber().Int64Value());
  if (taken < 0) throw systemError(info.Env(), -taken, "fcntl");
  return Napi::Boolean::New(info.Env(), taken == 1);
}

Napi::Value unlock(const Napi::CallbackInfo& info) {
  const int error = unlockFile(info[0].ToNumber().Int32Value(), info[1].ToNumber().Int64Value(),
                               info[2].ToNumber().Int64Value());
  if (error < 0) throw systemError(info.Env(), -error, "fcntl");
  return info.Env().Undefined();
}

Napi::Value lockedElsewhere(const Napi::CallbackInfo& info) {
  const int held = lockedByOthers(info[0].ToNumber().Int32Value(),
                                  info[1].ToNumber().Int64Value(), info[2].ToNumber().Int64Value());
  if (held < 0) throw systemError(info.Env(), -held, "fcntl");
  return Napi::Boolean::New(info.Env(), held == 1);
}

const Export exportFiles([](Napi::Env env, Napi::Object exports) {
  exports.Set("fileFacts", Napi::Function::New(env, factsOf, "fileFacts"));
  exports.Set("lockFile", Napi::Function::New(env, lock, "lockFile"));
  exports.Set("unlockFile", Napi::Function::New(env, unlock, "unlockFile"));
  exports.Set("lockedByOthers", Napi::Function::New(env, lockedElsewhere, "lockedByOthers"));
});

}  // namespace
}  // namespace tcmu

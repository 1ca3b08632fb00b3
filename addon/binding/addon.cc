// SPDX-License-Identifier: Apache-2.0
// Entry point: one Environment per JavaScript environment, then every registered export.
#include <napi.h>

#include "environment.h"
#include "registry.h"

namespace {

// CONTRACT in lib/native.ts: raised with every change of what the addon and lib expect of each other.
constexpr int kContract = 5;

Napi::Object init(Napi::Env env, Napi::Object exports) {
  tcmu::Environment::create(env);
  exports.Set("contract", Napi::Number::New(env, kContract));
  tcmu::Export::all(env, exports);
  return exports;
}

}  // namespace

NODE_API_MODULE(tcmu, init)

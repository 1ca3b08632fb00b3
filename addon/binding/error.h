// SPDX-License-Identifier: Apache-2.0
// Errors as lib/native.ts promises them.
#pragma once

#include <napi.h>
#include <uv.h>

#include <string>

#include "../ring/ring.h"

namespace tcmu {

inline constexpr const char* kMemoryGone = "ERR_TCMU_RING_MEMORY";

inline Napi::Error codedError(napi_env env, const std::string& code, const std::string& message) {
  Napi::Error error = Napi::Error::New(env, message);
  error.Set("code", Napi::String::New(env, code));
  return error;
}

// `error`: a positive errno value.
inline Napi::Error systemError(napi_env env, int error, const char* call) {
  const std::string name = uv_err_name(-error);
  Napi::Error result = codedError(env, name, name + ": " + uv_strerror(-error) + ", " + call);
  result.Set("errno", Napi::Number::New(env, -error));
  result.Set("syscall", Napi::String::New(env, call));
  return result;
}

inline const char* faultCode(const RingFault& fault) {
  switch (fault.kind) {
    case RingFault::Kind::Version: return "ERR_TCMU_RING_VERSION";
    case RingFault::Kind::Corrupt: return "ERR_TCMU_RING_CORRUPT";
    case RingFault::Kind::Memory: return kMemoryGone;
  }
  return "";
}

inline Napi::Error memoryError(napi_env env) {
  return codedError(env, kMemoryGone,
                    "the memory of the command is gone: the device was removed or its ring reset");
}

}  // namespace tcmu

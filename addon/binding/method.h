// SPDX-License-Identifier: Apache-2.0
// Methods that are called often: plain N-API under a thin typed face, since node-addon-api's
// CallbackInfo costs as much as the work itself.
//
//   napi_value copyIn(const Arguments<3>&);
//
//   method<&RingObject::copyIn>("copyIn")                   on the prototype, for DefineClass
//   bindMethod<&RingObject::copyIn>(self, this, "copyIn")   on the object itself
//
// A bound method knows its object instead of looking it up in `this` at each call: measured, that
// look-up takes two thirds of a small call. It keeps its object alive and can be called apart from it.
#pragma once

#include <napi.h>

#include <cmath>
#include <cstdint>

#include "error.h"

namespace tcmu {

struct Bytes {
  uint8_t* data;
  size_t length;
};

template <size_t N>
struct Arguments {
  napi_env env;
  napi_value values[N == 0 ? 1 : N];

  double number(size_t i) const {
    double value;
    if (napi_get_value_double(env, values[i], &value) != napi_ok)
      throw Napi::TypeError::New(env, "argument " + std::to_string(i) + " is no number");
    return value;
  }
  uint32_t uint32(size_t i) const {
    uint32_t value;
    if (napi_get_value_uint32(env, values[i], &value) != napi_ok)
      throw Napi::TypeError::New(env, "argument " + std::to_string(i) + " is no number");
    return value;
  }
  int32_t int32(size_t i) const { return static_cast<int32_t>(uint32(i)); }
  // A length or position.
  uint64_t size(size_t i) const {
    const double value = number(i);
    if (!(value >= 0 && value <= 9007199254740991.0))
      throw Napi::RangeError::New(env, "argument " + std::to_string(i) + " is no safe integer >= 0");
    return static_cast<uint64_t>(value);
  }
  // A file position; -1 is the descriptor's own.
  int64_t position(size_t i) const {
    return number(i) == -1 ? -1 : static_cast<int64_t>(size(i));
  }
  // A detached one has length 0.
  Bytes bytes(size_t i) const {
    napi_typedarray_type type;
    void* data;
    size_t length;
    if (napi_get_typedarray_info(env, values[i], &type, &length, &data, nullptr, nullptr) !=
            napi_ok ||
        type != napi_uint8_array)
      throw Napi::TypeError::New(env, "argument " + std::to_string(i) + " is no Uint8Array");
    return {static_cast<uint8_t*>(data), length};
  }
};

inline napi_value toNumber(napi_env env, int64_t value) {
  napi_value result;
  if (value == static_cast<int32_t>(value))
    napi_create_int32(env, static_cast<int32_t>(value), &result);
  else
    napi_create_double(env, static_cast<double>(value), &result);
  return result;
}

template <class>
struct MethodOf;
template <class Class, size_t N>
struct MethodOf<napi_value (Class::*)(const Arguments<N>&)> {
  using Object = Class;
  static constexpr size_t kCount = N;
};

template <auto kMethod, bool kBound>
napi_value callMethod(napi_env env, napi_callback_info info) {
  using Traits = MethodOf<decltype(kMethod)>;
  size_t count = Traits::kCount;
  Arguments<Traits::kCount> arguments;
  arguments.env = env;
  napi_value self;
  void* object;
  napi_status status = napi_get_cb_info(env, info, &count, arguments.values,
                                        kBound ? nullptr : &self, &object);
  if (!kBound && status == napi_ok) status = napi_unwrap(env, self, &object);
  if (status != napi_ok) {
    napi_throw_type_error(env, nullptr, "called on another kind of object");
    return nullptr;
  }
  try {
    return (static_cast<typename Traits::Object*>(object)->*kMethod)(arguments);
  } catch (const Napi::Error& error) {
    error.ThrowAsJavaScriptException();
    return nullptr;
  }
}

template <auto kMethod>
napi_property_descriptor method(const char* name) {
  return {name,    nullptr, callMethod<kMethod, false>, nullptr, nullptr, nullptr,
          napi_default_method, nullptr};
}

template <auto kMethod>
void bindMethod(Napi::Object self, typename MethodOf<decltype(kMethod)>::Object* object,
                const char* name) {
  const Napi::Env env = self.Env();
  napi_value function;
  if (napi_create_function(env, name, NAPI_AUTO_LENGTH, callMethod<kMethod, true>, object, &function) !=
      napi_ok)
    throw Napi::Error::New(env);
  Napi::Object(env, function)
      .DefineProperty(Napi::PropertyDescriptor::Value("of", self, napi_default));
  self.DefineProperty(
      Napi::PropertyDescriptor::Value(name, Napi::Value(env, function), napi_enumerable));
}

}  // namespace tcmu

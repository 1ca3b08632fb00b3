// SPDX-License-Identifier: Apache-2.0
#include "environment.h"

namespace tcmu {

Environment& Environment::of(napi_env env) { return *Napi::Env(env).GetInstanceData<Environment>(); }

void Environment::create(Napi::Env env) { env.SetInstanceData(new Environment(env)); }

Environment::Environment(Napi::Env env) : env_(env) {
  napi_get_uv_event_loop(env_, &loop_);
  napi_add_async_cleanup_hook(env_, onCleanup, this, &hook_);
}

void Environment::onCleanup(napi_async_cleanup_hook_handle, void* data) {
  auto* self = static_cast<Environment*>(data);
  self->stopping_ = true;
  self->opened();
  const std::vector<Member*> members = self->members_;
  for (Member* member : members) member->stop();
  self->closed();
}

void Environment::closed() {
  // Removing the hook lets Node free this object.
  if (--open_ == 0 && stopping_) napi_remove_async_cleanup_hook(hook_);
}

void Environment::leave() {
  if (--depth_ > 0) return;
  for (AfterCallback* listener : after_callback_) listener->afterCallback();
}

bool Environment::succeeded(napi_status status) {
  if (status == napi_ok) return true;
  bool pending = false;
  napi_is_exception_pending(env_, &pending);
  napi_value exception;
  if (!pending || napi_get_and_clear_last_exception(env_, &exception) != napi_ok) return false;
  // When the thread is being terminated, what is pending is no JavaScript value that could be reported.
  napi_valuetype type;
  if (napi_typeof(env_, exception, &type) == napi_ok && type != napi_null && type != napi_undefined)
    napi_fatal_exception(env_, exception);
  return false;
}

bool Environment::call(napi_ref function, size_t argc, const napi_value* argv) {
  if (stopping_) return false;
  napi_value target, receiver, result;
  if (napi_get_reference_value(env_, function, &target) != napi_ok ||
      napi_get_global(env_, &receiver) != napi_ok)
    return false;
  depth_++;
  const napi_status status =
      napi_make_callback(env_, nullptr, receiver, target, argc, argv, &result);
  leave();
  return succeeded(status);
}

napi_async_context Environment::asyncContext() {
  napi_value name;
  if (async_context_ == nullptr &&
      napi_create_string_utf8(env_, "tcmu", NAPI_AUTO_LENGTH, &name) == napi_ok)
    napi_async_init(env_, nullptr, name, &async_context_);
  return async_context_;
}

bool Environment::Turn::begin() {
  Environment& e = environment_;
  if (scope_ != nullptr) return true;
  napi_value resource;
  return !e.stopping_ && napi_create_object(e.env_, &resource) == napi_ok &&
         napi_open_callback_scope(e.env_, resource, e.asyncContext(), &scope_) == napi_ok;
}

bool Environment::Turn::call(napi_ref function, size_t argc, const napi_value* argv) {
  Environment& e = environment_;
  if (e.stopping_) return false;
  napi_value target, receiver, result;
  if (napi_get_reference_value(e.env_, function, &target) != napi_ok ||
      napi_get_undefined(e.env_, &receiver) != napi_ok)
    return false;
  e.depth_++;
  const napi_status status = napi_call_function(e.env_, receiver, target, argc, argv, &result);
  e.leave();
  return e.succeeded(status);
}

void Environment::Turn::end() {
  if (scope_ == nullptr) return;
  const napi_callback_scope scope = scope_;
  scope_ = nullptr;
  environment_.depth_++;
  const napi_status status = napi_close_callback_scope(environment_.env_, scope);
  environment_.leave();
  environment_.succeeded(status);
}

}  // namespace tcmu

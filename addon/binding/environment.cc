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

bool Environment::call(napi_ref function, size_t argc, const napi_value* argv) {
  if (stopping_) return false;
  napi_value target, receiver, result;
  if (napi_get_reference_value(env_, function, &target) != napi_ok ||
      napi_get_global(env_, &receiver) != napi_ok)
    return false;
  depth_++;
  const napi_status status =
      napi_make_callback(env_, nullptr, receiver, target, argc, argv, &result);
  if (--depth_ == 0) {
    for (AfterCallback* listener : after_callback_) listener->afterCallback();
  }
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

}  // namespace tcmu

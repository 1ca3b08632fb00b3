// SPDX-License-Identifier: Apache-2.0
// All state the addon has in one JavaScript environment (the main thread's, or a worker's), and the
// order in which it goes.
//
// Everything that holds a libuv handle or has work in libuv's pool is a `Member` and counts what it
// has open with `opened()` / `closed()`. When the environment ends (worker.terminate(), process exit,
// the last reference gone), Node calls our asynchronous cleanup hook: every member is told to stop,
// no callback enters JavaScript any more, and Node's teardown goes on only once the count is zero:
// no handle is left for uv_loop_close to abort on, no pool job touches freed memory.
#pragma once

#include <napi.h>
#include <uv.h>

#include <cstdint>
#include <vector>

namespace tcmu {

class Environment {
 public:
  // On the environment's thread only. `stop` must lead to a `closed()` for each `opened()`.
  class Member {
   public:
    virtual void stop() = 0;

   protected:
    explicit Member(Environment& environment) : environment_(environment) {
      environment_.members_.push_back(this);
    }
    ~Member() { std::erase(environment_.members_, this); }
    Member(const Member&) = delete;
    Member& operator=(const Member&) = delete;

    Environment& environment_;
  };

  static Environment& of(napi_env env);
  static void create(Napi::Env env);

  explicit Environment(Napi::Env env);

  napi_env env() const { return env_; }
  uv_loop_t* loop() const { return loop_; }
  // JavaScript must not be entered any more.
  bool stopping() const { return stopping_; }
  // Inside one of our callbacks into JavaScript: what is queued now is handed over when it ends.
  bool inCallback() const { return depth_ > 0; }

  // Called each time the outermost callback into JavaScript has ended.
  struct AfterCallback {
    virtual void afterCallback() = 0;

   protected:
    ~AfterCallback() = default;
  };
  void add(AfterCallback* listener) { after_callback_.push_back(listener); }
  void remove(AfterCallback* listener) { std::erase(after_callback_, listener); }

  void opened() { open_++; }
  void closed();

  // Calls `function` from the event loop (no JavaScript below us on the stack) and lets microtasks
  // run. An exception becomes an uncaught one. Needs a handle scope. False: it did not run through.
  bool call(napi_ref function, size_t argc, const napi_value* argv);

  // Several calls from the event loop with one run of ticks and microtasks, at its end: for callees
  // that mostly leave none behind. Needs a handle scope around it.
  class Turn {
   public:
    explicit Turn(Environment& environment) : environment_(environment) {}
    ~Turn() { end(); }
    Turn(const Turn&) = delete;
    Turn& operator=(const Turn&) = delete;

    // Before a call. The handle scope at this moment must last until `end`.
    bool begin();
    // As Environment::call, but microtasks wait for `end`.
    bool call(napi_ref function, size_t argc, const napi_value* argv);
    // Lets ticks and microtasks run.
    void end();

   private:
    Environment& environment_;
    napi_callback_scope scope_ = nullptr;
  };

 private:
  static void onCleanup(napi_async_cleanup_hook_handle handle, void* self);
  // What `Member`s do when the outermost of our callbacks has ended.
  void leave();
  bool succeeded(napi_status status);
  napi_async_context asyncContext();

  napi_env env_;
  uv_loop_t* loop_ = nullptr;
  bool stopping_ = false;
  uint32_t depth_ = 0;
  uint32_t open_ = 0;
  std::vector<Member*> members_;
  std::vector<AfterCallback*> after_callback_;
  napi_async_cleanup_hook_handle hook_ = nullptr;
  // Lives as long as the environment.
  napi_async_context async_context_ = nullptr;
};

// Keeps `value` alive as long as `self`, by a property nobody sees, and answers a weak reference. A
// strong one would be a root: a callback that mentions its own object could never be collected.
template <class Value>
Napi::Reference<Value> keepOn(Napi::Object self, const char* name, Value value) {
  self.DefineProperty(Napi::PropertyDescriptor::Value(name, value, napi_default));
  return Napi::Reference<Value>::New(value, 0);
}

// A libuv handle: started by the owner, closed when this goes, freed when libuv is done with it.
// `data` is the owner's pointer. After the close no callback comes any more.
template <class Handle>
class UvHandle {
 public:
  UvHandle() = default;
  ~UvHandle() { close(); }
  UvHandle(const UvHandle&) = delete;
  UvHandle& operator=(const UvHandle&) = delete;

  // `init(loop, handle)` is the uv_*_init call. Returns its result.
  template <class Init>
  int open(Environment& environment, void* data, Init&& init) {
    auto* box = new Box{{}, &environment};
    const int result = init(environment.loop(), &box->handle);
    if (result != 0) {
      delete box;
      return result;
    }
    box->handle.data = data;
    box_ = box;
    environment.opened();
    return 0;
  }
  Handle* get() const { return box_ ? &box_->handle : nullptr; }
  explicit operator bool() const { return box_ != nullptr; }
  void close() {
    if (!box_) return;
    uv_close(reinterpret_cast<uv_handle_t*>(&box_->handle), [](uv_handle_t* handle) {
      auto* box = reinterpret_cast<Box*>(handle);
      Environment* environment = box->environment;
      delete box;
      environment->closed();
    });
    box_ = nullptr;
  }

 private:
  struct Box {
    Handle handle;  // first: libuv gives us its address
    Environment* environment;
  };
  Box* box_ = nullptr;
};

}  // namespace tcmu

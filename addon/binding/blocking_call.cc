// SPDX-License-Identifier: Apache-2.0
// `blockingCall`: a system call that may hang uninterruptibly, on a thread of its own.
//
// The threads belong to nobody: when the environment ends before one is back, it goes on (or hangs
// on) alone, finds the environment gone, and throws its answer away. Promises are settled on the
// JavaScript thread. An outstanding call keeps the event loop alive.
#include <errno.h>
#include <fcntl.h>
#include <napi.h>
#include <signal.h>
#include <sys/stat.h>
#include <unistd.h>

#include <memory>
#include <mutex>
#include <string>
#include <system_error>
#include <thread>
#include <unordered_map>
#include <vector>

#include "../util/unique_fd.h"
#include "environment.h"
#include "error.h"
#include "registry.h"

namespace tcmu {
namespace {

struct Call {
  std::string name, path, data;
  const char* failed = "";  // the system call that did

  // 0 or an errno.
  int run() {
    failed = name.c_str();
    if (name == "mkdir") return mkdir(path.c_str(), 0777) == 0 ? 0 : errno;
    if (name == "rmdir") return rmdir(path.c_str()) == 0 ? 0 : errno;
    if (name == "symlink") return symlink(data.c_str(), path.c_str()) == 0 ? 0 : errno;
    if (name == "unlink") return unlink(path.c_str()) == 0 ? 0 : errno;
    failed = "open";
    const UniqueFd file(open(path.c_str(), O_WRONLY | O_CLOEXEC));
    if (!file) return errno;
    failed = "write";
    // EINTR is an answer (a reset of TCMU's netlink ends an `enable` so): to try again would be to
    // enable again.
    const ssize_t wrote = write(file.get(), data.data(), data.size());
    if (wrote < 0) return errno;
    return static_cast<size_t>(wrote) == data.size() ? 0 : EIO;
  }
  static bool known(const std::string& name) {
    return name == "mkdir" || name == "rmdir" || name == "symlink" || name == "unlink" ||
           name == "open-write";
  }
};

struct Answer {
  uint32_t id;
  int error;
  std::string call;
};

// What threads and the environment share; outlives both.
struct Letterbox {
  std::mutex mutex;
  std::vector<Answer> answers;
  uv_async_t* bell = nullptr;  // null: nobody reads any more
};

class BlockingCalls : private Environment::Member {
 public:
  explicit BlockingCalls(Environment& environment)
      : Member(environment), box_(std::make_shared<Letterbox>()) {
    bell_.open(environment_, this, [](uv_loop_t* loop, uv_async_t* handle) {
      return uv_async_init(loop, handle, [](uv_async_t* async) {
        static_cast<BlockingCalls*>(async->data)->read();
      });
    });
    uv_unref(reinterpret_cast<uv_handle_t*>(bell_.get()));
    box_->bell = bell_.get();
    const Napi::Env env = environment_.env();
    settle_ = Napi::Persistent(Napi::Function::New(
        env, [this](const Napi::CallbackInfo& info) { settle(info.Env()); }, "settle"));
  }

  Napi::Value start(const Napi::CallbackInfo& info) {
    const Napi::Env env = info.Env();
    Call call = {info[0].ToString(), info[1].ToString(),
                 info[2].IsUndefined() ? std::string() : std::string(info[2].ToString())};
    if (!Call::known(call.name)) throw Napi::TypeError::New(env, "no such call: " + call.name);
    const auto deferred = Napi::Promise::Deferred::New(env);
    const uint32_t id = ++last_id_;
    try {
      std::thread([id, call = std::move(call), box = box_]() mutable {
        // Signals are for the other threads, and must not cut a call short.
        sigset_t all;
        sigfillset(&all);
        pthread_sigmask(SIG_BLOCK, &all, nullptr);
        const int error = call.run();
        const std::lock_guard lock(box->mutex);
        box->answers.push_back({id, error, call.failed});
        if (box->bell) uv_async_send(box->bell);
      }).detach();
    } catch (const std::system_error& error) {
      throw systemError(env, error.code().value(), "pthread_create");
    }
    if (waiting_.empty()) uv_ref(reinterpret_cast<uv_handle_t*>(bell_.get()));
    waiting_.emplace(id, deferred);
    return deferred.Promise();
  }

 private:
  void read() {
    const Napi::HandleScope scope(environment_.env());
    environment_.call(settle_, 0, nullptr);
  }

  void settle(Napi::Env env) {
    std::vector<Answer> answers;
    {
      const std::lock_guard lock(box_->mutex);
      answers.swap(box_->answers);
    }
    for (const Answer& answer : answers) {
      const auto found = waiting_.find(answer.id);
      const Napi::Promise::Deferred deferred = found->second;
      waiting_.erase(found);
      if (answer.error == 0)
        deferred.Resolve(env.Undefined());
      else
        deferred.Reject(systemError(env, answer.error, answer.call.c_str()).Value());
    }
    if (waiting_.empty() && bell_) uv_unref(reinterpret_cast<uv_handle_t*>(bell_.get()));
  }

  void stop() override {
    {
      const std::lock_guard lock(box_->mutex);
      box_->bell = nullptr;
    }
    bell_.close();
  }

  const std::shared_ptr<Letterbox> box_;
  UvHandle<uv_async_t> bell_;
  Napi::FunctionReference settle_;
  std::unordered_map<uint32_t, Napi::Promise::Deferred> waiting_;
  uint32_t last_id_ = 0;
};

const Export exportBlockingCall([](Napi::Env env, Napi::Object exports) {
  const auto calls = std::make_shared<BlockingCalls>(Environment::of(env));
  exports.Set("blockingCall",
              Napi::Function::New(
                  env, [calls](const Napi::CallbackInfo& info) { return calls->start(info); },
                  "blockingCall"));
});

}  // namespace
}  // namespace tcmu

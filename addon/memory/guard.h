// SPDX-License-Identifier: Apache-2.0
// Touching shared memory whose pages may be gone.
//
// After a device is removed or its ring reset, and for a truncated memory file, a load or store in
// the mapping raises SIGBUS. Two nets catch it, so that one device never takes the process down:
//
// - `guarded(f)`: native code runs `f` and gets false when it hit such a page. `f` may hold nothing
//   that needs a destructor: it is left by siglongjmp. Costs a few nanoseconds.
// - Everybody else (JavaScript on an external ArrayBuffer, zlib in the thread pool): the page of a
//   registered mapping is replaced by a private zero page and the mapping marked as poisoned. What
//   was read or written there is lost, so a poisoned ring must publish nothing any more.
//
// Any thread may use both. The handler is installed once per process, stays, and passes on faults
// that are none of ours. The addon must never be unloaded (it is linked with -z nodelete).
#pragma once

#include <csetjmp>
#include <cstddef>
#include <cstring>

namespace tcmu {

struct GuardFrame {
  sigjmp_buf environment;
  GuardFrame* outer;
};

#ifdef __GLIBC__
// No lazy allocation of thread-local storage inside the signal handler.
#define TCMU_TLS_MODEL __attribute__((tls_model("initial-exec")))
#else
#define TCMU_TLS_MODEL
#endif
extern thread_local GuardFrame* volatile currentGuard TCMU_TLS_MODEL;

// Idempotent; called before the first mapping is made.
void installGuard();

template <class F>
[[nodiscard]] inline bool guarded(F&& touch) noexcept {
  GuardFrame frame;
  frame.outer = currentGuard;
  if (sigsetjmp(frame.environment, 0) != 0) {
    currentGuard = frame.outer;
    return false;
  }
  currentGuard = &frame;
  touch();
  currentGuard = frame.outer;
  return true;
}

[[nodiscard]] inline bool guardedCopy(void* to, const void* from, size_t bytes) noexcept {
  return guarded([=] { std::memcpy(to, from, bytes); });
}

// A mapping known to the handler. Not found a place for (4096 at once): only `guarded` protects it.
class GuardedRange {
 public:
  GuardedRange(void* start, size_t bytes);
  ~GuardedRange();
  GuardedRange(const GuardedRange&) = delete;
  GuardedRange& operator=(const GuardedRange&) = delete;

  // A page was replaced: the memory no longer is what the kernel sees.
  bool poisoned() const;
  // The address whose touch was the first to do that; null: none.
  const void* poisonedAt() const;

 private:
  int index_;
};

}  // namespace tcmu

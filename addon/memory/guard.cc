// SPDX-License-Identifier: Apache-2.0
#include "guard.h"

#include <signal.h>
#include <sys/mman.h>
#include <unistd.h>

#include <atomic>
#include <mutex>

namespace tcmu {

thread_local GuardFrame* volatile currentGuard TCMU_TLS_MODEL = nullptr;

namespace {

struct Range {
  std::atomic<bool> taken{false};
  std::atomic<uintptr_t> poisoned{0};  // the address touched
  std::atomic<size_t> bytes{0};
  std::atomic<uintptr_t> start{0};
};

constexpr int kRanges = 4096;
Range ranges[kRanges];
std::atomic<int> rangesUsed{0};
struct sigaction previous;
size_t pageBytes;

bool replacePage(uintptr_t address) {
  const int used = rangesUsed.load(std::memory_order_acquire);
  for (int i = 0; i < used; i++) {
    const uintptr_t start = ranges[i].start.load(std::memory_order_acquire);
    if (start == 0 || address < start || address - start >= ranges[i].bytes.load()) continue;
    uintptr_t nowhere = 0;
    ranges[i].poisoned.compare_exchange_strong(nowhere, address);
    void* page = reinterpret_cast<void*>(address & ~(pageBytes - 1));
    return mmap(page, pageBytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED, -1,
                0) != MAP_FAILED;
  }
  return false;
}

void onBusError(int signal, siginfo_t* info, void* context) {
  if (GuardFrame* frame = currentGuard) siglongjmp(frame->environment, 1);
  if (info->si_code > 0 && replacePage(reinterpret_cast<uintptr_t>(info->si_addr))) return;
  if (previous.sa_flags & SA_SIGINFO) {
    previous.sa_sigaction(signal, info, context);
  } else if (previous.sa_handler != SIG_DFL && previous.sa_handler != SIG_IGN) {
    previous.sa_handler(signal);
  } else {
    // The access is repeated, and the process ends as it would have without us.
    struct sigaction standard = {};
    standard.sa_handler = SIG_DFL;
    sigaction(SIGBUS, &standard, nullptr);
    if (info->si_code <= 0) raise(SIGBUS);
  }
}

}  // namespace

void installGuard() {
  static std::once_flag once;
  std::call_once(once, [] {
    pageBytes = static_cast<size_t>(sysconf(_SC_PAGESIZE));
    struct sigaction ours = {};
    ours.sa_sigaction = onBusError;
    // NODEFER: the handler is left by siglongjmp, which restores no signal mask.
    ours.sa_flags = SA_SIGINFO | SA_NODEFER | SA_ONSTACK;
    sigaction(SIGBUS, &ours, &previous);
  });
}

GuardedRange::GuardedRange(void* start, size_t bytes) : index_(-1) {
  installGuard();
  for (int i = 0; i < kRanges; i++) {
    bool taken = false;
    if (!ranges[i].taken.compare_exchange_strong(taken, true)) continue;
    index_ = i;
    ranges[i].poisoned.store(0);
    ranges[i].bytes.store(bytes);
    ranges[i].start.store(reinterpret_cast<uintptr_t>(start), std::memory_order_release);
    int used = rangesUsed.load();
    while (used <= i && !rangesUsed.compare_exchange_weak(used, i + 1)) {
    }
    return;
  }
}

GuardedRange::~GuardedRange() {
  if (index_ < 0) return;
  ranges[index_].start.store(0);
  ranges[index_].taken.store(false);
}

bool GuardedRange::poisoned() const { return poisonedAt() != nullptr; }

const void* GuardedRange::poisonedAt() const {
  return index_ < 0 ? nullptr : reinterpret_cast<const void*>(ranges[index_].poisoned.load());
}

}  // namespace tcmu

// SPDX-License-Identifier: Apache-2.0
#include "window.h"

#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <csignal>

#include "abi.h"

namespace tcmu::sim {

namespace {

// Windows of this process, for the signal handler.
struct Guarded {
  std::atomic<bool> taken{false};
  std::atomic<size_t> bytes{0};
  std::atomic<uintptr_t> start{0};  // 0: not valid
};
constexpr size_t kGuarded = 1024;
Guarded guarded[kGuarded];
std::atomic<uint64_t> deniedTouches{0};
struct sigaction previousAction;

bool inWindow(uintptr_t address) {
  for (const Guarded& each : guarded) {
    const uintptr_t start = each.start.load(std::memory_order_acquire);
    if (start && address >= start && address - start < each.bytes.load()) return true;
  }
  return false;
}

// A touch of window pages without the right to it: the kernel answers it with SIGBUS. Sends that to
// this thread; it arrives when we return, at the same instruction.
void onSegmentationFault(int signal, siginfo_t* info, void* context) {
  if (info->si_code == SEGV_ACCERR && inWindow(reinterpret_cast<uintptr_t>(info->si_addr))) {
    deniedTouches.fetch_add(1);
    siginfo_t bus = {};
    bus.si_signo = SIGBUS;
    bus.si_code = BUS_ADRERR;
    bus.si_addr = info->si_addr;
    syscall(SYS_rt_tgsigqueueinfo, getpid(), gettid(), SIGBUS, &bus);
    return;
  }
  if (previousAction.sa_flags & SA_SIGINFO) {
    previousAction.sa_sigaction(signal, info, context);
  } else if (previousAction.sa_handler != SIG_DFL && previousAction.sa_handler != SIG_IGN) {
    previousAction.sa_handler(signal);
  } else {
    std::signal(SIGSEGV, SIG_DFL);  // the access is repeated, and ends the process
    if (info->si_code <= 0) raise(SIGSEGV);
  }
}

void installHandler() {
  static std::once_flag once;
  std::call_once(once, [] {
    struct sigaction ours = {};
    ours.sa_sigaction = onSegmentationFault;
    ours.sa_flags = SA_SIGINFO | SA_ONSTACK;
    sigemptyset(&ours.sa_mask);
    sigaddset(&ours.sa_mask, SIGBUS);  // until we have returned
    sigaction(SIGSEGV, &ours, &previousAction);
  });
}

}  // namespace

uint64_t Window::denied() { return deniedTouches.load(); }

Window::Window(int ringFd, int poolFd, size_t offset, size_t bytes)
    : MappingWatch(ringFd), ringFd_(ringFd), poolFd_(poolFd), offset_(offset), bytes_(bytes) {
  installHandler();
  begin();
}

Window::~Window() {
  {
    // Before end(): from then on a mapping may go without our knowing. What stays mapped lies
    // behind the end of the ring's file from now on, and raises SIGBUS without our handler.
    std::lock_guard guard(lock_);
    closing_ = true;
    while (!bases_.empty()) {
      // Failing leaves what is there, and this is the end of it.
      static_cast<void>(mmap(bases_.back() + offset_, bytes_, PROT_READ | PROT_WRITE,
                             MAP_SHARED | MAP_FIXED, ringFd_, static_cast<off_t>(offset_)));
      forget(bases_.back());
    }
  }
  end();
}

bool Window::protect(const Range& range, int protection) {
  bool done = true;
  for (uint8_t* base : bases_)
    done &= mprotect(base + offset_ + range.offset, range.bytes, protection) == 0;
  return done;
}

bool Window::expose(const Range& range, bool writable) {
  const int protection = writable ? PROT_READ | PROT_WRITE : PROT_READ;
  std::lock_guard guard(lock_);
  if (bases_.empty()) return false;
  const auto next = exposed_.lower_bound(range.offset);
  if (next != exposed_.end() && next->first < range.offset + range.bytes) return false;
  if (next != exposed_.begin()) {
    const auto before = std::prev(next);
    if (before->first + before->second.bytes > range.offset) return false;
  }
  if (!protect(range, protection)) return false;
  exposed_.emplace_hint(next, range.offset, Exposure{range.bytes, protection});
  return true;
}

void Window::conceal(std::span<Range> ranges) {
  std::sort(ranges.begin(), ranges.end(),
            [](const Range& a, const Range& b) { return a.offset < b.offset; });
  std::lock_guard guard(lock_);
  for (size_t i = 0; i < ranges.size();) {
    Range run{ranges[i].offset, 0};
    for (; i < ranges.size() && ranges[i].offset == run.offset + run.bytes; i++) {
      exposed_.erase(ranges[i].offset);
      run.bytes += ranges[i].bytes;
    }
    zaps_++;
    protect(run, PROT_NONE);
  }
}

void Window::mapped(void* start, size_t bytes) {
  if (bytes < offset_ + bytes_) return;  // not all of it: no window there
  auto* base = static_cast<uint8_t*>(start);
  std::lock_guard guard(lock_);
  if (closing_) return;
  if (mmap(base + offset_, bytes_, PROT_NONE, MAP_SHARED | MAP_FIXED | MAP_NORESERVE, poolFd_, 0) ==
      MAP_FAILED)
    return;
  for (Guarded& each : guarded) {
    bool taken = false;
    if (!each.taken.compare_exchange_strong(taken, true)) continue;
    each.bytes = bytes_;
    each.start.store(reinterpret_cast<uintptr_t>(base + offset_), std::memory_order_release);
    break;
  }
  bases_.push_back(base);
  for (const auto& [offset, exposure] : exposed_)
    protect({offset, exposure.bytes}, exposure.protection);
}

void Window::unmapping(void* start) {
  std::lock_guard guard(lock_);
  forget(static_cast<uint8_t*>(start));
}

void Window::forget(uint8_t* base) {
  const auto window = reinterpret_cast<uintptr_t>(base + offset_);
  for (Guarded& each : guarded) {
    if (each.start != window) continue;
    each.start = 0;
    each.taken = false;
  }
  std::erase(bases_, base);
}

}  // namespace tcmu::sim

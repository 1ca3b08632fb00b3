#include "window.h"

#include <algorithm>
#include <atomic>
#include <csignal>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "abi.h"

namespace tcmu::sim {

namespace {

/** Windows of this process, for the signal handler. */
struct Guarded {
  std::atomic<bool> taken{false};
  std::atomic<size_t> bytes{0};
  std::atomic<uintptr_t> start{0}; // 0: not valid
};
constexpr size_t kGuarded = 1024;
Guarded guarded[kGuarded];
std::atomic<uint64_t> deniedStores{0};
struct sigaction previousAction;

bool inWindow(uintptr_t address) {
  for (const Guarded& each : guarded) {
    const uintptr_t start = each.start.load(std::memory_order_acquire);
    if (start && address >= start && address - start < each.bytes.load()) return true;
  }
  return false;
}

/**
 * A store into read-only pages of a window: the kernel answers it with SIGBUS. Sends that to this
 * thread; it arrives when we return, at the same instruction.
 */
void onSegmentationFault(int signal, siginfo_t* info, void* context) {
  if (info->si_code == SEGV_ACCERR && inWindow(reinterpret_cast<uintptr_t>(info->si_addr))) {
    deniedStores.fetch_add(1);
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
    std::signal(SIGSEGV, SIG_DFL); // the access is repeated, and ends the process
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
    sigaddset(&ours.sa_mask, SIGBUS); // until we have returned
    sigaction(SIGSEGV, &ours, &previousAction);
  });
}

} // namespace

uint64_t Window::denied() { return deniedStores.load(); }

Window::Window(int ringFd, int poolFd, size_t offset, size_t bytes)
    : MappingWatch(ringFd), ringFd_(ringFd), poolFd_(poolFd), offset_(offset),
      pages_(static_cast<uint32_t>(bytes / kPage)), taken_(pages_) {
  installHandler();
  begin();
}

Window::~Window() {
  std::vector<Range> all;
  for (const auto& [first, exposure] : exposed_) all.push_back({first, exposure.pages});
  zap(all);
  {
    // Before end(): from then on a mapping may go without our knowing.
    std::lock_guard guard(lock_);
    closing_ = true;
    while (!bases_.empty()) forget(bases_.back());
  }
  end();
}

size_t Window::offsetOf(const Range& range) const { return offset_ + range.first * kPage; }

std::optional<Window::Range> Window::reserve(size_t pages) {
  if (pages == 0 || pages > pages_) return {};
  // From the cursor to the end, then from the start: a run doesn't wrap.
  for (const uint32_t from : {cursor_, 0u}) {
    for (uint32_t first = from, end = from; first + pages <= pages_;) {
      if (end - first == pages) {
        std::fill_n(taken_.begin() + first, pages, true);
        cursor_ = end;
        return Range{first, static_cast<uint32_t>(pages)};
      }
      if (taken_[end++]) first = end;
    }
  }
  return {};
}

void Window::release(const Range& range) {
  std::fill_n(taken_.begin() + range.first, range.pages, false);
}

bool Window::show(uint8_t* base, uint32_t first, const Exposure& exposure) const {
  const int protection = exposure.writable ? PROT_READ | PROT_WRITE : PROT_READ;
  return mmap(base + offset_ + first * kPage, exposure.pages * kPage, protection,
              MAP_SHARED | MAP_FIXED, poolFd_,
              static_cast<off_t>(exposure.poolOffset)) != MAP_FAILED;
}

bool Window::expose(const Range& range, size_t poolOffset, bool writable) {
  const Exposure exposure{range.pages, writable, poolOffset};
  std::lock_guard guard(lock_);
  if (bases_.empty()) return false;
  for (uint8_t* base : bases_)
    if (!show(base, range.first, exposure)) return false;
  exposed_.emplace(range.first, exposure);
  return true;
}

void Window::zap(std::span<Range> ranges) {
  std::sort(ranges.begin(), ranges.end(),
            [](const Range& a, const Range& b) { return a.first < b.first; });
  std::lock_guard guard(lock_);
  for (size_t i = 0; i < ranges.size();) {
    const uint32_t first = ranges[i].first;
    uint32_t end = first;
    while (i < ranges.size() && ranges[i].first == end) end += ranges[i++].pages;
    for (auto it = exposed_.lower_bound(first); it != exposed_.end() && it->first < end;)
      it = exposed_.erase(it);
    zaps_++;
    for (uint8_t* base : bases_)
      mmap(base + offset_ + first * kPage, (end - first) * kPage, PROT_READ | PROT_WRITE,
           MAP_SHARED | MAP_FIXED, ringFd_, static_cast<off_t>(offset_ + first * kPage));
  }
}

void Window::mapped(void* start, size_t bytes) {
  if (bytes < offset_ + pages_ * kPage) return; // not all of it: no window there
  auto* base = static_cast<uint8_t*>(start);
  std::lock_guard guard(lock_);
  if (closing_) return;
  for (Guarded& each : guarded) {
    bool taken = false;
    if (!each.taken.compare_exchange_strong(taken, true)) continue;
    each.bytes = pages_ * kPage;
    each.start.store(reinterpret_cast<uintptr_t>(base + offset_), std::memory_order_release);
    break;
  }
  bases_.push_back(base);
  for (const auto& [first, exposure] : exposed_) show(base, first, exposure);
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

} // namespace tcmu::sim

// SPDX-License-Identifier: Apache-2.0
#include "device.h"

#include <poll.h>
#include <pthread.h>
#include <sys/eventfd.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <exception>
#include <stdexcept>
#include <system_error>

namespace tcmu::sim {

Device::Device(const Geometry& geometry, const Attributes& attributes) : kernel_(geometry) {
  if (!kernel_.setAttributes(attributes))
    throw std::invalid_argument("with zero copy the command time-out is 0 and fixed");
  control_ = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
  if (control_ < 0) throw std::system_error(errno, std::generic_category(), "eventfd");
  thread_ = std::thread([this] { loop(); });
  pthread_setname_np(thread_.native_handle(), "tcmu-sim");
}

Device::~Device() {
  stop();
  close(control_);
}

void Device::submit(std::span<const Request> requests) {
  run([&](TimePoint now) {
    for (const Request& request : requests) kernel_.submit(request, now, faults_.holdUntil(now));
  });
}

Uio::Handle Device::open() {
  Uio::Handle handle{};
  std::exception_ptr refused;
  run([&](TimePoint) {
    try {
      handle = uio_.open(kernel_.memory().fd());
    } catch (...) {
      refused = std::current_exception();
    }
  });
  if (refused) std::rethrow_exception(refused);
  interrupt();  // the thread polls the new doorbell
  return handle;
}

void Device::kick() {
  run([&](TimePoint) { notify(); });
}

void Device::setFaults(const FaultOptions& options) {
  run([&](TimePoint) { faults_ = Faults(options); });
}

void Device::unregister() {
  run([&](TimePoint) { uio_.unregister(); });
}

void Device::stop() {
  {
    std::lock_guard guard(lock_);
    if (std::exchange(stopping_, true)) return;
  }
  interrupt();
  thread_.join();
  run([&](TimePoint) {
    kernel_.refuseAll();
    kernel_.failAll();
    uio_.unregister();
  });
}

DeviceStats Device::stats() {
  std::lock_guard guard(lock_);
  return stats_;
}

void Device::catchUp(TimePoint now) {
  for (;;) {
    const Uio::Doorbell doorbell = uio_.takeDoorbells();
    if (doorbell.rung) {
      stats_.doorbells++;
      kernel_.doorbell(now);
    }
    if (doorbell.closed) kernel_.released(now);
    if (!doorbell.rung || doorbell.closed) return;
  }
}

// If there is something new on the ring, and as fault injection lets it.
void Device::wakeHandler(TimePoint now) {
  if (!kernel_.takeEvent()) return;
  if (const TimePoint at = faults_.spuriousAt(now); at != TimePoint::max()) wakeups_.push_back(at);
  if (faults_.loseWakeup()) return;
  const TimePoint at = faults_.wakeAt(now);
  if (at > now)
    wakeups_.push_back(at);
  else
    notify();
}

void Device::notify() {
  stats_.wakeups++;
  uio_.notify();
}

TimePoint Device::nextWake() const {
  TimePoint next = kernel_.nextDeadline();
  for (const TimePoint at : wakeups_) next = std::min(next, at);
  return next;
}

void Device::interrupt() {
  const uint64_t one = 1;
  while (write(control_, &one, sizeof one) < 0 && errno == EINTR) {
  }
}

void Device::attach(Guest* guest) {
  {
    std::lock_guard guard(serving_);
    guests_.push_back(guest);
  }
  interrupt();
}

void Device::detach(Guest* guest) {
  std::lock_guard guard(serving_);
  std::erase(guests_, guest);
}

void Device::loop() {
  std::vector<pollfd> fds;
  for (;;) {
    fds = {{control_, POLLIN, 0}, {-1, POLLIN, 0}};
    TimePoint guestsUntil = TimePoint::max();
    {
      std::lock_guard guard(serving_);
      for (const Guest* guest : guests_) {
        fds.push_back({guest->fd(), POLLIN, 0});
        guestsUntil = std::min(guestsUntil, guest->deadline());
      }
    }
    Milliseconds timeout;
    {
      std::lock_guard guard(lock_);
      if (stopping_) return;
      const TimePoint now = Clock::now();
      // A command that comes while we sleep expires no earlier than a time-out from now: it need
      // not interrupt us.
      sleepUntil_ = std::min({nextWake(), now + kernel_.shortestTimeout(), guestsUntil});
      timeout = std::chrono::ceil<Milliseconds>(std::max(sleepUntil_ - now, Clock::duration{}));
      fds[1].fd = uio_.doorbellFd();
    }
    poll(fds.data(), fds.size(), static_cast<int>(std::min<int64_t>(timeout.count(), 1 << 30)));
    if (fds[0].revents) {
      uint64_t count;
      while (read(control_, &count, sizeof count) < 0 && errno == EINTR) {
      }
    }
    run(
        [&](TimePoint now) {
          kernel_.tick(now);
          if (std::erase_if(wakeups_, [&](TimePoint at) { return at <= now; }) > 0) notify();
        },
        true);
    serveGuests(std::span(fds).subspan(2));
  }
}

// Until none has anything to do: what one submits may finish another's commands.
void Device::serveGuests(std::span<const pollfd> polled) {
  std::lock_guard guard(serving_);
  const TimePoint now = Clock::now();
  bool served = true;
  for (bool first = true; served && (first || guests_.size() > 1); first = false) {
    served = false;
    for (Guest* guest : guests_) {
      const auto readable = [&](const pollfd& each) {
        return each.fd == guest->fd() && each.revents != 0;
      };
      served |= guest->serve(first && std::any_of(polled.begin(), polled.end(), readable), now);
    }
  }
}

void Device::deliver(const Finished& finished) {
  for (size_t i = 0; i < finished.size(); i++) {
    Initiator* initiator = finished[i].first;
    initiator->finished(finished[i].second);
    if (i + 1 == finished.size() || finished[i + 1].first != initiator) initiator->batchEnd();
  }
}

}  // namespace tcmu::sim

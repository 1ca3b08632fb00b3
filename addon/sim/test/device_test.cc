// SPDX-License-Identifier: Apache-2.0
// The device with its thread: doorbells, wake-ups, time-outs and ends, from several threads.
#include "../device.h"

#include <atomic>
#include <condition_variable>
#include <csignal>
#include <map>
#include <mutex>
#include <random>
#include <system_error>
#include <thread>

#include "check.h"
#include "handler.h"

using namespace tcmu::sim;
using namespace std::chrono_literals;

namespace {

// Collects completions by tag; a second one for a tag is a failure.
class Collector : public Initiator {
 public:
  void finished(const Completion& completion) override {
    std::lock_guard guard(lock_);
    if (!list_.emplace(completion.tag, completion).second) doubled_ = true;
  }
  void batchEnd() override { changed_.notify_all(); }

  // The limits are for what hangs: a busy machine takes its time.
  bool waitFor(size_t count, Milliseconds limit = 120s) {
    std::unique_lock guard(lock_);
    return changed_.wait_for(guard, limit, [&] { return list_.size() >= count; }) && !doubled_;
  }
  Completion of(uint64_t tag) {
    std::lock_guard guard(lock_);
    return list_.at(tag);
  }
  size_t size() {
    std::lock_guard guard(lock_);
    return list_.size();
  }

 private:
  std::mutex lock_;
  std::condition_variable changed_;
  std::map<uint64_t, Completion> list_;
  bool doubled_ = false;
};

void submit(Device& device, Initiator& initiator, uint64_t tag, std::span<uint8_t> in = {}) {
  static constexpr uint8_t cdb[10] = {0x28};
  const Request request{tag, &initiator, cdb, {}, in};
  device.submit({&request, 1});
}

size_t inFlight(Device& device) {
  size_t count = 0;
  device.act([&](Kernel& kernel, TimePoint) { count = kernel.inFlight(); });
  return count;
}

TEST(wakeUpDoorbellAndCompletion) {
  Collector collector;
  Device device({.ringBytes = 64 << 10, .dataBytes = 1 << 20}, {});
  TestHandler handler(device.open(), device.mapSize());
  std::vector<uint8_t> in(512);
  submit(device, collector, 1, in);
  submit(device, collector, 2, in);
  CHECK_EQ(handler.wait(), 2);  // two events, one wake-up
  CHECK_EQ(handler.wait(0), -1);
  handler.complete(handler.command()->id);
  handler.complete(handler.command()->id);
  handler.ring();
  CHECK(collector.waitFor(2));
  CHECK_EQ(device.stats().doorbells, 1);
}

TEST(aDoorbellCountsBeforeTheNextCall) {
  Collector collector;
  Device device({.ringBytes = 64 << 10, .dataBytes = 1 << 20}, {});
  TestHandler handler(device.open(), device.mapSize());
  for (uint64_t i = 0; i < 200; i++) {
    submit(device, collector, i);
    const auto e = *handler.command();
    CHECK_EQ(e.id, 1);  // free again each time
    handler.complete(e.id);
    handler.ring();
  }
  CHECK(collector.waitFor(200));
}

TEST(openBusyCloseOpen) {
  Collector collector;
  Device device({.ringBytes = 64 << 10, .dataBytes = 1 << 20}, {});
  auto handler = std::make_unique<TestHandler>(device.open(), device.mapSize());
  int error = 0;
  try {
    device.open();
  } catch (const std::system_error& e) {
    error = e.code().value();
  }
  CHECK_EQ(error, EBUSY);
  submit(device, collector, 1);
  handler.reset();
  TestHandler second(device.open(), device.mapSize());
  CHECK_EQ(second.wait(0), -1);
  second.complete(second.command()->id);
  second.ring();
  CHECK(collector.waitFor(1));
  device.unregister();
  CHECK_EQ(second.wait(), 0);
  error = 0;
  try {
    device.open();
  } catch (const std::system_error& e) {
    error = e.code().value();
  }
  CHECK_EQ(error, ENODEV);
}

TEST(timeoutsRunByThemselves) {
  Collector collector;
  Device device({.ringBytes = 64 << 10, .dataBytes = 4096},
                {.commandTimeout = 30ms, .queueFullTimeout = 10ms});
  std::vector<uint8_t> in(512);
  submit(device, collector, 1, in);
  submit(device, collector, 2, in);
  CHECK(collector.waitFor(2));
  CHECK_EQ(collector.of(1).status, 2);
  CHECK_EQ(collector.of(2).status, 0x28);
}

TEST(aShorterTimeoutInterruptsTheSleep) {
  Collector collector;
  Device device({.ringBytes = 64 << 10, .dataBytes = 4096}, {});
  std::this_thread::sleep_for(20ms);  // asleep for half a minute now
  device.act([](Kernel& kernel, TimePoint) { kernel.setAttributes({.commandTimeout = 10ms}); });
  submit(device, collector, 1);
  CHECK(collector.waitFor(1, 20s));
}

TEST(stopEndsEverything) {
  Collector collector;
  std::vector<uint8_t> in(4096);
  {
    Device device({.ringBytes = 64 << 10, .dataBytes = 4096}, {});
    TestHandler handler(device.open(), device.mapSize());
    device.setFaults({.holdCommand = 1, .maxDelay = 10s});
    submit(device, collector, 1, in);  // held
    device.setFaults({});
    submit(device, collector, 2, in);  // in flight
    submit(device, collector, 3, in);  // waits for room
    device.stop();
    CHECK_EQ(collector.size(), 3);
    submit(device, collector, 4, in);
    CHECK_EQ(collector.of(4).sense[12], 0x25);
    CHECK_EQ(handler.wait(), 0);  // at once: the unread wake-up of before went with the device
  }
  for (uint64_t tag = 1; tag <= 3; tag++) CHECK_EQ(collector.of(tag).sense[12], 0x08);
}

// A handler thread that completes in random order, with a copy of the tag in the data.
class RandomHandler {
 public:
  explicit RandomHandler(Device& device, uint32_t seed)
      : handler_(device.open(), device.mapSize()), random_(seed), thread_([this] { serve(); }) {}
  ~RandomHandler() {
    stop_ = true;
    thread_.join();
  }

 private:
  void serve() {
    std::vector<TestHandler::Entry> held;
    for (;;) {
      const int64_t event = handler_.wait(held.empty() ? 20 : 0);
      if (event == 0 || stop_) return;
      while (auto e = handler_.command()) held.push_back(*e);
      bool any = false;
      while (!held.empty() && random_() % 4 != 0) {
        std::swap(held[random_() % held.size()], held.back());
        for (const auto& iov : held.back().iovs) {
          auto data = handler_.data(iov);
          std::memset(data.data(), static_cast<int>(held.back().cdb[1]), data.size());
        }
        handler_.complete(held.back().id);
        held.pop_back();
        any = true;
      }
      handler_.passOver();
      if (any) handler_.ring();
    }
  }

  TestHandler handler_;
  std::mt19937 random_;
  std::atomic<bool> stop_ = false;
  std::thread thread_;
};

TEST(manyThreadsManyCommandsUnderFaults) {
  Collector collector;
  Device device({.ringBytes = 4096, .dataBytes = 64 << 10, .pagesPerBlock = 2},
                {.tmrNotification = true});
  device.setFaults(
      {.seed = 3, .holdCommand = 0.1, .lateWakeup = 0.1, .spuriousWakeup = 0.2, .maxDelay = 2ms});
  constexpr uint64_t kEach = 1500;
  std::vector<std::vector<uint8_t>> buffers(3 * kEach);
  std::atomic<int> wrong = 0;
  {
    RandomHandler handler(device, 5);
    std::vector<std::thread> threads;
    for (uint64_t t = 0; t < 3; t++) {
      threads.emplace_back([&, t] {
        std::mt19937 random(static_cast<uint32_t>(t));
        for (uint64_t i = 0; i < kEach; i++) {
          const uint64_t tag = t * kEach + i;
          buffers[tag].resize(random() % 20000);
          const uint8_t cdb[16] = {uint8_t(i % 2 ? 0x28 : 0x88), uint8_t(tag)};
          const Request request{tag, &collector, cdb, {}, buffers[tag]};
          device.submit({&request, 1});
          if (random() % 64 == 0) {
            const auto one = [&](const Command& c) { return c.tag == tag; };
            device.act(
                [&](Kernel& kernel, TimePoint) { kernel.taskManagement(Tmr::abortTask, one); });
          }
          if (random() % 256 == 0)
            device.act([](Kernel& kernel, TimePoint now) { kernel.reclaim(now); });
          // A real initiator has a queue depth.
          while (collector.size() + 64 < t * kEach + i && inFlight(device) > 64)
            std::this_thread::yield();
        }
      });
    }
    for (auto& thread : threads) thread.join();
    CHECK(collector.waitFor(3 * kEach));
  }
  for (uint64_t tag = 0; tag < 3 * kEach; tag++) {
    const Completion c = collector.of(tag);
    if (c.status == 0x40) continue;
    if (c.status != 0 || c.dataBytes != buffers[tag].size()) wrong++;
    for (const uint8_t byte : buffers[tag])
      if (byte != uint8_t(tag)) {
        wrong++;
        break;
      }
  }
  CHECK_EQ(wrong.load(), 0);
  device.act([](Kernel& kernel, TimePoint) {
    CHECK(kernel.broken() == nullptr);
    CHECK_EQ(kernel.idsInUse(), 0);
    CHECK_EQ(kernel.blocksInUse(), 0);
  });
}

TEST(resetsAndReopensUnderLoad) {
  Collector collector;
  Device device({.ringBytes = 8192, .dataBytes = 256 << 10}, {});
  std::vector<std::vector<uint8_t>> buffers(3000, std::vector<uint8_t>(3000));
  std::thread initiator([&] {
    for (uint64_t tag = 0; tag < buffers.size(); tag++) {
      submit(device, collector, tag, buffers[tag]);
      if (tag % 16 == 0) std::this_thread::sleep_for(100us);
    }
  });
  for (uint32_t i = 0; i < 20; i++) {
    {
      RandomHandler handler(device, i);
      std::this_thread::sleep_for(5ms);
    }
    // The handler is dead; what it left is reset as a restarted one would.
    device.act([](Kernel& kernel, TimePoint now) {
      kernel.block(now);
      kernel.resetRing(1, now);
      kernel.unblock();
    });
  }
  initiator.join();
  {
    RandomHandler handler(device, 99);
    CHECK(collector.waitFor(buffers.size()));
  }
  device.act([](Kernel& kernel, TimePoint) { CHECK(kernel.broken() == nullptr); });
}

}  // namespace

int main() {
  std::signal(SIGPIPE, SIG_IGN);  // as in Node: a doorbell of a removed device fails, nothing more
  return check::run();
}

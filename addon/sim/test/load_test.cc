// SPDX-License-Identifier: Apache-2.0
// The load generator and its histogram.
#include "../load.h"

#include <csignal>
#include <future>

#include "check.h"
#include "ram_handler.h"

using namespace tcmu::sim;
using namespace std::chrono_literals;

namespace {

struct Run {
  Run(Device& device, const LoadOptions& options)
      : load(device, options, [this] { ended.set_value(); }) {
    load.start();
  }
  const LoadReport& wait() {
    if (ended.get_future().wait_for(60s) != std::future_status::ready) std::abort();
    return load.report();
  }
  std::promise<void> ended;
  LoadGenerator load;
};

TEST(percentilesAreWithinABucket) {
  Histogram h;
  CHECK_EQ(h.percentile(0.5), 0);
  for (uint64_t i = 1; i <= 100000; i++) h.add(i);
  for (const double share : {0.01, 0.5, 0.9, 0.99, 0.999, 1.0}) {
    const double exact = share * 100000;
    const auto got = static_cast<double>(h.percentile(share));
    CHECK(got >= exact && got <= exact * 1.016 + 1);
  }
  CHECK_EQ(h.max(), 100000);
  CHECK_EQ(h.mean(), 50000);
  Histogram wide;
  wide.add(UINT64_MAX);
  wide.add(0);
  CHECK_EQ(wide.percentile(1), UINT64_MAX);
  CHECK_EQ(wide.percentile(0.5), 0);
}

TEST(writesAndReadsAreVerified) {
  for (const uint32_t depth : {1u, 16u}) {
    for (const uint32_t bytes : {512u, 4096u, 128u << 10}) {
      Device device({.ringBytes = 64 << 10, .dataBytes = 1 << 20}, {});
      RamHandler handler(device, 4 << 20);
      Run run(device, {.depth = depth,
                       .bytes = bytes,
                       .blocks = 8192,
                       .readShare = 0.5,
                       .verify = true,
                       .count = 1500});
      const LoadReport& report = run.wait();
      CHECK_EQ(report.commands, 1500);
      CHECK_EQ(report.latency.count(), 1500);
      CHECK(report.reads > 600 && report.reads < 900);
      CHECK_EQ(report.failed, 0);
      CHECK_EQ(report.corrupt, 0);
    }
  }
}

TEST(wrongBytesAreFound) {
  Device device({.ringBytes = 64 << 10, .dataBytes = 1 << 20}, {});
  std::atomic<int> damaged = 0;
  RamHandler handler(device, 1 << 20, [&](const auto& e, TestHandler& h, auto&) {
    if (e.cdb[0] != 0x28 || ++damaged % 10) return;
    const auto data = h.data(e.iovs[0]);
    data[data.size() - 1] ^= 1;
  });
  Run run(device, {.depth = 4, .blocks = 256, .readShare = 0.5, .verify = true, .count = 2000});
  const LoadReport& report = run.wait();
  CHECK(report.corrupt > 30 && report.corrupt <= 200);  // of units that were written before
}

TEST(failuresAreCounted) {
  Device device({.ringBytes = 64 << 10, .dataBytes = 1 << 20}, {});
  std::atomic<int> seen = 0;
  RamHandler handler(device, 1 << 20, [&](const auto&, auto&, TestHandler::Response& response) {
    if (++seen % 4 == 0) response.status = 8;
  });
  Run run(device, {.depth = 4, .blocks = 256, .readShare = 0.5, .verify = true, .count = 1000});
  const LoadReport& report = run.wait();
  CHECK_EQ(report.failed, 250);
  CHECK_EQ(report.corrupt, 0);
  CHECK_EQ(report.firstFailure.status, 8);
}

TEST(aBlockedDeviceRefusesAllAtOnce) {
  Device device({.ringBytes = 64 << 10, .dataBytes = 1 << 20}, {});
  device.act([](Kernel& kernel, TimePoint now) { kernel.block(now); });
  Run run(device, {.depth = 8, .count = 50000});
  CHECK_EQ(run.wait().failed, 50000);
}

TEST(sequential) {
  Device device({.ringBytes = 64 << 10, .dataBytes = 1 << 20}, {});
  std::atomic<uint32_t> order = 0, disorder = 0;
  RamHandler handler(device, 1 << 20, [&](const auto& e, auto&, auto&) {
    const uint32_t lba = uint32_t{e.cdb[4]} << 8 | e.cdb[5];
    if (lba != 8 * (order++ % 64)) disorder++;
  });
  Run run(device, {.depth = 4, .blocks = 512, .sequential = true, .count = 1000});
  CHECK_EQ(run.wait().failed, 0);
  CHECK_EQ(order.load(), 1000);
  CHECK_EQ(disorder.load(), 0);
}

TEST(endsByTime) {
  Device device({.ringBytes = 64 << 10, .dataBytes = 1 << 20}, {});
  RamHandler handler(device, 1 << 20);
  Run run(device, {.depth = 4, .blocks = 512, .count = UINT64_MAX, .duration = 50ms});
  const LoadReport& report = run.wait();
  CHECK(report.seconds >= 0.05);
  CHECK(report.commands > 0);
}

TEST(stopAndDeviceStop) {
  {
    Device device({.ringBytes = 64 << 10, .dataBytes = 1 << 20}, {});
    RamHandler handler(device, 1 << 20);
    Run run(device, {.depth = 4, .blocks = 512, .count = UINT64_MAX});
    std::this_thread::sleep_for(10ms);
    run.load.stop();
    CHECK(run.wait().failed == 0);
  }
  auto device =
      std::make_unique<Device>(Geometry{.ringBytes = 64 << 10, .dataBytes = 1 << 20}, Attributes{});
  Run run(*device, {.depth = 4, .blocks = 512, .count = UINT64_MAX});  // nobody serves
  run.load.stop();
  device->stop();
  CHECK_EQ(run.wait().failed, 4);
}

TEST(impossibleLoadsAreRefused) {
  Device device({.ringBytes = 64 << 10, .dataBytes = 1 << 20}, {});
  for (const LoadOptions& o : {LoadOptions{.depth = 0}, LoadOptions{.depth = 300, .blocks = 2048},
                               LoadOptions{.bytes = 1000}, LoadOptions{.bytes = 0},
                               LoadOptions{.bytes = 64 << 20, .blocks = 1 << 20}}) {
    bool refused = false;
    try {
      LoadGenerator load(device, o, [] {});
    } catch (const std::invalid_argument&) {
      refused = true;
    }
    CHECK(refused);
  }
}

}  // namespace

int main() {
  std::signal(SIGPIPE, SIG_IGN);
  return check::run();
}

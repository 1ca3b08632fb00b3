// SPDX-License-Identifier: Apache-2.0
// A handler in C++ on the simulated kernel's ring: the limit for any language. Called by bench/ring.ts:
//
//   ring-native null|ram|file BYTES DEPTH MILLISECONDS FILE
//
// Prints {"commandsPerSecond", "p50", "p99" (seconds), "cpu" (seconds of the process per command)}.
#include <fcntl.h>
#include <sys/resource.h>

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <future>
#include <string>

#include "../addon/sim/load.h"
#include "../addon/sim/test/handler.h"

using namespace tcmu::sim;

namespace {

constexpr size_t kDisk = 256 << 20;

double cpuSeconds() {
  rusage usage;
  getrusage(RUSAGE_SELF, &usage);
  const auto seconds = [](const timeval& t) {
    return static_cast<double>(t.tv_sec) + static_cast<double>(t.tv_usec) / 1e6;
  };
  return seconds(usage.ru_utime) + seconds(usage.ru_stime);
}

// Reads everything that is asked; the load here is of reads.
class Handler {
 public:
  Handler(Device& device, std::string kind, const char* file)
      : ring_(device.open(), device.mapSize()),
        kind_(std::move(kind)),
        disk_(kind_ == "ram" ? kDisk : 0),
        fd_(kind_ == "file" ? open(file, O_RDWR) : -1),
        thread_([this] { serve(); }) {}
  ~Handler() {
    stop_ = true;
    thread_.join();
    if (fd_ >= 0) close(fd_);
  }

 private:
  void serve() {
    while (!stop_) {
      ring_.wait(20);
      bool any = false;
      while (const auto command = ring_.command()) {
        any = true;
        answer(*command);
        ring_.complete(command->id);
      }
      if (any) ring_.ring();
    }
  }

  void answer(const TestHandler::Entry& command) {
    size_t position = size_t{512} * (size_t{command.cdb[2]} << 24 | command.cdb[3] << 16 |
                                     command.cdb[4] << 8 | command.cdb[5]);
    if (kind_ == "null") return;
    for (const auto& iov : command.iovs) {
      const auto data = ring_.data(iov);
      if (kind_ == "ram")
        std::memcpy(data.data(), disk_.data() + position, data.size());
      else if (pread(fd_, data.data(), data.size(), static_cast<off_t>(position)) < 0)
        std::abort();
      position += data.size();
    }
  }

  TestHandler ring_;
  const std::string kind_;
  std::vector<uint8_t> disk_;
  const int fd_;
  std::atomic<bool> stop_ = false;
  std::thread thread_;
};

}  // namespace

int main(int argc, char** argv) {
  if (argc != 6) return 2;
  const auto number = [&](int i) { return static_cast<uint32_t>(std::atoi(argv[i])); };
  Device device(Geometry{}, Attributes{});
  Handler handler(device, argv[1], argv[5]);
  std::promise<void> ended;
  LoadGenerator load(device,
                     {.depth = number(3),
                      .bytes = number(2),
                      .blocks = kDisk / 512,
                      .count = UINT64_MAX,
                      .duration = Milliseconds(number(4))},
                     [&] { ended.set_value(); });
  const double before = cpuSeconds();
  load.start();
  ended.get_future().wait();
  const LoadReport& report = load.report();
  const double cpu = (cpuSeconds() - before) / static_cast<double>(report.commands);
  std::printf("{\"commandsPerSecond\":%.1f,\"p50\":%.9f,\"p99\":%.9f,\"cpu\":%.9f,\"failed\":%llu}\n",
              static_cast<double>(report.commands) / report.seconds,
              static_cast<double>(report.latency.percentile(0.5)) / 1e9,
              static_cast<double>(report.latency.percentile(0.99)) / 1e9, cpu,
              static_cast<unsigned long long>(report.failed));
  std::fflush(stdout);
  std::_Exit(0);
}

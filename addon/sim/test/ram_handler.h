// SPDX-License-Identifier: Apache-2.0
// A handler thread that serves READ (10) and WRITE (10) from memory, with faults on wish.
#pragma once

#include <atomic>
#include <functional>
#include <thread>
#include <vector>

#include "../device.h"
#include "handler.h"

namespace tcmu::sim {

class RamHandler {
 public:
  // `tamper` may change a response before it goes; the data is in place already.
  using Tamper =
      std::function<void(const TestHandler::Entry&, TestHandler&, TestHandler::Response&)>;

  RamHandler(Device& device, size_t bytes, Tamper tamper = {})
      : handler_(device.open(), device.mapSize()),
        disk_(bytes),
        tamper_(std::move(tamper)),
        thread_([this] { serve(); }) {}
  ~RamHandler() {
    stop_ = true;
    thread_.join();
  }

 private:
  void serve() {
    for (;;) {
      if (handler_.wait(20) == 0 || stop_) return;
      while (auto e = handler_.command()) {
        uint8_t* at = disk_.data() + 512 * (uint64_t{e->cdb[2]} << 24 | e->cdb[3] << 16 |
                                            e->cdb[4] << 8 | e->cdb[5]);
        for (const auto& iov : e->iovs) {
          const auto data = handler_.data(iov);
          if (e->cdb[0] == 0x28)
            std::memcpy(data.data(), at, data.size());
          else
            std::memcpy(at, data.data(), data.size());
          at += data.size();
        }
        TestHandler::Response response;
        if (tamper_) tamper_(*e, handler_, response);
        handler_.complete(e->id, response);
      }
      handler_.ring();
    }
  }

  TestHandler handler_;
  std::vector<uint8_t> disk_;
  Tamper tamper_;
  std::atomic<bool> stop_ = false;
  std::thread thread_;
};

}  // namespace tcmu::sim

// SPDX-License-Identifier: Apache-2.0
// A generic netlink socket: whole datagrams in and out. No N-API, no knowledge of their content.
//
// Non-blocking. Datagrams that do not come from the kernel (port 0) are dropped.
#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include "../util/unique_fd.h"

namespace tcmu {

class NetlinkSocket {
 public:
  enum class Received { Datagram, Nothing, Overrun, Failed };

  // 0 or a positive errno; `call` names what failed.
  int open(int receive_buffer, const char*& call);
  int send(std::span<const uint8_t> message);
  int join(uint32_t group);
  // Failed: errno tells.
  Received receive(std::vector<uint8_t>& datagram);
  int fd() const { return fd_.get(); }
  uint32_t port() const { return port_; }
  void close() { fd_.reset(); }

 private:
  UniqueFd fd_;
  uint32_t port_ = 0;
};

}  // namespace tcmu

// SPDX-License-Identifier: Apache-2.0
#include "socket.h"

#include <errno.h>
#include <linux/netlink.h>
#include <sys/socket.h>

namespace tcmu {

int NetlinkSocket::open(int receive_buffer, const char*& call) {
  call = "socket";
  UniqueFd fd(socket(AF_NETLINK, SOCK_RAW | SOCK_CLOEXEC | SOCK_NONBLOCK, NETLINK_GENERIC));
  if (!fd) return errno;
  call = "setsockopt";
  // FORCE passes the system's limit and needs CAP_NET_ADMIN; without it the limit holds.
  if (setsockopt(fd.get(), SOL_SOCKET, SO_RCVBUFFORCE, &receive_buffer, sizeof receive_buffer) != 0 &&
      setsockopt(fd.get(), SOL_SOCKET, SO_RCVBUF, &receive_buffer, sizeof receive_buffer) != 0)
    return errno;
  call = "bind";
  sockaddr_nl address = {};
  address.nl_family = AF_NETLINK;
  if (bind(fd.get(), reinterpret_cast<sockaddr*>(&address), sizeof address) != 0) return errno;
  call = "getsockname";
  socklen_t length = sizeof address;
  if (getsockname(fd.get(), reinterpret_cast<sockaddr*>(&address), &length) != 0) return errno;
  port_ = address.nl_pid;
  fd_ = std::move(fd);
  return 0;
}

int NetlinkSocket::send(std::span<const uint8_t> message) {
  sockaddr_nl kernel = {};
  kernel.nl_family = AF_NETLINK;
  ssize_t sent;
  do {
    sent = sendto(fd_.get(), message.data(), message.size(), 0,
                  reinterpret_cast<const sockaddr*>(&kernel), sizeof kernel);
  } while (sent < 0 && errno == EINTR);
  return sent < 0 ? errno : 0;
}

int NetlinkSocket::join(uint32_t group) {
  return setsockopt(fd_.get(), SOL_NETLINK, NETLINK_ADD_MEMBERSHIP, &group, sizeof group) == 0
             ? 0
             : errno;
}

NetlinkSocket::Received NetlinkSocket::receive(std::vector<uint8_t>& datagram) {
  for (;;) {
    const ssize_t bytes = recv(fd_.get(), nullptr, 0, MSG_PEEK | MSG_TRUNC);
    if (bytes >= 0) {
      datagram.resize(static_cast<size_t>(bytes));
      sockaddr_nl from = {};
      socklen_t length = sizeof from;
      const ssize_t got = recvfrom(fd_.get(), datagram.data(), datagram.size(), 0,
                                   reinterpret_cast<sockaddr*>(&from), &length);
      if (got >= 0) {
        datagram.resize(static_cast<size_t>(got));
        if (from.nl_pid == 0) return Received::Datagram;
        continue;
      }
    }
    if (errno == EINTR) continue;
    if (errno == EAGAIN) return Received::Nothing;
    return errno == ENOBUFS ? Received::Overrun : Received::Failed;
  }
}

}  // namespace tcmu

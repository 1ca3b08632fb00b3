// SPDX-License-Identifier: Apache-2.0
#include "listener.h"

#include <arpa/inet.h>
#include <netinet/in.h>
#include <sys/socket.h>
#include <sys/un.h>

#include <cerrno>
#include <cstring>
#include <system_error>

namespace tcmu::nbd {

namespace {

constexpr int kBacklog = 128;

std::system_error failure(int error, const char* call) {
  return std::system_error(error, std::generic_category(), call);
}

UniqueFd openSocket(int family) {
  UniqueFd fd(socket(family, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0));
  if (!fd) throw failure(errno, "socket");
  return fd;
}

void listenThere(const UniqueFd& fd, const sockaddr* address, socklen_t bytes) {
  if (bind(fd.get(), address, bytes) < 0) throw failure(errno, "bind");
  if (listen(fd.get(), kBacklog) < 0) throw failure(errno, "listen");
}

}  // namespace

UniqueFd listenAt(const std::string& path) {
  sockaddr_un address{};
  address.sun_family = AF_UNIX;
  if (path.empty() || path.size() >= sizeof address.sun_path) throw failure(ENAMETOOLONG, "bind");
  std::memcpy(address.sun_path, path.data(), path.size());
  const auto* generic = reinterpret_cast<const sockaddr*>(&address);
  const UniqueFd probe = openSocket(AF_UNIX);
  if (connect(probe.get(), generic, sizeof address) < 0 && errno == ECONNREFUSED)
    unlink(path.c_str());
  UniqueFd fd = openSocket(AF_UNIX);
  listenThere(fd, generic, sizeof address);
  return fd;
}

UniqueFd listenOn(const std::string& host, uint16_t& port) {
  sockaddr_storage address{};
  socklen_t bytes = 0;
  auto* v4 = reinterpret_cast<sockaddr_in*>(&address);
  auto* v6 = reinterpret_cast<sockaddr_in6*>(&address);
  if (inet_pton(AF_INET, host.c_str(), &v4->sin_addr) == 1) {
    v4->sin_family = AF_INET;
    v4->sin_port = htons(port);
    bytes = sizeof *v4;
  } else if (inet_pton(AF_INET6, host.c_str(), &v6->sin6_addr) == 1) {
    v6->sin6_family = AF_INET6;
    v6->sin6_port = htons(port);
    bytes = sizeof *v6;
  } else {
    throw failure(EADDRNOTAVAIL, "bind");
  }
  UniqueFd fd = openSocket(address.ss_family);
  const int one = 1;
  setsockopt(fd.get(), SOL_SOCKET, SO_REUSEADDR, &one, sizeof one);
  auto* generic = reinterpret_cast<sockaddr*>(&address);
  listenThere(fd, generic, bytes);
  if (getsockname(fd.get(), generic, &bytes) < 0) throw failure(errno, "getsockname");
  port = ntohs(address.ss_family == AF_INET ? v4->sin_port : v6->sin6_port);
  return fd;
}

}  // namespace tcmu::nbd

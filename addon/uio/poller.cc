// SPDX-License-Identifier: Apache-2.0
#include "poller.h"

namespace tcmu {

int Poller::start(int fd) {
  int error = poll_.open(environment_, this, [fd](uv_loop_t* loop, uv_poll_t* handle) {
    return uv_poll_init(loop, handle, fd);
  });
  if (error == 0)
    error = idle_.open(environment_, this, [](uv_loop_t* loop, uv_idle_t* handle) {
      return uv_idle_init(loop, handle);
    });
  if (error == 0) error = watch();
  if (error != 0) stop();
  return error;
}

int Poller::watch() {
  return uv_poll_start(poll_.get(), UV_READABLE, [](uv_poll_t* handle, int status, int) {
    Poller& self = *static_cast<Poller*>(handle->data);
    // libuv stops watching at POLLERR, which for a netlink socket means dropped messages only.
    if (status < 0) self.watch();
    self.owner_.ready(true);
  });
}

void Poller::again() {
  if (!idle_) return;
  uv_idle_start(idle_.get(), [](uv_idle_t* handle) {
    uv_idle_stop(handle);
    static_cast<Poller*>(handle->data)->owner_.ready(false);
  });
}

void Poller::stop() {
  poll_.close();
  idle_.close();
}

}  // namespace tcmu

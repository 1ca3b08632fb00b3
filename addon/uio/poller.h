// SPDX-License-Identifier: Apache-2.0
// Watches one descriptor on the environment's event loop.
//
// `ready` is called on the loop's thread when the descriptor is readable (or in error), and once
// after each `again()` without waiting for it. Neither comes after `stop()`. Holds no descriptor.
#pragma once

#include "../binding/environment.h"

namespace tcmu {

class Poller {
 public:
  struct Owner {
    // `readable`: the descriptor has something, or an error.
    virtual void ready(bool readable) = 0;

   protected:
    ~Owner() = default;
  };

  Poller(Environment& environment, Owner& owner) : environment_(environment), owner_(owner) {}

  // 0, or a negative errno.
  int start(int fd);
  // Look once more in the loop's next turn.
  void again();
  void stop();
  bool active() const { return static_cast<bool>(poll_); }

 private:
  int watch();

  Environment& environment_;
  Owner& owner_;
  UvHandle<uv_poll_t> poll_;
  UvHandle<uv_idle_t> idle_;
};

}  // namespace tcmu

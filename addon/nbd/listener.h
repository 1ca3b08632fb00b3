// SPDX-License-Identifier: Apache-2.0
// Listening sockets: bound, listening, non-blocking.
#pragma once

#include <cstdint>
#include <string>

#include "../util/unique_fd.h"

namespace tcmu::nbd {

// A socket file that nobody listens on any more is replaced. @throws std::system_error
UniqueFd listenAt(const std::string& path);

// `host`: a numeric address. `port`: 0 for any; says which one it is. @throws std::system_error
UniqueFd listenOn(const std::string& host, uint16_t& port);

}  // namespace tcmu::nbd

// SPDX-License-Identifier: Apache-2.0
// Views that JavaScript has on command memory: external ArrayBuffers, one an iovec piece.
//
// Made when first asked for, kept until the slot is revoked, then detached: every view on them has
// length 0 from then on. They own no memory. JavaScript thread only; needs a handle scope.
#pragma once

#include <napi.h>

#include <cstdint>
#include <vector>

#include "segments.h"

namespace tcmu {

class ExternalBuffers {
 public:
  explicit ExternalBuffers(napi_env env) : env_(env) {}
  ~ExternalBuffers();

  // The Uint8Array views that make up the range. Throws Napi::Error.
  napi_value views(uint32_t slot, Segments segments, uint64_t offset, uint64_t length);
  // False: somebody else had detached one already, so its memory lives on in another ArrayBuffer.
  bool revoke(uint32_t slot);
  // Lets go without detaching: the environment does that itself when it ends.
  void forget();

  uint64_t made() const { return made_; }

 private:
  struct Buffer {
    uint32_t piece;
    napi_ref reference;
  };
  napi_value buffer(std::vector<Buffer>& buffers, uint32_t piece, const iovec& memory);

  napi_env env_;
  std::vector<std::vector<Buffer>> slots_;
  uint64_t made_ = 0;
};

}  // namespace tcmu

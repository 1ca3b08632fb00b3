// SPDX-License-Identifier: Apache-2.0
#include "external_buffers.h"

#include <algorithm>

#include "../binding/error.h"

namespace tcmu {

ExternalBuffers::~ExternalBuffers() { forget(); }

void ExternalBuffers::forget() {
  for (std::vector<Buffer>& buffers : slots_) {
    for (const Buffer& buffer : buffers) napi_delete_reference(env_, buffer.reference);
  }
  slots_.clear();
}

napi_value ExternalBuffers::buffer(std::vector<Buffer>& buffers, uint32_t piece,
                                   const iovec& memory) {
  napi_value result;
  for (const Buffer& buffer : buffers) {
    if (buffer.piece != piece) continue;
    if (napi_get_reference_value(env_, buffer.reference, &result) != napi_ok)
      throw Napi::Error::New(env_);
    return result;
  }
  const napi_status status = napi_create_external_arraybuffer(env_, memory.iov_base, memory.iov_len,
                                                              nullptr, nullptr, &result);
  if (status == napi_no_external_buffers_allowed)
    throw codedError(env_, "ERR_TCMU_EXTERNAL_BUFFERS",
                     "this runtime allows no external ArrayBuffers; copy the data instead");
  napi_ref reference;
  if (status != napi_ok || napi_create_reference(env_, result, 1, &reference) != napi_ok)
    throw Napi::Error::New(env_);
  buffers.push_back({piece, reference});
  made_++;
  return result;
}

napi_value ExternalBuffers::views(uint32_t slot, Segments segments, uint64_t offset,
                                  uint64_t length) {
  if (slots_.size() <= slot) slots_.resize(std::max<size_t>(slot + 1, slots_.size() * 2));
  napi_value array;
  napi_create_array(env_, &array);
  uint32_t count = 0;
  for (uint32_t i = 0; i < segments.count && length > 0; i++) {
    const iovec& memory = segments.pieces[i];
    if (offset >= memory.iov_len) {
      offset -= memory.iov_len;
      continue;
    }
    const size_t bytes = std::min<uint64_t>(length, memory.iov_len - offset);
    napi_value view;
    if (napi_create_typedarray(env_, napi_uint8_array, bytes, buffer(slots_[slot], i, memory),
                               offset, &view) != napi_ok ||
        napi_set_element(env_, array, count++, view) != napi_ok)
      throw Napi::Error::New(env_);
    length -= bytes;
    offset = 0;
  }
  return array;
}

bool ExternalBuffers::revoke(uint32_t slot) {
  if (slot >= slots_.size() || slots_[slot].empty()) return true;
  const Napi::HandleScope scope(env_);
  bool intact = true;
  for (const Buffer& buffer : slots_[slot]) {
    napi_value value;
    bool detached = false;
    if (napi_get_reference_value(env_, buffer.reference, &value) == napi_ok &&
        napi_is_detached_arraybuffer(env_, value, &detached) == napi_ok) {
      if (detached)
        intact = false;
      else
        napi_detach_arraybuffer(env_, value);
    }
    napi_delete_reference(env_, buffer.reference);
  }
  slots_[slot].clear();
  return intact;
}

}  // namespace tcmu

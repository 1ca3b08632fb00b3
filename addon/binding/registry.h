// SPDX-License-Identifier: Apache-2.0
// What the addon exports. A source file of any folder adds to it with one line at namespace scope:
//
//   static const tcmu::Export simulator(&initSimulator);   // void initSimulator(Napi::Env, Napi::Object exports)
//
// Run once per environment, after Environment exists.
#pragma once

#include <napi.h>

namespace tcmu {

class Export {
 public:
  using Init = void (*)(Napi::Env env, Napi::Object exports);
  explicit Export(Init init) : init_(init), next_(first()) { first() = this; }
  static void all(Napi::Env env, Napi::Object exports) {
    for (const Export* entry = first(); entry; entry = entry->next_) entry->init_(env, exports);
  }

 private:
  static const Export*& first() {
    static const Export* list = nullptr;
    return list;
  }
  Init init_;
  const Export* next_;
};

}  // namespace tcmu

// SPDX-License-Identifier: Apache-2.0
// The few lines of test framework that the simulated kernel's C++ tests need.
#pragma once

#include <cstdio>
#include <exception>
#include <vector>

namespace check {

struct Test {
  const char* name;
  void (*body)();
};

inline std::vector<Test>& tests() {
  static std::vector<Test> list;
  return list;
}

inline bool& failed() {
  static bool flag = false;
  return flag;
}

struct Registration {
  Registration(const char* name, void (*body)()) { tests().push_back({name, body}); }
};

inline int run() {
  std::setvbuf(stdout, nullptr, _IOLBF, 0);
  int passed = 0;
  int broken = 0;
  for (const Test& test : tests()) {
    failed() = false;
    try {
      test.body();
    } catch (const std::exception& error) {
      std::printf("  threw: %s\n", error.what());
      failed() = true;
    }
    std::printf("%s %s\n", failed() ? "FAILED" : "ok", test.name);
    (failed() ? broken : passed)++;
  }
  std::printf("%d passed, %d failed\n", passed, broken);
  return broken ? 1 : 0;
}

}  // namespace check

#define TEST(name)                                                  \
  static void name();                                               \
  static const check::Registration name##Registration{#name, name}; \
  static void name()

#define CHECK(condition)                                            \
  do {                                                              \
    if (!(condition)) {                                             \
      std::printf("  %s:%d: %s\n", __FILE__, __LINE__, #condition); \
      check::failed() = true;                                       \
    }                                                               \
  } while (0)

#define CHECK_EQ(actual, expected)                                                             \
  do {                                                                                         \
    const auto actualValue = static_cast<long long>(actual);                                   \
    const auto expectedValue = static_cast<long long>(expected);                               \
    if (actualValue != expectedValue) {                                                        \
      std::printf("  %s:%d: %s is %lld, not %lld\n", __FILE__, __LINE__, #actual, actualValue, \
                  expectedValue);                                                              \
      check::failed() = true;                                                                  \
    }                                                                                          \
  } while (0)

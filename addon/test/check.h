// SPDX-License-Identifier: Apache-2.0
// A test is a function that says what it expects. `TEST(name) { ... EXPECT(condition); }`
//
// One line for each failed expectation, one at the end: `N passed, N failed`.
#pragma once

#include <cstdio>
#include <vector>

namespace check {

struct Test {
  const char* name;
  void (*run)();
};
inline std::vector<Test>& tests() {
  static std::vector<Test> list;
  return list;
}
inline int failures = 0;
inline const char* current = "";

struct Register {
  Register(const char* name, void (*run)()) { tests().push_back({name, run}); }
};

inline void expect(bool holds, const char* what, const char* file, int line) {
  if (holds) return;
  failures++;
  std::printf("FAIL %s: %s (%s:%d)\n", current, what, file, line);
}

inline int runAll() {
  int passed = 0, failed = 0;
  for (const Test& test : tests()) {
    current = test.name;
    failures = 0;
    test.run();
    (failures == 0 ? passed : failed)++;
  }
  std::printf("%d passed, %d failed\n", passed, failed);
  return failed == 0 ? 0 : 1;
}

}  // namespace check

#define TEST(name)                                        \
  static void name();                                     \
  static const check::Register name##Registered(#name, name); \
  static void name()
#define EXPECT(...) check::expect((__VA_ARGS__), #__VA_ARGS__, __FILE__, __LINE__)

#!/bin/bash
# SPDX-License-Identifier: Apache-2.0
# C++ tests of the simulated kernel and its NBD server: under AddressSanitizer and UndefinedBehaviorSanitizer, and what
# has threads under ThreadSanitizer too. Needs g++ only. Ends in "N passed, N failed".
#
#   addon/sim/test/run.sh [test…]
set -u
here=$(cd "$(dirname "$0")" && pwd)
out=$(mktemp -d)
trap 'rm -rf "$out"' EXIT
flags="-std=c++20 -g -O1 -Wall -Wextra -Wconversion -Wno-sign-conversion -Werror -pthread -fno-sanitize-recover=all"
compiler=${CXX:-g++}
passed=0
failed=0

build() { # sanitizers test…
  local sanitizers=$1 source
  mkdir -p "$out/$sanitizers"
  shift
  for source in "$here"/../*.cc "$here"/../../nbd/*.cc "$here/../../memory/mapping_watch.cc" \
    "${@/#/$here/}"; do
    while [ "$(jobs -rp | wc -l)" -ge "$(nproc)" ]; do wait -n; done
    $compiler $flags "-fsanitize=$sanitizers" -c "${source%.cc}.cc" \
      -o "$out/$sanitizers/$(basename "${source%.cc}").o" &
  done
  wait
}

run() { # sanitizers test…
  local sanitizers=$1 test counts
  build "$@"
  shift
  for test in "$@"; do
    echo "# $test with $sanitizers"
    : >"$out/log"
    $compiler $flags "-fsanitize=$sanitizers" "$out/$sanitizers/$test.o" \
      $(ls "$out/$sanitizers"/*.o | grep -v _test.o) -o "$out/test" &&
      timeout 300 "$out/test" >"$out/log" 2>&1
    counts=$(grep -E '^[0-9]+ passed, [0-9]+ failed$' "$out/log")
    grep -vE '^[0-9]+ passed, ' "$out/log"
    # No counts: it did not build, or a sanitizer or a signal ended it.
    read -r p _ f _ <<<"${counts:-0 passed, 1 failed}"
    passed=$((passed + p))
    failed=$((failed + f))
  done
}

if [ $# -gt 0 ]; then
  run address,undefined "$@"
else
  run address,undefined kernel_test device_test load_test zero_copy_test nbd_test
  run thread device_test load_test nbd_test
fi
echo "$passed passed, $failed failed"
[ "$failed" -eq 0 ]

#!/bin/sh
# C++ tests of the simulated kernel: under AddressSanitizer and UndefinedBehaviorSanitizer, and what
# has threads under ThreadSanitizer too. Ends in "N passed, N failed".
set -u
here=$(dirname "$(readlink -f "$0")")
out=$(mktemp -d)
trap 'rm -rf "$out"' EXIT
flags="-std=c++20 -g -O1 -Wall -Wextra -Wconversion -Wno-sign-conversion -Werror -pthread"
compiler=${CXX:-g++}
passed=0
failed=0

run() { # name sanitizers
  if $compiler $flags "-fsanitize=$2" -fno-sanitize-recover=all "$here"/../*.cc "$here/$1.cc" \
    -o "$out/$1"; then
    echo "# $1 with $2"
    timeout 300 "$out/$1" >"$out/log" 2>&1 || true
    grep -v ' passed, ' "$out/log"
    last=$(grep -o '^[0-9]* passed, [0-9]* failed$' "$out/log")
  else
    last=
  fi
  # No last line: it did not build, or a sanitizer or a signal ended it.
  set -- ${last:-0 passed, 1 failed}
  passed=$((passed + $1))
  failed=$((failed + $3))
}

run kernel_test address,undefined
run device_test address,undefined
run load_test address,undefined
run device_test thread
run load_test thread
echo "$passed passed, $failed failed"
[ "$failed" -eq 0 ]

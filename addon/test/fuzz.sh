#!/bin/bash
# SPDX-License-Identifier: Apache-2.0
# Fuzzes the ring for a number of seconds (20), under the sanitizers.
#
#   addon/test/fuzz.sh [seconds] [folder for binary and findings]
#
# With clang's libFuzzer where that is installed, guided by coverage; with random programs and g++
# elsewhere. Ends with "1 passed, 0 failed", or with the report of what broke.
set -u
addon=$(cd "$(dirname "$0")/.." && pwd)
seconds=${1:-20}
out=${2:-$addon/../build/addon-test}
mkdir -p "$out" || exit 1
cd "$addon" || exit 1
sources="test/fuzz.cc ring/ring.cc memory/guard.cc memory/segments.cc"
flags="-std=c++20 -O1 -g -Wno-missing-field-initializers -fno-sanitize-recover=all"

if clang++ $flags -fsanitize=fuzzer,address,undefined $sources -o "$out/fuzz" 2>"$out/fuzz.log"; then
  mkdir -p "$out/corpus"
  run=("$out/fuzz" -max_total_time="$seconds" -max_len=4096 -artifact_prefix="$out/" -print_final_stats=1
    "$out/corpus")
elif g++ $flags -DSTANDALONE -fsanitize=address,undefined $sources -o "$out/fuzz" 2>"$out/fuzz.log"; then
  run=("$out/fuzz" "$seconds")
else
  cat "$out/fuzz.log"
  echo "FAIL the fuzzer does not compile"
  echo "0 passed, 1 failed"
  exit 1
fi
if timeout $((seconds + 60)) "${run[@]}" >"$out/fuzz.log" 2>&1; then
  grep -E 'number_of_executed_units|programs' "$out/fuzz.log"
  echo "1 passed, 0 failed"
else
  tail -40 "$out/fuzz.log"
  echo "FAIL the fuzzer found something: see above, and crash-* in $out"
  echo "0 passed, 1 failed"
  exit 1
fi

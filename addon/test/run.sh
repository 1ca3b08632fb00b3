#!/bin/bash
# SPDX-License-Identifier: Apache-2.0
# The addon's C++ tests, under the address and undefined-behaviour sanitizers.
#
#   addon/test/run.sh [folder for the binaries]
#
# Needs g++ only. Prints a line for each failure and ends with "N passed, N failed".
set -u
addon=$(cd "$(dirname "$0")/.." && pwd)
out=${1:-$addon/../build/addon-test}
mkdir -p "$out" || exit 1
cd "$addon" || exit 1

core="ring/ring.cc ring/express.cc memory/guard.cc memory/mapping.cc memory/mapping_watch.cc memory/segments.cc io/operation.cc io/file_facts.cc"
flags="-std=c++20 -O1 -g -Wall -Wextra -Wno-missing-field-initializers -fno-omit-frame-pointer
  -fsanitize=address,undefined -fno-sanitize-recover=all"
passed=0
failed=0

# Objects are built side by side, and only when a source is newer.
newest=$(find . -name '*.h' -newer "$out/stamp" 2>/dev/null | head -1)
[ -e "$out/stamp" ] && [ -z "$newest" ] || rm -f "$out"/*.o
compile() {
  local object
  object=$out/$(echo "$1" | tr / _ | sed 's/\.cc$/.o/')
  if [ ! "$object" -nt "$1" ]; then g++ $flags -c "$1" -o "$object" || touch "$out/broken"; fi
}
rm -f "$out/broken"
for source in $core test/*.cc; do
  compile "$source" &
  while [ "$(jobs -rp | wc -l)" -ge "$(nproc)" ]; do wait -n; done
done
wait
touch "$out/stamp"
if [ -e "$out/broken" ]; then
  rm -f "$out"/*.o
  echo "FAIL the C++ tests do not compile"
  echo "0 passed, 1 failed"
  exit 1
fi
objects=$(for source in $core; do echo "$out/$(echo "$source" | tr / _ | sed 's/\.cc$/.o/')"; done)

for source in test/*_test.cc; do
  name=$(basename "$source" .cc)
  g++ $flags "$out/test_$name.o" $objects -o "$out/$name" -pthread || exit 1
  # The sanitizer would take SIGBUS for itself; the tests raise it on purpose.
  ASAN_OPTIONS=handle_sigbus=0:detect_leaks=1 timeout 100 "$out/$name" >"$out/$name.log" 2>&1
  status=$?
  summary=$(tail -1 "$out/$name.log")
  if [[ $summary =~ ^([0-9]+)\ passed,\ ([0-9]+)\ failed$ ]]; then
    passed=$((passed + BASH_REMATCH[1]))
    failed=$((failed + BASH_REMATCH[2]))
    sed '$d' "$out/$name.log"
    if [ $status -ne 0 ] && [ "${BASH_REMATCH[2]}" -eq 0 ]; then
      echo "FAIL $name ended with status $status"
      failed=$((failed + 1))
    fi
  else
    cat "$out/$name.log"
    echo "FAIL $name ended with status $status"
    failed=$((failed + 1))
  fi
done
echo "$passed passed, $failed failed"
[ $failed -eq 0 ]

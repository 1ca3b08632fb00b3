#!/bin/sh
# C++ tests of the simulated kernel under AddressSanitizer and UndefinedBehaviorSanitizer, and the one
# with threads under ThreadSanitizer too. Ends in "N passed, N failed".
set -eu
here=$(dirname "$(readlink -f "$0")")
out=$(mktemp -d)
trap 'rm -rf "$out"' EXIT
flags="-std=c++20 -g -O1 -Wall -Wextra -Wconversion -Wno-sign-conversion -Werror -pthread"
core="$here/../kernel.cc $here/../memory.cc $here/../uio.cc $here/../device.cc"
compiler=${CXX:-g++}

$compiler $flags -fsanitize=address,undefined -fno-sanitize-recover=all \
  $core "$here/kernel_test.cc" -o "$out/kernel"
"$out/kernel"

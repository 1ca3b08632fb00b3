#!/bin/bash
# SPDX-License-Identifier: GPL-2.0-only
#
# The scenarios of test/zero-copy under a kernel that looks for mistakes: lockdep, KASAN, DEBUG_VM,
# page poisoning, object debugging, fault injection; two processors.
#
#   kernel/debug/run.sh [part of a name…]
#
# Builds the kernel from Debian's linux-source-6.1 with `config` into build/zero-copy-kernel (some 20
# minutes on two processors, once), then the modules against it, and boots it in QEMU. Wants flex,
# bison, bc, libelf-dev, libssl-dev besides what `node scripts/setup.mjs kernel peer zero-copy` installs.
# Every time limit is 5 times the usual; TCMU_ZERO_COPY_SLOWNESS in the environment is another factor, for a busy
# machine.
set -eu
here=$(cd "$(dirname "$0")" && pwd)
root=$(cd "$here/../.." && pwd)
work=$root/build/zero-copy-kernel
archive=/usr/src/linux-source-6.1.tar.xz

if [ ! -e "$work/kernel/image" ]; then
	mkdir -p "$work/src"
	tar -C "$work/src" --strip-components=1 -xf "$archive"
	cd "$work/src"
	make tinyconfig >/dev/null
	sed -i '/SLOB/d' .config
	cat "$here/config" >>.config
	make olddefconfig >/dev/null
	for option in KASAN PROVE_LOCKING DEBUG_VM FAILSLAB FAIL_PAGE_ALLOC; do
		grep -q "^CONFIG_$option=y" .config || { echo "CONFIG_$option was not taken" >&2; exit 1; }
	done
	nice -n 19 make -j"$(nproc)" bzImage modules
	make -s modules_install INSTALL_MOD_PATH="$work/kernel"
	make -s kernelrelease >"$work/release"
	cp arch/x86/boot/bzImage "$work/kernel/image"
fi

cd "$root"
release=$(cat "$work/release")
TCMU_ZERO_COPY_KERNEL=$work/kernel TCMU_ZERO_COPY_RELEASE=$release TCMU_ZERO_COPY_HEADERS=$work/src \
	TCMU_ZERO_COPY_FAULTS=1 TCMU_ZERO_COPY_MEMORY=3072 TCMU_ZERO_COPY_SECONDS=7200 node scripts/test-zero-copy.mjs "$@"

#!/bin/bash
# SPDX-License-Identifier: GPL-2.0-only
#
# Builds target_core_user with zero copy, out of tree, for the running or a named kernel.
#
#   build.sh [--kernel RELEASE] [--headers DIR] [--source TREE|TARBALL] [--out DIR]
#
# Takes drivers/target/target_core_user.c and its header from the distribution's source of the
# same series, patches them, and compiles them against the distribution's headers. Nothing is
# installed and nothing downloaded; the module is DIR/target_core_user.ko (default: the current
# directory). Whatever is missing ends this with exit code 2 and a line that says what to do.
set -eu
here=$(cd "$(dirname "$0")" && pwd)
release=$(uname -r)
headers='' source='' out=$PWD

refuse() {
	echo "tcmu zero copy: $*" >&2
	exit 2
}

while [ $# -gt 0 ]; do
	[ $# -ge 2 ] || refuse "$1 needs a value"
	case $1 in
	--kernel) release=$2 ;;
	--headers) headers=$2 ;;
	--source) source=$2 ;;
	--out) out=$2 ;;
	*) refuse "unknown option $1" ;;
	esac
	shift 2
done

for tool in make gcc patch tar xz; do
	command -v $tool >/dev/null || refuse "$tool is not installed"
done

# --- headers ---
if [ -z "$headers" ]; then
	for dir in "/lib/modules/$release/build" "/usr/src/linux-headers-$release"; do
		[ ! -e "$dir/Makefile" ] || { headers=$dir && break; }
	done
fi
[ -n "$headers" ] && [ -e "$headers/Makefile" ] ||
	refuse "no headers of kernel $release; on Debian: apt-get install linux-headers-$release"
[ -e "$headers/include/config/auto.conf" ] && [ -e "$headers/Module.symvers" ] ||
	refuse "$headers is not prepared for building modules (include/config/auto.conf and Module.symvers are needed)"
version=$(make -s -C "$headers" kernelversion) || refuse "$headers doesn't tell its version"
series=$(echo "$version" | cut -d. -f1-2)
major=${series%.*} minor=${series#*.}
if [ ! -d "$here/patches/$series" ]; then
	known=$(cd "$here/patches" && echo *)
	if [ "$major" -lt 6 ] || { [ "$major" -eq 6 ] && [ "$minor" -lt 1 ]; }; then
		refuse "kernel $version is too old: 6.1 is the oldest that the patches are for"
	fi
	refuse "no patches for kernel $series, only for: $known"
fi

# --- configuration and symbols ---
for option in TARGET_CORE UIO NET CONFIGFS_FS ARCH_HAS_PTE_SPECIAL; do
	grep -qE "^CONFIG_$option=[ym]" "$headers/include/config/auto.conf" ||
		refuse "kernel $release is built without CONFIG_$option"
done
for symbol in apply_to_page_range vm_insert_pages unmap_mapping_range vm_get_page_prot \
	bitmap_find_next_zero_area_off ihold iput transport_backend_register __uio_register_device; do
	awk -v want=$symbol '$2 == want { found = 1 } END { exit !found }' "$headers/Module.symvers" ||
		refuse "kernel $release doesn't export $symbol"
done

# --- source ---
if [ -z "$source" ]; then
	for path in "/usr/src/linux-source-$series.tar.xz" "/usr/src/linux-source-$series"; do
		[ ! -e "$path" ] || { source=$path && break; }
	done
fi
[ -n "$source" ] && [ -e "$source" ] ||
	refuse "no source of kernel $series; on Debian: apt-get install linux-source-$series, or name one with --source"

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
module=drivers/target/target_core_user.c
header=include/uapi/linux/target_core_user.h
mkdir -p "$work/tree/${module%/*}" "$work/tree/${header%/*}"
if [ -d "$source" ]; then
	cp "$source/$module" "$work/tree/$module" && cp "$source/$header" "$work/tree/$header" ||
		refuse "$source is no kernel source tree"
else
	tar -C "$work/tree" -xf "$source" --strip-components=1 --wildcards "*/$module" "*/$header" ||
		refuse "$source is no kernel source archive"
fi

# --- patch and compile ---
for patch in "$here/patches/$series"/*.patch; do
	# The document is not needed here.
	[ "${patch##*-Document-zero-copy}" = "$patch" ] || continue
	patch -d "$work/tree" -p1 -s -f --no-backup-if-mismatch <"$patch" >"$work/log" || {
		cat "$work/log" >&2
		refuse "${patch##*/} doesn't apply to $source: it is of another version than $series"
	}
done
cp "$work/tree/$module" "$work/"
# Ours must be found before the header of the same name in the kernel's headers.
mkdir -p "$work/uapi/linux"
cp "$work/tree/$header" "$work/uapi/linux/"
echo 'obj-m := target_core_user.o' >"$work/Kbuild"
make -C "$headers" M="$work" NOSTDINC_FLAGS="-nostdinc -I$work/uapi" modules >"$work/log" 2>&1 || {
	cat "$work/log" >&2
	refuse "compiling for kernel $release failed (above)"
}
! grep -E 'warning:' "$work/log" >&2 || refuse 'the compiler has warnings (above)'
mkdir -p "$out"
cp "$work/target_core_user.ko" "$out/"
echo "$out/target_core_user.ko: zero copy for kernel $release"

#!/bin/bash
# SPDX-License-Identifier: GPL-2.0-only
#
# Builds target_core_user with zero copy, out of tree, for the running or a named kernel.
#
#   build.sh [--kernel RELEASE] [--headers DIR] [--source TREE|TARBALL] [--out DIR]
#
# Takes drivers/target/target_core_user.c and its header from the distribution's source of the
# same series, patches them, and compiles them against the distribution's headers. A series that has no
# directory in patches/ is tried with those of its neighbours, the older first. Nothing is
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
# A series without patches of its own may do with those of its neighbours.
bases=$series
if [ ! -d "$here/patches/$series" ]; then
	older='' newer=''
	for base in $(cd "$here/patches" && printf '%s\n' * | sort -V); do
		if [ "$(printf '%s\n' "$base" "$series" | sort -V | head -n 1)" = "$base" ]; then
			older=$base
		else
			newer=${newer:-$base}
		fi
	done
	[ -n "$older" ] || refuse "kernel $version is too old: $newer is the oldest that the patches are for"
	bases="$older${newer:+ $newer}"
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
mkdir -p "$work/plain/${module%/*}" "$work/plain/${header%/*}"
if [ -d "$source" ]; then
	cp "$source/$module" "$work/plain/$module" && cp "$source/$header" "$work/plain/$header" ||
		refuse "$source is no kernel source tree"
else
	tar -C "$work/plain" -xf "$source" --strip-components=1 --wildcards "*/$module" "*/$header" ||
		refuse "$source is no kernel source archive"
fi

# --- patch and compile ---
# Without fuzz: where the kernel has changed around a patch, somebody has to look at it.
apply() {
	rm -rf "$work/tree"
	cp -r "$work/plain" "$work/tree"
	for patch in "$here/patches/$1"/*.patch; do
		# The document is not needed here.
		[ "${patch##*-Document-zero-copy}" = "$patch" ] || continue
		patch -d "$work/tree" -p1 -s -f -F0 --no-backup-if-mismatch <"$patch" >"$work/log" || return 1
	done
}

taken=''
for base in $bases; do
	! apply "$base" || { taken=$base && break; }
done
if [ -z "$taken" ]; then
	[ "$bases" != "$series" ] ||
		{ cat "$work/log" >&2 && refuse "${patch##*/} doesn't apply to $source: it is of another version than $series"; }
	refuse "no patches for kernel $series, and those for ${bases/ / and } don't apply to it (there are patches for:$(
		cd "$here/patches" && printf ' %s' $(printf '%s\n' * | sort -V)))"
fi
note=''
[ "$taken" = "$series" ] || note=", with the patches for $taken: never tested on $series"

cp "$work/tree/$module" "$work/"
# Ours must be found before the header of the same name in the kernel's headers.
mkdir -p "$work/uapi/linux"
cp "$work/tree/$header" "$work/uapi/linux/"
echo 'obj-m := target_core_user.o' >"$work/Kbuild"
make -C "$headers" M="$work" NOSTDINC_FLAGS="-nostdinc -I$work/uapi" modules >"$work/log" 2>&1 || {
	cat "$work/log" >&2
	refuse "compiling failed (above) for kernel $release$note"
}
! grep -E 'warning:' "$work/log" >&2 || refuse "the compiler has warnings (above) for kernel $release$note"
mkdir -p "$out"
cp "$work/target_core_user.ko" "$out/"
echo "$out/target_core_user.ko: zero copy for kernel $release$note"

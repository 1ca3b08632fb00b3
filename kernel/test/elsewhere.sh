#!/bin/bash
# SPDX-License-Identifier: GPL-2.0-only
#
# The scenarios of test/zero-copy on a kernel of another Debian release, whose build tools don't run on this machine.
#
#   kernel/test/elsewhere.sh SUITE RELEASE [part of a name…]
#   kernel/test/elsewhere.sh trixie-backports 7.3.4+deb13-amd64 default access
#
# As root, with debootstrap, qemu-system-x86 and a built package (`npm run build`). Debian's SUITE is unpacked into
# build/zero-copy-debian/SUITE, and there, from its packages and as a user of it would, kernel/build.sh and the test
# module are built. Downloads some 700 MB the first time, from apt's mirror or that in TCMU_ZERO_COPY_MIRROR.
set -eu
[ $# -ge 2 ] || { echo "usage: ${0##*/} SUITE RELEASE [part of a name…]" >&2 && exit 2; }
root=$(cd "$(dirname "$0")/../.." && pwd)
suite=$1 release=$2
shift 2
mirror=${TCMU_ZERO_COPY_MIRROR:-$(apt-get indextargets --format '$(REPO_URI)' 'Created-By: Packages' 'Origin: Debian' | grep -v security | head -n 1)}
[ -n "$mirror" ] || { echo "${0##*/}: apt knows no Debian mirror here: name one in TCMU_ZERO_COPY_MIRROR" >&2 && exit 2; }
debian=$root/build/zero-copy-debian/$suite
series=$(echo "$release" | cut -d. -f1-2)
out=$root/build/zero-copy/$release
export DEBIAN_FRONTEND=noninteractive INITRD=No

# Runs a command in that Debian, with a /proc that goes away with it: objtool looks there.
inside() {
	unshare --mount sh -c 'mount -t proc proc "$0/proc" && exec chroot "$0" "$@"' "$debian" "$@"
}

if [ ! -e "$debian/ready" ]; then
	rm -rf "$debian"
	debootstrap --variant=minbase --include=gcc,make,patch,xz-utils "${suite%-backports}" "$debian" "$mirror"
	[ "${suite%-backports}" = "$suite" ] || echo "deb $mirror $suite main" >>"$debian/etc/apt/sources.list"
	touch "$debian/ready"
fi
inside apt-get -q update
inside apt-get -q install -y --no-install-recommends -t "$suite" \
	"linux-headers-$release" "linux-image-$release" "linux-source-$series"
ln -sf "boot/vmlinuz-$release" "$debian/image"

rm -rf "$debian/root/module"
mkdir -p "$debian/root/module/bidi" "$out"
cp -r "$root/kernel" "$debian/root/module/"
cp "$root/kernel/test/tcmu_bidi_test.c" "$debian/root/module/bidi/"
echo 'obj-m := tcmu_bidi_test.o' >"$debian/root/module/bidi/Kbuild"
inside /root/module/kernel/build.sh --kernel "$release" --out /root/module
inside make -s -C "/usr/src/linux-headers-$release" M=/root/module/bidi modules
cp "$debian/root/module/target_core_user.ko" "$debian/root/module/bidi/tcmu_bidi_test.ko" "$out/"
touch "$out/built" # newer than what it was built from: the runner builds nothing

cd "$root"
TCMU_ZERO_COPY_KERNEL=$debian TCMU_ZERO_COPY_RELEASE=$release TCMU_ZERO_COPY_SECONDS=1800 \
	exec node scripts/test-zero-copy.mjs "$@"

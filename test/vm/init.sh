#!/bin/sh
# SPDX-License-Identifier: Apache-2.0
# PID 1 of a test kernel (user-mode Linux): builds a root from the host's, runs one job, powers off.
#
# Contract with uml.ts: this file lies, copied, in a private directory of the host beside `job`, a shell
# file that sets OUT (host directory, writable as /run/out), KEEP (newline-separated host paths to be seen
# below a directory that starts empty), DEADLINE (seconds) and MODULES, and defines run_job. ttyS0
# carries the job's output as it is; ttyS1 carries the line `exit N`; the console carries kernel messages
# only. The host's files are seen read-only, at their own places; nothing of the host is written but OUT.
here=${0%/*}
export PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin

# The new root is a tmpfs. What a system writes to starts empty there; all else is the host's.
root=/mnt
mount -t tmpfs -o mode=755 tmpfs $root
cd $root || exit 1
mkdir -p old dev proc sys run/lock run/dbus run/home run/out var
mkdir -m 1777 tmp
for path in /* /var/*; do
  case $path in
    /dev | /proc | /sys | /run | /tmp | /var | /mnt | /old | /var/log | /var/tmp | /var/target) continue ;;
  esac
  if [ -L "$path" ]; then
    cp -P "$path" ".$path"
  elif [ -d "$path" ]; then
    mkdir ".$path" && mount --bind "$path" ".$path"
  fi
done
mkdir -p mnt var/log var/tmp var/target/pr var/target/alua
[ ! -d /etc/target ] || { mount -t tmpfs tmpfs etc/target && mkdir etc/target/pr etc/target/alua; }
# modprobe and libkmod look below /lib/modules, Debian's package puts the modules in /usr/lib/uml: so /lib,
# a link everywhere but on ancient systems, becomes a directory of links with one more entry.
if [ -L lib ]; then
  rm lib
  mkdir lib
  ln -s /usr/lib/* lib/
  rm -f lib/modules
  mkdir lib/modules
  ln -s "/usr/lib/uml/modules/$(uname -r)" lib/modules/
fi
mount -t proc proc proc
mount -t sysfs sysfs sys
mount -t devtmpfs devtmpfs dev
mkdir -p dev/pts dev/shm
mount -t devpts devpts dev/pts
mount -t tmpfs -o mode=1777 tmpfs dev/shm
ln -sf /proc/self/fd dev/fd

. "$here/job"

printf '%s\n' "$KEEP" | while IFS= read -r path; do
  [ ! -e "$path" ] || [ -e ".$path" ] || { mkdir -p ".$path" && mount --bind "$path" ".$path"; }
done
pivot_root . old || exit 1
cd / || exit 1
umount -l /old && rmdir /old

stty -F /dev/ttyS0 raw -echo
stty -F /dev/ttyS1 raw -echo
# No stdin: a program that asks a question must fail, not wait.
exec </dev/null >/dev/ttyS0 2>&1 3>/dev/ttyS1
[ -z "$OUT" ] || mount -t hostfs none /run/out -o "$OUT"

ip link set lo up
for module in $MODULES; do modprobe "$module" || echo "init: no module $module"; done
[ ! -d /sys/kernel/config ] || mount -t configfs configfs /sys/kernel/config

finish() {
  # Only the output directory is written back: a sync of everything would wait for a stuck disk.
  [ -z "$OUT" ] || timeout -k 1 20 sync -f /run/out
  echo "exit $1" >&3
  printf '<6>tcmu-vm: end\n' >/dev/kmsg
  sleep 0.1
  echo o >/proc/sysrq-trigger
  sleep 10
}

export HOME=/run/home TMPDIR=/tmp LANG=C.UTF-8
# Through a pipe, so that programs don't take the output for a terminal.
mkfifo /run/job.out
cat /run/job.out &
copier=$!
(run_job) >/run/job.out 2>&1 3>&- &
job=$!
# This kernel has no hung-task detector: at the deadline the stacks of blocked tasks go to its log.
(
  exec 3>&- >/dev/null 2>&1
  sleep "$DEADLINE"
  : >/run/expired
  echo 'tcmu-vm: out of time, blocked tasks follow' >/dev/kmsg
  echo w >/proc/sysrq-trigger
  kill -TERM "$job"
  sleep 2
  kill -KILL -1
) &
wait "$job"
code=$?
[ ! -e /run/expired ] || code=124
# The rest of the output; a process left behind may hold the pipe open, so not for ever.
(
  sleep 3
  kill "$copier"
) 3>&- 2>/dev/null &
wait "$copier"
finish "$code"

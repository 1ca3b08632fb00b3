#!/bin/sh
# PID 1 of a test kernel (user-mode Linux): makes the read-only host root usable, runs one job, powers off.
#
# Contract with uml.ts: this file lies, copied, in a private directory of the host beside `job`, a shell
# file that sets OUT (host directory, writable as /run/out), KEEP (newline-separated host paths which must
# stay visible below a covered directory), DEADLINE (seconds) and MODULES, and defines run_job. ttyS0 carries the job's output as it is; ttyS1 carries the lines
# `booted` and `exit N`; the console carries kernel messages only. Nothing of the host is written but OUT.
here=${0%/*}

# No stdin: a program that asks a question must fail, not wait.
export PATH=/run/kmod/bin:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin
mount -t proc proc /proc
mount -t sysfs sysfs /sys
mount -t devtmpfs devtmpfs /dev 2>/dev/null
mkdir -p /dev/pts /dev/shm
mount -t devpts devpts /dev/pts
mount -t tmpfs tmpfs /dev/shm
ln -sf /proc/self/fd /dev/fd
stty -F /dev/ttyS0 raw -echo
stty -F /dev/ttyS1 raw -echo
exec </dev/null >/dev/ttyS0 2>&1 3>/dev/ttyS1

. "$here/job"

# What of the host lies below a directory that is about to be covered is mounted again where it was.
covered='/run /tmp /mnt /var/log /var/tmp'
for dir in $covered /etc/target /var/target; do
  [ -d "$dir" ] && mount -t tmpfs -o mode=1777 tmpfs "$dir"
done
mkdir -p /run/lock /run/dbus /run/home /run/out /run/target/pr /run/target/alua /run/kmod/bin /run/kmod/lib/modules
for dir in /etc/target /var/target; do
  [ -d "$dir" ] && mkdir -p "$dir/pr" "$dir/alua"
done
printf '%s\n' "$KEEP" | while IFS= read -r path; do
  for dir in $covered; do
    case $path in
      "$dir"/*) [ -e "$path" ] || { mkdir -p "$path" && mount -r -t hostfs none "$path" -o "$path"; } ;;
    esac
  done
done
[ -z "$OUT" ] || mount -t hostfs none /run/out -o "$OUT"

# modprobe looks below /lib/modules; the package's modules lie elsewhere, and the root is read-only.
# Both users of it, the PATH and the kernel's own requests, get a modprobe that knows the place.
ln -s "/usr/lib/uml/modules/$(uname -r)" "/run/kmod/lib/modules/$(uname -r)"
modprobe=$(PATH=${PATH#*:} command -v modprobe)
printf '#!/bin/sh\nexec %s -d /run/kmod "$@"\n' "${modprobe:-/sbin/modprobe}" >/run/kmod/bin/modprobe
chmod +x /run/kmod/bin/modprobe
echo /run/kmod/bin/modprobe >/proc/sys/kernel/modprobe

ip link set lo up
for module in $MODULES; do modprobe "$module" || echo "init: no module $module"; done
if [ -d /sys/kernel/config ] && grep -q configfs /proc/filesystems; then
  mount -t configfs configfs /sys/kernel/config
  # Persistent reservations and ALUA state want a writable place that every host has.
  [ -e /sys/kernel/config/target/dbroot ] && echo /run/target >/sys/kernel/config/target/dbroot
fi

finish() {
  # Only the output directory is written back: a sync of everything would wait for a stuck disk.
  [ -z "$OUT" ] || timeout -k 1 20 sync -f /run/out
  echo "exit $1" >&3
  echo 'tcmu-vm: end' >/dev/kmsg
  sleep 0.1
  echo o >/proc/sysrq-trigger
  sleep 10
}

export HOME=/run/home TMPDIR=/tmp LANG=C.UTF-8
echo booted >&3
# Through a pipe, so that programs don't take the output for a terminal.
mkfifo /run/job.out
cat /run/job.out &
copier=$!
( run_job ) >/run/job.out 2>&1 3>&- &
job=$!
# The kernel has no hung-task detector: shortly before the deadline the blocked tasks' stacks go to the log.
(
  exec 3>&- >/dev/null 2>&1
  sleep "$DEADLINE"
  echo 'tcmu-vm: out of time, blocked tasks follow' >/dev/kmsg
  echo w >/proc/sysrq-trigger
  : >/run/expired
  kill -TERM "$job"
  sleep 2
  kill -KILL -1
) &
wait "$job"
code=$?
[ -e /run/expired ] && code=124
# The rest of the output; a process left behind may hold the pipe open, so not for ever.
( sleep 3; kill "$copier" ) 3>&- 2>/dev/null &
wait "$copier"
finish "$code"

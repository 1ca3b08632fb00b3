#!/bin/bash
# SPDX-License-Identifier: Apache-2.0
# Runs inside a test kernel: makes one disk per subject, and measures them with fio in turn.
#
# Contract with guest.ts: the environment gives SUBJECTS, ROUNDS, RUNTIME (milliseconds), SIZE_MB, JOBS (lines of
# `name rw block-size depth`), OURS (command line of our handler, PATH standing for the file), IMAGE (what that file is, see
# make_image), WARM_UP (what is run before measuring, as fio spells it) and COUNT (1: also count system calls and switches with the kernel's tracepoints). Each measurement is a file of /run/out, named <round>.<job>.<subject> with the
# ending .json (fio's report), .switches (commands and context switches before, and after) or .trace.*. Lines starting with `bench: ` report progress, the last line
# `bench: failed: …` says what went wrong. The machine is thrown away afterwards, so what is made here is not undone.
set -u
target=/sys/kernel/config/target
tracing=/sys/kernel/tracing
files=/mnt/bench
size=$((SIZE_MB << 20))
declare -A disk=() pid=()

fail() {
  echo "bench: failed: $*"
  exit 1
}

# Runs a command until it succeeds, for at most so many seconds.
await() {
  local seconds=$1 what=$2 end
  shift 2
  end=$((SECONDS + seconds))
  until "$@" 2>/dev/null; do
    [ $SECONDS -lt $end ] || fail "no $what within $seconds s"
    sleep 0.1
  done
}

# Makes a backstore a disk of this machine; sets the named subject's disk.
attach() {
  local subject=$1 backstore=$2 wwn=naa.500140500000000$3 nexus=naa.500140500000001$3 address
  local tpg=$target/loopback/$wwn/tpgt_1
  mkdir -p "$tpg" && echo "$nexus" >"$tpg/nexus" || fail "loopback target $wwn"
  mkdir -p "$tpg/lun/lun_0" && ln -s "$backstore" "$tpg/lun/lun_0/backstore" || fail "LUN of $subject"
  read -r address <"$tpg/address" || fail "$tpg/address"
  # host:channel:target, all but the LUN
  await 10 "disk of $subject" eval "compgen -G '/sys/bus/scsi/devices/$address:0/block/sd*'"
  disk[$subject]=$(basename "$(compgen -G "/sys/bus/scsi/devices/$address:0/block/sd*")")
}

start_fileio() {
  local backstore=$target/core/fileio_1/fileio
  mkdir -p "$backstore" || fail 'a fileio backstore (target_core_file)'
  echo "fd_dev_name=$1,fd_dev_size=$size" >"$backstore/control" && echo 1 >"$backstore/enable" ||
    fail 'enabling a fileio backstore'
  attach fileio "$backstore" 1
}

start_runner() {
  local backstore=$target/core/user_2/runner
  mkdir -p "$backstore" || fail 'a user backstore (target_core_user)'
  echo "dev_config=qcow/$1,dev_size=$size,hw_block_size=512,hw_max_sectors=2048" >"$backstore/control" &&
    echo 1 >"$backstore/enable" || fail 'enabling a backstore for tcmu-runner'
  # Started last: an existing device is adopted, and nobody waits for a reply over netlink.
  mkdir -p /run/dbus
  dbus-daemon --system --fork || fail 'dbus-daemon'
  tcmu-runner >/run/runner.log 2>&1 &
  pid[runner]=$!
  await 20 'tcmu-runner serving its device' eval "ls -l /proc/${pid[runner]}/fd | grep -q '/dev/uio'"
  attach runner "$backstore" 2
}

start_ours() {
  ${OURS//PATH/$1} >/run/ours.log 2>&1 &
  pid[ours]=$!
  await 60 "ready line of our handler: $(cat /run/ours.log)" eval \
    "grep -q '^ready ' /run/ours.log || ! kill -0 ${pid[ours]}"
  disk[ours]=$(sed -n 's|^ready .*disk=/dev/\(sd[a-z]*\).*|\1|p' /run/ours.log)
  [ -n "${disk[ours]}" ] || fail "our handler: $(tail -n 30 /run/ours.log)"
}

# The disk's content: `raw` a file of zeros; or a qcow2 image, `allocated` all over, or `chain`, nothing over nothing
# over an allocated one.
make_image() {
  local file=$1 size=$2 base=$1
  case $IMAGE in
    raw) dd if=/dev/zero of="$file" bs=1M count=$((size >> 20)) status=none ;;
    allocated | chain)
      [ "$IMAGE" = allocated ] || base=$file.base
      qemu-img create -q -f qcow2 "$base" "$size" && qemu-io -f qcow2 -c "write -q -P 1 0 $size" "$base" || return
      [ "$IMAGE" = allocated ] && return
      qemu-img create -q -f qcow2 -b "$base" -F qcow2 "$file.middle" && qemu-img create -q -f qcow2 -b "$file.middle" -F qcow2 "$file" ;;
  esac
}

start() {
  local subject=$1 queue limit
  make_image "$files/$subject" $size || fail "room for $files/$subject"
  "start_$subject" "$files/$subject"
  await 10 "/dev/${disk[$subject]}" test -b "/dev/${disk[$subject]}"
  queue=/sys/block/${disk[$subject]}/queue
  # The same for all: no elevator, whose cost would blur the difference, and no I/O cut in two.
  echo none >"$queue/scheduler" && echo 1024 >"$queue/max_sectors_kb" ||
    fail "queue of ${disk[$subject]}"
  echo "bench: $subject is ${disk[$subject]}"
}

measure() {
  local subject=$1 report=$2 rw=$3 bs=$4 depth=$5 runtime=$6
  fio --name=job --filename="/dev/${disk[$subject]}" --ioengine=libaio --direct=1 --rw="$rw" --bs="$bs" \
    --iodepth="$depth" --norandommap --randseed=1 --time_based --runtime="${runtime}ms" \
    --output-format=json --output="$report" ||
    fail "fio $rw $bs depth $depth on $subject (${disk[$subject]}): $(tail -n 3 "$report")"
  [ -z "${pid[$subject]-}" ] || kill -0 "${pid[$subject]}" || fail "$subject died: $(tail -n 30 "/run/$subject.log")"
}

# Commands the disk has completed so far.
commands() {
  awk '{ print $1 + $5 }' "/sys/block/${disk[$1]}/stat"
}

# Context switches of all threads of a subject's process so far.
switches() {
  cat /proc/"${pid[$1]}"/task/*/status | awk '/ctxt_switches/ { sum += $2 } END { print sum }'
}

calls=$tracing/events/raw_syscalls/sys_enter/trigger
switch=$tracing/events/sched/sched_switch/trigger

# Another run of the job, this one with tracepoints on, which slow it down.
count() {
  local subject=$1 report=$2 before
  shift 2
  ls "/proc/${pid[$subject]}/task" >"$report.tasks"
  echo 'hist:keys=common_pid,id.syscall:size=4096' >$calls && echo 'hist:keys=next_pid:size=4096' >$switch ||
    fail 'histograms of tracepoints (CONFIG_HIST_TRIGGERS)'
  before=$(commands "$subject")
  measure "$subject" "$report.json" "$@"
  echo "$before $(commands "$subject")" >"$report.commands"
  cat ${calls%trigger}hist >"$report.calls"
  cat ${switch%trigger}hist >"$report.switches"
  echo '!hist:keys=common_pid,id.syscall:size=4096' >$calls
  echo '!hist:keys=next_pid:size=4096' >$switch
}

mkdir -p $files && mount -t tmpfs -o size=95% tmpfs $files || fail 'tmpfs'
[ "$COUNT" = 0 ] || mount -t tracefs tracefs $tracing || fail tracefs
read -ra subjects <<<"$SUBJECTS"
# tcmu-runner last: it would hear of, and answer for, the devices of others.
for subject in ours fileio runner; do
  case " $SUBJECTS " in *" $subject "*) start $subject ;; esac
done

# A just-in-time compiler needs its seconds; what is measured is the steady state, for all.
for subject in "${subjects[@]}"; do
  measure "$subject" /run/warm-up "$WARM_UP" 4k 1 1500
  measure "$subject" /run/warm-up "$WARM_UP" 4k 32 1500
done
for ((round = 1; round <= ROUNDS; round++)); do
  while read -r job rw bs depth; do
    for ((i = 0; i < ${#subjects[@]}; i++)); do
      # Each round begins with another subject.
      subject=${subjects[(i + round) % ${#subjects[@]}]}
      report=/run/out/$round.$job.$subject
      if [ -n "${pid[$subject]-}" ]; then
        [ "$COUNT" = 0 ] || [ $round -gt 1 ] || count "$subject" "$report.trace" "$rw" "$bs" "$depth" 300
        before="$(commands "$subject") $(switches "$subject")"
        measure "$subject" "$report.json" "$rw" "$bs" "$depth" "$RUNTIME"
        echo "$before $(commands "$subject") $(switches "$subject")" >"$report.switches"
      else
        measure "$subject" "$report.json" "$rw" "$bs" "$depth" "$RUNTIME"
      fi
      echo "bench: measured $round $job $subject $(cut -d" " -f1 /proc/uptime)"
    done
  done <<<"$JOBS"
done
echo 'bench: finished'

#!/bin/bash
# SPDX-License-Identifier: Apache-2.0
# Runs inside the test kernel: serves one disk after another by every handler in every mode, and measures each with fio.
#
# Contract with main.ts: the environment gives BUILD (consumer, peer, target_core_user.ko, handlers.js), NODE, CLI (the file example),
# HANDLERS, MODES, JOBS (lines of `name rw block-size depth`), RUNTIME (milliseconds) and MIN_BYTES (zc_min_bytes, or empty). A measurement is
# /run/out/<handler>.<mode>.<job>.json, fio's report. The last line is `bench: finished`, or `bench: failed: …`.
set -u
target=/sys/kernel/config/target
backstore=$target/core/user_0/bench
tpg=$target/loopback/naa.5001405000000001/tpgt_1
size=$((128 << 20))

fail() {
  echo "bench: failed: $*"
  exit 1
}

await() {
  local seconds=$1 what=$2 end
  shift 2
  end=$((SECONDS + seconds))
  until "$@" 2>/dev/null; do
    [ $SECONDS -lt $end ] || fail "no $what within $seconds s: $(cat /run/handler.log)"
    sleep 0.1
  done
}

# Idle priority: the initiator fills its queue first, in every mode, so that all handlers find as many commands a wake-up.
serve() {
  case $1 in
    c-memory) exec chrt --idle 0 "$BUILD/consumer" "$2" $size memory ;;
    c-null) exec chrt --idle 0 "$BUILD/consumer" "$2" $size null ;;
    c-file) exec chrt --idle 0 "$BUILD/consumer" "$2" $size file /mnt/file ;;
    file) exec chrt --idle 0 "$NODE" "$CLI" /mnt/file --uio "$2" --serial bench ;;
    null) exec chrt --idle 0 "$NODE" "$BUILD/handlers.js" null "$2" $size ;;
    socket)
      rm -f /run/peer
      "$BUILD/peer" /run/peer &
      sleep 0.3
      exec chrt --idle 0 "$NODE" "$BUILD/handlers.js" socket "$2" $size /run/peer
      ;;
  esac
}

# Without a time-out on such a device, fio waits for ever for a handler that is gone.
measure() {
  local fio
  fio --name=job --filename="$1" --ioengine=libaio --direct=1 --rw="$2" --bs="$3" --iodepth="$4" --norandommap --randseed=1 \
    --time_based --runtime="$5ms" --output-format=json --output="$6" &
  fio=$!
  wait -n $fio $pid
  local code=$?
  kill -0 $pid 2>/dev/null || fail "$handler died: $(tail -n 20 /run/handler.log)"
  [ $code = 0 ] || fail "fio: $(tail -n 3 "$6")"
}

mount -t tmpfs -o size=80% tmpfs /mnt && dd if=/dev/zero of=/mnt/file bs=1M count=$((size >> 20)) status=none || fail 'tmpfs'
insmod "$BUILD/target_core_user.ko" || fail 'insmod of the module with zero copy'
for handler in $HANDLERS; do
  for mode in $MODES; do
    case $mode in copy) zero_copy=0 ;; *) zero_copy=1 ;; esac
    mkdir -p $backstore || fail 'a backstore'
    echo "dev_config=bench/x,dev_size=$size,hw_block_size=512,hw_max_sectors=2048,zero_copy=$zero_copy" >$backstore/control
    case $mode in scrub-off) echo 0 >$backstore/attrib/zc_scrub ;; esac
    [ $zero_copy = 0 ] || [ -z "$MIN_BYTES" ] || echo "$MIN_BYTES" >$backstore/attrib/zc_min_bytes || fail 'zc_min_bytes'
    echo 1 >$backstore/enable || fail 'enable'
    uio=/dev/$(ls /sys/class/uio)
    serve "$handler" "$uio" >/run/handler.log 2>&1 &
    pid=$!
    await 60 "$handler" grep -q ready /run/handler.log
    mkdir -p $tpg && echo naa.5001405000000002 >$tpg/nexus && mkdir -p $tpg/lun/lun_0 && ln -s $backstore $tpg/lun/lun_0/x || fail 'a LUN'
    await 30 'disk' eval 'compgen -G "/sys/block/sd*" >/dev/null'
    disk=$(basename /sys/block/sd*)
    echo none >"/sys/block/$disk/queue/scheduler"
    echo 1024 >"/sys/block/$disk/queue/max_sectors_kb"
    # Until V8 has compiled what small commands run through, in both depths.
    measure "/dev/$disk" randrw 4k 16 1500 /run/warm-up
    measure "/dev/$disk" randrw 4k 1 500 /run/warm-up
    measure "/dev/$disk" randrw 64k 16 300 /run/warm-up
    while read -r job rw bs depth; do
      measure "/dev/$disk" "$rw" "$bs" "$depth" "$RUNTIME" "/run/out/$handler.$mode.$job.json"
    done <<<"$JOBS"
    [ $zero_copy = 0 ] || cat $backstore/attrib/zc_stats >"/run/out/$handler.$mode.stats"
    rm $tpg/lun/lun_0/x && rmdir $tpg/lun/lun_0 $tpg $(dirname $tpg) || fail 'removing the LUN'
    kill $pid
    wait $pid 2>/dev/null
    rmdir $backstore || fail 'removing the backstore'
    echo "bench: measured $handler $mode $(cut -d' ' -f1 /proc/uptime)"
  done
done
echo 'bench: finished'

#!/usr/bin/env bash
# Runs one kdjax command as N processes on this machine, as a cluster would:
#   launch/local.sh 2 -m kdjax.train --config=configs/quickstart.py
# KDJAX_DEVICES sets the (virtual CPU) devices of each process; without it each sees its own.
set -euo pipefail
if [ $# -lt 2 ]; then
  echo "usage: launch/local.sh NUM_PROCESSES PYTHON_ARGUMENTS..." >&2
  exit 2
fi
num_processes=$1
shift
port=${KDJAX_PORT:-$(python -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])')}
export KDJAX_COORDINATOR=127.0.0.1:$port KDJAX_NUM_PROCESSES=$num_processes
if [ -n "${KDJAX_DEVICES:-}" ]; then
  export XLA_FLAGS="${XLA_FLAGS:-} --xla_force_host_platform_device_count=$KDJAX_DEVICES"
fi
pids=()
trap 'kill "${pids[@]}" 2>/dev/null || true' TERM INT
for ((id = 0; id < num_processes; id++)); do
  KDJAX_PROCESS_ID=$id python "$@" &
  pids+=($!)
done
status=0
for pid in "${pids[@]}"; do
  wait "$pid" || status=$?
  # One process that fails would leave the others waiting for it.
  [ "$status" -eq 0 ] || kill "${pids[@]}" 2>/dev/null || true
done
exit "$status"

#!/usr/bin/env bash
# Runs a kdjax command on a Slurm cluster; docs/launch.md has the whole path.
set -euo pipefail

usage() {
  cat <<'EOF'
usage: launch/slurm.sh [OPTIONS] -- COMMAND...

Submits COMMAND as one job of nodes x tasks processes that are the ranks of one run:
  launch/slurm.sh --nodes=2 --gpus-per-node=8 --time=4:00:00 -- \
      python -m kdjax.train --config=FILE.py --workdir=/shared/run
It is supervised (python -m kdjax.supervise): a lost rank or a hung step starts all ranks
again in the same job. Two minutes before the time limit, and when the job is preempted,
all ranks save the same step, and the job is queued again. A lost node queues it again.

A comparison (python -m kdjax.compare) becomes three jobs: what its runs share, an array
with a task for each run, and the report.

  --nodes=N              nodes (1)
  --tasks-per-node=N     processes per node (1); N = GPUs per node gives each its own
  --gpus-per-node=N      GPUs per node (0)
  --cpu-devices=N        virtual CPU devices per process, to rehearse without GPUs
  --time=T --partition=P --account=A --job-name=J --cpus-per-task=N --mem=M
  --dependency=D --output=FILE
                         as for sbatch
  --sbatch=FLAG          another flag of sbatch; may be repeated
  --supervise=FLAG       a flag of kdjax.supervise; may be repeated
  --container=IMAGE      run the ranks in a container; kdjax is needed outside as well
  --container-runtime=R  pyxis (srun --container-image, the default) or apptainer
  --mounts=A:B,...       folders for the container
  --dry-run              print what would be run, exactly, and run nothing
  --help                 this text
EOF
}

fail() {
  echo "slurm.sh: error: $1" >&2
  exit 2
}

quoted() { printf '%q ' "$@"; }

nodes=1 tasks=1 gpus=0 cpu_devices=0 dry_run='' in_job='' container='' runtime=pyxis mounts=''
sbatch=() supervise=() command=() options=()
while [ $# -gt 0 ]; do
  keep=1
  case $1 in
    --) shift && command=("$@") && break ;;
    --in-job) in_job=1 keep='' ;;
    --nodes=*) nodes=${1#*=} ;;
    --tasks-per-node=*) tasks=${1#*=} ;;
    --gpus-per-node=*) gpus=${1#*=} ;;
    --cpu-devices=*) cpu_devices=${1#*=} ;;
    --time=* | --partition=* | --account=* | --job-name=* | --cpus-per-task=*) sbatch+=("$1") ;;
    --mem=* | --dependency=* | --output=*) sbatch+=("$1") ;;
    --sbatch=*) sbatch+=("${1#*=}") ;;
    --supervise=*) supervise+=("${1#*=}") ;;
    --container=*) container=${1#*=} ;;
    --container-runtime=*) runtime=${1#*=} ;;
    --mounts=*) mounts=${1#*=} ;;
    --dry-run) dry_run=1 keep='' ;;
    --help | -h) usage && exit ;;
    *) fail "$1: unknown; --help lists the options, and the command comes after --" ;;
  esac
  [ -z "$keep" ] || options+=("$1")
  shift
done
[ ${#command[@]} -gt 0 ] || fail "no command: launch/slurm.sh [OPTIONS] -- COMMAND..."
for number in "$nodes" "$tasks" "$gpus" "$cpu_devices"; do
  [[ $number =~ ^[0-9]+$ ]] || fail "$number is not a number"
done
case $runtime in pyxis | apptainer) ;; *) fail "--container-runtime=$runtime: use pyxis or apptainer" ;; esac
((gpus == 0 || tasks == 1 || tasks == gpus)) ||
  fail "--tasks-per-node=$tasks with --gpus-per-node=$gpus: use 1, or one task for each GPU"

workdir='' comparison=''
for argument in "${command[@]}"; do
  case $argument in
    --workdir=*) workdir=${argument#--workdir=} ;;
    kdjax.compare | compare) comparison=1 ;;
  esac
done
[ -z "$comparison" ] || [ "$nodes$tasks" = 11 ] ||
  fail "a comparison's runs have a process each: without --nodes and --tasks-per-node"
[ -n "$workdir" ] || fail "the command needs --workdir=DIR, a folder that all nodes see"

# The command of one rank. Environment and rank come from Slurm, where the rank runs.
rank=("${command[@]}")
if [ -n "$container" ] && [ "$runtime" = apptainer ]; then
  rank=(apptainer exec --pwd "$PWD" ${mounts:+--bind "$mounts"} "$container" "${command[@]}")
  [ "$gpus" = 0 ] || rank=(apptainer exec --nv "${rank[@]:2}")
fi
# shellcheck disable=SC2016 # expanded in the rank
prologue='if [ "$SLURM_NTASKS" -gt 1 ]; then
  export KDJAX_NUM_PROCESSES=$SLURM_NTASKS KDJAX_PROCESS_ID=$SLURM_PROCID
else
  unset KDJAX_COORDINATOR
fi
'
if ((tasks > 1 && gpus > 0)); then
  # All GPUs stay visible to the driver, so that NCCL can copy between them directly;
  # --gpus-per-task would hide them (cgroups), and NCCL would go through host memory.
  # shellcheck disable=SC2016
  prologue+='export CUDA_VISIBLE_DEVICES=$SLURM_LOCALID
'
fi
if ((cpu_devices > 0)); then
  prologue+="export JAX_PLATFORMS=cpu XLA_FLAGS=\"\${XLA_FLAGS:-} --xla_force_host_platform_device_count=$cpu_devices\"
"
fi
# shellcheck disable=SC2016
prologue+='exec "$@"'

srun=(srun --nodes="$nodes" --ntasks="$((nodes * tasks))" --ntasks-per-node="$tasks")
# --label names the rank of each line. A rank that has saved may end before another has:
# no --kill-on-bad-exit; the supervisor ends the step (-q: by one SIGINT).
srun+=(--label --quit-on-interrupt --kill-on-bad-exit=0 --wait=0)
if [ -n "$container" ] && [ "$runtime" = pyxis ]; then
  srun+=(--container-image="$container" --container-workdir="$PWD")
  [ -z "$mounts" ] || srun+=(--container-mounts="$mounts")
fi

run_job() {
  # NCCL: one line about what fails. Its own choice of networks is left as it is: set
  # NCCL_SOCKET_IFNAME or NCCL_IB_HCA where it errs.
  export NCCL_DEBUG=${NCCL_DEBUG:-WARN}
  # One port per job, below those that systems hand out; a restarted gang takes the next.
  local port=$((20000 + ${SLURM_JOB_ID:-0} % 12000)) first host code=0
  if [ -n "$dry_run" ]; then
    host=ADDRESS_OF_THE_FIRST_NODE port=20000+JOB_ID%12000
  else
    first=$(scontrol show hostnames "$SLURM_JOB_NODELIST")
    first=${first%%$'\n'*}
    host=$(scontrol show node "$first" | sed -n 's/.*NodeAddr=\([^ ]*\).*/\1/p')
  fi
  local supervisor=(
    "${KDJAX_PYTHON:-python}" -m kdjax.supervise --launcher --port="$port"
    --coordinator_host="${host:-$first}" ${supervise[@]+"${supervise[@]}"} --
    "${srun[@]}" bash -c "$prologue" rank "${rank[@]}"
  )
  if [ -n "$comparison" ]; then # a run of its own lock, and started again by itself
    supervisor=("${srun[@]}" bash -c "$prologue" rank "${rank[@]}")
    [ -z "${SLURM_ARRAY_TASK_ID:-}" ] || supervisor+=(--index="$SLURM_ARRAY_TASK_ID")
  fi
  if [ -n "$dry_run" ]; then
    echo "# in the job:"
    quoted "${supervisor[@]}" && echo
    return
  fi
  "${supervisor[@]}" &
  local pid=$!
  # The batch script alone gets some signals: preemption, scancel --batch.
  trap 'kill -TERM "$pid" 2>/dev/null || true' TERM
  wait "$pid" || code=$?
  while kill -0 "$pid" 2>/dev/null; do # a trap ends a wait
    code=0
    wait "$pid" || code=$?
  done
  # 143: a signal came, and the step is saved. The same job goes on from it, unless Slurm
  # has queued it again already, as it does when a node is lost.
  if [ "$code" = 143 ]; then
    local try
    for try in 1 2 3 4 5; do # slurmctld may be too busy to answer
      if [[ $(scontrol show job "$SLURM_JOB_ID") =~ Restarts=([0-9]+) ]]; then
        [ "${BASH_REMATCH[1]}" = "${SLURM_RESTART_COUNT:-0}" ] || break
        scontrol requeue "$SLURM_JOB_ID" && break
      fi
      echo "slurm.sh: job $SLURM_JOB_ID is not queued again (try $try of 5)" >&2
      sleep "$try"
    done
  fi
  exit "$code"
}

if [ -n "$in_job" ]; then
  run_job
  exit
fi

submit() { # FLAGS... -- COMMAND...
  local flags=()
  while [ "$1" != -- ]; do
    flags+=("$1")
    shift
  done
  shift
  local job=(sbatch --parsable --nodes="$nodes" --ntasks-per-node="$tasks")
  [ "$gpus" = 0 ] || job+=(--gpus-per-node="$gpus")
  # Lines are appended: a job that is queued again goes on in the same file.
  job+=(--requeue --signal=TERM@120 --open-mode=append ${sbatch[@]+"${sbatch[@]}"})
  job+=(${flags[@]+"${flags[@]}"} "$0" --in-job "${options[@]}" -- "$@")
  if [ -n "$dry_run" ]; then
    quoted "${job[@]}" >&2 && echo >&2
    echo "JOB_ID"
  else
    "${job[@]}"
  fi
}

if [ -z "$comparison" ]; then
  submit -- "${command[@]}"
  [ -z "$dry_run" ] || run_job
  exit
fi

# Checks every config, and writes the list of runs.
list=("${command[@]}" --stage=report)
if [ -n "$dry_run" ]; then
  quoted "${list[@]}" && echo
  last=NUM_RUNS-1
else
  "${list[@]}" >/dev/null
  last=$(($(wc -l <"$workdir/runs.jsonl") - 1))
fi
prepared=$(submit -- "${command[@]}" --stage=prepare)
ran=$(submit --dependency="afterok:$prepared" --array="0-$last" -- "${command[@]}" --stage=run)
submit --dependency="afterany:$ran" -- "${command[@]}" --stage=report

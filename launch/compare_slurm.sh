#!/usr/bin/env bash
# Runs a comparison on Slurm: a job for what its runs share, an array with a job a run, and
# a job for the report, in a workdir that all nodes see. SBATCH_* variables (or
# KDJAX_SBATCH, flags for every sbatch) say where and how long:
#   KDJAX_SBATCH="--gpus=1 --time=4:00:00" launch/compare_slurm.sh \
#       --config=configs/compare/csqa.py --workdir=/shared/csqa
set -euo pipefail
if [ $# -lt 2 ]; then
  echo "usage: launch/compare_slurm.sh --config=FILE.py --workdir=DIR [FLAGS...]" >&2
  exit 2
fi
for flag in "$@"; do
  case $flag in --workdir=*) workdir=${flag#--workdir=} ;; esac
done
if [ -z "${workdir:-}" ]; then
  echo "compare_slurm.sh: error: give --workdir=DIR" >&2
  exit 2
fi
command="python -m kdjax.compare $(printf '%q ' "$@")"
read -ra options <<<"${KDJAX_SBATCH:-}"
submit() { sbatch --parsable ${options[@]+"${options[@]}"} "$@"; }

# Checks every config, and writes the list of runs.
python -m kdjax.compare "$@" --stage=report >/dev/null
last=$(($(wc -l <"$workdir/runs.jsonl") - 1))
prepared=$(submit --wrap "$command --stage=prepare")
ran=$(submit --dependency="afterok:$prepared" --array="0-$last" \
  --wrap "$command --stage=run --index=\$SLURM_ARRAY_TASK_ID")
submit --dependency="afterany:$ran" --wrap "$command --stage=report"

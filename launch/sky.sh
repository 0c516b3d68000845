#!/usr/bin/env bash
# Runs a kdjax command as a SkyPilot managed job; docs/launch.md has the whole path.
set -euo pipefail

usage() {
  cat <<'EOF'
usage: launch/sky.sh --bucket=URL | --nfs=SERVER:/SHARE [OPTIONS] -- COMMAND...

  launch/sky.sh --bucket=s3://my-runs --gpus=H100:8 --spot -- \
      python -m kdjax.train --config=FILE.py --workdir=/runs/NAME

Bucket or share are mounted at /runs; machines that are lost are replaced, and the
command goes on from its newest checkpoint.

  --bucket=URL           s3://, gs:// or r2:// bucket that exists; for one node
  --nfs=SERVER:/SHARE    a file system that all nodes reach; for several nodes
  --gpus=NAME:N          accelerators per node (H100:8)
  --nodes=N              nodes (1)
  --name=J               name of the job (kdjax)
  --spot                 machines that may be taken away
  --supervise=FLAG       a flag of kdjax.supervise; may be repeated
  --sky=FLAG             another flag of sky jobs launch; may be repeated
  --dry-run              print what would be run, exactly, and run nothing
  --help                 this text
EOF
}

fail() {
  echo "sky.sh: error: $1" >&2
  exit 2
}

bucket='' nfs='' gpus=H100:8 nodes=1 name=kdjax dry_run=''
supervise=() sky=() command=()
while [ $# -gt 0 ]; do
  case $1 in
    --) shift && command=("$@") && break ;;
    --help | -h) usage && exit ;;
    --bucket=*) bucket=${1#*=} ;;
    --nfs=*) nfs=${1#*=} ;;
    --gpus=*) gpus=${1#*=} ;;
    --nodes=*) nodes=${1#*=} ;;
    --name=*) name=${1#*=} ;;
    --spot) sky+=(--use-spot) ;;
    --supervise=*) supervise+=("${1#*=}") ;;
    --sky=*) sky+=("${1#*=}") ;;
    --dry-run) dry_run=1 ;;
    *) fail "$1: unknown; --help lists the options, and the command comes after --" ;;
  esac
  shift
done
[ ${#command[@]} -gt 0 ] || fail "no command: launch/sky.sh [OPTIONS] -- COMMAND..."
[ -n "$bucket" ] || [ -n "$nfs" ] || fail "--bucket=URL or --nfs=SERVER:/SHARE is missing"
case $bucket in '' | s3://?* | gs://?* | r2://?*) ;; *) fail "--bucket=$bucket: give a URL, s3://NAME" ;; esac
# A mounted bucket shows a file of one machine to another one late, or never.
[ -z "$bucket" ] || [ "$nodes" = 1 ] ||
  fail "--nodes=$nodes with --bucket: the ranks need one file system: give --nfs"
case " ${command[*]} " in
  *" --workdir=/runs/"*) ;;
  *) fail "the command needs --workdir=/runs/NAME: other folders are lost with a machine" ;;
esac

quoted() { [ $# -eq 0 ] || printf '%q ' "$@"; }

task=$(dirname "$0")/sky.yaml
if [ -z "$bucket" ]; then
  task=$(mktemp --suffix=.yaml)
  trap 'rm -f "$task"' EXIT
  sed '/^file_mounts:/,/mode:/d' "$(dirname "$0")/sky.yaml" >"$task"
fi
launch=(
  sky jobs launch --yes --detach-run --name "$name" --num-nodes "$nodes" --gpus "$gpus"
  --env KDJAX_BUCKET="$bucket" --env KDJAX_NFS="$nfs"
  --env KDJAX_COMMAND="$(quoted "${command[@]}")"
  --env KDJAX_SUPERVISE="$(quoted ${supervise[@]+"${supervise[@]}"})"
  ${sky[@]+"${sky[@]}"} "$task"
)
if [ -n "$dry_run" ]; then
  quoted "${launch[@]}" && echo
  [ -n "$bucket" ] || cat "$task"
else
  "${launch[@]}"
fi

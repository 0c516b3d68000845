#!/usr/bin/env bash
# Runs a kdjax command on all hosts of a Cloud TPU VM; docs/launch.md has the whole path.
set -euo pipefail

usage() {
  cat <<'EOF'
usage: launch/tpu_vm.sh ACTION NAME --zone=ZONE [OPTIONS] [-- COMMAND...]

  create NAME --type=T   queue a request for a TPU VM, and wait until it is there
  sync NAME              copy this checkout to all hosts, and install it
  run NAME -- COMMAND    stop what was left, start COMMAND on all hosts, and return
  logs NAME              follow what host 0 prints
  status NAME            state of the TPU VM, and of the command on each host
  stop NAME              save and stop (SIGTERM); then free the chips of what is left
  fetch NAME --workdir=DIR [--to=DIR]
                         copy a folder of host 0 here
  delete NAME            give the TPU VM back: it costs money until then

  --zone=ZONE            of the TPU VM; all actions
  --project=P            another project than gcloud's own
  --type=T               accelerator type: v5litepod-16, v5p-32, v6e-64
  --version=V            runtime version; by default the one for the type
  --spot                 a machine that may be taken away, at about a third of the price
  --reserved             a machine of a reservation
  --nfs=SERVER:/SHARE:DIR
                         a shared folder (Filestore) that run mounts, for --workdir
  --supervise=FLAG       a flag of kdjax.supervise; may be repeated
  --poll=SECONDS         between two looks at the queue (30)
  --dry-run              print what would be run, exactly, and run nothing
  --help                 this text

The hosts find each other by themselves (jax.distributed.initialize without arguments).
Each runs python -m kdjax.supervise: if one of them loses its process, the others notice,
and all start again from the newest checkpoint.
EOF
}

fail() {
  echo "tpu_vm.sh: error: $1" >&2
  exit 2
}

name='' zone='' project='' type='' version='' nfs='' workdir='' to=. poll=30 dry_run=''
extra=() supervise=() command=() action=''
while [ $# -gt 0 ]; do
  case $1 in
    --) shift && command=("$@") && break ;;
    --help | -h) usage && exit ;;
    --zone=*) zone=${1#*=} ;;
    --project=*) project=${1#*=} ;;
    --type=*) type=${1#*=} ;;
    --version=*) version=${1#*=} ;;
    --spot | --reserved) extra+=("$1") ;;
    --nfs=*) nfs=${1#*=} ;;
    --workdir=*) workdir=${1#*=} ;;
    --to=*) to=${1#*=} ;;
    --supervise=*) supervise+=("${1#*=}") ;;
    --poll=*) poll=${1#*=} ;;
    --dry-run) dry_run=1 ;;
    -*) fail "$1: unknown; --help lists the options" ;;
    *) if [ -z "$action" ]; then action=$1; elif [ -z "$name" ]; then name=$1; else
      fail "$1: unknown; the command comes after --"
    fi ;;
  esac
  shift
done
[ -n "$action" ] || fail "no action; --help lists them"
[ -n "$name" ] || fail "$action: no name of a TPU VM"
[ -n "$zone" ] || fail "--zone=ZONE is missing: gcloud compute tpus locations list"

where=(--zone="$zone")
[ -z "$project" ] || where+=(--project="$project")

quoted() { [ $# -eq 0 ] || printf '%q ' "$@"; }
show() { # prints a command as a shell takes it, and runs it unless --dry-run
  [ -n "$dry_run" ] && quoted "$@" && echo && return
  "$@"
}
tpu=(gcloud compute tpus tpu-vm)
queued=(gcloud compute tpus queued-resources)
on_all() { show "${tpu[@]}" ssh "$name" "${where[@]}" --worker=all --command="$1"; }
on_first() { show "${tpu[@]}" ssh "$name" "${where[@]}" --worker=0 --command="$1"; }

# On each host. The supervisor's process group is ended by its number, never by a name.
state=\$HOME/kdjax-run
# A process that holds the chips keeps every later one from them ("TPU is already in use").
stop_script="
if [ -s $state/pid ] && kill -0 \"\$(cat $state/pid)\" 2>/dev/null; then
  kill -TERM \"\$(cat $state/pid)\"
  for _ in \$(seq 300); do kill -0 \"\$(cat $state/pid)\" 2>/dev/null || break; sleep 1; done
  kill -KILL \"\$(cat $state/pid)\" 2>/dev/null || true
fi
rm -f $state/pid
holders=\$(sudo lsof -t /dev/accel* /dev/vfio/[0-9]* 2>/dev/null | sort -u)
[ -z \"\$holders\" ] || { echo \"ends \$holders, which held the chips\"; sudo kill -KILL \$holders; }
sudo rm -f /tmp/libtpu_lockfile
"

runtime_version() {
  case $type in
    v5lite* | v5e*) echo v2-alpha-tpuv5-lite ;;
    v5p*) echo v2-alpha-tpuv5 ;;
    v6e*) echo v2-alpha-tpuv6e ;;
    v2* | v3* | v4*) echo tpu-ubuntu2204-base ;;
    *) fail "--type=$type: no runtime version is known for it: give --version" ;;
  esac
}

create() {
  [ -n "$type" ] || fail "create: --type=T is missing: v5litepod-16, v5p-32, v6e-64"
  [ -n "$version" ] || version=$(runtime_version)
  show "${queued[@]}" create "$name" --node-id="$name" "${where[@]}" \
    --accelerator-type="$type" --runtime-version="$version" ${extra[@]+"${extra[@]}"}
  local state='' describe=("${queued[@]}" describe "$name" "${where[@]}" --format='value(state.state)')
  [ -z "$dry_run" ] || { show "${describe[@]}" && return; }
  while state=$("${describe[@]}"); do
    case $state in
      ACTIVE) return ;;
      FAILED | SUSPEND*) fail "$name is $state: delete it, and try another zone or time" ;;
      *) echo "$name is $state" >&2 && sleep "$poll" ;;
    esac
  done
  fail "$name cannot be described"
}

sync() {
  local archive
  archive=$(mktemp -d)
  trap 'rm -rf "$archive"' RETURN
  # What git knows and what is new, without results and without .git. The machines'
  # own Python is older than kdjax needs.
  if [ -n "$dry_run" ]; then
    echo "git ls-files -coz --exclude-standard | tar -czf kdjax.tgz --null -T -"
    archive=.
  else
    git ls-files -coz --exclude-standard | tar -czf "$archive/kdjax.tgz" --null -T -
  fi
  show "${tpu[@]}" scp "$archive/kdjax.tgz" "$name:" "${where[@]}" --worker=all
  on_all "mkdir -p kdjax && tar -xzf kdjax.tgz -C kdjax && pip install -q uv && PATH=\$HOME/.local/bin:\$PATH && uv venv -q --allow-existing --python 3.12 kdjax-env && uv pip install -q --python kdjax-env -e 'kdjax[tpu]'"
  [ -z "$dry_run" ] || trap - RETURN
}

run() {
  [ ${#command[@]} -gt 0 ] || fail "run: no command: run NAME -- python -m kdjax.train ..."
  local script='' words flags
  words=$(quoted "${command[@]}")
  flags=$(quoted ${supervise[@]+"${supervise[@]}"})
  if [ -n "$nfs" ]; then
    script="sudo mkdir -p ${nfs##*:} && { mountpoint -q ${nfs##*:} || sudo mount -t nfs ${nfs%:*} ${nfs##*:}; }
"
  fi
  script+="mkdir -p $state && cd \$HOME/kdjax
export PATH=\$HOME/kdjax-env/bin:\$PATH KDJAX_DISTRIBUTED=1
rank=\$(curl -sf -H 'Metadata-Flavor: Google' http://metadata.google.internal/computeMetadata/v1/instance/attributes/agent-worker-number)
nohup setsid python -m kdjax.supervise --rank=\"\$rank\" $flags-- $words>>$state/log 2>&1 </dev/null &
echo \$! >$state/pid"
  on_all "$stop_script"
  on_all "$script"
}

case $action in
  create | sync | run) "$action" ;;
  logs) on_first "tail -n 100 -F $state/log" ;;
  status)
    show "${queued[@]}" describe "$name" "${where[@]}" --format='value(state.state)'
    on_all "hostname; if kill -0 \"\$(cat $state/pid)\" 2>/dev/null; then echo runs; else echo ended; fi; tail -n 1 $state/log"
    ;;
  stop) on_all "$stop_script" ;;
  fetch)
    [ -n "$workdir" ] || fail "fetch: --workdir=DIR is missing"
    show "${tpu[@]}" scp --recurse "$name:$workdir" "$to" "${where[@]}" --worker=0
    ;;
  delete) show "${queued[@]}" delete "$name" "${where[@]}" --force --quiet ;;
  *) fail "$action: unknown; --help lists the actions" ;;
esac

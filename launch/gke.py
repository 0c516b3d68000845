#!/usr/bin/env python
"""Runs a kdjax command on GKE as a JobSet; docs/launch.md has the whole path.

    launch/gke.py --name=run --image=IMAGE --claim=runs --tpu=v5e:4x4 -- \
        python -m kdjax.train --config=FILE.py --workdir=/runs/NAME
    launch/gke.py --name=run --image=IMAGE --claim=runs --gpu=h100:8 --nodes=2 -- ...

makes a JobSet with one pod per host and gives it to kubectl. A pod starts its process
again as long as that helps (python -m kdjax.supervise); a lost node, or a pod that
gives up, has all pods made anew; what cannot succeed ends the JobSet.
"""

import argparse
import math
import shlex
import subprocess
import sys

import yaml

# Name -> label of the node pool, chips of a host in a slice of several hosts.
TPUS = {
    "v4": ("tpu-v4-podslice", 4),
    "v5e": ("tpu-v5-lite-podslice", 4),
    "v5p": ("tpu-v5p-slice", 4),
    "v6e": ("tpu-v6e-slice", 4),
}
GPUS = {
    "a100": "nvidia-tesla-a100",
    "a100-80": "nvidia-a100-80gb",
    "l4": "nvidia-l4",
    "h100": "nvidia-h100-80gb",
    "h200": "nvidia-h200-141gb",
    "b200": "nvidia-b200",
}
PORT = 8476
# The supervisor has tried again what helps: errors, ranks that differ, no command.
FINAL_CODES = [1, 78, 126, 127]
JOB = "hosts"


def main() -> None:
    """Give the JobSet of the flags to kubectl."""
    flags = parse(sys.argv[1:])
    jobset = make_jobset(flags)
    text = yaml.safe_dump(jobset, sort_keys=False, width=100)
    command = ["kubectl", "apply", "-f", "-"]
    if flags.namespace:
        command += ["--namespace", flags.namespace]
    if flags.dry_run:
        print(f"# {shlex.join(command)} <<'EOF'\n{text}# EOF", end="\n")
        return
    sys.exit(subprocess.run(command, input=text.encode(), check=False).returncode)


def parse(arguments: list[str]) -> argparse.Namespace:
    """Parse and check the flags."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--name", required=True, help="of the JobSet")
    add("--image", required=True, help="container image that has kdjax")
    add(
        "--claim", required=True, help="PersistentVolumeClaim (ReadWriteMany), at /runs"
    )
    add("--tpu", help="TPU slice, TYPE:TOPOLOGY: v5e:4x4, v5p:2x2x4, v6e:8x8")
    add("--gpu", help="GPUs of a node, TYPE:N: h100:8")
    add("--nodes", type=int, default=1, help="nodes with GPUs (1)")
    add("--slices", type=int, default=1, help="TPU slices (1)")
    add("--spot", action="store_true", help="nodes that may be taken away")
    add("--queue", help="Kueue's LocalQueue")
    add("--namespace", help="of the cluster")
    add("--max-restarts", type=int, default=100, help="of all pods (100)")
    add("--supervise", action="append", default=[], help="flag of kdjax.supervise")
    add("--dry-run", action="store_true", help="print what would be run, run nothing")
    add("command", nargs="+", help="after --")
    flags = parser.parse_args(arguments)
    workdir = next((c for c in flags.command if c.startswith("--workdir=")), "")
    if not workdir.startswith("--workdir=/runs/"):
        parser.error(
            "the command needs --workdir=/runs/NAME: a pod's own files are lost"
        )
    if bool(flags.tpu) == bool(flags.gpu):
        parser.error("give one of --tpu=TYPE:TOPOLOGY and --gpu=TYPE:N")
    kind, _, size = (flags.tpu or flags.gpu).partition(":")
    known = TPUS if flags.tpu else GPUS
    name = "--tpu" if flags.tpu else "--gpu"
    if kind not in known or not all(part.isdecimal() for part in size.split("x")):
        parser.error(f"{name}={flags.tpu or flags.gpu}: TYPE:SIZE, of {list(known)}")
    if flags.gpu and not size.isdecimal():
        parser.error(f"--gpu={flags.gpu}: the number of GPUs of a node: {kind}:8")
    return flags


def make_jobset(flags: argparse.Namespace) -> dict:
    """Return the JobSet of the flags."""
    hosts, resource, selector, environment = (
        tpu_hosts(flags) if flags.tpu else gpu_hosts(flags)
    )
    if flags.spot:
        selector["cloud.google.com/gke-spot"] = "true"
    environment = [index_variable("HOST_INDEX"), *environment]
    rank = "$HOST_INDEX"
    if flags.slices > 1:
        environment.append(annotation("SLICE_INDEX", "jobset.sigs.k8s.io/job-index"))
        rank = f"$(expr $SLICE_INDEX '*' {hosts} + $HOST_INDEX)"
    supervise = [*("exec", "python", "-m", "kdjax.supervise"), f"--rank={rank}"]
    words = shlex.join([*flags.supervise, "--", *flags.command])
    container = {
        "name": "kdjax",
        "image": flags.image,
        # Twice: $(...) is Kubernetes' own way to name a variable.
        "command": [
            "bash",
            "-c",
            f"{' '.join(supervise)} {words}".replace("$(", "$$("),
        ],
        "env": environment,
        "resources": {"limits": resource},
        "volumeMounts": [
            {"name": "runs", "mountPath": "/runs"},
            {"name": "shm", "mountPath": "/dev/shm"},
        ],
    }
    if not flags.tpu:
        container["ports"] = [{"containerPort": PORT}]
    pod = {
        "restartPolicy": "Never",
        # SIGTERM comes first: all ranks save the same step, and leave.
        "terminationGracePeriodSeconds": 120,
        "nodeSelector": selector,
        "containers": [container],
        "volumes": [
            {"name": "runs", "persistentVolumeClaim": {"claimName": flags.claim}},
            # NCCL and libtpu share memory there; a container has 64 MiB by default.
            {"name": "shm", "emptyDir": {"medium": "Memory"}},
        ],
    }
    if flags.gpu:
        pod["tolerations"] = [{"key": "nvidia.com/gpu", "operator": "Exists"}]
    job = {
        "completionMode": "Indexed",
        "completions": hosts,
        "parallelism": hosts,
        "backoffLimit": 0,
        "podFailurePolicy": {
            "rules": [
                {
                    "action": "FailJob",
                    "onExitCodes": {
                        "containerName": "kdjax",
                        "operator": "In",
                        "values": FINAL_CODES,
                    },
                }
            ]
        },
        "template": {"spec": pod},
    }
    metadata: dict = {"name": flags.name}
    if flags.queue:
        metadata["labels"] = {"kueue.x-k8s.io/queue-name": flags.queue}
    if flags.tpu:  # a slice is a node pool
        key = "alpha.jobset.sigs.k8s.io/exclusive-topology"
        metadata["annotations"] = {key: "cloud.google.com/gke-nodepool"}
    return {
        "apiVersion": "jobset.x-k8s.io/v1alpha2",
        "kind": "JobSet",
        "metadata": metadata,
        "spec": {
            "network": {"enableDNSHostnames": True, "publishNotReadyAddresses": True},
            "failurePolicy": {
                "maxRestarts": flags.max_restarts,
                # No pod of the last attempt holds a chip or a lock of the next one.
                "restartStrategy": "BlockingRecreate",
                "rules": [
                    {
                        "name": "cannotSucceed",
                        "action": "FailJobSet",
                        "onJobFailureReasons": ["PodFailurePolicy"],
                    }
                ],
            },
            "replicatedJobs": [
                {
                    "name": JOB,
                    "replicas": flags.slices if flags.tpu else 1,
                    "template": {"spec": job},
                }
            ],
        },
    }


def tpu_hosts(flags: argparse.Namespace) -> tuple[int, dict, dict, list]:
    """Return hosts of a slice, resources, node labels and variables."""
    kind, _, topology = flags.tpu.partition(":")
    label, chips_per_host = TPUS[kind]
    chips = math.prod(int(size) for size in topology.split("x"))
    selector = {
        "cloud.google.com/gke-tpu-accelerator": label,
        "cloud.google.com/gke-tpu-topology": topology,
    }
    per_host = min(chips, chips_per_host)
    # GKE gives the pods the names of all hosts: initialize() needs no argument.
    distributed = chips > per_host or flags.slices > 1
    variables = [{"name": "KDJAX_DISTRIBUTED", "value": "1"}] if distributed else []
    return chips // per_host, {"google.com/tpu": per_host}, selector, variables


def gpu_hosts(flags: argparse.Namespace) -> tuple[int, dict, dict, list]:
    """Return nodes, resources, node labels and variables."""
    kind, _, count = flags.gpu.partition(":")
    selector = {"cloud.google.com/gke-accelerator": GPUS[kind]}
    variables = [{"name": "NCCL_DEBUG", "value": "WARN"}]
    if flags.nodes > 1:
        first = f"{flags.name}-{JOB}-0-0.{flags.name}"
        variables += [
            {"name": "KDJAX_COORDINATOR", "value": f"{first}:{PORT}"},
            {"name": "KDJAX_NUM_PROCESSES", "value": str(flags.nodes)},
            index_variable("KDJAX_PROCESS_ID"),
        ]
    return flags.nodes, {"nvidia.com/gpu": int(count)}, selector, variables


def index_variable(name: str) -> dict:
    """Return a variable with the number of the pod in its job."""
    return annotation(name, "batch.kubernetes.io/job-completion-index")


def annotation(name: str, key: str) -> dict:
    """Return a variable with an annotation of the pod."""
    path = f"metadata.annotations['{key}']"
    return {"name": name, "valueFrom": {"fieldRef": {"fieldPath": path}}}


if __name__ == "__main__":
    main()

"""The launchers, with stand-ins of sbatch, gcloud, kubectl and sky that take notes.

What they would run is checked call by call; that Slurm takes it, in test_slurm.py.
"""

import os
import pathlib
import re
import shlex
import shutil
import subprocess
import sys

import pytest
import yaml

from tests import helpers
from tests.launch import jobset_schema

LAUNCH = helpers.ROOT / "launch"
SCRIPTS = ("slurm.sh", "tpu_vm.sh", "sky.sh", "gke.py")
STAND_IN = """#!/usr/bin/env bash
set -e
printf '%s\\0' "$(basename "$0")" "$@" >> "$NOTES"
echo >> "$NOTES"
case "$(basename "$0") $*" in
  sbatch*) grep -ac "^sbatch" "$NOTES" ;;
  "scontrol show hostnames"*) printf 'n1\\nn2\\n' ;;
  "scontrol show node n1") echo "NodeName=n1 NodeAddr=10.0.0.1 NodeHostName=n1" ;;
  "scontrol show job"*)
    [ "$(grep -ac job "$NOTES")" -gt "${FAILURES:-0}" ]
    echo "JobId=1 Requeue=1 Restarts=${RESTARTS:-0} BatchFlag=1" ;;
  *queued-resources\\ describe*) sed -n 1p "$NOTES.states"; sed -i 1d "$NOTES.states" ;;
  kubectl*) cat > "$NOTES.input" ;;
  python*) exit "${PYTHON_CODE:-0}" ;;
esac
"""
TRAIN = ["python", "-m", "kdjax.train", "--config=x.py", "--workdir=/runs/a b"]


class StandIns:
    """Programs on PATH that note how they were called."""

    def __init__(self, folder: pathlib.Path) -> None:
        self.folder, self.notes = folder, folder / "notes"
        folder.mkdir()
        for name in ("sbatch", "scontrol", "gcloud", "kubectl", "sky"):
            self.add(name)

    def add(self, name: str) -> None:
        (self.folder / name).write_text(STAND_IN)
        (self.folder / name).chmod(0o755)

    def run(self, script: str, *arguments: str, code: int = 0, **variables: str):
        """Run a launcher; returns its output and the calls, as lists of words."""
        self.notes.unlink(missing_ok=True)
        bin_folder = pathlib.Path(sys.executable).parent
        done = subprocess.run(
            [str(LAUNCH / script), *arguments],
            env=os.environ
            | {
                "PATH": f"{self.folder}:{bin_folder}:{os.environ['PATH']}",
                "NOTES": str(self.notes),
            }
            | variables,
            capture_output=True,
            text=True,
            cwd=helpers.ROOT,
        )
        assert done.returncode == code, done.stderr
        text = self.notes.read_text() if self.notes.exists() else ""
        return done, [call.split("\0") for call in text.split("\0\n")[:-1]]


def words(line: str) -> list[str]:
    """The words that a shell makes of a line."""
    command = ["bash", "-c", f"printf '%s\\0' {line}"]
    printed = subprocess.run(command, capture_output=True, text=True, check=True)
    return printed.stdout.split("\0")[:-1]


@pytest.fixture
def stand_ins(tmp_path) -> StandIns:
    return StandIns(tmp_path / "bin")


@pytest.mark.parametrize("script", SCRIPTS)
def test_help(script, stand_ins):
    done, calls = stand_ins.run(script, "--help")
    assert "usage" in done.stdout and "--dry-run" in done.stdout and not calls


@pytest.mark.parametrize(
    ("script", "arguments"),
    [
        ("slurm.sh", ["--nodes=2"]),
        ("tpu_vm.sh", ["run", "t", "--zone=z"]),
        ("sky.sh", ["--bucket=s3://b"]),
        ("gke.py", ["--name=r", "--image=i", "--claim=c", "--gpu=h100:8"]),
    ],
)
def test_a_dry_run_prints_what_is_run_and_runs_nothing(script, arguments, stand_ins):
    done, calls = stand_ins.run(script, *arguments, "--dry-run", "--", *TRAIN)
    assert not calls and "/runs/a" in done.stdout + done.stderr
    _, calls = stand_ins.run(script, *arguments, "--", *TRAIN)
    lines = (done.stdout + done.stderr).splitlines()
    starts = [line.strip("# ").removesuffix(" <<'EOF'") for line in lines]
    names = ("sbatch", "gcloud", "kubectl", "sky ")
    printed = [words(line) for line in starts if line.startswith(names)]
    assert printed == calls  # word for word


@pytest.mark.parametrize(
    ("script", "arguments", "message"),
    [
        ("slurm.sh", ["--nodes=2"], "no command"),
        ("slurm.sh", ["--nodes=two", "--", *TRAIN], "two is not a number"),
        ("slurm.sh", ["--node=2", "--", *TRAIN], "--node=2: unknown"),
        ("slurm.sh", ["--", "true"], "needs --workdir"),
        (
            "slurm.sh",
            ["--gpus-per-node=8", "--tasks-per-node=4", "--", *TRAIN],
            "one task for each GPU",
        ),
        ("slurm.sh", ["--container-runtime=x", "--", *TRAIN], "pyxis or apptainer"),
        (
            "slurm.sh",
            ["--nodes=2", "--", "python", "-m", "kdjax.compare", "--workdir=w"],
            "a process each",
        ),
        ("tpu_vm.sh", [], "no action"),
        ("tpu_vm.sh", ["create", "t"], "--zone=ZONE"),
        ("tpu_vm.sh", ["create", "t", "--zone=z"], "--type=T is missing"),
        ("tpu_vm.sh", ["create", "t", "--zone=z", "--type=v9"], "give --version"),
        ("tpu_vm.sh", ["fly", "t", "--zone=z"], "fly: unknown"),
        ("sky.sh", ["--", *TRAIN], "--bucket=URL or --nfs"),
        ("sky.sh", ["--bucket=b", "--", *TRAIN], "give a URL"),
        ("sky.sh", ["--bucket=s3://b", "--nodes=2", "--", *TRAIN], "give --nfs"),
        ("sky.sh", ["--bucket=s3://b", "--", "x", "--workdir=/w"], "--workdir=/runs/"),
        (
            "gke.py",
            ["--name=r", "--image=i", "--claim=c", "--", *TRAIN],
            "give one of --tpu",
        ),
        (
            "gke.py",
            ["--name=r", "--image=i", "--claim=c", "--tpu=v5e:16y", "--", *TRAIN],
            "TYPE:SIZE",
        ),
    ],
)
def test_bad_arguments_are_a_line(script, arguments, message, stand_ins):
    done, calls = stand_ins.run(script, *arguments, code=2)
    assert message in done.stderr.splitlines()[-1] and not calls


def test_scripts_are_shell_without_traps():
    shellcheck = shutil.which("shellcheck")
    if shellcheck is None:
        pytest.skip("shellcheck is not installed (Debian: shellcheck)")
    scripts = sorted(str(path) for path in LAUNCH.glob("*.sh"))
    done = subprocess.run([shellcheck, *scripts], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


# slurm.sh


def test_slurm_submits_one_job(stand_ins):
    flags = ["--nodes=2", "--gpus-per-node=8", "--time=4:00:00", "--sbatch=--qos=high"]
    done, [call] = stand_ins.run("slurm.sh", *flags, "--", *TRAIN)
    assert done.stdout.strip() == "1"
    assert call[:9] == [
        *("sbatch", "--parsable", "--nodes=2", "--ntasks-per-node=1"),
        *("--gpus-per-node=8", "--requeue", "--signal=TERM@120"),
        *("--open-mode=append", "--time=4:00:00"),
    ]
    assert call[9:] == [
        *("--qos=high", str(LAUNCH / "slurm.sh"), "--in-job"),
        *(*flags, "--", *TRAIN),
    ]


def in_job(stand_ins, *flags: str, code: int = 0, **variables: str):
    """The calls of the job script, Python being a stand-in."""
    stand_ins.add("python")
    return stand_ins.run(
        *("slurm.sh", "--in-job", *flags, "--"),
        *TRAIN,
        code=code,
        SLURM_JOB_ID="12345",
        SLURM_JOB_NODELIST="n[1-2]",
        **variables,
    )[1]


def test_slurm_supervises_srun(stand_ins):
    flags = ("--nodes=2", "--tasks-per-node=8", "--gpus-per-node=8")
    *_, call = in_job(stand_ins, *flags, "--supervise=--stalled_attempts=5")
    assert call[:6] == [
        *("python", "-m", "kdjax.supervise", "--launcher"),
        *(f"--port={20000 + 345}", "--coordinator_host=10.0.0.1"),
    ]
    assert call[6:9] == ["--stalled_attempts=5", "--", "srun"]
    rest = call[call.index("bash") :]
    assert {"--ntasks=16", "--label", "--kill-on-bad-exit=0"} <= set(call)
    assert rest[3:] == ["rank", *TRAIN]
    assert "export CUDA_VISIBLE_DEVICES=$SLURM_LOCALID" in rest[2]


def test_the_rank_gets_its_number_from_slurm(stand_ins):
    """The command of the rank is run as srun would."""
    *_, call = in_job(stand_ins, "--nodes=2", "--cpu-devices=3")
    words = call[call.index("bash") :]
    show = "import os; print(*(f'{k}={v}' for k, v in os.environ.items()))"
    for num, expected in (("2", True), ("1", False)):
        printed = subprocess.run(
            [*words[:3], "rank", sys.executable, "-c", show],
            env={"SLURM_NTASKS": num, "SLURM_PROCID": "1", "KDJAX_COORDINATOR": "a:1"},
            capture_output=True,
            text=True,
        ).stdout
        assert "device_count=3" in printed
        assert ("KDJAX_PROCESS_ID=1" in printed) is expected
        assert ("KDJAX_COORDINATOR=a:1" in printed) is expected


def test_a_job_that_saved_is_queued_again(stand_ins):
    calls = in_job(stand_ins, code=143, PYTHON_CODE="143")
    assert calls[-1] == ["scontrol", "requeue", "12345"]
    again = {"PYTHON_CODE": "143", "RESTARTS": "1"}  # Slurm was quicker
    assert in_job(stand_ins, code=143, **again)[-1][1] == "show"
    again["SLURM_RESTART_COUNT"] = "1"
    assert in_job(stand_ins, code=143, **again)[-1][1] == "requeue"
    calls = in_job(stand_ins, code=143, PYTHON_CODE="143", FAILURES="1")
    assert [call[1] for call in calls[-3:]] == ["show", "show", "requeue"]
    calls = in_job(stand_ins, code=1, PYTHON_CODE="1")
    assert calls[-1][0] == "python"


@pytest.mark.parametrize("runtime", ["pyxis", "apptainer"])
def test_containers(stand_ins, runtime):
    flags = [f"--container-runtime={runtime}", "--container=img", "--mounts=/a:/a"]
    *_, call = in_job(stand_ins, *flags, "--gpus-per-node=4")
    if runtime == "pyxis":
        assert {"--container-image=img", "--container-mounts=/a:/a"} <= set(call)
    else:
        text = " ".join(call)
        assert (
            f"apptainer exec --nv --pwd {helpers.ROOT} --bind /a:/a img python" in text
        )


def test_a_comparison_is_three_jobs(stand_ins, tmp_path):
    workdir = tmp_path / "a folder"
    command = [
        *("python", "-m", "kdjax.compare", "--config=tests/comparison/tiny.py:sound"),
        f"--workdir={workdir}",
    ]
    flags = ["--gpus-per-node=1", "--time=1:00"]
    _, calls = stand_ins.run("slurm.sh", *flags, "--", *command)
    script = [str(LAUNCH / "slurm.sh"), "--in-job", *flags, "--", *command]
    prepare, array, report = calls
    assert prepare[-len(script) - 1 :] == [*script, "--stage=prepare"]
    assert array[-len(script) - 1 :] == [*script, "--stage=run"]
    assert {"--dependency=afterok:1", "--array=0-3"} <= set(array)
    assert report[-len(script) - 1 :] == [*script, "--stage=report"]
    assert "--dependency=afterany:2" in report
    assert (workdir / "results.csv").read_text().count("not run") == 4


# tpu_vm.sh


def remote(call: list[str]) -> str:
    [command] = [w for w in call if w.startswith("--command=")]
    return command.removeprefix("--command=")


def test_tpu_create_waits_for_the_machine(stand_ins):
    states = stand_ins.folder / "notes.states"
    states.write_text("WAITING_FOR_RESOURCES\nPROVISIONING\nACTIVE\n")
    flags = ("--zone=z", "--project=p", "--poll=0")
    _, calls = stand_ins.run(
        "tpu_vm.sh", "create", "t", "--type=v6e-16", "--spot", *flags
    )
    queued = ["gcloud", "compute", "tpus", "queued-resources"]
    where = ["--zone=z", "--project=p"]
    describe = [*queued, "describe", "t", *where, "--format=value(state.state)"]
    assert calls == [
        [
            *(*queued, "create", "t", "--node-id=t", *where),
            *("--accelerator-type=v6e-16", "--runtime-version=v2-alpha-tpuv6e"),
            "--spot",
        ],
        *[describe] * 3,
    ]
    states.write_text("FAILED\n")
    done, _ = stand_ins.run("tpu_vm.sh", "create", "t", "--type=v6e-16", *flags, code=2)
    assert "t is FAILED: delete it" in done.stderr


def test_tpu_sync_copies_what_git_knows(stand_ins):
    _, calls = stand_ins.run("tpu_vm.sh", "sync", "t", "--zone=z")
    copy, install = calls
    assert copy[:5] == ["gcloud", "compute", "tpus", "tpu-vm", "scp"]
    assert copy[5].endswith("/kdjax.tgz") and copy[6:] == [
        "t:",
        "--zone=z",
        "--worker=all",
    ]
    assert "--worker=all" in install and "kdjax[tpu]" in remote(install)


def test_tpu_run_stops_what_is_left_and_starts_on_all_hosts(stand_ins):
    flags = ["--zone=z", "--nfs=10.0.0.2:/share:/runs", "--supervise=--quiet=60"]
    _, calls = stand_ins.run("tpu_vm.sh", "run", "t", *flags, "--", *TRAIN)
    stop, start = calls
    assert all(call[3:6] == ["tpu-vm", "ssh", "t"] for call in calls)
    assert all("--worker=all" in call for call in calls)
    assert "kill -TERM" in remote(stop) and "/dev/accel" in remote(stop)
    text = remote(start)
    assert "sudo mount -t nfs 10.0.0.2:/share /runs" in text
    assert "KDJAX_DISTRIBUTED=1" in text and "agent-worker-number" in text
    command = shlex.join(TRAIN).replace(
        "'--workdir=/runs/a b'", "--workdir=/runs/a\\ b"
    )
    assert f'kdjax.supervise --rank="$rank" --quiet=60 -- {command} >>' in text
    for call in calls:  # the remote side takes it
        check = subprocess.run(["bash", "-n", "-c", remote(call)], capture_output=True)
        assert check.returncode == 0, check.stderr


def test_tpu_stop_ends_a_run_and_its_own_alone(stand_ins, tmp_path):
    """The remote script, run here, with a lsof that finds nobody."""
    _, [call] = stand_ins.run("tpu_vm.sh", "stop", "t", "--zone=z")
    for name in ("lsof", "sudo"):
        (stand_ins.folder / name).write_text("#!/bin/sh\nexit 0\n")
        (stand_ins.folder / name).chmod(0o755)
    state = tmp_path / "kdjax-run"
    state.mkdir()
    run = subprocess.Popen(["sleep", "100"])
    other = subprocess.Popen(["sleep", "100"])
    (state / "pid").write_text(str(run.pid))
    done = subprocess.Popen(
        ["bash", "-c", remote(call)],
        env=os.environ
        | {"HOME": str(tmp_path), "PATH": f"{stand_ins.folder}:{os.environ['PATH']}"},
    )
    assert run.wait(30) == -15 and done.wait(30) == 0
    assert other.poll() is None and not (state / "pid").exists()
    other.kill()
    other.wait()


def test_tpu_fetch_status_logs_and_delete(stand_ins):
    (stand_ins.folder / "notes.states").write_text("ACTIVE\n")
    for action, words in {
        "fetch": ["scp", "--recurse", "t:/runs/x", "here", "--zone=z", "--worker=0"],
        "delete": ["delete", "t", "--zone=z", "--force", "--quiet"],
    }.items():
        _, [call] = stand_ins.run(
            *("tpu_vm.sh", action, "t", "--zone=z", "--workdir=/runs/x", "--to=here")
        )
        assert call[4:] == words
    _, calls = stand_ins.run("tpu_vm.sh", "status", "t", "--zone=z")
    assert [call[4] for call in calls] == ["describe", "ssh"]
    _, [call] = stand_ins.run("tpu_vm.sh", "logs", "t", "--zone=z")
    assert "--worker=0" in call and "tail" in remote(call)


# sky.sh


def test_sky_launches_a_managed_job(stand_ins):
    flags = ["--bucket=s3://b", "--gpus=H200:8", "--spot", "--name=r"]
    _, [call] = stand_ins.run("sky.sh", *flags, "--", *TRAIN)
    assert call[:11] == [
        *("sky", "jobs", "launch", "--yes", "--detach-run", "--name", "r"),
        *("--num-nodes", "1", "--gpus", "H200:8"),
    ]
    assert call[-2:] == ["--use-spot", str(LAUNCH / "sky.yaml")]
    variables = dict(w.split("=", 1) for w in call if w.startswith("KDJAX_"))
    assert variables["KDJAX_BUCKET"] == "s3://b"
    assert shlex.split(variables["KDJAX_COMMAND"]) == TRAIN


def test_the_task_of_sky(tmp_path):
    task = yaml.safe_load((LAUNCH / "sky.yaml").read_text())
    assert task.keys() <= {
        *("name", "workdir", "num_nodes", "resources", "envs", "file_mounts"),
        *("setup", "run"),
    }
    assert task["resources"].keys() <= {"accelerators", "use_spot", "job_recovery"}
    assert task["file_mounts"]["/runs"]["mode"] in ("MOUNT", "COPY", "MOUNT_CACHED")
    shown = tmp_path / "python"
    shown.write_text('#!/bin/sh\necho "$KDJAX_COORDINATOR $KDJAX_PROCESS_ID" "$@"\n')
    shown.chmod(0o755)
    script = task["run"].replace("$HOME/kdjax-env/bin", str(tmp_path))
    printed = subprocess.run(
        ["bash", "-c", script],
        env=os.environ
        | {
            "SKYPILOT_NODE_IPS": "10.0.0.1\n10.0.0.2",
            "SKYPILOT_NUM_NODES": "2",
            "SKYPILOT_NODE_RANK": "1",
            "KDJAX_COMMAND": "python -m kdjax.train --workdir=/runs/a\\ b ",
            "KDJAX_SUPERVISE": "",
        },
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    assert printed.strip() == (
        "10.0.0.1:8476 1 -m kdjax.supervise --rank=1 -- python -m kdjax.train "
        "--workdir=/runs/a b"
    )


def test_sky_on_a_share_has_no_bucket(stand_ins):
    done, _ = stand_ins.run(
        *("sky.sh", "--nfs=s:/x", "--nodes=2", "--dry-run", "--", *TRAIN)
    )
    command, _, text = done.stdout.partition("\n")
    task = yaml.safe_load(text)
    assert "file_mounts" not in task and "--num-nodes 2" in command
    assert "KDJAX_NFS=s:/x" in command and {"run", "setup"} <= task.keys()


# gke.py


@pytest.mark.parametrize(
    ("flags", "pods", "limits"),
    [
        (["--tpu=v5e:4x4"], 4, {"google.com/tpu": 4}),
        (["--tpu=v5e:2x2"], 1, {"google.com/tpu": 4}),
        (["--tpu=v5p:2x2x4", "--slices=2", "--spot"], 4, {"google.com/tpu": 4}),
        (["--gpu=h100:8", "--nodes=4", "--queue=q"], 4, {"nvidia.com/gpu": 8}),
        (["--gpu=h200:8"], 1, {"nvidia.com/gpu": 8}),
    ],
)
def test_the_jobset_is_one(stand_ins, flags, pods, limits):
    common = ["--name=r", "--image=i", "--claim=c"]
    _, [call] = stand_ins.run("gke.py", *common, *flags, "--", *TRAIN)
    assert call == ["kubectl", "apply", "-f", "-"]
    jobset = yaml.safe_load((stand_ins.folder / "notes.input").read_text())
    jobset_schema.check(jobset)
    [replicated] = jobset["spec"]["replicatedJobs"]
    job = replicated["template"]["spec"]
    [container] = job["template"]["spec"]["containers"]
    assert job["completions"] == job["parallelism"] == pods
    assert container["resources"]["limits"] == limits
    names = [variable["name"] for variable in container["env"]]
    assert ("KDJAX_COORDINATOR" in names) == ("--nodes=4" in flags)
    assert ("KDJAX_DISTRIBUTED" in names) == (pods > 1 and "tpu" in flags[0])
    labels = jobset["metadata"].get("labels", {})
    assert labels == (
        {"kueue.x-k8s.io/queue-name": "q"} if "--queue=q" in flags else {}
    )
    # What the pod's shell makes of it, Kubernetes' escapes undone.
    command = [word.replace("$$(", "$(") for word in container["command"]]
    shown = subprocess.run(
        [*command[:2], command[2].replace("exec python", "printf '%s\\n'")],
        env=os.environ | {"HOST_INDEX": "3", "SLICE_INDEX": "1"},
        capture_output=True,
        text=True,
    ).stdout.splitlines()
    rank = 7 if "--slices=2" in flags else 3
    assert shown == ["-m", "kdjax.supervise", f"--rank={rank}", "--", *TRAIN]


def test_a_wrong_jobset_is_noticed(stand_ins):
    common = ["--name=r", "--image=i", "--claim=c", "--gpu=h100:8"]
    done, _ = stand_ins.run("gke.py", *common, "--dry-run", "--", *TRAIN)
    jobset = yaml.safe_load(re.sub(r"^#.*\n?", "", done.stdout, flags=re.M))
    jobset_schema.check(jobset)
    breaks = [
        (("spec", "failurePolicy", "restartStrategy"), "Recreated"),
        (("spec", "failurePolicy", "maxRestarts"), "3"),
        (("spec", "failurePolicy", "rules", 0, "name"), "cannot-succeed"),
        (("spec", "replicatedJobs", 0, "replica"), 1),
        (("spec", "replicatedJobs", 0, "template", "spec", "completionMode"), "Index"),
        (("metadata", "name"), "Run_1"),
        (("metadata", "labels"), {"kueue.x-k8s.io/queue-name": 3}),
    ]
    for path, value in breaks:
        broken = yaml.safe_load(yaml.safe_dump(jobset))
        part = broken
        for key in path[:-1]:
            part = part[key]
        part[path[-1]] = value
        with pytest.raises(AssertionError):
            jobset_schema.check(broken)

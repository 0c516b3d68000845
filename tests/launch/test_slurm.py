"""launch/slurm.sh on a real Slurm: what it survives, and with which result.

KDJAX_SLURM_FAULTS names the faults, in order, of the disturbed run ("all" by hand).
"""

import json
import os
import pathlib
import signal
import tempfile

import pytest

from kdjax.runtime import files
from tests import helpers, xla_flags
from tests.helpers import step_rows, summary
from tests.launch import slurm_cluster

ALL_FAULTS = ("kill", "term", "lost", "requeue", "down")
FAULTS = os.environ.get("KDJAX_SLURM_FAULTS", "kill,lost").replace(
    "all", ",".join(ALL_FAULTS)
)
DOWN = ("scontrol", "update", "State=DOWN", "Reason=test")
SCRIPT = str(helpers.ROOT / "launch" / "slurm.sh")
STEPS = 400  # some 10 ms each: a fault comes before the end

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        bool(slurm_cluster.missing()), reason=slurm_cluster.missing() or "none"
    ),
]


@pytest.fixture(scope="module")
def cluster():
    with (
        tempfile.TemporaryDirectory(prefix="slurm", dir="/tmp") as folder,
        slurm_cluster.Cluster(pathlib.Path(folder) / "c", 4) as cluster,
    ):
        cluster.environment |= {
            "PYTHONPATH": str(helpers.ROOT),
            "XLA_FLAGS": xla_flags.FAST_COMPILE,
        }
        yield cluster


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    config = helpers.small_config(
        train={"steps": STEPS, "save_every": 20, "num_microbatches": 1}
    )
    folder = tmp_path_factory.mktemp("config")
    return helpers.write_config_file(config, folder / "config_file.py")


def submit(cluster, config, workdir: pathlib.Path) -> str:
    return cluster.run(
        *("bash", SCRIPT, "--nodes=2", "--tasks-per-node=2", "--cpu-devices=1"),
        *(f"--output={workdir}.log", "--supervise=--delay=0", "--"),
        *("python", "-m", "kdjax.train", f"--config={config}", f"--workdir={workdir}"),
        cwd=workdir.parent,
    )


def log_of(workdir: pathlib.Path) -> str:
    file = workdir.with_name(f"{workdir.name}.log")
    return file.read_text() if file.exists() else ""


def wait_for_the_end(cluster, job: str, workdir: pathlib.Path) -> None:
    ends = ("COMPLETED", "FAILED", "CANCELLED", "NODE_FAIL", "TIMEOUT")
    state = cluster.wait(
        lambda: cluster.state(job).get("JobState", "gone"),
        lambda state: state in ends,
        600,
        lambda: log_of(workdir)[-3000:],
    )
    assert state == "COMPLETED", log_of(workdir)[-5000:]


def result(workdir: pathlib.Path) -> dict:
    return {
        "student": summary(workdir)["student"],
        "losses": [(row["step"], row["loss"]) for row in step_rows(workdir)],
        "processes": summary(workdir)["processes"],
    }


def newest(workdir: pathlib.Path) -> int:
    folder = workdir / "checkpoints"
    names = [path.name for path in folder.iterdir()] if folder.is_dir() else []
    return max((int(name) for name in names if name.isdecimal()), default=0)


def num_rows(workdir: pathlib.Path) -> int:
    return len(files.read_jsonl(workdir / "attempts.jsonl"))


def happen(cluster, fault: str, job: str) -> None:
    if fault == "term":  # all ranks save, and the job is queued again
        cluster.run("scancel", "--signal=TERM", job)
    elif fault == "requeue":
        cluster.run("scontrol", "requeue", job)
    elif fault == "down":  # the second node: the first has the batch script
        cluster.run(*DOWN, f"NodeName={second_node(cluster, job)}")
    elif fault == "lost":  # the machine of the second node, with all that runs there
        name = second_node(cluster, job)
        cluster.kill_node(name)
        for pid in processes_of(job):
            if f"SLURMD_NODENAME={name}" in environment(pathlib.Path(f"/proc/{pid}")):
                os.kill(pid, signal.SIGKILL)
        # What slurmctld itself does after SlurmdTimeout.
        cluster.run(*DOWN, f"NodeName={name}")
    elif fault == "kill":
        ranks = [pid for pid in processes_of(job) if rank_of(pid) == "2"]
        os.kill(ranks[0], signal.SIGKILL)


def second_node(cluster, job: str) -> str:
    nodes = cluster.state(job)["NodeList"]
    return cluster.run("scontrol", "show", "hostnames", nodes).split()[-1]


def processes_of(job: str) -> list[int]:
    """The ranks' processes: Python of a step, in the job."""
    pids = []
    for entry in pathlib.Path("/proc").iterdir():
        if entry.name.isdecimal() and f"SLURM_JOB_ID={job}" in environment(entry):
            command = (entry / "cmdline").read_bytes()
            if b"kdjax.train" in command and b"srun" not in command:
                pids.append(int(entry.name))
    return pids


def rank_of(pid: int) -> str:
    fields = environment(pathlib.Path(f"/proc/{pid}"))
    values = [f.partition("=")[2] for f in fields if f.startswith("KDJAX_PROCESS_ID=")]
    return next(iter(values), "")


def environment(entry: pathlib.Path) -> list[str]:
    try:
        return (entry / "environ").read_bytes().decode(errors="replace").split("\0")
    except OSError:
        return []


@pytest.fixture(scope="module")
def undisturbed(cluster, config, tmp_path_factory) -> dict:
    workdir = tmp_path_factory.mktemp("undisturbed") / "run"
    wait_for_the_end(cluster, submit(cluster, config, workdir), workdir)
    return result(workdir)


def test_a_disturbed_job_ends_with_the_undisturbed_result(
    cluster, config, undisturbed, tmp_path
):
    workdir = tmp_path / "run"
    job = submit(cluster, config, workdir)
    for fault in FAULTS.split(","):
        before = newest(workdir)
        cluster.wait(
            lambda: newest(workdir),
            lambda step, before=before: step >= before + 40,
            300,
            lambda: log_of(workdir)[-3000:],
        )
        assert newest(workdir) < STEPS, "the run was over before all faults"
        attempts = num_rows(workdir)
        happen(cluster, fault, job)
        cluster.wait(
            lambda: cluster.hurry(job) or num_rows(workdir),
            lambda num, attempts=attempts: num > attempts + 1,
            300,
            lambda: log_of(workdir)[-3000:],
        )
    wait_for_the_end(cluster, job, workdir)
    rows = files.read_jsonl(workdir / "attempts.jsonl")
    print(json.dumps(rows, indent=1), log_of(workdir)[-3000:])
    assert undisturbed["processes"] == 4
    assert result(workdir) == undisturbed
    expected = len(FAULTS.split(",")) - FAULTS.count("kill")
    assert int(cluster.state(job)["Restarts"]) == expected
    killed = [row for row in rows if "SIGKILL" in row.get("cause", "")]
    assert len(killed) == FAULTS.count("kill")
    assert all(row["rank"] == 2 and row["host"].startswith("n") for row in killed)


@pytest.mark.skipif("requeue" not in FAULTS, reason="by hand: KDJAX_SLURM_FAULTS=all")
def test_a_comparison_with_a_disturbed_run_has_the_same_results(cluster, tmp_path):
    config = "--config=tests/comparison/tiny.py:sound"
    command = ["python", "-m", "kdjax.compare", config]
    alone, disturbed = tmp_path / "alone", tmp_path / "disturbed"
    one_device = "--xla_force_host_platform_device_count=1"
    flags = f"{xla_flags.FAST_COMPILE} {one_device}"
    cluster.run(
        *(*command, f"--workdir={alone}"), cwd=helpers.ROOT, env={"XLA_FLAGS": flags}
    )
    report = cluster.run(
        *("bash", SCRIPT, "--cpu-devices=1", f"--output={tmp_path}/log-%a", "--"),
        *(*command, f"--workdir={disturbed}"),
        cwd=helpers.ROOT,
    ).splitlines()[-1]
    array = str(int(report) - 1)
    cluster.wait(
        lambda: cluster.run("squeue", "-h", "-t", "R", "-j", array, "-o", "%i").split(),
        lambda running: running,
        300,
    )
    first = cluster.run("squeue", "-h", "-t", "R", "-j", array, "-o", "%A").split()[0]
    cluster.run("scontrol", "requeue", first)
    state = cluster.wait(
        lambda: cluster.hurry(first) or cluster.state(report).get("JobState", "gone"),
        lambda state: state in ("COMPLETED", "FAILED", "CANCELLED"),
        600,
    )
    assert state == "COMPLETED"
    assert int(cluster.state(first)["Restarts"]) == 1
    runs = sorted(alone.glob("**/summary.json"))
    assert len(runs) >= 4
    for path in runs:
        other = disturbed / path.relative_to(alone)
        assert summary(path.parent)["student"] == summary(other.parent)["student"]
    assert (disturbed / "report.html").exists()

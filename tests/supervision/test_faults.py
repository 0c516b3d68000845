"""Random faults of supervised runs: they end with the undisturbed result.

Of a pretended run, which takes no time to start, and of a training. KDJAX_FAULTS sets
how many there are of each (50 by hand, fewer in CI), KDJAX_RANKS the numbers of
processes of the runs in turn; faults are printed with the time until they were noticed
and the steps that were lost.
"""

import collections
import contextlib
import hashlib
import os
import pathlib
import re
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import time

import numpy as np
import pytest

from kdjax.runtime import files
from kdjax.supervision import progress
from tests import helpers, xla_flags
from tests.helpers import step_rows, summary

NUM_FAULTS = int(os.environ.get("KDJAX_FAULTS", "0"))  # 0: few
NUM_RANKS = [int(n) for n in os.environ.get("KDJAX_RANKS", "2,3,2,4").split(",")]
PER_RUN = 10  # faults of one run
RANK = [sys.executable, "-S", str(pathlib.Path(__file__).with_name("rank.py"))]
KINDS = ("kill rank 0", "kill supervisor", "kill rank n", "stop", "port", "disk")
FLAGS = [
    "--delay=0.1",  # doubled: nine attempts outlast a disk that is full for 4 s
    "--stalled_attempts=9",
    "--max_stopped=5",
    "--min_silence=60",
    "--quiet=300",
]


class Run:
    """A supervised training, in a directory that can be full."""

    def __init__(self, command, folder: pathlib.Path, num_processes: int) -> None:
        self.folder, self.workdir = folder, folder / "disk" / "run"
        self.num_processes, self.command = num_processes, command
        self.port = _free_port()
        self.log = folder / "log"
        self.start()

    def start(self) -> None:
        command = [
            *(sys.executable, "-m", "kdjax.supervise", *FLAGS),
            *(f"--port={self.port}", f"--processes={self.num_processes}"),
            *("--cpu_devices=1", "--", *self.command, f"--workdir={self.workdir}"),
        ]
        variables = {
            "PYTHONPATH": str(helpers.ROOT),
            "XLA_FLAGS": xla_flags.FAST_COMPILE,
        }
        with self.log.open("ab") as log:
            self.supervisor = subprocess.Popen(
                command, env=os.environ | variables, stdout=log, stderr=log
            )

    def rows(self) -> list[dict]:
        file = self.workdir / "attempts.jsonl"
        with contextlib.suppress(FileNotFoundError, ValueError):
            return files.read_jsonl(file)
        return []

    def num_told(self) -> int:
        """The number of ends that the supervisor has told of."""
        text = self.log.read_text(errors="replace")
        return len(re.findall(r"^supervise: .* (?:failed|hung) after", text, re.M))

    def num_ends(self) -> int:
        return sum(row["event"] == "ended" for row in self.rows())

    def pids(self) -> list[int]:
        return [row for row in self.rows() if row["event"] == "started"][-1]["pids"]

    def step(self) -> int:
        """The newest step of the metrics."""
        return progress.Progress(self.workdir).step

    def saved(self) -> int:
        with contextlib.suppress(OSError):
            names = [p.name for p in (self.workdir / "checkpoints").iterdir()]
            return max((int(n) for n in names if n.isdecimal()), default=0)
        return 0

    def wait_for_steps(self, num: int) -> None:
        """Wait until an attempt has saved, and done some steps more."""
        before = self.saved()
        self.wait(lambda: self.saved() > before)
        first = self.saved() + num
        self.wait(lambda: self.step() >= first and self.is_running())

    def is_running(self) -> bool:
        """Return True if no rank has ended."""
        last = (self.rows() or [{"event": ""}])[-1]
        return last["event"] == "started" and all(map(files.is_running, last["pids"]))

    def close(self) -> None:
        """Kill the supervisor, and so the ranks, if a test has failed."""
        if self.supervisor.poll() is None:
            self.supervisor.kill()
            self.supervisor.wait()

    def wait(self, ready, seconds: float = 300.0) -> None:
        deadline = time.monotonic() + seconds
        while not ready():
            assert time.monotonic() < deadline, self.log.read_text()[-4000:]
            assert self.supervisor.poll() is None or ready(), self.log.read_text()[
                -4000:
            ]
            time.sleep(0.05)


def _free_port() -> int:
    with socket.socket() as one:
        one.bind(("", 0))
        return one.getsockname()[1]


def happen(run: Run, kind: str, rng: np.random.Generator) -> dict:
    """Let a fault happen; return the seconds until it is noticed, and what is lost."""
    pids, told, ends = run.pids(), run.num_told(), run.num_ends()
    start, step = time.monotonic(), run.step()
    with contextlib.ExitStack() as until_noticed:
        if kind == "kill supervisor":
            run.supervisor.kill()
            run.supervisor.wait()
            while any(files.is_running(pid) for pid in pids):
                assert time.monotonic() < start + 30, "orphans"
                time.sleep(0.01)
            seconds, saved = time.monotonic() - start, run.saved()
            run.start()
            run.wait(lambda: run.num_ends() > ends)
            return {"seconds": seconds, "lost": max(0, step - saved)}
        if kind == "stop":
            os.kill(pids[rng.integers(len(pids))], signal.SIGSTOP)
        elif kind == "disk":
            fill(run.folder / "disk" / "filling")
        elif kind == "port":  # but for every third one
            for port in range(run.port, run.port + 40):
                if port % 3:
                    listener = until_noticed.enter_context(socket.socket())
                    with contextlib.suppress(OSError):
                        listener.bind(("", port))
        if kind in ("kill rank 0", "kill rank n", "port"):
            rank = 0 if kind == "kill rank 0" else rng.integers(1, len(pids))
            os.kill(pids[rank], signal.SIGKILL)
        run.wait(lambda: run.num_told() > told)
        seconds = time.monotonic() - start
        if kind == "port":
            run.wait(lambda: run.rows()[-1]["event"] == "started")
            assert run.rows()[-1]["port"] % 3 == 0
        if kind == "disk":
            time.sleep(rng.uniform(0, 4))
            (run.folder / "disk" / "filling").unlink()
    run.wait(lambda: run.num_ends() > ends)
    row = [row for row in run.rows() if row["event"] == "ended"][ends]
    return {"seconds": seconds, "lost": row["steps_lost"], "cause": row["cause"]}


def fill(file: pathlib.Path) -> None:
    """Write until the disk is full."""
    with contextlib.suppress(OSError), file.open("wb", buffering=0) as stream:
        while True:
            stream.write(bytes(4096))


def result(workdir: pathlib.Path) -> dict:
    """What an undisturbed run ends with."""
    losses = [(row["step"], row["loss"]) for row in step_rows(workdir)]
    return {"student": summary(workdir)["student"], "losses": losses}


@contextlib.contextmanager
def small_disk(folder: pathlib.Path):
    """A file system of 64 MiB, where this user may mount one: yields if it could."""
    folder.mkdir(parents=True)
    command = ["mount", "-t", "tmpfs", "-o", "size=64m", "tmpfs", str(folder)]
    mounted = os.geteuid() == 0 and not subprocess.run(command, check=False).returncode
    try:
        yield mounted
    finally:
        if mounted:
            subprocess.run(["umount", "-l", str(folder)], check=True)


CAUSES = {  # what attempts.jsonl says
    "kill rank 0": "rank 0 .* was killed by SIGKILL",
    "kill rank n": "rank [1-9] .* was killed by SIGKILL",
    "stop": r"is stopped \(SIGSTOP\)",
    "port": "rank [1-9] .* was killed by SIGKILL",
    "disk": "No space left on device",
}


def test_random_faults_of_a_pretended_run_change_nothing(tmp_path):
    """It has no end of its own: SIGTERM comes after the faults."""
    command = [*RANK, "--steps=1000000", "--seconds=0.02"]
    disturb(command, NUM_FAULTS or len(KINDS), tmp_path, first=12, endless=True)


@pytest.mark.slow
def test_random_faults_of_a_training_change_nothing(tmp_path):
    number = NUM_FAULTS or 2
    config = helpers.small_config(
        train={
            "steps": 200 + 100 * min(PER_RUN, number),
            "save_every": 10,
            "num_microbatches": 1,
            "batch_size": 12,  # divides over 2, 3 and 4 ranks
        }
    )
    file = helpers.write_config_file(config, tmp_path / "config_file.py")
    command = [sys.executable, "-m", "kdjax.train", f"--config={file}"]
    disturb(command, number, tmp_path, first=15)


def check_hashes(run: Run) -> None:
    """Check that a pretended run has done each step once, the last one saved."""
    rows, state = step_rows(run.workdir), ""
    for step, row in enumerate(rows, start=1):
        state = hashlib.sha256(f"{state} {step}".encode()).hexdigest()
        assert row == {"step": step, "loss": state}
    assert run.saved() == len(rows)


def disturb(
    command, num_faults: int, folder: pathlib.Path, *, first: int, endless: bool = False
) -> None:
    """Run a command with faults; each comes some steps (`first`, ...) after a save."""
    rng = np.random.default_rng(0)
    expected: dict[int, dict] = {}
    told = collections.defaultdict(list)
    kinds = list(KINDS)
    number = index = 0
    while number < num_faults:
        num_ranks = NUM_RANKS[index % len(NUM_RANKS)]
        if not endless and num_ranks not in expected:
            alone = folder / f"alone-{num_ranks}"
            (alone / "disk").mkdir(parents=True)
            with contextlib.closing(Run(command, alone, num_ranks)) as run:
                assert run.supervisor.wait(900) == 0, run.log.read_text()[-4000:]
            expected[num_ranks] = result(run.workdir)
            shutil.rmtree(alone)
        own = folder / f"run-{index}"
        with contextlib.ExitStack() as stack:
            mounted = stack.enter_context(small_disk(own / "disk"))
            if not mounted and "disk" in kinds:
                kinds.remove("disk")
            run = stack.enter_context(contextlib.closing(Run(command, own, num_ranks)))
            for _ in range(min(PER_RUN, num_faults - number)):
                # Each kind in turn, then by chance.
                kind = kinds[number] if number < len(kinds) else str(rng.choice(kinds))
                run.wait_for_steps(int(rng.integers(first, 3 * first)))
                told[kind].append(happen(run, kind, rng))
                print(kind, told[kind][-1], flush=True)
                number += 1
            if endless:
                run.wait_for_steps(1)  # the last fault is over
            pids = run.pids()
            if endless:
                run.supervisor.terminate()
            code = run.supervisor.wait(900)
            assert code == (143 if endless else 0), run.log.read_text()[-4000:]
            assert not any(files.is_running(pid) for pid in pids)
            if endless:
                check_hashes(run)
            else:
                assert result(run.workdir) == expected[num_ranks]
            print(f"{number} faults, the last ones with {num_ranks} ranks: same result")
        index += 1
    for kind, rows in told.items():
        seconds = [row["seconds"] for row in rows]
        lost = [row["lost"] for row in rows]
        print(
            f"| {kind} | {len(rows)} | {statistics.median(seconds):.1f} "
            f"({max(seconds):.1f}) | {statistics.median(lost):.0f} ({max(lost)}) |"
        )
        for row in rows:
            assert re.search(CAUSES.get(kind, ""), row.get("cause", "")), (kind, row)

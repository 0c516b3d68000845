"""Attempts of a pretended run with faults: what is tried again, what is said of it."""

import errno
import json
import os
import pathlib
import re
import signal
import socket
import subprocess
import sys
import time

import pytest

from kdjax import supervise
from kdjax.runtime import files
from kdjax.supervision import attempts, causes, supervisor
from kdjax.supervision.attempts import Attempts
from kdjax.supervision.causes import End
from tests import helpers

RANK = [sys.executable, "-S", str(pathlib.Path(__file__).with_name("rank.py"))]


def run(workdir, *flags, **options) -> int:
    defaults = {"processes": 2, "delay": 0.0, "settle": 0.5, "grace": 10.0}
    command = [*RANK, f"--workdir={workdir}", *flags]
    options = supervisor.Options(**(defaults | options))
    return supervisor.Supervisor(command, workdir, options).run()


def ended(workdir: pathlib.Path, name: str = "attempts.jsonl") -> list[dict]:
    rows = files.read_jsonl(workdir / name)
    return [row for row in rows if row["event"] == "ended"]


def start(workdir, *flags, supervise_flags=()) -> subprocess.Popen:
    """Starts the command itself; its pids are in attempts.jsonl."""
    return subprocess.Popen(
        [
            *(sys.executable, "-m", "kdjax.supervise", "--delay=0", *supervise_flags),
            *("--processes=2", "--", *RANK, f"--workdir={workdir}", *flags),
        ],
        env=os.environ | {"PYTHONPATH": str(helpers.ROOT)},
        stderr=subprocess.PIPE,
        text=True,
    )


def wait_for_step(workdir: pathlib.Path, step: int, seconds: float = 30) -> None:
    deadline = time.monotonic() + seconds
    while not (workdir / "checkpoints" / str(step)).exists():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def pids_of(workdir: pathlib.Path) -> list[int]:
    return files.read_jsonl(workdir / "attempts.jsonl")[-1]["pids"]


def wait_for_ends(pids: list[int], seconds: float = 10) -> None:
    deadline = time.monotonic() + seconds
    while any(files.is_running(pid) for pid in pids):
        assert time.monotonic() < deadline, "orphans"
        time.sleep(0.02)


def test_an_undisturbed_run_is_one_attempt(tmp_path):
    assert run(tmp_path) == 0
    [row] = ended(tmp_path)
    assert row["outcome"] == "done" and row["codes"] == [0, 0]
    assert (row["first_step"], row["last_step"], row["saved_step"]) == (0, 20, 20)
    assert not (tmp_path / supervisor.LOCK).exists()


@pytest.mark.parametrize("rank", [0, 1])
def test_a_killed_rank_is_named_and_the_gang_started_again(tmp_path, capfd, rank):
    assert run(tmp_path, f"--fault=kill:{rank}:11", "--seconds=0.03") == 0
    failed, done = ended(tmp_path)
    assert failed["rank"] == rank and failed["host"] == socket.gethostname()
    assert failed["codes"][rank] == -9 and "SIGKILL" in failed["cause"]
    assert done["outcome"] == "done" and done["first_step"] == failed["saved_step"]
    lost = failed["last_step"] - failed["saved_step"]
    assert failed["steps_lost"] == lost and 0 <= lost < 12
    text = capfd.readouterr().err
    assert re.search(rf"attempt 1 failed after \d+ s: rank {rank} on host", text)


@pytest.mark.parametrize(
    ("kind", "outcome", "attempts"),
    [("refuse*", "final", 1), ("differ*", "final", 1), ("bug*", "failed", 3)],
)
def test_what_would_fail_again_is_not_tried_for_ever(tmp_path, kind, outcome, attempts):
    assert run(tmp_path, f"--fault={kind}:1:2") != 0
    rows = ended(tmp_path)
    assert [row["outcome"] for row in rows] == [outcome] * attempts
    assert {row["rank"] for row in rows} == {1}


def test_a_full_disk_is_tried_again(tmp_path):
    assert run(tmp_path, "--fault=full:0:6") == 0
    assert "No space left" in ended(tmp_path)[0]["cause"]


def test_an_attempt_that_saves_something_resets_the_count(tmp_path):
    """Each attempt saves one checkpoint more, and is killed: more often than three."""
    workdir = tmp_path / "w"
    codes = []
    for step in (5, 9, 13, 17):
        codes.append(
            run(workdir, f"--fault=kill*:0:{step}", stalled_attempts=2, processes=1)
        )
        rows = ended(workdir)
        assert rows[-1]["saved_step"] == step - 1
    # The first attempt of each call is new, but for two after it.
    assert codes == [137] * 4 and len(rows) == 4 * 3


def test_a_stopped_rank_is_found(tmp_path):
    assert run(tmp_path, "--fault=stop:1:6", "--seconds=0.1", settle=0.3) == 0
    row = ended(tmp_path)[0]
    assert row["rank"] == 1 and "is stopped (SIGSTOP)" in row["cause"]


def test_a_hung_gang_is_killed_after_some_medians(tmp_path):
    flags = ("--fault=hang:0:12", "--seconds=0.25")
    assert run(tmp_path, *flags, min_silence=1.5, step_medians=3.0) == 0
    row = ended(tmp_path)[0]
    assert row["outcome"] == "hung" and row["saved_step"] == 8
    assert "no sign of life" in row["cause"] and "in the median" in row["cause"]


def test_what_a_rank_has_started_ends_with_it(tmp_path):
    assert run(tmp_path, "--fault=child:0:5") == 0
    assert ended(tmp_path)[0]["codes"][0] == 3


def test_sigterm_goes_on_to_the_gang_and_its_code_comes_back(tmp_path):
    process = start(tmp_path, "--steps=2000")
    wait_for_step(tmp_path, 8)
    pids = pids_of(tmp_path)
    process.send_signal(signal.SIGTERM)
    text = process.communicate(timeout=30)[1]
    assert process.returncode == 143, text
    [row] = ended(tmp_path)
    assert row["outcome"] == "stopped" and set(row["codes"]) <= {143, -15}
    assert row["saved_step"] == row["last_step"]
    wait_for_ends(pids)


def test_a_rank_that_was_asked_to_stop_is_not_started_again(tmp_path):
    """Nor is rank 0 killed, which still saves when the others have left."""
    process = start(tmp_path, "--steps=2000", "--save_seconds=2")
    wait_for_step(tmp_path, 4)
    for pid in pids_of(tmp_path):
        os.kill(pid, signal.SIGTERM)
    process.communicate(timeout=30)
    [row] = ended(tmp_path)
    assert process.returncode == 143 and row["outcome"] == "stopped"
    assert row["codes"][0] == 143 and row["saved_step"] == row["last_step"]


def test_nothing_outlives_a_killed_supervisor(tmp_path):
    """Neither the ranks nor what they have started, which the kernel does not know."""
    process = start(tmp_path, "--steps=5000", "--child")
    wait_for_step(tmp_path, 8)
    pids = [*pids_of(tmp_path), int((tmp_path / "child").read_text())]
    assert all(files.is_running(pid) for pid in pids)
    process.kill()
    process.communicate(timeout=30)
    wait_for_ends(pids)
    assert run(tmp_path, "--steps=60") == 0
    lost, done = ended(tmp_path)
    assert lost["outcome"] == "lost" and "was killed" in lost["cause"]
    assert done["outcome"] == "done" and done["attempt"] == 2


def test_a_second_supervisor_is_refused(tmp_path):
    process = start(tmp_path, "--steps=5000")
    wait_for_step(tmp_path, 4)
    with pytest.raises(ValueError, match="is being written by supervise"):
        run(tmp_path)
    process.terminate()
    process.communicate(timeout=30)


def test_hosts_with_a_supervisor_each(tmp_path):
    """Rank 1 is killed; rank 0 notices, and both go on."""
    flags = [*RANK, f"--workdir={tmp_path}", "--fault=kill:1:6"]
    supervisors = [
        subprocess.Popen(
            [
                *(sys.executable, "-m", "kdjax.supervise", "--delay=0"),
                *(f"--rank={rank}", "--", *flags),
            ],
            env=os.environ
            | {"PYTHONPATH": str(helpers.ROOT), "KDJAX_PROCESS_ID": str(rank)},
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    for process in supervisors:
        assert "attempt 2" in process.communicate(timeout=60)[1]
        assert process.returncode == 0
    lost, killed = ended(tmp_path)[0], ended(tmp_path, "attempts-1.jsonl")[0]
    assert (lost["rank"], lost["codes"]) == (0, [75])
    assert (killed["rank"], killed["codes"]) == (1, [-9])


def test_a_taken_port_is_passed_by():
    with socket.socket() as listener:
        listener.bind(("", 0))
        listener.listen()
        taken = listener.getsockname()[1]
        assert supervisor.free_port(taken) > taken
    assert supervisor.free_port(0)


def test_a_row_is_written_while_the_gang_runs_if_there_is_room_again(
    tmp_path, monkeypatch
):
    file, append, ended = tmp_path / "attempts.jsonl", attempts._append, Attempts.ended
    failures, before_the_end = [OSError(errno.ENOSPC, "full")], []

    def full_once(*arguments):
        if failures:
            raise failures.pop()
        append(*arguments)

    def look(self, **fields):
        before_the_end.extend(files.read_jsonl(file))
        ended(self, **fields)

    monkeypatch.setattr(attempts, "_append", full_once)
    monkeypatch.setattr(Attempts, "ended", look)
    assert run(tmp_path) == 0
    assert [row["event"] for row in before_the_end] == ["started"]


def test_what_a_full_disk_refused_is_written_later(tmp_path, monkeypatch):
    from kdjax.supervision import attempts

    log = attempts.Attempts(tmp_path / "attempts.jsonl")
    real = os.write
    for room in (0, 10):  # a write may be cut short

        def full(descriptor, data, room=room):
            if not room:
                raise OSError(28, "No space left on device")
            return real(descriptor, data[:room])

        monkeypatch.setattr(os, "write", full)
        if not room:
            log.started(port=1)
        log.flush()
        assert not (tmp_path / "attempts.jsonl").read_text()
    monkeypatch.setattr(os, "write", real)
    log.ended(outcome="done")
    rows = files.read_jsonl(tmp_path / "attempts.jsonl")
    assert [row["event"] for row in rows] == ["started", "ended"]


LOST = "train: error: process 0 of 2 (host a, pid 1) lost another process of this run"


@pytest.mark.parametrize(
    ("ends", "rank"),
    [
        ([(0, 75, "x"), (1, -9, "")], 1),
        ([(0, 1, LOST), (1, 1, "train: error: loss is nan")], 1),
        ([(0, -6, "F0000 coordination service"), (1, -11, "")], 1),
        ([(0, 1, "ValueError: Gloo all-reduce failed: timeout")], 0),
        ([(2, 1, "KeyError: 'k'"), (0, 75, "")], 2),
        ([(2, 1, "KeyError: 'k'"), (1, -9, "")], 1),
    ],
)
def test_the_first_cause_is_no_echo(ends, rank):
    ends = [End(rank=r, host="h", code=c, lines=(text,)) for r, c, text in ends]
    assert causes.first(ends).rank == rank


def test_srun_names_host_and_rank():
    lines = [
        "1: train: error: process 1 of 4 lost another process of this run (Gloo)",
        "2: Traceback (most recent call last):",
        "2: KeyError: 'k'",
        "srun: error: n1: task 1: Exited with exit code 75",
        "srun: error: n2: task 2: Exited with exit code 1",
        "srun: error: n2: task 3: Killed",
        "srun: error: n1: tasks 0,4-5: Terminated",
    ]
    ends = causes.srun_ends(lines)
    assert [(e.host, e.rank, e.code) for e in ends] == [
        *(("n1", 1, 75), ("n2", 2, 1), ("n2", 3, -9), ("n1", 0, -15))
    ]
    assert ends[1].words == "KeyError: 'k'" and ends[0].is_echo


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--", "true"], "has no --workdir=DIR"),
        (["--workdir=a", "--", "true", "--workdir=b"], "is not the command's"),
        ([], "no command"),
        (["--launcher", "--processes=2", "--", "x", "--workdir=a"], "starts them"),
    ],
)
def test_bad_flags_are_one_line(flags, message, tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "kdjax.supervise", *flags],
        env=os.environ | {"PYTHONPATH": str(helpers.ROOT)},
        capture_output=True,
        text=True,
        cwd=tmp_path,
    )
    assert done.returncode == 1 and message in done.stderr
    assert done.stderr.count("\n") == 1 and not list(tmp_path.iterdir())


def test_the_directory_is_the_commands():
    command = ["srun", "python", "-m", "kdjax.train", "--workdir", "a", "--config=x"]
    assert supervise.workdir_of(command, None) == pathlib.Path("a")
    assert supervise.workdir_of(["x"], "b") == pathlib.Path("b")


def test_gpus_and_devices_of_ranks(tmp_path):
    options = supervisor.Options(processes=2, gpus_per_process=4, cpu_devices=2)
    environments = supervisor.Supervisor([], tmp_path, options)._environments(1)
    gpus = [variables["CUDA_VISIBLE_DEVICES"] for variables in environments]
    assert gpus == ["0,1,2,3", "4,5,6,7"]
    assert json.dumps(environments).count("device_count=2") == 2

"""Commands as forked processes: what they get, how they end."""

import json
import os
import pathlib
import signal
import subprocess
import sys
import time

from kdjax.runtime import processes
from tests import helpers

COMMAND = "tests.comparison.command"


def test_arguments_environment_cores_log_and_exit_code(tmp_path, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "7")
    core = min(os.sched_getaffinity(0))
    command = (COMMAND, f"--workdir={tmp_path / 'run'}", "--fail=num=3")
    log = tmp_path / "log.txt"
    log.write_text("before\n")
    exit_codes = []
    for environment in ({}, {"CUDA_VISIBLE_DEVICES": "3"}):
        process = processes.start(
            command, log=log, cores=[core], environment=environment
        )
        process.join()
        exit_codes.append(process.exitcode)
    assert exit_codes == [1, 1]
    notes = list(map(json.loads, (tmp_path / "ran.jsonl").read_text().splitlines()))
    assert [note["gpu"] for note in notes] == ["7", "3"]
    assert all(note["cores"] == [core] for note in notes)
    lines = ["some warning", "command: error: num=3"]
    assert log.read_text().splitlines() == ["before", *lines, *lines]


def test_a_process_ends_when_the_one_that_started_it_is_killed(tmp_path):
    code = (
        "import pathlib, sys\n"
        "from kdjax.runtime import processes\n"
        f"command = ('{COMMAND}', f'--workdir={{sys.argv[1]}}/run', '--wait=/no')\n"
        "processes.start(command, log=pathlib.Path(sys.argv[1], 'log.txt')).join()\n"
    )
    parent = subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path)], cwd=helpers.ROOT
    )
    notes = tmp_path / "ran.jsonl"
    while not notes.exists() or not notes.read_text().endswith("\n"):
        time.sleep(0.02)
    child = json.loads(notes.read_text())["pid"]
    parent.send_signal(signal.SIGKILL)
    parent.wait()
    for _ in range(500):
        state = pathlib.Path(f"/proc/{child}/stat")
        if not state.exists() or state.read_text().split()[2] == "Z":
            break
        time.sleep(0.02)
    else:
        raise AssertionError(f"process {child} lives on")

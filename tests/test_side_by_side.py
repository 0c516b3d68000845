"""Commands beside a running one: it ends undisturbed, they succeed or say who runs.

KDJAX_STARTS sets how many commands are started (100 by hand, fewer in CI).
"""

import json
import os
import pathlib
import pty
import re
import select
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from kdjax.runtime import locks, processes
from tests import helpers
from tests.helpers import step_rows, summary

NUM_STARTS = int(os.environ.get("KDJAX_STARTS", "6"))
PRELOAD = ("kdjax.pipeline.distill", "kdjax.evaluation.summary")
ENVIRONMENT = {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": ""}
HELD = r"error: (workdir|cache|out)='[^']+' is being written by \w+ \(host .*pid \d+"


class Commands:
    """Commands as forks of a process that has imported everything."""

    def __init__(self, config, folder: pathlib.Path) -> None:
        processes.preload(PRELOAD)
        self.config = helpers.write_config_file(config, folder / "config_file.py")
        self.folder = folder
        self.number = 0

    def start(self, name: str, workdir: pathlib.Path, *flags: str):
        """Start `kdjax.name` on a workdir; returns the process and its log."""
        self.number += 1
        log = self.folder / f"{self.number}-{name}.log"
        arguments = [f"--workdir={workdir}", *flags]
        if name in ("train", "label"):
            arguments.insert(0, f"--config={self.config}")
        if name == "cache":
            arguments = list(flags)
        log.touch()
        process = processes.start(
            ["tests.run_command", f"kdjax.{name}", *arguments],
            log=log,
            environment=ENVIRONMENT,
        )
        return process, log

    def run(self, name: str, workdir: pathlib.Path, *flags: str) -> str:
        process, log = self.start(name, workdir, *flags)
        process.join()
        assert process.exitcode == 0, log.read_text()
        return log.read_text()


def visitor(rng: np.random.Generator, workdir: pathlib.Path, number: int):
    """A random command that may be started beside a training."""
    out = workdir.parent / f"out-{number}"
    return [
        ("evaluate",),
        ("evaluate", "--model=teacher"),
        ("export", f"--out={out}"),
        ("cache", "info", str(workdir / "cache" / "train")),
        ("cache", "verify", str(workdir / "cache" / "eval")),
        ("train",),
        ("label",),
    ][rng.integers(7)]


def state_of(workdir: pathlib.Path) -> dict:
    """What an undisturbed run ends with."""
    config = json.loads((workdir / "config.json").read_text())
    checkpoint = workdir / "checkpoints" / str(config["train"]["steps"])
    return {
        "student": summary(workdir)["student"],
        "teacher": summary(workdir)["teacher"],
        "losses": [(row["step"], row["loss"]) for row in step_rows(workdir)],
        "best": sorted(p.name for p in (workdir / "checkpoints").iterdir()),
        "complete": (checkpoint / "checksums.json").is_file(),
    }


@pytest.fixture(scope="module")
def commands(tmp_path_factory) -> Commands:
    config = helpers.small_config(
        train={"steps": 400, "save_every": 5, "eval_every": 50, "keep_last": 1},
        teacher={"steps": 40},
    )
    return Commands(config, tmp_path_factory.mktemp("side"))


@pytest.fixture(scope="module")
def undisturbed(commands) -> dict:
    commands.run("train", commands.folder / "alone")
    return state_of(commands.folder / "alone")


@pytest.mark.slow
def test_a_training_with_company_ends_undisturbed(commands, undisturbed):
    rng = np.random.default_rng(0)
    held = succeeded = number = 0
    while number < NUM_STARTS:
        workdir = commands.folder / f"run-{number}"
        running, log = commands.start("train", workdir)
        visits = []
        while not (workdir / "config.json").exists():  # until the lock is its own
            assert running.exitcode is None, log.read_text()
            time.sleep(0.1)
        while running.exitcode is None:
            # Some come early, most when there is something to look at.
            seen = list(workdir.glob("checkpoints/*/checksums.json")) or not visits
            if (
                seen
                and number < NUM_STARTS
                and sum(v.exitcode is None for _, v, _ in visits) < 2
            ):
                name, *flags = visitor(rng, workdir, number)
                visits.append((name, *commands.start(name, workdir, *flags)))
                number += 1
            time.sleep(rng.uniform(0, 1))
        assert running.exitcode == 0, log.read_text()
        assert state_of(workdir) == undisturbed
        for name, process, text in visits:
            process.join()
            output = text.read_text()
            assert "Traceback" not in output, output
            if process.exitcode == 0:
                succeeded += 1
                continue
            [error] = re.findall(r"^\w+: error: .*$", output, re.M)
            early = ("has no checkpoint", "no manifest.json", "does not exist")
            assert re.search(HELD, error) or any(e in error for e in early), error
            held += bool(re.search(HELD, error))
            assert name != "cache" or "manifest.json" in error, error
        assert not (workdir / locks.LOCK).exists()
    print(f"{number} starts: {succeeded} succeeded, {held} were told who runs")
    assert succeeded + held > 0


def in_a_terminal(command: list[str], text: str, timeout: float = 400):
    """Runs a command in a pseudo-terminal, presses Ctrl-C when a text is shown."""
    # Not pty.fork: this process has threads.
    terminal, ends = pty.openpty()
    process = subprocess.Popen(
        ["setsid", "--ctty", "--wait", "env", "--default-signal=INT", *command],
        stdin=ends,
        stdout=ends,
        stderr=ends,
        env=os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(helpers.ROOT)},
    )
    os.close(ends)
    shown, deadline, pressed = b"", time.monotonic() + timeout, False
    while time.monotonic() < deadline:
        if select.select([terminal], [], [], 0.2)[0]:
            try:
                shown += os.read(terminal, 1 << 16)
            except OSError:  # it has ended
                break
        if text.encode() in shown and not pressed:
            os.write(terminal, b"\x03")
            pressed = True
    else:
        process.kill()
    code = process.wait()
    os.close(terminal)
    return code, shown.decode(errors="replace")


@pytest.mark.slow
def test_what_a_terminal_and_a_pipe_show(commands):
    workdir = commands.folder / "terminal"
    command = [sys.executable, "-m", "kdjax.train", f"--config={commands.config}"]
    command += [f"--workdir={workdir}", "--config.train.steps=3000"]
    code, shown = in_a_terminal(command, "kl ")
    plain = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", shown)
    assert code == 130, plain
    assert "Traceback" not in plain and "deprecat" not in plain
    assert "PyTorch" not in plain and "compiling the step" in plain
    assert shown.rfind("\x1b[?25h") > shown.rfind("\x1b[?25l")  # the cursor is back
    last = plain.strip().splitlines()[-1]
    saved = re.fullmatch(
        r"train: interrupted: step (\d+) of 3000 is saved in .*checkpoints: the same "
        r"command goes on from it",
        last,
    )
    assert saved, last
    assert step_rows(workdir)[-1]["step"] == int(saved[1])
    process, log = commands.start("train", workdir, "--config.train.steps=3000")
    line = f"small goes on: step {saved[1]} of 3000 is in checkpoints/"
    while line not in log.read_text():
        assert process.exitcode is None, log.read_text()
        time.sleep(0.1)
    while "kl " not in log.read_text():
        time.sleep(0.1)
    os.kill(process.pid, signal.SIGTERM)
    process.join()
    assert process.exitcode == 143
    assert re.search(
        r"^train: ended by SIGTERM: step \d+ of 3000 is saved in .*: the same command "
        r"goes on from it$",
        log.read_text(),
        re.M,
    )


@pytest.mark.slow
def test_a_killed_training_is_taken_over_at_once(commands, undisturbed):
    workdir = commands.folder / "killed"
    rng = np.random.default_rng(1)
    for _ in range(3):
        process, _ = commands.start("train", workdir)
        time.sleep(rng.uniform(2, 8))
        if process.exitcode is None:
            os.kill(process.pid, signal.SIGKILL)
        process.join()
    log = commands.run("train", workdir)
    assert state_of(workdir) == undisturbed
    assert "being written" not in log
    assert [p.name for p in workdir.iterdir() if ".tmp" in p.name] == []


@pytest.mark.slow
def test_ctrl_c_at_random_moments_loses_no_step(commands, undisturbed):
    workdir = commands.folder / "interrupted"
    rng = np.random.default_rng(2)
    before = stops = 0
    for _ in range(max(4, NUM_STARTS // 5)):
        process, log = commands.start("train", workdir)
        lines = int(rng.integers(8, 60))  # of its output, however slow it is
        while process.exitcode is None and len(log.read_text().splitlines()) < lines:
            time.sleep(0.05)
        if process.exitcode is None:
            os.kill(process.pid, signal.SIGINT)
        process.join()
        output = log.read_text()
        assert process.exitcode in (0, 130, -signal.SIGINT), output
        if process.exitcode == 130:
            assert "train: interrupted" in output and "Traceback" not in output
        if saved := re.search(r"step (\d+) of 400 is saved", output):
            step, stops = int(saved[1]), stops + 1
            assert step >= before and step == step_rows(workdir)[-1]["step"]
            assert (workdir / "checkpoints" / str(step) / "checksums.json").is_file()
            before = step
    log = commands.run("train", workdir)
    assert not before or re.search(f"step {before} of 400 is in checkpoints", log)
    assert stops and state_of(workdir)["losses"] == undisturbed["losses"]
    assert state_of(workdir)["student"] == undisturbed["student"]

"""kdjax.compare as a user starts it."""

import csv
import json
import pathlib
import random
import signal
import subprocess
import sys
import time

import pytest

CONFIG = "--config=tests/comparison/tiny.py"


def command(workdir: pathlib.Path, *flags: str, config: str = CONFIG) -> list[str]:
    base = [sys.executable, "-m", "kdjax.compare", config, f"--workdir={workdir}"]
    return [*base, *flags]


def start(workdir: pathlib.Path, *flags: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        command(workdir, *flags), capture_output=True, text=True, timeout=500
    )


def rows(workdir: pathlib.Path) -> dict[str, dict[str, str]]:
    with (workdir / "results.csv").open() as file:
        return {row["run"]: row for row in csv.DictReader(file)}


@pytest.mark.slow
def test_stages_then_all_with_a_run_that_fails(tmp_path):
    early = start(tmp_path, "--stage=run", "--index=0")
    assert early.returncode == 1 and "--stage=prepare makes them" in early.stderr
    assert start(tmp_path, "--stage=prepare").returncode == 0
    beyond = start(tmp_path, "--stage=run", "--index=3")
    assert beyond.returncode == 1 and "0 to 2" in beyond.stderr
    assert start(tmp_path, "--stage=run", "--index=1").returncode == 0
    listed = (tmp_path / "runs.jsonl").read_text().splitlines()
    assert json.loads(listed[1]) == {
        "index": 1,
        "run": "runs/soft-s0",
        "labels": "soft",
        "seed": "0",
    }
    assert start(tmp_path, "--stage=report").returncode == 0
    assert [r["status"] for r in rows(tmp_path).values()] == [
        "not run",
        "done",
        "not run",
    ]

    whole = start(tmp_path, "--jobs=1")
    assert whole.returncode == 1
    assert "1 of 6 failed, first runs/broken-s0" in whole.stderr
    assert "Traceback" not in whole.stderr
    found = rows(tmp_path)
    assert [r["status"] for r in found.values()] == ["done", "done", "failed"]
    assert "is not finite" in found["broken-s0"]["error"]
    assert float(found["soft-s0"]["nll"]) > 0
    assert "is not finite" in (tmp_path / "report.html").read_text()
    # Both runs read the labels of one cache, and neither has a teacher of its own.
    assert not list((tmp_path / "runs").glob("*/teacher"))
    assert not list((tmp_path / "runs").glob("*/cache"))

    other = start(tmp_path, "--config.base.train.steps=7")
    assert other.returncode == 1 and "train.steps: 6 -> 7" in other.stderr


@pytest.mark.slow
def test_killed_and_started_again_gives_the_same_results(tmp_path):
    config = f"{CONFIG}:sound"
    arguments = {"capture_output": True, "timeout": 500}
    whole = tmp_path / "whole"
    start = time.monotonic()
    subprocess.run(command(whole, "--jobs=2", config=config), check=True, **arguments)
    seconds = time.monotonic() - start
    killed = tmp_path / "killed"
    moments = random.Random(0)
    for _ in range(3):
        process = subprocess.Popen(
            command(killed, "--jobs=2", config=config),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        time.sleep(moments.uniform(0.3, 0.8) * seconds)
        process.send_signal(signal.SIGKILL)
        process.wait()
    subprocess.run(command(killed, "--jobs=2", config=config), check=True, **arguments)
    first, second = (folder / "results.csv" for folder in (whole, killed))
    assert first.read_bytes() == second.read_bytes()
    assert {row["status"] for row in rows(killed).values()} == {"done"}

"""Tasks as processes: order, side by side, failures, and going on."""

import dataclasses
import importlib.util
import json
import os
import pathlib

import pytest

from kdjax.comparison import runner
from kdjax.comparison.grid import Task
from kdjax.config import Config

COMMAND = "tests.comparison.command"
PRELOAD = runner.PRELOAD


def test_what_the_fork_server_imports_is_there():
    # It ignores what it cannot import.
    assert all(importlib.util.find_spec(name) for name in PRELOAD)


@pytest.fixture(autouse=True)
def no_imports(monkeypatch):
    """The command of these tests needs none, and they take seconds."""
    monkeypatch.setattr(runner, "PRELOAD", ())


def task(name: str, *flags: str, **fields) -> Task:
    return Task(name=name, config=Config(), commands=((COMMAND, *flags),), **fields)


def run(tasks: list[Task], workdir: pathlib.Path, jobs: int = 1) -> list:
    """Run tasks; return name and error of each, in the order in which they ended."""
    ended = []
    for one in tasks:
        (workdir / one.name).mkdir(parents=True, exist_ok=True)
    runner.run(tasks, workdir, jobs=jobs, report=lambda t, e: ended.append((t.name, e)))
    return ended


def ran(workdir: pathlib.Path) -> list[dict]:
    file = workdir / "ran.jsonl"
    return list(map(json.loads, file.read_text().splitlines())) if file.exists() else []


def test_tasks_run_after_those_they_depend_on_and_only_once(tmp_path):
    tasks = [task("first"), task("second", depends_on=("first",)), task("third")]
    ended = run(tasks, tmp_path, jobs=2)
    assert sorted(ended) == [("first", ""), ("second", ""), ("third", "")]
    assert ended.index(("first", "")) < ended.index(("second", ""))
    assert run(tasks, tmp_path) == []
    assert len(ran(tmp_path)) == 3


def test_a_later_command_is_run_alone(tmp_path):
    one = task("first")
    run([one], tmp_path)
    more = dataclasses.replace(one, commands=(*one.commands, (COMMAND, "--wait=")))
    assert run([more], tmp_path) == [("first", "")]
    assert len(ran(tmp_path)) == 2


def test_side_by_side_with_cores_of_their_own(tmp_path):
    if len(os.sched_getaffinity(0)) < 2:
        pytest.skip("one core")
    # Each waits for the other to have started: one after the other would never end.
    tasks = [
        task("a", f"--wait={tmp_path / 'b.started'}"),
        task("b", f"--wait={tmp_path / 'a.started'}"),
    ]
    assert sorted(run(tasks, tmp_path, jobs=2)) == [("a", ""), ("b", "")]
    first, second = ran(tmp_path)
    assert not set(first["cores"]) & set(second["cores"])


def test_what_is_timed_runs_alone(tmp_path):
    if len(os.sched_getaffinity(0)) < 2:
        pytest.skip("one core")
    timed = task("timed", "--seconds=0.2", exclusive=True)
    tasks = [task("a", "--seconds=0.2"), timed, task("b"), task("c")]
    run(tasks, tmp_path, jobs=2)
    spans = {note["name"]: note["span"] for note in ran(tmp_path)}
    begin, end = spans.pop("timed")
    assert all(last <= begin or first >= end for first, last in spans.values())


def test_a_failure_is_a_row_and_the_rest_goes_on(tmp_path):
    tasks = [
        task("bad", "--fail=num=3 is above 2: use 2"),
        task("after", depends_on=("bad",)),
        task("dead", "--die=yes"),
        task("good"),
    ]
    ended = dict(run(tasks, tmp_path))
    assert ended == {
        "bad": f"{COMMAND}: num=3 is above 2: use 2",
        "after": "bad failed, which it needs",
        "dead": f"{COMMAND}: ended by SIGKILL (out of memory?)",
        "good": "",
    }
    assert runner.error(tmp_path / "bad") == ended["bad"]
    (tmp_path / "mended").touch()
    again = dict(run(tasks[:2], tmp_path))
    assert again == {"bad": "", "after": ""}
    assert runner.error(tmp_path / "bad") == ""


def test_a_gpu_for_each(monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,5")
    monkeypatch.delenv("JAX_PLATFORMS", raising=False)
    ended = runner.slots(2)
    assert [p.environment for p in ended] == [
        {"CUDA_VISIBLE_DEVICES": "3"},
        {"CUDA_VISIBLE_DEVICES": "5"},
    ]
    # One process alone has them all.
    assert runner.slots(1)[0].environment == {}
    with pytest.raises(ValueError, match="--jobs=3: this machine has 2 GPUs"):
        runner.slots(3)


def test_no_more_processes_than_cores(monkeypatch):
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    with pytest.raises(ValueError, match="CPU cores; use 1 to"):
        runner.slots(len(os.sched_getaffinity(0)) + 1)

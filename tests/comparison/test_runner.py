"""Items as processes: order, side by side, failures, and going on."""

import dataclasses
import json
import os
import pathlib
import signal
import subprocess
import sys
import time

import pytest

from kdjax.comparison import forks, runner
from kdjax.comparison.grid import Item
from kdjax.config import Config

VERB = "tests.comparing.verb"


@pytest.fixture(autouse=True)
def no_imports(monkeypatch):
    """The verb of these tests needs none, and they take seconds."""
    monkeypatch.setattr(forks, "IMPORTED", ())


def item(name: str, *flags: str, needs: tuple[str, ...] = ()) -> Item:
    return Item(name=name, config=Config(), commands=((VERB, *flags),), needs=needs)


def run(items: list[Item], workdir: pathlib.Path, jobs: int = 1) -> list:
    """What ended, in turn: name, error."""
    found = []
    for one in items:
        (workdir / one.name).mkdir(parents=True, exist_ok=True)
    runner.run(items, workdir, jobs=jobs, report=lambda i, e: found.append((i.name, e)))
    return found


def ran(workdir: pathlib.Path) -> list[dict]:
    file = workdir / "ran.jsonl"
    return list(map(json.loads, file.read_text().splitlines())) if file.exists() else []


def test_items_run_after_what_they_need_and_only_once(tmp_path):
    items = [item("first"), item("second", needs=("first",)), item("third")]
    found = run(items, tmp_path, jobs=2)
    assert sorted(found) == [("first", ""), ("second", ""), ("third", "")]
    assert found.index(("first", "")) < found.index(("second", ""))
    assert run(items, tmp_path) == []
    assert len(ran(tmp_path)) == 3


def test_a_later_command_is_run_alone(tmp_path):
    one = item("first")
    run([one], tmp_path)
    more = dataclasses.replace(one, commands=(*one.commands, (VERB, "--wait=")))
    assert run([more], tmp_path) == [("first", "")]
    assert len(ran(tmp_path)) == 2


def test_side_by_side_with_cores_of_their_own(tmp_path):
    if len(os.sched_getaffinity(0)) < 2:
        pytest.skip("one core")
    # Each waits for the other's directory entry: alone neither would end.
    items = [
        item("a", f"--wait={tmp_path / 'go'}"),
        item("b", f"--wait={tmp_path / 'go'}"),
        item("c"),
    ]
    opener = subprocess.Popen(
        [
            sys.executable,
            "-c",
            "import pathlib, sys, time\n"
            "folder = pathlib.Path(sys.argv[1])\n"
            "file = folder / 'ran.jsonl'\n"
            "while not file.exists() or len(file.read_text().splitlines()) < 2:\n"
            "    time.sleep(0.02)\n"
            "(folder / 'go').touch()\n",
            str(tmp_path),
        ]
    )
    assert len(run(items, tmp_path, jobs=2)) == 3
    opener.wait()
    first, second = ran(tmp_path)[:2]
    assert not set(first["cores"]) & set(second["cores"])


def test_what_is_timed_runs_alone(tmp_path):
    if len(os.sched_getaffinity(0)) < 2:
        pytest.skip("one core")
    timed = dataclasses.replace(item("timed", "--seconds=0.5"), alone=True)
    items = [item("a", "--seconds=0.3"), timed, item("b", "--seconds=0.3"), item("c")]
    run(items, tmp_path, jobs=2)
    spans = {note["name"]: note["span"] for note in ran(tmp_path)}
    begin, end = spans.pop("timed")
    assert all(last <= begin or first >= end for first, last in spans.values())


def test_a_failure_is_a_row_and_the_rest_goes_on(tmp_path):
    items = [
        item("bad", "--fail=num=3 is above 2: use 2"),
        item("after", needs=("bad",)),
        item("dead", "--die=yes"),
        item("good"),
    ]
    found = dict(run(items, tmp_path))
    assert found == {
        "bad": f"{VERB}: num=3 is above 2: use 2",
        "after": "bad failed, which it needs",
        "dead": f"{VERB}: ended by SIGKILL (out of memory?)",
        "good": "",
    }
    assert runner.error(tmp_path / "bad") == found["bad"]
    (tmp_path / "mended").touch()
    again = dict(run(items[:2], tmp_path))
    assert again == {"bad": "", "after": ""}
    assert runner.error(tmp_path / "bad") == ""


def test_processes_end_with_the_one_that_started_them(tmp_path):
    code = (
        "import pathlib, sys\n"
        "from kdjax.comparing import processes\n"
        "from tests.comparing.test_processes import item\n"
        "folder = pathlib.Path(sys.argv[1])\n"
        "(folder / 'long').mkdir()\n"
        "processes.run([item('long', '--wait=/nowhere')], folder, jobs=1,\n"
        "              report=print)\n"
    )
    parent = subprocess.Popen([sys.executable, "-c", code, str(tmp_path)])
    while not ran(tmp_path):
        time.sleep(0.05)
    child = ran(tmp_path)[0]["pid"]
    parent.send_signal(signal.SIGKILL)
    parent.wait()
    for _ in range(100):
        state = pathlib.Path(f"/proc/{child}/stat")
        if not state.exists() or state.read_text().split()[2] == "Z":
            break
        time.sleep(0.05)
    else:
        raise AssertionError(f"process {child} lives on")
    assert not runner.finished(item("long"), tmp_path)


def test_a_gpu_for_each(monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,5")
    monkeypatch.delenv("JAX_PLATFORMS", raising=False)
    found = runner.places(2)
    assert [p.environment for p in found] == [
        {"CUDA_VISIBLE_DEVICES": "3"},
        {"CUDA_VISIBLE_DEVICES": "5"},
    ]
    # One process alone has them all.
    assert runner.places(1)[0].environment == {}
    with pytest.raises(ValueError, match="--jobs=3: this machine has 2 GPUs"):
        runner.places(3)


def test_no_more_processes_than_cores(monkeypatch):
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    with pytest.raises(ValueError, match="CPU cores; use 1 to"):
        runner.places(len(os.sched_getaffinity(0)) + 1)

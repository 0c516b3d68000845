"""One writer per folder: who holds it, who may take it over, what is cleared."""

import contextlib
import json
import os
import pathlib
import signal
import subprocess
import sys
import threading
import time

import pytest

from kdjax.runtime import files, locks

HOLDER = """
import os, pathlib, signal, sys, time
from kdjax.runtime import locks
with locks.hold(sys.argv[1]):
    print(os.getpid(), flush=True)
    sys.stdin.read()
"""


@contextlib.contextmanager
def holder(folder: pathlib.Path):
    """A process that holds the lock of a folder until its end."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(folder)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None and process.stdin is not None
    assert int(process.stdout.readline()) == process.pid
    yield process
    with process:
        process.stdin.close()


def write_owner(folder: pathlib.Path, **changes) -> pathlib.Path:
    """A lock as another process has left it."""
    owner = {
        "host": "elsewhere",
        "pid": 1,
        "start": 0,
        "machine": "another kernel",
        "command": "train",
        "since": "2026-01-01 00:00:00",
        "token": "t",
    } | changes
    file = folder / locks.LOCK
    file.write_text(json.dumps(owner))
    return file


def test_a_second_writer_is_told_who_holds_the_folder(tmp_path):
    with holder(tmp_path / "run") as process:
        with pytest.raises(ValueError) as raised, locks.hold(tmp_path / "run"):
            pass
        [line] = str(raised.value).splitlines()
        assert f"pid {process.pid}" in line and "since 20" in line
        assert os.uname().nodename in line and "another --workdir" in line
        owner = locks.holder(tmp_path / "run")
        assert owner is not None and owner.pid == process.pid
    assert locks.holder(tmp_path / "run") is None
    with locks.hold(tmp_path / "run"):
        assert (tmp_path / "run" / locks.LOCK).is_file()
    assert not (tmp_path / "run" / locks.LOCK).exists()


def test_a_killed_owner_is_taken_over_at_once(tmp_path):
    with holder(tmp_path) as process:
        process.kill()  # not waited for: a zombie is dead
        deadline = time.monotonic() + 5
        while files.is_running(process.pid):
            assert time.monotonic() < deadline
        start = time.monotonic()
        with locks.hold(tmp_path) as lock:
            assert time.monotonic() - start < 1
            lock.check()


def test_a_stopped_owner_is_alive(tmp_path):
    with holder(tmp_path) as process:
        process.send_signal(signal.SIGSTOP)
        with pytest.raises(ValueError, match="is being written by"):
            locks.Lock(tmp_path / locks.LOCK, name="x", remedy="y").acquire()
        process.send_signal(signal.SIGCONT)


def test_a_number_that_another_process_has_got_is_no_owner(tmp_path):
    own = {"pid": os.getpid(), "machine": files.machine()}
    write_owner(tmp_path, **own, start=files.process_start(os.getpid()))
    assert locks.holder(tmp_path) is not None
    write_owner(tmp_path, **own, start=1)
    with locks.hold(tmp_path):
        pass


def test_an_owner_elsewhere_is_dead_when_its_heart_stopped(tmp_path):
    file = write_owner(tmp_path)
    with pytest.raises(ValueError, match=r"train \(host elsewhere, pid 1, since 2026-"):
        locks.Lock(file, name="x", remedy="y").acquire()
    old = time.time() - locks.STALE_SECONDS - 5
    os.utime(file, (old, old))
    with locks.hold(tmp_path):
        pass


def test_the_heart_beats(tmp_path, monkeypatch):
    monkeypatch.setattr(locks, "HEARTBEAT_SECONDS", 0.02)
    with locks.hold(tmp_path):
        file = tmp_path / locks.LOCK
        os.utime(file, (0, 0))
        deadline = time.monotonic() + 5
        while file.stat().st_mtime < time.time() - 60:
            assert time.monotonic() < deadline
            time.sleep(0.01)


def test_a_lock_that_was_taken_over_is_noticed_and_left_alone(tmp_path):
    with locks.hold(tmp_path) as lock:
        lock.check()
        locks.check()
        write_owner(tmp_path)
        with pytest.raises(ValueError, match=r"taken over by train \(host elsewhere"):
            locks.check()
    assert (tmp_path / locks.LOCK).exists()


def test_a_damaged_lock_counts_until_it_is_old(tmp_path):
    file = tmp_path / locks.LOCK
    file.write_text("{")
    with pytest.raises(ValueError, match="does not name"), locks.hold(tmp_path):
        pass
    os.utime(file, (0, 0))
    with locks.hold(tmp_path):
        pass


def test_without_hard_links_it_holds_as_well(tmp_path, monkeypatch):
    def refuse(*arguments):
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(os, "link", refuse)
    second = locks.Lock(tmp_path / locks.LOCK, name="x", remedy="y")
    with locks.hold(tmp_path), pytest.raises(ValueError, match="is being written by"):
        second.acquire()
    assert list(tmp_path.iterdir()) == []


def test_of_many_who_start_at_once_one_gets_a_dead_owner_s_lock(tmp_path):
    own = {"pid": 2**22 + 1, "machine": files.machine()}
    winners, losers = [], []
    barrier = threading.Barrier(8)

    def start():
        lock = locks.Lock(tmp_path / locks.LOCK, name="x", remedy="y")
        barrier.wait()
        try:
            lock.acquire()
            winners.append(lock)
        except ValueError:
            losers.append(lock)

    for round_number in range(10):
        write_owner(tmp_path, **own, token=str(round_number))
        threads = [threading.Thread(target=start) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert (len(winners), len(losers)) == (1, 7)
        winners.pop().release()
        losers.clear()


def test_the_lock_of_a_dead_owner_is_cleared_and_no_other(tmp_path):
    locks.clear(tmp_path / "none")
    file = write_owner(tmp_path, pid=4194305, machine=files.machine())
    locks.clear(tmp_path)
    assert not file.exists()
    with locks.hold(tmp_path):
        locks.clear(tmp_path)
        assert file.exists()


def test_a_failure_leaves_no_folder_where_there_was_none(tmp_path):
    with pytest.raises(RuntimeError), locks.hold(tmp_path / "run"):
        raise RuntimeError
    assert list(tmp_path.iterdir()) == []


def test_leftovers_of_dead_processes_are_cleared(tmp_path):
    live = files.temporary(tmp_path / "live.json")
    name = f"-{os.getpid()}"
    dead = live.with_name(live.name.replace(name, "-4194305"))
    elsewhere = tmp_path / ".out.tmp-elsewhere-01234567-1"
    former = [tmp_path / ".teacher.tmp-4194305", tmp_path / "config.json.tmp4194305"]
    for path in (live, dead, elsewhere, former[1], tmp_path / "config.json"):
        path.write_text("x")
    former[0].mkdir()
    (former[0] / "model.safetensors").write_text("x")
    with locks.hold(tmp_path):
        remaining = {path.name for path in tmp_path.iterdir()}
    assert dead.name not in remaining
    kept = {live.name, elsewhere.name, "config.json"}
    assert kept <= remaining  # the former kind does not say on which machine
    assert {path.name for path in former} <= remaining
    for path in (elsewhere, *former):
        os.utime(path, (0, 0))
    with locks.hold(tmp_path):
        pass
    assert {path.name for path in tmp_path.iterdir()} == {live.name, "config.json"}


def test_leftovers_of_a_lock_beside_a_folder_are_cleared(tmp_path):
    """A process may be killed between the two steps in which it makes its lock."""
    names = [files.temporary(tmp_path / name).name for name in (".out.lock", "other")]
    for name in names:
        (tmp_path / name.replace(f"-{os.getpid()}", "-4194305")).write_text("x")
    with locks.hold(tmp_path, file=".out.lock"):
        pass
    [kept] = tmp_path.iterdir()
    assert kept.name.startswith(".other.tmp-")

"""Mirrored folders: whatever is killed when, nothing is lost or half."""

import contextlib
import json
import pathlib
import random
import shutil
import tempfile
import threading
import time

import pytest

from kdjax.config import StorageConfig
from kdjax.experiment.workdir import hold_output
from kdjax.runtime import files as files_lib
from kdjax.storage import index as index_lib
from kdjax.storage import mirror, snapshot, urls
from kdjax.storage.store import Store, StoreError
from tests.storage import toy
from tests.storage.memory import Files, KilledError, Machine, Memory

URL = "s3://bucket/runs/x"


@pytest.fixture
def memory():
    return Memory()


@pytest.fixture
def disk(tmp_path):
    """A folder in memory, where there is one: there are thousands of small files."""
    if not pathlib.Path("/dev/shm").is_dir():
        yield tmp_path
        return
    with tempfile.TemporaryDirectory(dir="/dev/shm") as folder:
        yield pathlib.Path(folder)


@pytest.fixture(autouse=True)
def _no_power_cuts(monkeypatch):
    monkeypatch.setattr(files_lib, "sync", lambda path: None)


def machine(monkeypatch, disk: pathlib.Path, files: Files) -> pathlib.Path:
    """Makes this process run on a machine; returns the local folder of the address."""
    Machine(monkeypatch, disk).use(files)
    return urls.local_folder(URL)


def train(folder: pathlib.Path) -> None:
    """The toy run on the address, which is copied whenever something is complete."""
    copies = mirror.Mirror(Store(URL, retry_seconds=1), folder)
    copies.fetch()
    toy.run(folder, copies.copy)
    copies.copy()


def undisturbed(folder: pathlib.Path) -> dict[str, bytes]:
    toy.run(folder)
    return toy.content(folder)


def test_a_fresh_machine_has_what_the_store_has(monkeypatch, tmp_path, memory):
    expected = undisturbed(tmp_path / "undisturbed")
    train(machine(monkeypatch, tmp_path / "a", Files(memory)))
    folder = machine(monkeypatch, tmp_path / "b", Files(memory))
    assert mirror.fetch(URL) == folder
    assert toy.content(folder) == expected
    # In the store each file lies under its own name, and nothing else but the index.
    names = {p.removeprefix("/bucket/runs/x/"): p for p in memory.store}
    assert set(names) - {index_lib.INDEX} == set(expected)
    stored = {name: memory.cat_file(path) for name, path in names.items()}
    stored.pop(index_lib.INDEX)
    assert stored == expected


@pytest.mark.parametrize("stride", [5, pytest.param(1, marks=pytest.mark.slow)])
@pytest.mark.parametrize("after", [False, True], ids=["before", "after"])
def test_killed_with_a_disk_that_stays(monkeypatch, disk, after, stride):
    kill_at_every_request(monkeypatch, disk, after, stride, disk_is_lost=False)


@pytest.mark.parametrize(
    "after, stride",
    [(True, 1), (False, 5), pytest.param(False, 1, marks=pytest.mark.slow)],
    ids=["after", "before", "before_all"],
)
def test_killed_with_a_disk_that_is_lost(monkeypatch, disk, after, stride):
    kill_at_every_request(monkeypatch, disk, after, stride, disk_is_lost=True)


def kill_at_every_request(monkeypatch, disk, after, stride, *, disk_is_lost):
    """Kills a run before or after each request; it must end as the undisturbed one."""
    expected = undisturbed(disk / "undisturbed")
    number = 0
    while True:
        memory, own = Memory(), disk / "own"
        shutil.rmtree(own, ignore_errors=True)
        files = Files(memory, kill_at=number, after=after)
        # The second start is killed early, too, some of them while they download.
        for start in (files, Files(memory, kill_at=number % 23, after=after)):
            with _maybe_killed():
                train(machine(monkeypatch, own, start))
            if disk_is_lost:
                shutil.rmtree(own, ignore_errors=True)
        folder = machine(monkeypatch, own, Files(memory))
        train(folder)
        assert toy.content(folder) == expected, number
        index = index_lib.read(Store(URL))
        assert set(index.files) == set(expected), number
        if not files.killed:  # it came to its end
            break
        number += stride
    assert number > 60  # kill points


class _maybe_killed:
    def __enter__(self):
        pass

    def __exit__(self, kind, *rest):
        return kind is not None and issubclass(kind, KilledError)


def test_nothing_is_left_in_the_store_that_no_file_needs(monkeypatch, tmp_path):
    for number in (9, 33, 50, 61):
        memory = Memory()
        with _maybe_killed():
            files = Files(memory, kill_at=number)
            train(machine(monkeypatch, tmp_path / f"a-{number}", files))
        folder = machine(monkeypatch, tmp_path / f"b-{number}", Files(memory))
        train(folder)
        names = {path.removeprefix("/bucket/runs/x/") for path in memory.store}
        assert names == {*toy.content(folder), index_lib.INDEX}


def test_readers_never_see_half(monkeypatch, disk, memory):
    """At every third request of the writer, what a reader gets can be gone on from."""
    reader = disk / "reader"

    def read(number: int, name: str) -> None:
        if number % 3:
            return
        shutil.rmtree(reader, ignore_errors=True)
        store = Store(URL)
        store._files = memory
        index = index_lib.read(store)
        mirror.download(store, index, reader)
        assert set(toy.content(reader)) == set(index.files)
        if index.files:
            toy.run(reader)

    train(machine(monkeypatch, disk / "a", Files(memory, fault=read)))


def test_an_answer_that_is_lost_loses_nothing(monkeypatch, disk):
    """A write of the index that has failed may have been done all the same."""
    expected = undisturbed(disk / "undisturbed")
    train(machine(monkeypatch, disk / "first", files := Files(Memory())))
    writes = [n for n, name in enumerate(files.requests) if name == "pipe_file"]
    assert len(writes) > 15
    for number in writes:
        memory = Memory()
        shutil.rmtree(disk / "a", ignore_errors=True)

        def read(request: int, name: str, number=number, memory=memory) -> None:
            """What others see at each of the next requests is all there."""
            if number < request < number + 12:
                reader = Store(URL)
                reader._files = memory
                index = index_lib.read(reader)
                shutil.rmtree(disk / "reader", ignore_errors=True)
                mirror.download(reader, index, disk / "reader")
                assert set(toy.content(disk / "reader")) == set(index.files)

        files = Files(memory, lost=number, fault=read)
        folder = machine(monkeypatch, disk / "a", files)
        copies = mirror.Mirror(Store(URL, retry_seconds=0), folder)
        copies.fetch()

        def copy(copies=copies) -> None:
            with contextlib.suppress(StoreError):
                copies.copy()

        toy.run(folder, copy)
        copies.copy()
        shutil.rmtree(disk / "a")
        mirror.fetch(URL)
        assert toy.content(folder) == expected, number


def test_a_machine_that_comes_back_takes_what_another_has_done(
    monkeypatch, tmp_path, memory
):
    expected = undisturbed(tmp_path / "undisturbed")
    for disk, kill_at in (("a", 40), ("b", 36)):
        with pytest.raises(KilledError):
            files = Files(memory, kill_at=kill_at)
            train(machine(monkeypatch, tmp_path / disk, files))
    theirs = toy.content(urls.local_folder(URL))
    folder = machine(monkeypatch, tmp_path / "a", Files(memory))
    ours = toy.content(folder)
    (folder / "checkpoints" / "4000" / "d").mkdir(parents=True)
    (folder / "checkpoints" / "4000" / "d" / "state").write_bytes(b"of nobody")
    copies = mirror.Mirror(Store(URL), folder)
    copies.fetch()
    assert len(theirs["metrics.jsonl"]) > len(ours["metrics.jsonl"])
    assert not (folder / "checkpoints" / "4000").exists()
    toy.run(folder, copies.copy)
    assert toy.content(folder) == expected


def test_what_is_ahead_of_the_store_stays(monkeypatch, tmp_path, memory):
    files = Files(memory)
    folder = machine(monkeypatch, tmp_path / "a", files)
    train(folder)
    (folder / "notes.txt").write_text("not copied yet")
    num = len(files.requests)
    mirror.Mirror(Store(URL), folder).fetch()
    assert (folder / "notes.txt").exists()
    assert files.requests[num:] == ["cat_file"]  # the index alone


def test_a_store_that_was_emptied_is_not_filled_again(monkeypatch, tmp_path, memory):
    folder = machine(monkeypatch, tmp_path / "a", Files(memory))
    train(folder)
    memory.store.clear()
    with pytest.raises(ValueError, match=r"has nothing any more.*remove that folder"):
        mirror.Mirror(Store(URL), folder).fetch()


def test_what_has_not_changed_is_not_copied(monkeypatch, tmp_path, memory):
    files = Files(memory)
    folder = machine(monkeypatch, tmp_path / "a", files)
    copies = mirror.Mirror(Store(URL), folder)
    copies.fetch()
    toy.run(folder)
    copies.copy()
    num = len(files.requests)
    copies.copy()
    assert len(files.requests) == num
    with (folder / "metrics.jsonl").open("a") as stream:
        stream.write('{"step": 7}\n')
    copies.copy()
    assert files.requests[num:].count("put_file") == 1


def test_a_damaged_object_is_left_out(monkeypatch, tmp_path, memory, capsys):
    train(machine(monkeypatch, tmp_path / "a", Files(memory)))
    path = "/bucket/runs/x/checkpoints/4/d/state"
    memory.pipe_file(path, memory.cat_file(path)[:-1] + b"?")
    folder = machine(monkeypatch, tmp_path / "b", Files(memory))
    mirror.fetch(URL)
    assert not (folder / "checkpoints" / "4" / "d" / "state").exists()
    assert (folder / "checkpoints" / "4" / "checksums.json").exists()
    line = f"{URL}/checkpoints/4/d/state is missing or damaged: it is left out\n"
    assert capsys.readouterr().err == line


@pytest.mark.parametrize(
    "change",
    [
        {"files": {"../out": [1, "0" * 32, False]}},
        {"files": {"/etc/out": [1, "0" * 32, False]}},
        {"files": {"a\\..\\b": [1, "0" * 32, False]}},
        {"files": {"a": [-1, "0" * 32, False]}},
        {"files": {"a": [1, "sum", False]}},
        {"files": {"a": [1, "0" * 32]}},
        {"garbage": ["../../other/run"]},
        {"version": 2},
        {"generation": 3},
    ],
)
def test_an_index_of_somebody_else_is_refused(monkeypatch, tmp_path, memory, change):
    machine(monkeypatch, tmp_path / "a", Files(memory))
    value = {"version": 1, "generation": "g", "files": {}, "garbage": []} | change
    memory.pipe_file(f"/bucket/runs/x/{index_lib.INDEX}", json.dumps(value).encode())
    with pytest.raises(ValueError, match="none that this version of kdjax writes"):
        mirror.fetch(URL)


def test_snapshots_are_moments(monkeypatch, disk):
    """What is written second is in no snapshot without what is written first."""
    monkeypatch.setattr(snapshot, "_PAUSE_SECONDS", 0.001)
    folder, stopped = disk / "run", threading.Event()
    (folder / "z").mkdir(parents=True)

    def write() -> None:
        number = 0
        while not stopped.is_set():
            number += 1
            with (folder / "metrics.jsonl").open("a") as stream:
                stream.write(f"{number}\n")
            for name in ("first", "z/second"):  # a walk comes to "first" first
                scratch = folder / ".scratch.tmp-1"
                scratch.write_text(str(number))
                scratch.replace(folder / name)
                time.sleep(random.choice((0.0, 0.001, 0.02)))

    writer = threading.Thread(target=write)
    writer.start()
    num_taken = 0
    try:
        while num_taken < 60:
            try:
                with snapshot.take(folder) as (scratch, listing):
                    if "z/second" not in listing:
                        continue
                    second = int((scratch / "z" / "second").read_text())
                    assert int((scratch / "first").read_text()) >= second
                    lines = (scratch / "metrics.jsonl").read_text().splitlines()
                    assert int(lines[-1]) >= second
                    assert ".scratch.tmp-1" not in listing
                    num_taken += 1
            except snapshot.BusyError:
                pass
    finally:
        stopped.set()
        writer.join()
    assert [path.name for path in disk.iterdir()] == ["run"]


def test_a_folder_in_a_mirrored_one_is_found(monkeypatch, tmp_path, memory):
    folder = machine(monkeypatch, tmp_path / "a", Files(memory))
    train(folder)
    assert mirror.fetch(f"{URL}/cache/train/") == folder / "cache" / "train"
    with pytest.raises(ValueError, match="has nothing that kdjax has written"):
        mirror.fetch(f"{URL}/cache/none")
    assert mirror.read_file(URL, "config.json") == b"{}"


def test_the_context_copies_from_time_to_time_and_at_the_end(
    monkeypatch, tmp_path, memory
):
    machine(monkeypatch, tmp_path / "a", Files(memory))
    config = StorageConfig(sync_seconds=0.02, retry_seconds=0)
    with mirror.mirrored(URL, config) as folder:
        (folder / "early").parent.mkdir(parents=True, exist_ok=True)
        (folder / "early").write_text("1")
        deadline = time.monotonic() + 10
        while not index_lib.read(Store(URL)).generation:
            assert time.monotonic() < deadline
            time.sleep(0.01)
        # Readers of this machine use the folder as it is.
        assert mirror.fetch(URL) == folder
        with pytest.raises(ValueError, match=f"workdir='{URL}' is being written by"):
            mirror.mirrored(URL, config).__enter__()
    with (
        pytest.raises(RuntimeError, match="a bug"),
        mirror.mirrored(URL, StorageConfig(sync_seconds=1000)) as folder,
    ):
        (folder / "late").write_text("2")
        raise RuntimeError("a bug")
    assert "/bucket/runs/x/late" in memory.store
    assert f"/bucket/runs/x/{index_lib.FOLDER}/lease.json" not in memory.store


def test_a_store_that_is_away_stops_nothing_but_the_end(
    monkeypatch, tmp_path, memory, capsys
):
    away = threading.Event()

    def fault(number: int, name: str) -> None:
        if away.is_set():
            raise OSError("503 Slow Down")

    machine(monkeypatch, tmp_path / "a", Files(memory, fault=fault))
    config = StorageConfig(sync_seconds=0.02, retry_seconds=0)
    with (
        pytest.raises(StoreError) as caught,
        mirror.mirrored(URL, config) as folder,
    ):
        away.set()
        folder.mkdir(exist_ok=True)
        (folder / "result").write_text("1")
        time.sleep(0.2)
    text = str(caught.value)
    assert text.startswith(f"not all is in {URL}, all is kept in {folder}: ")
    assert "503 Slow Down" in text and "\n" not in text
    assert "not copied yet" in capsys.readouterr().err
    away.clear()
    with mirror.mirrored(URL, config):
        pass
    assert memory.cat_file("/bucket/runs/x/result") == b"1"


def test_a_new_output_is_whole_or_goes_on(monkeypatch, tmp_path, memory):
    def export(files: Files) -> None:
        machine(monkeypatch, tmp_path / "a", files)
        with mirror.new_output(URL) as folder, hold_output(folder):
            folder.mkdir()
            (folder / "model.safetensors").write_bytes(b"weights")
            (folder / "config.json").write_text("{}")

    for number in range(100):
        memory.store.clear()
        with _maybe_killed():
            export(files := Files(memory, kill_at=number))
        machine(monkeypatch, tmp_path / "a", Files(memory))
        # A killed process of another machine, long ago.
        memory.store.pop(f"/bucket/runs/x/{index_lib.FOLDER}/lease.json", None)
        if index_lib.read(Store(URL)).generation:
            with pytest.raises(ValueError, match="is not empty: name a new folder"):
                export(Files(memory))
        else:
            export(Files(memory))
            assert not list((tmp_path / "a").glob("*"))
        assert memory.cat_file("/bucket/runs/x/model.safetensors") == b"weights"
        if not files.killed:
            break
    assert 10 < number < 99

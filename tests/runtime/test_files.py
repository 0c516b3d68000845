"""Atomic writes: the old content or the new one, and on disk when they return."""

import errno
import json
import os
import pathlib
import stat

import pytest

from kdjax.runtime import files


def test_content_is_replaced_and_folders_are_made(tmp_path):
    file = tmp_path / "a" / "b.txt"
    files.write_atomically(file, "première\n")
    files.write_atomically(str(file), b"\x00second")
    assert file.read_bytes() == b"\x00second"
    assert [path.name for path in file.parent.iterdir()] == ["b.txt"]


@pytest.mark.parametrize("name", ["write_bytes", "replace"])
def test_a_crash_before_the_rename_leaves_the_old_content(tmp_path, monkeypatch, name):
    file = tmp_path / "a.txt"
    files.write_atomically(file, "old")

    def crash(path, *arguments):
        with path.open("w") as stream:
            stream.write("n")
        raise OSError("disk full")

    monkeypatch.setattr(pathlib.Path, name, crash)
    with pytest.raises(OSError, match="disk full"):
        files.write_atomically(file, "new")
    assert file.read_text() == "old"
    assert list(tmp_path.iterdir()) == [file]


def test_the_file_is_synced_before_the_rename_and_the_folder_after(
    tmp_path, monkeypatch
):
    events = []
    fsync, replace = os.fsync, pathlib.Path.replace

    def fsync_noted(descriptor):
        folder = stat.S_ISDIR(os.fstat(descriptor).st_mode)
        events.append("folder" if folder else "file")
        fsync(descriptor)

    def replace_noted(path, target):
        events.append("rename")
        return replace(path, target)

    monkeypatch.setattr(os, "fsync", fsync_noted)
    monkeypatch.setattr(pathlib.Path, "replace", replace_noted)
    files.write_atomically(tmp_path / "a.txt", "text")
    assert events == ["file", "rename", "folder"]


def test_json_has_null_where_a_number_is_not_finite(tmp_path):
    value = {"nll": float("nan"), "rows": ({"kl": float("-inf")}, [1.5, "nan", None])}
    files.write_json(tmp_path / "a.json", value)
    text = (tmp_path / "a.json").read_text()
    assert json.loads(text) == {"nll": None, "rows": [{"kl": None}, [1.5, "nan", None]]}
    assert text.endswith("\n")


def test_a_device_stays_what_it_is():
    master, slave = os.openpty()
    name = os.ttyname(slave)
    before = os.stat(name)
    files.write_json(name, {"nll": 1})
    assert os.read(master, 100).split() == [b"{", b'"nll":', b"1", b"}"]
    assert os.stat(name).st_rdev == before.st_rdev
    os.close(master)
    os.close(slave)


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (b"", "is empty: remove it"),
        (b"\n ", "is empty"),
        (b'{"a": ', "is damaged .Expecting value"),
        (b"\xff\xfe", "is damaged"),
        (b"[1]", "no JSON object"),
        (b"[" * 100_000, "is damaged"),
    ],
)
def test_what_is_no_object_is_refused_by_name(tmp_path, content, problem):
    file = tmp_path / "config.json"
    file.write_bytes(content)
    with pytest.raises(ValueError, match=problem) as raised:
        files.read_json(file)
    assert str(raised.value).startswith(str(file))
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("call", ["open", "fsync", "replace"])
def test_a_full_disk_leaves_the_old_content_and_no_temporary_file(
    tmp_path, monkeypatch, call
):
    file = tmp_path / "summary.json"
    files.write_json(file, {"a": 1})
    before = file.read_bytes()

    def fail(*arguments, **keywords):
        raise OSError(28, "No space left on device", str(file))

    if call == "fsync":
        monkeypatch.setattr(os, "fsync", fail)
    else:
        name = "write_bytes" if call == "open" else "replace"
        monkeypatch.setattr(pathlib.Path, name, fail)
    with pytest.raises(OSError, match="No space left"):
        files.write_json(file, {"a": 2})
    assert file.read_bytes() == before
    assert list(tmp_path.iterdir()) == [file]


def test_what_may_not_be_looked_at_is_no_nothing(tmp_path):
    (tmp_path / "file").write_text("x")
    (tmp_path / "link").symlink_to("nothing")
    assert files.exists(tmp_path / "file") and files.exists(tmp_path / "link")
    assert not files.exists(tmp_path / "none")
    assert not files.exists(tmp_path / "file" / "below")
    with pytest.raises(OSError, match="too long"):
        files.exists(tmp_path / ("x" * 300))


def test_a_full_disk_names_the_file(tmp_path, monkeypatch):
    def refuse(self, data):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(pathlib.Path, "write_bytes", refuse)
    with pytest.raises(OSError) as raised:
        files.write_json(tmp_path / "result.json", {})
    assert raised.value.filename == str(tmp_path / "result.json")

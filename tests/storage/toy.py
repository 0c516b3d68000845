"""A run in miniature: a cache, checkpoints that follow from each other, results.

It writes as the real one does, each thing in one step, and started again it goes on
from what is complete.
"""

import hashlib
import json
import pathlib
import shutil
from collections.abc import Callable

NUM_STEPS = 4


def run(folder: pathlib.Path, happened: Callable[[], None] = lambda: None) -> None:
    """Run to the end; `happened` is called whenever something has become complete."""
    folder.mkdir(parents=True, exist_ok=True)
    _write(folder / "config.json", "{}")
    _label(folder / "cache" / "train", happened)
    start, state = _resume(folder)
    metrics = folder / "metrics.jsonl"
    lines = metrics.read_text().splitlines(True) if metrics.exists() else []
    _write(
        metrics, "".join(line for line in lines if json.loads(line)["step"] <= start)
    )
    for step in range(start + 1, NUM_STEPS + 1):
        state = hashlib.sha256(state).digest()
        with metrics.open("a") as stream:
            stream.write(json.dumps({"step": step, "loss": state.hex()}) + "\n")
        if step % 2 == 0:
            _save(folder / "checkpoints", step, state)
        happened()
    _write(folder / "summary.json", json.dumps({"final": state.hex()}))
    happened()


def content(folder: pathlib.Path) -> dict[str, bytes]:
    """The files of a folder, by path."""
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def _label(folder: pathlib.Path, happened: Callable[[], None]) -> None:
    if (folder / "manifest.json").exists():
        return
    names = [f"shard-{index}" for index in range(2)]
    for name in names:
        if not (folder / name).exists():
            _write(folder / name, name * 100)
            happened()
    missing = [name for name in names if not (folder / name).exists()]
    assert not missing, "a shard is lost"
    _write(folder / "manifest.json", json.dumps(names))
    happened()


def _resume(folder: pathlib.Path) -> tuple[int, bytes]:
    paths = (folder / "checkpoints").glob("*")
    steps = sorted(int(path.name) for path in paths if path.name.isdecimal())
    if not steps:
        return 0, b""
    newest = folder / "checkpoints" / str(steps[-1])
    state = (newest / "d" / "state").read_bytes()
    checksums = json.loads((newest / "checksums.json").read_text())
    assert checksums == {"d/state": hashlib.sha256(state).hexdigest()}, (
        "half a checkpoint"
    )
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines][: steps[-1]] == [
        *range(1, steps[-1] + 1)
    ], "metrics of the checkpoint's steps are lost"
    return steps[-1], state


def _save(folder: pathlib.Path, step: int, state: bytes) -> None:
    scratch = folder / f"{step}.orbax-checkpoint-tmp-0"
    shutil.rmtree(scratch, ignore_errors=True)
    (scratch / "d").mkdir(parents=True)
    (scratch / "d" / "state").write_bytes(state)
    digest = hashlib.sha256(state).hexdigest()
    (scratch / "checksums.json").write_text(json.dumps({"d/state": digest}))
    scratch.rename(folder / str(step))
    shutil.rmtree(folder / str(step - 2), ignore_errors=True)  # one is kept


def _write(path: pathlib.Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = path.with_name(f".{path.name}.tmp-1")
    scratch.write_text(text)
    scratch.replace(path)

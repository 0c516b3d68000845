"""The working directory of a run: its config, its owner, its lock and its files."""

import contextlib
import json
import os
import pathlib
import socket
import time
from collections.abc import Iterator

import jax

from kdjax import config as config_lib
from kdjax.config import Config
from kdjax.experiment import resume
from kdjax.parallel import distributed
from kdjax.runtime import files, locks

CONFIG = "config.json"
SUMMARY = "summary.json"
GENERATIONS = "generations.jsonl"
CHOICES = "choices.jsonl"
_SHARED_SECONDS = 60.0  # until another host sees a new file
# What a run of one config leaves that one of another must not take for its own.
_RESULTS = ("checkpoints/*", "teacher", "teacher_run/checkpoints/*", SUMMARY)


def read_config(folder: pathlib.Path) -> Config:
    """Read the config that a directory belongs to.

    Raises:
      ValueError: there is none, or a field is unknown.
    """
    file = folder / CONFIG
    if not file.is_file():
        raise ValueError(
            f"workdir={str(folder)!r} has no {CONFIG}: give the directory of a run"
        )
    values = files.read_json(file, remedy="remove it; a run writes its own anew")
    try:
        return config_lib.from_json(json.dumps(values))
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from None


@contextlib.contextmanager
def hold(
    folder: str | os.PathLike,
    *,
    name: str = "workdir",
    remedy: str = "another --workdir",
) -> Iterator[None]:
    """Hold the lock of a folder: process 0 does, for all processes of a run.

    Args:
      folder: made when missing.
      name: of the folder's flag or field, for errors.
      remedy: what else to use, for errors.

    Raises:
      ValueError: another run holds it, which is named; or another process of this run
        does not see the folder of process 0.
    """
    with contextlib.ExitStack() as stack:
        if distributed.is_main():
            stack.enter_context(locks.hold(folder, name=name, remedy=remedy))
        distributed.barrier(f"hold {folder}")
        if not distributed.is_main():
            _check_shared(pathlib.Path(folder), name)
        yield


@contextlib.contextmanager
def hold_output(out: str | os.PathLike) -> Iterator[None]:
    """Hold the lock of a new folder, beside it; dead processes' leftovers are cleared.

    Args:
      out: the folder; those above it are made.

    Raises:
      ValueError: another process writes it.
    """
    path = pathlib.Path(out).absolute()
    with contextlib.ExitStack() as stack:
        if distributed.is_main():
            lock = locks.hold(
                path.parent,
                name="out",
                remedy="another --out",
                file=f".{path.name}.lock",
            )
            stack.enter_context(lock)
            files.clear_leftovers(path.parent, path.name)
        yield


def _check_shared(folder: pathlib.Path, name: str) -> None:
    """Check that this is the folder of process 0."""
    deadline = time.monotonic() + _SHARED_SECONDS
    while not (folder / locks.LOCK).is_file():
        if time.monotonic() > deadline:
            raise ValueError(
                f"{name}={str(folder)!r} of process {jax.process_index()} (host "
                f"{socket.gethostname()}) is not the folder of process 0, whose lock "
                "is not in it: use one on a file system that all processes share"
            )
        time.sleep(0.1)


def claim(folder: pathlib.Path, config: Config) -> None:
    """Make a working directory this config's own, or check that it is.

    Raises:
      ValueError: another config has run there; the fields that differ are named.
    """
    check_owner(folder, config)
    distributed.barrier("claim")
    if distributed.is_main():
        write_config(folder, config)


def check_owner(folder: pathlib.Path, config: Config) -> None:
    """Check that no other config has run in a directory, but for one that failed early.

    Raises:
      ValueError: one has; the fields that differ are named.
    """
    if not (folder / CONFIG).exists() or not _has_results(folder):
        return
    if changed := resume.differences(read_config(folder), config):
        raise ValueError(
            f"workdir={str(folder)!r} holds a run of another config "
            f"({'; '.join(changed)}): use another --workdir, or remove it"
        )


def _has_results(folder: pathlib.Path) -> bool:
    """Return True if a run has got as far as something that is used again."""
    metrics = folder / "metrics.jsonl"
    if metrics.is_file() and metrics.stat().st_size:
        return True
    return any(next(folder.glob(name), None) is not None for name in _RESULTS)


def write_config(folder: pathlib.Path, config: Config) -> None:
    """Write the config that a directory belongs to."""
    files.write_atomically(folder / CONFIG, config_lib.to_json(config))

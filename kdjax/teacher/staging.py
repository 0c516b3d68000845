"""New files and folders that appear whole under their names, or not at all.

They are written as `.NAME.partial` beside their place. What a killed process left there
is cleared by the next one that writes the same.
"""

import contextlib
import fcntl
import os
import pathlib
import shutil
from collections.abc import Iterator

from kdjax.runtime import files


@contextlib.contextmanager
def new_folder(out: str | os.PathLike) -> Iterator[pathlib.Path]:
    """Yield a folder to fill, which becomes `out` when the block ends.

    Raises:
      ValueError: there is something in `out`, or another process is writing it.
    """
    path = pathlib.Path(out)
    if path.exists() and not (path.is_dir() and not any(path.iterdir())):
        raise ValueError(f"out={out!s} is not empty: name a new folder")
    partial = _partial(path)
    partial.mkdir(parents=True, exist_ok=True)
    with _locked(partial, path):
        try:
            for leftover in partial.iterdir():
                _remove(leftover)
            yield partial
            files.sync(partial)
            if path.exists():
                path.rmdir()
            partial.rename(path)
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)
            raise
    files.sync(path.parent)


@contextlib.contextmanager
def new_file(out: str | os.PathLike) -> Iterator[pathlib.Path]:
    """Yield a path to write, which becomes `out` when the block ends.

    Raises:
      ValueError: `out` exists, its folder does not, or another process is writing it.
    """
    path = pathlib.Path(out)
    if os.path.lexists(path) or not path.parent.is_dir():
        raise ValueError(f"out={out!s} exists, or its folder does not: name a new file")
    partial = _partial(path)
    if partial.is_dir():
        _remove(partial)
    partial.touch()
    with _locked(partial, path):
        try:
            yield partial
            files.sync(partial)
            partial.replace(path)
        except BaseException:
            partial.unlink(missing_ok=True)
            raise
    files.sync(path.parent)


def _partial(path: pathlib.Path) -> pathlib.Path:
    absolute = path.absolute()
    return absolute.with_name(f".{absolute.name}.partial")


@contextlib.contextmanager
def _locked(partial: pathlib.Path, path: pathlib.Path) -> Iterator[None]:
    descriptor = os.open(partial, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(
                f"out={path!s} is being written by another process: name another"
            ) from None
        except OSError:  # a file system without locks
            pass
        yield
    finally:
        os.close(descriptor)


def _remove(path: pathlib.Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink()

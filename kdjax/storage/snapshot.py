"""The files of a folder at one instant, while others write there.

Two listings of the folder with nothing different between them are its state at every
moment between the two; then its files are linked, and what is appended to is copied. So
a snapshot is what a power cut at that moment would have left.
"""

import contextlib
import os
import pathlib
import re
import shutil
import stat
import time
from collections.abc import Iterator
from typing import NamedTuple

import xxhash

from kdjax.runtime import files

_APPENDED = re.compile(r"metrics\.jsonl|events\.out\..*")  # in place, to their end
_ATTEMPTS, _PAUSE_SECONDS = 50, 0.1
_BLOCK_BYTES = 1 << 20


class File(NamedTuple):
    """A file as a listing has it."""

    inode: int
    num_bytes: int
    modified: int  # nanoseconds


class BusyError(OSError):
    """A folder that changed between any two listings."""


def is_temporary(name: str) -> bool:
    """Return True if a file or folder of this name is unfinished, or a lock."""
    return (
        files.is_temporary(name)
        or name == ".lock"
        or (name.startswith(".") and name.endswith((".lock", ".partial")))
        or "orbax-checkpoint-tmp" in name
    )


def listing(folder: pathlib.Path) -> dict[str, File]:
    """List the files below a folder, without temporary ones and links, by path."""
    entries = {}
    for parent, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if not is_temporary(name)]
        for name in names:
            path = pathlib.Path(parent, name)
            with contextlib.suppress(FileNotFoundError):  # it was removed
                status = path.lstat()
                if stat.S_ISREG(status.st_mode) and not is_temporary(name):
                    entries[path.relative_to(folder).as_posix()] = File(
                        status.st_ino, status.st_size, status.st_mtime_ns
                    )
    return entries


@contextlib.contextmanager
def take(folder: pathlib.Path) -> Iterator[tuple[pathlib.Path, dict[str, File]]]:
    """Yield a folder with the files of another one, as links, and their listing.

    It lies beside the folder, on the same disk, and is removed after the block.

    Raises:
      BusyError: the folder did not stand still between two listings.
    """
    scratch = files.temporary(folder)
    shutil.rmtree(scratch, ignore_errors=True)
    try:
        for _ in range(_ATTEMPTS):
            entries = listing(folder)
            try:
                entries = _copy(folder, scratch, entries)
            except FileNotFoundError:
                pass
            else:
                if _standing(listing(folder)) == _standing(entries):
                    yield scratch, entries
                    return
            shutil.rmtree(scratch, ignore_errors=True)
            time.sleep(_PAUSE_SECONDS)
        raise BusyError(f"{folder} changes all the time: too much to copy a moment of")
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def checksum(file: pathlib.Path) -> str:
    """Return the XXH3 of a file, 128 bits, hex."""
    digest = xxhash.xxh3_128()
    with file.open("rb") as stream:
        while block := stream.read(_BLOCK_BYTES):
            digest.update(block)
    return digest.hexdigest()


def _is_appended(path: str) -> bool:
    return _APPENDED.fullmatch(path.rpartition("/")[2]) is not None


def _standing(entries: dict[str, File]) -> dict[str, File]:
    """Return a listing in which files that are appended to may grow."""
    return {
        path: File(entry.inode, 0, 0) if _is_appended(path) else entry
        for path, entry in entries.items()
    }


def _copy(
    folder: pathlib.Path, scratch: pathlib.Path, entries: dict[str, File]
) -> dict[str, File]:
    """Link the files of a listing, or copy those that may change in place.

    Returns:
      The listing, with the bytes of files that were copied.
    """
    scratch.mkdir(parents=True, exist_ok=True)
    copied = {}
    for path, entry in entries.items():
        target = scratch / path
        target.parent.mkdir(parents=True, exist_ok=True)
        copied[path] = entry
        if not _is_appended(path):
            try:
                os.link(folder / path, target)
                continue
            except FileNotFoundError:
                raise
            except OSError:  # a file system without links
                pass
        shutil.copyfile(folder / path, target)
        copied[path] = entry._replace(num_bytes=target.stat().st_size)
    return copied

"""Atomic, durable writes of small files; temporary names that tell their owner."""

import contextlib
import functools
import hashlib
import json
import math
import os
import pathlib
import re
import shutil
import socket
import stat
import time
from collections.abc import Mapping, Sequence
from typing import Any

# .NAME.tmp-HOST-MACHINE-PID of `temporary`
_TEMPORARY = re.compile(r"\..+\.tmp-.*-([0-9a-f]{8})-(\d+)")
# What earlier versions left: NAME.tmpPID, .NAME.tmp-PID
_FORMER_TEMPORARY = re.compile(r"(?:.+\.tmp|\..+\.tmp-)(\d+)")
_FOREIGN_SECONDS = 24 * 3600.0  # leftovers of other machines are dead after a day


def write_atomically(file: str | os.PathLike, content: str | bytes) -> None:
    """Replace the content of a file: after a crash it has the old one or the new one.

    A temporary file beside it is written and fsynced, renamed, and the folder fsynced,
    so that what has returned survives a power cut. What is no plain file, such as
    /dev/stdout, is written to and stays what it is.

    Args:
      file: path to write; its folders are made.
      content: text is encoded as UTF-8.
    """
    file = pathlib.Path(file)
    data = content.encode() if isinstance(content, str) else content
    if file.exists() and not stat.S_ISREG(file.stat().st_mode):
        with file.open("wb") as stream:
            stream.write(data)
        return
    file.parent.mkdir(parents=True, exist_ok=True)
    scratch = temporary(file)
    try:
        scratch.write_bytes(data)
        sync(scratch)
        scratch.replace(file)
    except OSError as error:
        if error.errno and not error.filename:  # as of a full disk
            error.filename = str(file)
        raise
    finally:
        with contextlib.suppress(OSError):  # not in place of what went wrong before
            scratch.unlink(missing_ok=True)
    sync(file.parent)


def write_json(file: str | os.PathLike, value: Any) -> None:
    """Write an indented JSON value atomically; NaN and infinities become null.

    JSON has no word for them: `NaN`, which Python writes by default, is refused by
    most readers.

    Args:
      file: path to write; its folders are made.
      value: mappings, sequences, text and numbers.
    """
    text = json.dumps(finite(value), indent=2, allow_nan=False)
    write_atomically(file, text + "\n")


def read_json(file: str | os.PathLike, *, remedy: str = "remove it") -> dict[str, Any]:
    """Read a JSON object that a command has written.

    Args:
      file: path to read.
      remedy: what to do about a damaged one, for errors.

    Raises:
      ValueError: the file is empty or damaged; it is named.
    """
    text = pathlib.Path(file).read_bytes()
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        problem = f"is damaged ({error})" if text.strip() else "is empty"
        raise ValueError(f"{file!s} {problem}: {remedy}") from None
    if not isinstance(value, dict):
        raise ValueError(f"{file!s} is damaged (no JSON object): {remedy}")
    return value


def read_jsonl(
    file: str | os.PathLike, *, remedy: str = "remove it"
) -> list[dict[str, Any]]:
    """Read the lines of a file of JSON objects that a command has written.

    Args:
      file: path to read.
      remedy: what to do about a damaged line, for errors.

    Raises:
      ValueError: a line is damaged; file and number are named.
    """
    return parse_jsonl(pathlib.Path(file).read_bytes().splitlines(), file, remedy)


def parse_jsonl(
    lines: Sequence[bytes], file: str | os.PathLike, remedy: str
) -> list[dict[str, Any]]:
    """Parse lines of JSON objects; arguments and errors as `read_jsonl`."""
    rows = []
    for number, line in enumerate(lines, 1):
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            row = None
        if not isinstance(row, dict):
            raise ValueError(f"{file!s}:{number} is damaged: {remedy}")
        rows.append(row)
    return rows


def finite(value: Any) -> Any:
    """Return a JSON value with null in place of floats that are not finite."""
    if isinstance(value, Mapping):
        return {key: finite(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [finite(inner) for inner in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def exists(path: str | os.PathLike) -> bool:
    """Return True if there is something of that name, also a link to nothing.

    Raises:
      OSError: that may not be known; `os.path` and `pathlib` say that there is nothing.
    """
    try:
        os.lstat(path)
    except (FileNotFoundError, NotADirectoryError):
        return False
    return True


def sync(path: str | os.PathLike) -> None:
    """Make the content of a file, or the names in a folder, survive a power cut."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def temporary(path: pathlib.Path) -> pathlib.Path:
    """Return a hidden name beside a path, with this host and process in it."""
    digest = hashlib.blake2b(machine().encode(), digest_size=4).hexdigest()
    host = re.sub(r"[^\w.]", "_", socket.gethostname())[:32]
    return path.with_name(f".{path.name[:128]}.tmp-{host}-{digest}-{os.getpid()}")


def is_temporary(name: str) -> bool:
    """Return True if a name is one of `temporary`, or of earlier versions' ones."""
    patterns = (_TEMPORARY, _FORMER_TEMPORARY)
    return any(pattern.fullmatch(name) for pattern in patterns)


def clear_leftovers(folder: pathlib.Path, name: str = "") -> None:
    """Remove temporary files and folders whose processes are dead.

    Those of other machines are left for a day.

    Args:
      folder: its own entries are looked at, not those below them.
      name: of the file or folder whose temporary ones are removed; "" = all.
    """
    digest = hashlib.blake2b(machine().encode(), digest_size=4).hexdigest()
    for path in folder.iterdir():
        if name and not path.name.startswith(f".{name[:128]}.tmp-"):
            continue
        if match := _TEMPORARY.fullmatch(path.name):
            own, pid = match[1] == digest, int(match[2])
        elif match := _FORMER_TEMPORARY.fullmatch(path.name):
            own, pid = False, int(match[1])
        else:
            continue
        with contextlib.suppress(OSError):  # it is gone, or another user's
            age = time.time() - path.lstat().st_mtime
            if is_running(pid) if own else age < _FOREIGN_SECONDS:
                continue
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink()


@functools.cache
def machine() -> str:
    """Return the running kernel and process namespace: pids of equal ones compare."""
    try:
        boot = pathlib.Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:  # not Linux
        return f"{socket.gethostname()} -"


def process_start(pid: int) -> int:
    """Return when a process of this machine started, ticks after boot; 0 = unknown."""
    fields = _process_fields(pid)
    return int(fields[19]) if fields else 0


def is_running(pid: int, start: int = 0) -> bool:
    """Return True if a process of this machine runs.

    Args:
      pid: of the process.
      start: from `process_start`: another process of that number does not count;
        0 = any.
    """
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # another user's
        pass
    fields = _process_fields(pid)
    if not fields:
        return True
    return fields[0] not in ("Z", "X") and start in (0, int(fields[19]))


def _process_fields(pid: int) -> list[str]:
    """Return the fields of /proc/PID/stat from the state on; [] if there are none."""
    try:
        text = pathlib.Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return []
    return text.rpartition(")")[2].split()

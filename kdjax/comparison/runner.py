"""Runs the items of a comparison as processes: several at a time, each once.

An item's directory says where it stands: `finished.json` has the commands that ended
well, with their seconds; `failed.json` the error of one that did not.
"""

import dataclasses
import json
import os
import pathlib
import signal
import time
from collections.abc import Callable, Generator, Mapping, Sequence
from typing import Any

from kdjax.comparison.forks import Server
from kdjax.comparison.grid import Item
from kdjax.runtime import files

FINISHED, FAILED, LOG = "finished.json", "failed.json", "log.txt"
_PAUSE = 0.1  # seconds between looks at the processes


def finished(item: Item, workdir: pathlib.Path) -> bool:
    """Whether all commands of an item have ended well."""
    done = _done(workdir / item.name)
    return all(" ".join(command) in done for command in item.commands)


def _done(folder: pathlib.Path) -> dict[str, float]:
    """Seconds that each command took which has ended well."""
    file = folder / FINISHED
    return json.loads(file.read_text()) if file.is_file() else {}


def error(folder: pathlib.Path) -> str:
    """Why the item failed when it was last tried; "" if it did not."""
    file = folder / FAILED
    return json.loads(file.read_text())["error"] if file.is_file() else ""


@dataclasses.dataclass
class Place:
    """Where one process at a time runs: its share of the machine."""

    cores: tuple[int, ...]  # CPU cores; () = wherever
    environment: Mapping[str, str]  # names its accelerator, where there are any


def places(jobs: int) -> list[Place]:
    """Shares of this machine for processes side by side.

    With GPUs each process has one of its own, without an equal part of the CPU cores.

    Raises:
      ValueError: more jobs than GPUs or cores.
    """
    gpus = _gpus()
    if gpus and "cpu" not in os.environ.get("JAX_PLATFORMS", "").split(","):
        what, limit = "GPUs", len(gpus)
        found = [Place((), {"CUDA_VISIBLE_DEVICES": gpu}) for gpu in gpus[:jobs]]
        if jobs == 1:
            found = [Place((), {})]
    else:
        cores = _cores()
        what, limit = "CPU cores", len(cores)
        found = [Place(tuple(cores[job::jobs]), {}) for job in range(jobs)]
    if not 1 <= jobs <= limit:
        raise ValueError(
            f"--jobs={jobs}: this machine has {limit} {what}; use 1 to {limit}"
        )
    return found


def run(
    items: Sequence[Item],
    workdir: pathlib.Path,
    *,
    jobs: int,
    report: Callable[[Item, str], None],
) -> None:
    """Runs what is not finished, each item after those it needs.

    An item that fails is left with its error, as is one that needs it; all others
    go on. Processes end with this one, however it ends.

    Args:
      items: in any order that has needs first.
      workdir: of the comparison.
      jobs: processes at a time.
      report: called with an item and its error ("" = none) when it has ended.
    """
    free = places(jobs)
    waiting = [item for item in items if not finished(item, workdir)]
    unfinished = {item.name for item in waiting}
    failed: set[str] = set()
    running: list[tuple[Item, Place, Generator[str | None, None, None]]] = []
    server = Server()
    try:
        while waiting or running:
            for item in list(waiting):
                if lost := sorted(failed & set(item.needs)):
                    waiting.remove(item)
                    failed.add(item.name)
                    _fail(workdir / item.name, f"{lost[0]} failed, which it needs")
                    report(item, error(workdir / item.name))
                elif _can_start(item, unfinished, running, free):
                    waiting.remove(item)
                    place = Place((), {}) if item.alone else free.pop()
                    running.append((item, place, _steps(item, workdir, place, server)))
            for entry in list(running):
                item, place, steps = entry
                if (outcome := next(steps)) is None:
                    continue
                running.remove(entry)
                if not item.alone:
                    free.append(place)
                if outcome:
                    failed.add(item.name)
                else:
                    unfinished.discard(item.name)
                report(item, outcome)
            time.sleep(_PAUSE)
    finally:
        for _, _, steps in running:
            steps.close()
        server.close()


def _can_start(
    item: Item,
    unfinished: set[str],
    running: Sequence[tuple[Item, Any, Any]],
    free: Sequence[Place],
) -> bool:
    """Whether all that an item needs is there, and room for it."""
    if unfinished & set(item.needs) or any(other.alone for other, _, _ in running):
        return False
    return not running if item.alone else bool(free)


def _steps(
    item: Item, workdir: pathlib.Path, place: Place, server: Server
) -> Generator[str | None, None, None]:
    """Runs the commands of an item; yields None until done, then the error or ""."""
    folder = workdir / item.name
    (folder / FAILED).unlink(missing_ok=True)
    done = _done(folder)
    for command in item.commands:
        if " ".join(command) in done:
            continue
        start = time.monotonic()
        verb, *flags = command
        whole = [verb, f"--workdir={folder}", *flags]
        with (folder / LOG).open("ab") as log:
            log.write(f"$ python -m {' '.join(whole)}\n".encode())
            log.flush()
            begin = log.tell()
        process = server.start(
            whole,
            log=folder / LOG,
            cores=place.cores,
            environment=place.environment,
        )
        code = None
        try:
            while (code := process.poll()) is None:
                yield None
        finally:
            if code is None:  # this process is interrupted
                process.end()
        if code:
            message = _reason(code, folder / LOG, begin)
            _fail(folder, f"{verb}: {message}")
            yield error(folder)
            return
        done[" ".join(command)] = round(time.monotonic() - start, 1)
        files.write_json(folder / FINISHED, done)
    yield ""


def _fail(folder: pathlib.Path, message: str) -> None:
    files.write_json(folder / FAILED, {"error": message})


def _reason(code: int, log: pathlib.Path, begin: int) -> str:
    """What a process that did not end well has said last, or what ended it."""
    if code < 0:
        name = signal.Signals(-code).name
        memory = " (out of memory?)" if -code == signal.SIGKILL else ""
        return f"ended by {name}{memory}"
    with log.open("rb") as file:
        file.seek(begin)
        lines = file.read().decode(errors="replace").split("\n")
    said = [line.strip() for line in lines if line.strip()]
    named = [line for line in said if ": error: " in line]
    last = (named or said or [f"exit code {code}"])[-1]
    return last.partition(": error: ")[2] or last


def _cores() -> list[int]:
    if hasattr(os, "sched_getaffinity"):
        return sorted(os.sched_getaffinity(0))
    return list(range(os.cpu_count() or 1))


def _gpus() -> list[str]:
    """Names of the NVIDIA GPUs that a process may use."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        return [name for name in visible.split(",") if name.strip()]
    folder = pathlib.Path("/proc/driver/nvidia/gpus")
    return [str(n) for n, _ in enumerate(folder.iterdir())] if folder.is_dir() else []

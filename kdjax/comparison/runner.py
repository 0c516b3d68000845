"""Scheduler of a comparison's tasks: processes side by side, each task once.

A task's directory has its state: `finished.json` the commands that have succeeded, with
their seconds; `failed.json` the error of one that has not.
"""

import dataclasses
import graphlib
import os
import pathlib
import signal
import time
from collections.abc import Callable, Generator, Mapping, Sequence

from kdjax.comparison.grid import Task
from kdjax.runtime import files, processes

FINISHED, FAILED, LOG = "finished.json", "failed.json", "log.txt"
# What the commands import where they run; they themselves are run as __main__.
PRELOAD = ("kdjax.training.loop", "kdjax.evaluation.scorer", "kdjax.teacher.build")
_POLL_SECONDS = 0.1


def finished(task: Task, workdir: pathlib.Path) -> bool:
    """Return whether all commands of a task have succeeded."""
    seconds = _seconds(workdir / task.name)
    return all(" ".join(command) in seconds for command in task.commands)


def _seconds(folder: pathlib.Path) -> dict[str, float]:
    """Return the seconds that each command took which has succeeded."""
    file = folder / FINISHED
    if not file.is_file():
        return {}
    return files.read_json(file, remedy="remove it; what it names is run again")


def error(folder: pathlib.Path) -> str:
    """Return why the task failed when it was last tried; "" if it did not."""
    file = folder / FAILED
    if not file.is_file():
        return ""
    return files.read_json(file, remedy="remove it").get("error", "")


@dataclasses.dataclass
class Slot:
    """A share of the machine, in which one process at a time runs."""

    cores: tuple[int, ...]  # CPU cores; () = all
    environment: Mapping[str, str]  # names its accelerator, where there are any


def slots(jobs: int) -> list[Slot]:
    """Divide this machine among processes side by side.

    With GPUs each process has one of its own, without an equal part of the CPU cores.

    Raises:
      ValueError: more jobs than GPUs or cores.
    """
    gpus = _gpus()
    if gpus and "cpu" not in os.environ.get("JAX_PLATFORMS", "").split(","):
        unit, limit = "GPUs", len(gpus)
        shares = [Slot((), {"CUDA_VISIBLE_DEVICES": gpu}) for gpu in gpus[:jobs]]
        if jobs == 1:
            shares = [Slot((), {})]
    else:
        cores = _cores()
        unit, limit = "CPU cores", len(cores)
        shares = [Slot(tuple(cores[job::jobs]), {}) for job in range(jobs)]
    if not 1 <= jobs <= limit:
        raise ValueError(
            f"--jobs={jobs}: this machine has {limit} {unit}; use 1 to {limit}"
        )
    return shares


def run(
    tasks: Sequence[Task],
    workdir: pathlib.Path,
    *,
    jobs: int,
    report: Callable[[Task, str], None],
    started: Callable[[list[str]], None] = lambda names: None,
) -> None:
    """Run what is not finished, each task after those it depends on.

    A task that fails is left with its error, as is one that depends on it; all others
    go on. Processes end with this one, however it ends.

    Args:
      tasks: in any order.
      workdir: of the comparison.
      jobs: processes at a time.
      report: called with a task and its error ("" = none) when it has ended.
      started: called with the names of all running tasks when one has started.
    """
    free = slots(jobs)
    processes.preload(PRELOAD)
    todo = {task.name: task for task in tasks if not finished(task, workdir)}
    graph = graphlib.TopologicalSorter(
        {task.name: todo.keys() & set(task.depends_on) for task in todo.values()}
    )
    graph.prepare()
    ready: list[Task] = []
    failed: set[str] = set()
    running: list[tuple[Task, Slot, Generator[str | None, None, None]]] = []

    def end(task: Task, message: str) -> None:
        if message:
            failed.add(task.name)
        graph.done(task.name)
        report(task, message)

    try:
        while graph.is_active():
            ready += [todo[name] for name in graph.get_ready()]
            for task in list(ready):
                if broken := sorted(failed & set(task.depends_on)):
                    ready.remove(task)
                    _fail(workdir / task.name, f"{broken[0]} failed, which it needs")
                    end(task, error(workdir / task.name))
                elif _can_start(task, [other for other, _, _ in running], free):
                    ready.remove(task)
                    slot = Slot((), {}) if task.exclusive else free.pop()
                    running.append((task, slot, _run_commands(task, workdir, slot)))
                    started([other.name for other, _, _ in running])
            for entry in list(running):
                task, slot, commands = entry
                if (message := next(commands)) is None:
                    continue
                running.remove(entry)
                if not task.exclusive:
                    free.append(slot)
                end(task, message)
            time.sleep(_POLL_SECONDS)
    finally:
        for _, _, commands in running:
            commands.close()


def _can_start(task: Task, running: Sequence[Task], free: Sequence[Slot]) -> bool:
    """Return whether there is a slot, and no conflict with a task that is timed."""
    if task.exclusive:
        return not running
    return bool(free) and not any(other.exclusive for other in running)


def _run_commands(
    task: Task, workdir: pathlib.Path, slot: Slot
) -> Generator[str | None, None, None]:
    """Run the commands of a task; yield None until done, then the error or ""."""
    folder = workdir / task.name
    (folder / FAILED).unlink(missing_ok=True)
    seconds = _seconds(folder)
    for command in task.commands:
        if " ".join(command) in seconds:
            continue
        start = time.monotonic()
        module, *flags = command
        arguments = [f"--workdir={folder}", *flags]
        with (folder / LOG).open("ab") as log:
            log.write(f"$ python -m {' '.join([module, *arguments])}\n".encode())
            log.flush()
            begin = log.tell()
        process = processes.start(
            [module, *arguments],
            log=folder / LOG,
            cores=slot.cores,
            environment=slot.environment,
        )
        try:
            while process.exitcode is None:
                yield None
        finally:  # also where this process is interrupted
            process.terminate()
            process.join()
        if process.exitcode:
            message = _reason(process.exitcode, folder / LOG, begin)
            _fail(folder, f"{module}: {message}")
            yield error(folder)
            return
        seconds[" ".join(command)] = round(time.monotonic() - start, 1)
        files.write_json(folder / FINISHED, seconds)
    yield ""


def _fail(folder: pathlib.Path, message: str) -> None:
    files.write_json(folder / FAILED, {"error": message})


def _reason(code: int, log: pathlib.Path, begin: int) -> str:
    """Return the last words of a process that failed, or the signal that ended it."""
    if code < 0:
        name = signal.Signals(-code).name
        memory = " (out of memory?)" if -code == signal.SIGKILL else ""
        return f"ended by {name}{memory}"
    with log.open("rb") as file:
        file.seek(begin)
        lines = file.read().decode(errors="replace").split("\n")
    lines = [line.strip() for line in lines if line.strip()]
    errors = [line for line in lines if ": error: " in line]
    last = (errors or lines or [f"exit code {code}"])[-1]
    return last.partition(": error: ")[2] or last


def _cores() -> list[int]:
    if hasattr(os, "sched_getaffinity"):
        return sorted(os.sched_getaffinity(0))
    return list(range(os.cpu_count() or 1))


def _gpus() -> list[str]:
    """Return the names of the NVIDIA GPUs that a process may use."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        return [name for name in visible.split(",") if name.strip()]
    folder = pathlib.Path("/proc/driver/nvidia/gpus")
    return [str(n) for n, _ in enumerate(folder.iterdir())] if folder.is_dir() else []

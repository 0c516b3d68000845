"""Commands as forked processes, with CPU cores, environment and a log of their own.

Importing JAX, transformers and orbax takes seconds. A fork server imports them once,
starts no thread and no backend, and each command runs in a fork of it, as
`python -m MODULE` would.
"""

import multiprocessing
import os
import pathlib
import runpy
import signal
import sys
import threading
from collections.abc import Mapping, Sequence
from multiprocessing import forkserver
from multiprocessing.process import BaseProcess

_CONTEXT = multiprocessing.get_context("forkserver")


def preload(modules: Sequence[str]) -> None:
    """Have the fork server import modules, if it has not been started."""
    if sys.platform == "linux":  # elsewhere libraries may not stand a fork
        _CONTEXT.set_forkserver_preload(list(modules))


def start(
    command: Sequence[str],
    *,
    log: pathlib.Path,
    cores: Sequence[int] = (),
    environment: Mapping[str, str] | None = None,
) -> BaseProcess:
    """Start a command; it is killed when this process ends, however that happens.

    Args:
      command: a module's name, and its arguments.
      log: the file to which its output is appended.
      cores: CPU cores that it may run on; () = all.
      environment: variables that it has besides those of this process.

    Returns:
      The process: `exitcode` is None while it runs, the negative number of the signal
      that ended it, or its exit code.
    """
    variables = os.environ | (environment or {})
    process = _CONTEXT.Process(
        target=_run, args=(tuple(command), str(log), tuple(cores), dict(variables))
    )
    _start_server()
    process.start()
    return process


def _start_server() -> None:
    """Start the fork server, which ignores a terminal's Ctrl-C, as do its forks.

    Whoever started them gets it, and ends them by SIGTERM.
    """
    if threading.current_thread() is not threading.main_thread():
        return
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        forkserver.ensure_running()
    finally:
        signal.signal(signal.SIGINT, before)


def _run(
    command: tuple[str, ...],
    log: str,
    cores: tuple[int, ...],
    environment: dict[str, str],
) -> None:
    """Run a command in this process, made for it."""
    descriptor = os.open(log, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    for stream in (1, 2):
        os.dup2(descriptor, stream)
    os.environ.update(environment)
    if cores and sys.platform == "linux":
        os.sched_setaffinity(0, cores)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    module, *sys.argv[1:] = command
    runpy.run_module(module, run_name="__main__", alter_sys=True)


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)

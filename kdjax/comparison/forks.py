"""Starts the processes of a comparison as forks of one that has done their imports.

A process of JAX, transformers and orbax takes 6 seconds to import them and more where
PyTorch is installed: a good part of a small run. Here one process imports once, starts
no thread and no backend, and forks: a child runs its command as `python -m` does.

A process of its own (`python -m kdjax.comparison.forks PARENT MODULE ...`), since the
one that asks has threads, which a fork does not copy. It answers in lines of JSON.
"""

import contextlib
import ctypes
import dataclasses
import gc
import importlib
import json
import os
import pathlib
import runpy
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence

_PR_SET_PDEATHSIG = 1  # of Linux
# What the commands have in common; the commands themselves are run as __main__.
IMPORTED: tuple[str, ...] = ("kdjax.experiment.build", "kdjax.cli")


@dataclasses.dataclass
class Process:
    """A command that runs."""

    server: "Server"
    pid: int

    def poll(self) -> int | None:
        """The exit code, a signal's number negative; None while it runs."""
        return self.server.ask({"poll": self.pid})

    def end(self) -> None:
        """Ends it, and waits until it has."""
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.pid, signal.SIGTERM)
        self.server.ask({"wait": self.pid})


class Server:
    """The process that forks; it and all that it started end with this one."""

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", __name__, str(os.getpid()), *IMPORTED],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def start(
        self,
        command: Sequence[str],
        *,
        log: pathlib.Path,
        cores: Sequence[int] = (),
        environment: Mapping[str, str] | None = None,
    ) -> Process:
        """Starts a command.

        Args:
          command: a module's name, and its arguments.
          log: the file to which it appends what it prints.
          cores: CPU cores that it keeps to; () = all.
          environment: variables it has besides those of this process.
        """
        pid = self.ask(
            {
                "command": list(command),
                "log": str(log),
                "cores": list(cores),
                "environment": dict(environment or {}),
            }
        )
        assert pid is not None
        return Process(self, pid)

    def ask(self, request: object) -> int | None:
        """The answer to a request.

        Raises:
          RuntimeError: the server has ended.
        """
        assert self._process.stdin and self._process.stdout
        answer = ""
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.write(json.dumps(request) + "\n")
            self._process.stdin.flush()
            answer = self._process.stdout.readline()
        if not answer:
            code = self._process.wait()
            raise RuntimeError(f"the process that starts runs ended with code {code}")
        return json.loads(answer)

    def close(self) -> None:
        """Ends the server."""
        self._process.kill()
        self._process.communicate()


def _end_with(parent: int) -> None:
    """Makes this process end when its parent does."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:
            os._exit(1)


def _serve(imported: Sequence[str]) -> list[str]:
    """Answers until nobody asks; a child returns from here with its command."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the one that asks ends all
    for name in imported:
        importlib.import_module(name)
    gc.collect()
    gc.freeze()  # the children share these pages
    server = os.getpid()
    for line in sys.stdin:
        request = json.loads(line)
        if "command" in request:
            answer: int | None = os.fork()
            if not answer:
                _end_with(server)
                _become(**request)
                return request["command"]
        else:
            (how, pid), *_ = request.items()
            done, status = os.waitpid(pid, os.WNOHANG if how == "poll" else 0)
            answer = os.waitstatus_to_exitcode(status) if done else None
        print(json.dumps(answer), flush=True)
    os._exit(0)


def _become(
    command: Sequence[str],
    log: str,
    cores: Sequence[int],
    environment: Mapping[str, str],
) -> None:
    """Makes this child what the command expects."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    nothing = os.open(os.devnull, os.O_RDONLY)
    file = os.open(log, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    for number, target in enumerate((nothing, file, file)):
        os.dup2(target, number)
    os.environ.update(environment)
    if sys.platform == "linux":
        if cores:
            os.sched_setaffinity(0, cores)
    else:  # where what is imported may not stand a fork
        os.execv(sys.executable, [sys.executable, "-m", *command])
    sys.argv[1:] = command[1:]


if __name__ == "__main__":
    _end_with(int(sys.argv[1]))
    runpy.run_module(_serve(sys.argv[2:])[0], run_name="__main__", alter_sys=True)

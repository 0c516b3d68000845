"""A store in memory whose requests are counted, fail or end the process that asks."""

import threading
from collections.abc import Callable

import pytest
from fsspec.implementations.memory import MemoryFileSystem

from kdjax.storage import mirror, store

CHANGES = ("pipe_file", "put_file", "cp_file", "rm_file")
REQUESTS = (*CHANGES, "cat_file", "get_file", "info", "modified", "ls")


class KilledError(BaseException):
    """The end of a process by kill -9, as far as its store is concerned."""


class Memory(MemoryFileSystem):
    """What is stored, apart from fsspec's own store of the process."""

    cachable = False

    def __init__(self):
        super().__init__()
        self.store, self.pseudo_dirs = {}, [""]


class Files:
    """A file system as a process sees it.

    Args:
      memory: what all processes share.
      kill_at: number of the request, from 0, with which the process ends; None = never.
      after: it ends when the request is done, not before.
      lost: number of the request whose answer is lost; None = all come.
      fault: called with number and name of each request; it may raise.
    """

    def __init__(
        self,
        memory: Memory,
        *,
        kill_at: int | None = None,
        after: bool = False,
        lost: int | None = None,
        fault: Callable[[int, str], None] = lambda number, name: None,
    ) -> None:
        self._memory, self._kill_at, self._after = memory, kill_at, after
        self._lost, self._fault, self._lock = lost, fault, threading.Lock()
        self.requests: list[str] = []
        self.killed = False

    def __getattr__(self, name):
        function = getattr(self._memory, name)
        if name not in REQUESTS:
            return function

        def request(*args, **kwargs):
            with self._lock:
                if self.killed:
                    raise KilledError
                number = len(self.requests)
                self.requests.append(name)
                self.killed = number == self._kill_at
                if self.killed and not self._after:
                    raise KilledError
                self._fault(number, name)
                result = function(*args, **kwargs)
                if self.killed:
                    raise KilledError
                if number == self._lost:
                    raise TimeoutError("no answer")
                return result

        return request


class Machine:
    """A machine with a local disk of its own, and a store that it shares.

    Args:
      monkeypatch: sets what stands for the machine in this process.
      disk: its local disk.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch, disk) -> None:
        self._monkeypatch, self._disk = monkeypatch, disk

    def use(self, files: Files) -> None:
        """Make this process run on the machine, with its own way to the store."""
        self._monkeypatch.setenv("KDJAX_LOCAL_DIR", str(self._disk))
        self._monkeypatch.setattr(store, "open_file_system", lambda scheme: files)
        self._monkeypatch.setattr(store, "_FIRST_DELAY", 0.001)
        self._monkeypatch.setattr(mirror, "_NUM_THREADS", 1)

"""The lease of a mirrored folder: one writer at a time, as far as a store can promise.

An object with its owner, which is made by a conditional request, written again every
few seconds and dead when it was not for two minutes, by the clock of the store. Between
the look at a lease and the next write a process may stand still for long, and another
one may take over: the look comes right before each write of the index, no closer.
"""

import dataclasses
import json
import os
import pathlib
import socket
import sys
import threading
import time
import uuid

from kdjax.runtime import files, locks
from kdjax.storage import index
from kdjax.storage.store import Store, StoreError

LEASE = f"{index.FOLDER}/lease.json"
HEARTBEAT_SECONDS = 20.0
STALE_SECONDS = 120.0
_LOOK_SECONDS = 5.0  # at the lease of an owner that may be dead


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Owner(locks.Owner):
    """The process that holds a lease."""

    beat: int  # how often it was renewed


class Lease:
    """The lease of the folder of a store, taken or not.

    Args:
      store: of the folder.
    """

    def __init__(self, store: Store) -> None:
        self._store = store
        self._owner = Owner(
            host=socket.gethostname(),
            pid=os.getpid(),
            start=files.process_start(os.getpid()),
            machine=files.machine(),
            command=pathlib.Path(sys.argv[0]).stem or "python",
            since=time.strftime("%Y-%m-%d %H:%M:%S"),
            token=uuid.uuid4().hex,
            beat=0,
        )
        self._taken_by = ""  # whoever has taken it over
        self._released = threading.Event()
        self._thread: threading.Thread | None = None

    def acquire(self) -> None:
        """Take the lease, when its owner is dead.

        Raises:
          ValueError: its owner lives, and is named.
          StoreError: the store does not do what is needed.
        """
        first: Owner | None = None
        while not self._store.write(LEASE, _pack(self._owner), new=True):
            owner = self._read()
            if owner is None:
                continue
            if first is not None and owner != first:
                raise ValueError(
                    f"{self._store.url} is being written by {owner}: wait for its end, "
                    "or use another address"
                )
            if self._is_dead(owner):
                if self._read() == owner:
                    self._store.remove(LEASE)
                continue
            if first is None:
                print(
                    f"{self._store.url} was being written by {owner}: up to "
                    f"{STALE_SECONDS:.0f} s until it is known to live or to be dead",
                    file=sys.stderr,
                    flush=True,
                )
            first = owner
            time.sleep(_LOOK_SECONDS)
        self._thread = threading.Thread(target=self._beat, daemon=True, name="lease")
        self._thread.start()

    def release(self) -> None:
        """Remove the lease, if it is still this process's own."""
        self._released.set()
        if self._thread is not None:
            self._thread.join()
        if self._is_held():
            self._store.remove(LEASE)

    def renew(self) -> None:
        """Look at the lease in the store, and write it again.

        Raises:
          ValueError: it was taken over.
          StoreError: the store does not do what is needed.
        """
        if self._is_held():
            beat = self._owner.beat + 1
            self._owner = dataclasses.replace(self._owner, beat=beat)
            self._store.write(LEASE, _pack(self._owner))
        self.check()

    def check(self) -> None:
        """Check what is known of the lease.

        Raises:
          ValueError: it was taken over, since this process was not heard of.
        """
        if self._taken_by:
            raise ValueError(
                f"{self._store.url} was taken over by {self._taken_by}: nothing was "
                f"heard of this process for {STALE_SECONDS:.0f} s, or its lease was "
                "removed; it writes nothing more there"
            )

    def _is_held(self) -> bool:
        owner = self._read()
        if owner is None or owner.token != self._owner.token:
            self._taken_by = str(owner or "another process")
        return not self._taken_by

    def _read(self) -> Owner | None:
        """Return the owner of the lease; None if there is none, or it is damaged."""
        data = self._store.read(LEASE)
        try:
            return None if data is None else Owner(**json.loads(data))
        except (ValueError, TypeError):
            raise ValueError(
                f"{self._store.url}/{LEASE} is no lease: remove it if nobody writes "
                "there"
            ) from None

    def _is_dead(self, owner: Owner) -> bool:
        """Return True if an owner cannot be alive, by the clock of the store."""
        if owner.machine == files.machine() and (
            not files.is_running(owner.pid, owner.start)
            or owner.pid == os.getpid()  # of a former lease: the local lock is held
        ):
            return True
        probe = f"{index.FOLDER}/clock-{self._owner.token}"
        self._store.write(probe, b"")
        now, then = self._store.modified(probe), self._store.modified(LEASE)
        self._store.remove(probe)
        if now is None or then is None:
            return False
        return (now - then).total_seconds() > STALE_SECONDS

    def _beat(self) -> None:
        """Renew the lease from time to time."""
        while not self._released.wait(HEARTBEAT_SECONDS) and not self._taken_by:
            try:
                self.renew()
            except StoreError:  # said by whoever copies; `_is_held` looks again
                pass
            except ValueError as error:
                print(error, file=sys.stderr, flush=True)


def _pack(owner: Owner) -> bytes:
    return json.dumps(dataclasses.asdict(owner)).encode()

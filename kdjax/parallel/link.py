"""A rank's side of the channel between ranks: its connection to rank 0's hub."""

import collections
import contextlib
import os
import selectors
import socket
import threading
import time
from collections.abc import Callable, Mapping
from typing import Any

from kdjax.parallel.agreement import RanksDiffer
from kdjax.parallel.hub import Hub, tick_of
from kdjax.parallel.wire import GREETING, Connection, Rank
from kdjax.runtime import interrupts

_RETRY_SECONDS = 0.2
_NOTICE_SECONDS = 10.0
_NOTICE_FACTOR = 1.5
_PORT_SECONDS = 10.0  # for an earlier run to let go of rank 0's port
_GOODBYE_SECONDS = 15.0  # for the hub's answer to a rank's end


class Link:
    """A rank's connection to all others, through rank 0.

    Args:
      stream: connected to the hub.
      rank: of this process.
      heartbeat: seconds of silence after which rank 0 is lost.
      lose: ends this process, with a text and an exit code; it is called in another
        thread.
      hub: of rank 0 alone.
    """

    def __init__(
        self,
        stream: socket.socket,
        rank: Rank,
        *,
        heartbeat: float,
        lose: Callable[[str, int], None],
        hub: Hub | None = None,
    ) -> None:
        self.rank, self._lose, self._hub = rank, lose, hub
        self.hosts: list[str] = []  # of all ranks, when they have met
        self.stop_signal = 0  # that all ranks stop after, when they have agreed
        self.has_agreed = False  # all ranks end as this one does
        self._heartbeat, self._tick = heartbeat, tick_of(heartbeat)
        self._connection = Connection(stream)
        self._condition = threading.Condition()
        self._turn = threading.Lock()
        self._outbox: collections.deque[tuple[str, dict[str, Any]]] = (
            collections.deque()
        )
        self._wake_end, self._wake = os.pipe()
        os.set_blocking(self._wake, False)
        self._verdict: str | None = None
        self._frozen, self._step = False, -1
        self._stop_at: int | None = None
        self._dismissed = threading.Event()
        self._is_rank_0_done = False
        self._is_over = False
        self._thread = threading.Thread(
            target=self._run, daemon=True, name="ranks link"
        )
        self._post(
            "hello", index=rank.index, num=rank.num, host=rank.host, pid=rank.pid
        )
        self._thread.start()
        os.register_at_fork(after_in_child=self._forget)

    def wait_until_met(self) -> None:
        """Wait until all ranks have come; the hub says who has not."""
        with self._condition:
            self._condition.wait_for(lambda: self.hosts or self._is_over)

    def agree(
        self, topic: str, fields: Mapping[str, str], *, is_final: bool = True
    ) -> None:
        """Compare fields with all ranks; without fields it is a barrier.

        Every rank calls it with the same topic, and all get the same answer. Where it
        is not final, the ranks stay together after fields that differ.

        Raises:
          RanksDiffer: the fields are not equal; it says which, where and how.
        """
        with self._turn, self._condition:
            if self._is_over or self._dismissed.is_set():
                raise RuntimeError(f"{topic}: the ranks of this run have parted")
            self._verdict = None
            self._post("fields", topic=topic, fields=dict(fields), final=is_final)
            self._condition.wait_for(lambda: self._verdict is not None)
            verdict = self._verdict
        if verdict:
            raise RanksDiffer(verdict)

    def request_stop(self, number: int) -> None:
        """Have all ranks stop after the same step; for a signal handler.

        Args:
          number: of the signal.
        """
        self._post("stop", signal=number)

    def begin_steps(self) -> None:
        """Count steps from here: no step of this loop has been done."""
        with self._condition:
            self._step = -1

    def reached(self, step: int) -> bool:
        """Note that a step is done; True to stop, after the same step on all ranks."""
        with self._condition:
            self._condition.wait_for(lambda: not self._frozen)
            self._step = step
            return self._stop_at is not None and step >= self._stop_at

    def end(self, code: int, message: str = "") -> None:
        """Say that this process ends, and wait for a moment until that is known.

        Args:
          code: of its exit; what is neither 0 nor agreed is why the others end.
          message: its last words.
        """
        if self._is_over or self._dismissed.is_set():
            return
        self._post("end", code=code, message=message[:2000], agreed=self.has_agreed)
        self._dismissed.wait(_GOODBYE_SECONDS)

    def wait_for_cause(self) -> None:
        """Wait for the hub to say which rank was lost, which ends this process."""
        if not self._dismissed.is_set():
            self._thread.join(self._heartbeat + 2 * self._tick)

    def _post(self, kind: str, **values: Any) -> None:
        """Have the thread send a message; signal handlers may call it."""
        self._outbox.append((kind, values))
        with contextlib.suppress(OSError):  # a full pipe wakes it as well
            os.write(self._wake, b"x")

    def _forget(self) -> None:
        """Close this process's copies: a fork must not keep connections open."""
        self._is_over = True
        self._connection.close()
        if self._hub is not None:
            self._hub.forget()

    def _run(self) -> None:
        connection, now = self._connection, time.monotonic()
        connection.heard, sent = now, 0.0
        selector = selectors.DefaultSelector()
        try:
            selector.register(connection, selectors.EVENT_READ)
            selector.register(self._wake_end, selectors.EVENT_READ)
            connection.greet()
            while True:
                ready = {key.fileobj for key, _ in selector.select(self._tick)}
                last, now = now, time.monotonic()
                if self._wake_end in ready:
                    os.read(self._wake_end, 4096)
                while self._outbox:
                    kind, values = self._outbox.popleft()
                    connection.send(kind, **values)
                if now - sent > self._tick / 2:
                    connection.send("beat")
                    sent = now
                if connection in ready:
                    messages = connection.receive()
                    connection.heard = now
                    for message in messages:
                        if self._handle(message):
                            return
                elif now - last > max(self._heartbeat / 2, 3 * self._tick):
                    connection.heard = now  # this process stood still itself
                elif self._hub is None and now - connection.heard > self._heartbeat:
                    silence = now - connection.heard
                    self._part(
                        f"rank 0 of {self.rank.num} (host {self._host()}) was lost: "
                        f"silent for {silence:.0f} s (stopped, or its host or network "
                        "is gone)"
                    )
                    return
        except (EOFError, OSError, KeyError, TypeError, ValueError):
            selector.close()
            self._part(
                f"rank 0 of {self.rank.num} (host {self._host()}) was lost: its "
                "process is gone, without a word (kill -9, out of memory, a crash: "
                "see its log, and dmesg on its host)"
            )

    def _host(self) -> str:
        return self.hosts[0] if self.hosts else "unknown"

    def _part(self, text: str) -> None:
        orderly = self._dismissed.is_set() or self._is_rank_0_done or self.has_agreed
        self._stop("" if orderly else text, interrupts.PEER_LOST_CODE)

    def _stop(self, text: str, code: int) -> None:
        self._is_over = True
        if text:
            self._lose(text, code)
        self._dismissed.set()
        with self._condition:
            self._verdict = self._verdict or text or "the ranks have parted"
            self._condition.notify_all()

    def _handle(self, message: dict[str, Any]) -> bool:
        """Take a message of the hub; True if it is the last."""
        kind = message["kind"]
        if kind == "lost":
            self._stop(str(message["text"]), int(message["code"]))
            return True
        with self._condition:
            if kind == "met":
                self.hosts = [str(host) for host in message["hosts"]]
            elif kind == "verdict":
                self._verdict = str(message["error"])
                self.has_agreed = bool(message["final"] and self._verdict)
            elif kind == "freeze":
                self._frozen = True
                self._post("step", step=self._step)
            elif kind == "stop_at":
                self.stop_signal = int(message["signal"])
                self._frozen, self._stop_at = False, int(message["step"])
            elif kind == "done":
                self._is_rank_0_done = True
            elif kind == "bye":
                self._dismissed.set()
            self._condition.notify_all()
        return False


def meet(
    coordinator: str,
    rank: Rank,
    *,
    heartbeat: float,
    patience: float,
    lose: Callable[[str, int], None],
    say: Callable[[str], None],
) -> Link:
    """Wait for all ranks of a run, and return this one's link to them.

    Args:
      coordinator: "host:port" of rank 0, on which JAX's service will be as well.
      rank: of this process.
      heartbeat: seconds of silence after which a rank is lost.
      patience: seconds until all ranks must have come.
      lose: ends this process, with a text and an exit code, when a rank is lost or does
        not come.
      say: prints a line of what is waited for.

    Raises:
      ValueError: the address is none.
      PeerLost: rank 0 cannot be reached, or its port is taken.
    """
    host, _, port = coordinator.rpartition(":")
    if not host or not port.isdigit():
        raise ValueError(f"coordinator={coordinator!r} is no address: use HOST:PORT")
    if rank.index:
        stream = _connect(host.strip("[]"), int(port), rank, patience, say)
        return _met(Link(stream, rank, heartbeat=heartbeat, lose=lose))
    listener = _listen(int(port))
    own, hubs = socket.socketpair()
    hub = Hub(listener, hubs, rank, heartbeat=heartbeat, patience=patience, say=say)
    hub.start()
    return _met(Link(own, rank, heartbeat=heartbeat, lose=lose, hub=hub))


def _met(link: Link) -> Link:
    try:
        link.wait_until_met()
    except KeyboardInterrupt:
        link.end(interrupts.SIGINT_CODE)
        raise
    except interrupts.Terminated:
        link.end(interrupts.SIGTERM_CODE)
        raise
    return link


class PeerLost(ValueError):
    """Another rank cannot be reached; starting all ranks again may help."""


def _listen(port: int) -> socket.socket:
    """Listen on all interfaces, as JAX's service does.

    Raises:
      PeerLost: the port is taken.
    """
    deadline = time.monotonic() + _PORT_SECONDS
    while True:
        try:
            if socket.has_dualstack_ipv6():
                return socket.create_server(
                    ("", port),
                    family=socket.AF_INET6,
                    dualstack_ipv6=True,
                    backlog=4096,
                )
            return socket.create_server(("", port), backlog=4096)
        except OSError as error:
            if time.monotonic() > deadline:
                raise PeerLost(
                    f"coordinator port {port} cannot be listened on "
                    f"({error.strerror or error}): end the process that has it, or "
                    "use another port"
                ) from None
        time.sleep(_RETRY_SECONDS)


def _connect(
    host: str, port: int, rank: Rank, patience: float, say: Callable[[str], None]
) -> socket.socket:
    """Connect to rank 0, which may still have to start.

    Raises:
      PeerLost: it could not be reached in time.
    """
    started = time.monotonic()
    notice, reason = started + _NOTICE_SECONDS, ""
    while True:
        now = time.monotonic()
        if now - started > patience:
            raise PeerLost(
                f"rank 0 of {rank.num} did not come within {now - started:.0f} s "
                f"(distributed.initialization_seconds): no answer at {host}:{port} "
                f"({reason}); see its log, and whether this host reaches that port"
            )
        if now > notice:
            notice = now + (now - started) * (_NOTICE_FACTOR - 1)
            say(
                f"rank {rank.index}: waiting for rank 0 of {rank.num} at {host}:{port} "
                f"({now - started:.0f} s: {reason})"
            )
        try:
            stream = socket.create_connection((host, port), timeout=5.0)
        except OSError as error:
            reason = error.strerror or str(error)
            time.sleep(_RETRY_SECONDS)
            continue
        if _is_hub(stream):
            return stream
        reason = "another program answers there"
        stream.close()
        time.sleep(_RETRY_SECONDS * 5)


def _is_hub(stream: socket.socket) -> bool:
    """Look whether the other end greets as a hub; nothing is taken from the stream."""
    with contextlib.suppress(OSError):
        stream.settimeout(5.0)
        content = stream.recv(len(GREETING), socket.MSG_PEEK | socket.MSG_WAITALL)
        return content == GREETING
    return False

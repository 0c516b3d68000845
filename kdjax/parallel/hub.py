"""Rank 0's side of the channel between ranks: it lets them meet, compares, and watches.

It holds one connection per rank, its own rank's included, in one thread:

- meeting: ranks say who they are; those that do not come are named, while it waits and
  when it gives up. The port is the coordinator's, which JAX's service takes over.
- agreement: each rank sends named fields; when all have, all get the same verdict.
- losses: a closed connection (a killed process) is noticed at once, silence (a stopped
  process, a lost host or network) after the heartbeat. The first cause is told to all.
- stops: after a signal to any rank, all are told the same step to stop after.
"""

import contextlib
import os
import selectors
import socket
import threading
import time
from collections.abc import Callable
from typing import Any

from kdjax.parallel import agreement
from kdjax.parallel.wire import Connection, NotARank, Rank
from kdjax.runtime import interrupts

_NOTICE_SECONDS = 10.0  # of waiting, until the first word about it
_NOTICE_FACTOR = 1.5  # from one word to the next
_DRAIN_SECONDS = 3.0  # for the others to leave, before rank 0 does
_LAST_SECONDS = 10.0  # rank 0, which has JAX's service, waits so long for the others
_GREETING_SECONDS = 10.0  # for a new connection to say who it is
_SIGNALS = {interrupts.SIGINT_CODE: "Ctrl-C", interrupts.SIGTERM_CODE: "SIGTERM"}
_LONGEST_REASON = 400  # characters of another rank's last words


def tick_of(heartbeat: float) -> float:
    """Return the seconds between two signs of life."""
    return min(5.0, heartbeat / 6)


class Hub:
    """The thread that all ranks of a run are connected to.

    Args:
      listener: a listening socket, on which the other ranks come; it is closed when
        all have.
      own: rank 0's connection to its own `Link`.
      rank: rank 0.
      heartbeat: seconds of silence after which a rank is lost.
      patience: seconds until all ranks must have come.
      say: prints a line.
    """

    def __init__(
        self,
        listener: socket.socket,
        own: socket.socket,
        rank: Rank,
        *,
        heartbeat: float,
        patience: float,
        say: Callable[[str], None],
    ) -> None:
        self._listener: socket.socket | None = listener
        self._rank, self._say = rank, say
        self._heartbeat, self._tick = heartbeat, tick_of(heartbeat)
        self._patience = patience
        listener.setblocking(False)
        self._selector = selectors.DefaultSelector()
        self._selector.register(listener, selectors.EVENT_READ)
        self._members: dict[int, Connection] = {}
        self._strangers: list[Connection] = []  # that have not said who they are
        self._ranks: dict[int, Rank] = {}  # all that have come
        self._ended: set[int] = set()  # in an orderly way
        self._pending: dict[int, tuple[str, dict[str, str]]] = {}
        self._stop_signal = 0
        self._steps: dict[int, int] = {}
        self._last_asked: float | None = None  # rank 0 leaves when the others have
        self._over = False
        self._admit(own)
        self._thread = threading.Thread(target=self._run, daemon=True, name="ranks hub")

    def start(self) -> None:
        """Start the thread."""
        self._thread.start()

    def forget(self) -> None:
        """Close all sockets: for a forked process, which must not keep them open."""
        self._over = True
        for connection in [*self._members.values(), *self._strangers]:
            connection.close()
        if self._listener is not None:
            self._listener.close()

    def _run(self) -> None:
        started = now = time.monotonic()
        notice, beaten = started + _NOTICE_SECONDS, 0.0
        while not self._over:
            for key, _ in self._selector.select(timeout=self._tick):
                if key.data is None:
                    self._accept()
                else:
                    self._read(key.data)
                if self._over:
                    return
            last, now = now, time.monotonic()
            if now - last > max(self._heartbeat / 2, 3 * self._tick):
                # This process stood still itself: its silence is not the others'.
                for connection in [*self._members.values(), *self._strangers]:
                    connection.heard = now
            if now - beaten > self._tick / 2:
                self._tell("beat")
                beaten = now
            self._check_silence(now)
            if self._listener is not None and not self._over:
                if now - started > self._patience:
                    self._give_up(now - started)
                elif now > notice:
                    notice = now + (now - started) * (_NOTICE_FACTOR - 1)
                    self._say(f"waiting for {self._missing()} ({now - started:.0f} s)")
            if self._last_asked and now - self._last_asked > _LAST_SECONDS:
                self._dismiss(0)

    def _accept(self) -> None:
        """Admit all who wait: hundreds come at once."""
        assert self._listener is not None
        with contextlib.suppress(OSError):  # BlockingIOError: nobody is left
            while True:
                self._admit(self._listener.accept()[0])

    def _admit(self, stream: socket.socket) -> None:
        connection = Connection(stream)
        connection.heard = time.monotonic()
        try:
            connection.greet()
        except OSError:
            connection.close()
            return
        self._strangers.append(connection)
        self._selector.register(stream, selectors.EVENT_READ, connection)

    def _read(self, connection: Connection) -> None:
        """Take what a rank has sent; it is lost if that is its end."""
        try:
            messages = connection.receive()
            connection.heard = time.monotonic()
            for message in messages:
                self._handle(connection, message)
        except (EOFError, OSError) as error:
            self._drop(connection)
            rank = connection.rank
            if rank is None or rank.index in self._ended:
                self._check_last()
            elif isinstance(error, NotARank):
                self._lose(rank, "sends what no rank would")
            else:
                self._lose(
                    rank,
                    "its process is gone, without a word (kill -9, out of memory, a "
                    "crash: see its log, and dmesg on its host)",
                )
        except (KeyError, TypeError, ValueError):
            self._drop(connection)
            if connection.rank is not None:
                self._lose(connection.rank, "sends what no rank would")

    def _drop(self, connection: Connection) -> None:
        with contextlib.suppress(KeyError, ValueError):
            self._selector.unregister(connection.socket)
        connection.close()
        if connection in self._strangers:
            self._strangers.remove(connection)
        rank = connection.rank
        if rank is not None and self._members.get(rank.index) is connection:
            del self._members[rank.index]

    def _handle(self, connection: Connection, message: dict[str, Any]) -> None:
        kind, rank = message["kind"], connection.rank
        if self._over or kind == "beat":
            return
        if rank is None:
            if kind != "hello":
                raise NotARank
            self._welcome(connection, message)
        elif kind == "fields":
            fields = {str(k): str(v) for k, v in message["fields"].items()}
            self._pending[rank.index] = str(message["topic"]), fields
            self._compare(is_final=bool(message["final"]))
        elif kind == "stop":
            self._begin_stop(int(message["signal"]))
        elif kind == "step":
            self._steps[rank.index] = int(message["step"])
            self._decide_stop()
        elif kind == "end":
            self._end(rank, int(message["code"]), str(message["message"]), message)

    def _welcome(self, connection: Connection, message: dict[str, Any]) -> None:
        rank = Rank(
            index=int(message["index"]),
            num=int(message["num"]),
            host=str(message["host"])[:100],
            pid=int(message["pid"]),
        )
        if rank.num != self._rank.num or not 0 <= rank.index < rank.num:
            self._strangers.remove(connection)
            self._members[-1] = connection  # it is told, too
            self._finish(
                f"{self._rank} and {rank} differ in the number of processes: give "
                "all of them the same one (KDJAX_NUM_PROCESSES, or the scheduler's)",
                interrupts.RANKS_DIFFER_CODE,
            )
            return
        if rank.index in self._members or self._listener is None:
            other = self._ranks.get(rank.index)
            self._strangers.remove(connection)
            self._members[-1] = connection
            self._finish(
                f"two processes are rank {rank.index}: {other} and {rank}: give each "
                "its own number (KDJAX_PROCESS_ID, or the scheduler's), and end what "
                "an earlier run has left",
                interrupts.PEER_LOST_CODE,
            )
            return
        self._strangers.remove(connection)
        connection.rank = rank
        self._ranks[rank.index] = rank
        self._members[rank.index] = connection
        if len(self._members) == self._rank.num:
            self._selector.unregister(self._listener)
            self._listener.close()
            self._listener = None
            hosts = [self._ranks[i].host for i in range(rank.num)]
            self._tell("met", hosts=hosts)

    def _missing(self) -> str:
        absent = [i for i in range(self._rank.num) if i not in self._members]
        several = "s" * (len(absent) > 1)
        return f"rank{several} {agreement.ranges(absent)} of {self._rank.num}"

    def _give_up(self, seconds: float) -> None:
        there = ", ".join(
            f"{index} (host {rank.host})" for index, rank in sorted(self._ranks.items())
        )
        self._finish(
            f"{self._missing()} did not come within {seconds:.0f} s "
            f"(distributed.initialization_seconds); there were: {there}. See the log "
            "of the missing one, and whether its host reaches the coordinator's port",
            interrupts.PEER_LOST_CODE,
        )

    def _compare(self, *, is_final: bool) -> None:
        """Tell all ranks the verdict, when all have sent their fields."""
        topics: dict[str, list[int]] = {}
        for index, (topic, _) in sorted(self._pending.items()):
            topics.setdefault(topic, []).append(index)
        if len(topics) > 1:
            where = "; ".join(
                f"rank{'s' * (len(ranks) > 1)} {agreement.ranges(ranks)} "
                f"({self._ranks[ranks[0]].host}) at {topic!r}"
                for topic, ranks in topics.items()
            )
            self._finish(
                f"the ranks of this run do different things: {where}. They see "
                "different files: use folders that all of them share",
                interrupts.RANKS_DIFFER_CODE,
            )
        elif len(self._pending) == self._rank.num:
            fields = [self._pending[i][1] for i in range(self._rank.num)]
            hosts = [self._ranks[i].host for i in range(self._rank.num)]
            self._pending = {}
            error = agreement.describe(fields, hosts)
            if error and is_final:
                self._ended.update(range(self._rank.num))  # each says it itself
            self._tell("verdict", error=error, final=is_final)

    def _begin_stop(self, number: int) -> None:
        """Have all ranks stand still between steps, and say where."""
        if not self._stop_signal:
            self._stop_signal, self._steps = number, {}
            self._tell("freeze")

    def _decide_stop(self) -> None:
        if self._steps.keys() >= self._members.keys() - self._ended:
            # Each rank has reported the last step that it was past.
            step = max(self._steps.values()) + 1
            self._tell("stop_at", step=step, signal=self._stop_signal)

    def _end(self, rank: Rank, code: int, text: str, message: dict[str, Any]) -> None:
        """Note a rank's end; what it did not agree on is the first cause of all's."""
        orderly = code == 0 or message.get("agreed") or rank.index in self._ended
        self._ended.add(rank.index)
        if not orderly:
            why = f"ended by {_SIGNALS[code]}" if code in _SIGNALS else "failed"
            text = " ".join(text.split())[:_LONGEST_REASON]
            self._lose(rank, f"{why}{': ' * bool(text)}{text}", code=code)
        elif rank.index != 0:
            self._dismiss(rank.index)
            self._check_last()
        elif code == 0:
            self._tell("done")  # its end is no loss; it goes on watching the others
            self._dismiss(0)
        else:
            self._last_asked = time.monotonic()
            self._check_last()

    def _check_last(self) -> None:
        """Let rank 0, which JAX's service dies with, leave after the others."""
        others = self._members.keys() - {0}
        if self._last_asked is not None and not others:
            self._dismiss(0)

    def _dismiss(self, index: int) -> None:
        if connection := self._members.get(index):
            with contextlib.suppress(OSError):
                connection.send("bye")

    def _tell(self, kind: str, **values: Any) -> None:
        for connection in list(self._members.values()):
            try:
                connection.send(kind, **values)
            except OSError:  # `_read` or `_check_silence` notice it
                continue

    def _check_silence(self, now: float) -> None:
        for connection in list(self._strangers):
            if now - connection.heard > _GREETING_SECONDS:
                self._drop(connection)
        for index, connection in list(self._members.items()):
            silence = now - connection.heard
            if silence > self._heartbeat and index not in self._ended and index > 0:
                assert connection.rank is not None
                self._lose(
                    connection.rank,
                    f"silent for {silence:.0f} s (stopped, or its host or network is "
                    "gone)",
                )
                return

    def _lose(self, rank: Rank, reason: str, *, code: int = 0) -> None:
        """Tell all ranks of the first loss."""
        own_end = code != 0
        if code not in _SIGNALS:
            code = interrupts.PEER_LOST_CODE
        text = f"{rank} {'' if own_end else 'was lost: '}{reason}"
        self._finish(text, code, but=rank.index if own_end else None)

    def _finish(self, text: str, code: int, *, but: int | None = None) -> None:
        """Tell all ranks why the run ends; rank 0, which goes last, when they have."""
        if self._over:
            return
        self._over = True
        others = [c for i, c in self._members.items() if i not in (0, but)]
        for connection in others:
            with contextlib.suppress(OSError):
                connection.send("lost", text=text, code=code)
        if but is not None and but != 0:
            self._dismiss(but)
        _drain(others, _DRAIN_SECONDS)
        if but == 0:
            self._dismiss(0)
        elif own := self._members.get(0):
            with contextlib.suppress(OSError):
                own.send("lost", text=text, code=code)


def _drain(connections: list[Connection], seconds: float) -> None:
    """Wait until the other ends have closed, for some seconds at most.

    A socket that is closed with bytes unread takes what was sent with it.
    """
    deadline = time.monotonic() + seconds
    with selectors.DefaultSelector() as selector:
        for connection in connections:
            with contextlib.suppress(KeyError, ValueError, OSError):
                selector.register(connection.socket, selectors.EVENT_READ)
        while selector.get_map() and (left := deadline - time.monotonic()) > 0:
            for key, _ in selector.select(left):
                try:
                    content = os.read(key.fd, 1 << 16)
                except OSError:
                    content = b""
                if not content:
                    selector.unregister(key.fileobj)

"""The processes of one attempt: start, output, signals, end."""

import collections
import contextlib
import dataclasses
import os
import pathlib
import selectors
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from typing import BinaryIO

from kdjax.supervision import guard
from kdjax.supervision.causes import End

_GUARD = [sys.executable, "-I", "-S", str(pathlib.Path(guard.__file__))]
_NUM_LINES = 200  # of the output of a process, that are kept
_REST_SECONDS = 1.0  # for what a process that has ended has written before


@dataclasses.dataclass(kw_only=True, slots=True)
class _Member:
    """A process of the gang."""

    rank: int
    process: subprocess.Popen[bytes]
    lines: collections.deque[str]  # the last ones of its output
    rest: dict[str, bytes]  # stream -> what has no line end yet
    end: End | None = None


class Gang:
    """Processes that run one command together; use as a context manager.

    Each is the leader of a session of its own, so that a terminal's Ctrl-C does not
    reach it. None of them outlives this process. On exit all are killed.

    Args:
      command: of each process.
      environments: variables of each process besides those of this one, by rank.
      first_rank: of the first process; others run elsewhere.
    """

    def __init__(
        self,
        command: Sequence[str],
        environments: Sequence[Mapping[str, str]],
        *,
        first_rank: int = 0,
    ) -> None:
        self._selector = selectors.DefaultSelector()
        self._members: list[_Member] = []
        self.output_time = time.monotonic()  # of the last output of the gang's own
        self._watch = subprocess.Popen(
            [*_GUARD, "watch"], stdin=subprocess.PIPE, start_new_session=True
        )
        try:
            for rank, environment in enumerate(environments, first_rank):
                self._start(rank, command, environment)
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> "Gang":
        """Return self."""
        return self

    def __exit__(self, *exception: object) -> None:
        """Kill what still runs."""
        self.close()

    @property
    def pids(self) -> list[int]:
        """Return the processes, by rank."""
        return [member.process.pid for member in self._members]

    @property
    def ends(self) -> list[End]:
        """Return the ends of the processes that have ended."""
        return [member.end for member in self._members if member.end is not None]

    @property
    def codes(self) -> list[int | None]:
        """Return exit codes by rank; None: the process runs."""
        ends = (member.end for member in self._members)
        return [None if end is None else end.code for end in ends]

    @property
    def running(self) -> list[int]:
        """Return the ranks of the processes that run."""
        return [member.rank for member in self._members if member.end is None]

    @property
    def lines(self) -> list[str]:
        """Return the last lines of the first process's output, the newest last."""
        return list(self._members[0].lines)

    def stopped(self) -> list[int]:
        """Return the ranks of the processes that stand still by a signal (SIGSTOP)."""
        return [
            member.rank
            for member in self._members
            if member.end is None and _is_stopped(member.process.pid)
        ]

    def wait(self, seconds: float) -> None:
        """Pass output on for a time, or until a process ends."""
        if not self._selector.get_map():
            time.sleep(seconds)
        for key, _ in self._selector.select(seconds):
            self._read(*key.data)
        for member in self._members:
            if member.end is None and member.process.poll() is not None:
                self._finish(member)

    def send(self, number: int) -> None:
        """Send a signal to each process that runs, not to what it has started."""
        for member in self._members:
            if member.end is None:
                with contextlib.suppress(ProcessLookupError):
                    member.process.send_signal(number)

    def kill(self) -> None:
        """Kill all processes, with what they have started, and wait for their end."""
        for member in self._members:
            if member.end is None:
                _kill_group(member.process.pid)
        for member in self._members:
            if member.end is None:
                member.process.wait()
                self._finish(member)

    def close(self) -> None:
        """Kill what still runs, and let the guard go."""
        self.kill()
        assert self._watch.stdin is not None
        with contextlib.suppress(OSError):
            self._watch.stdin.close()
        self._watch.wait()
        self._selector.close()

    def _start(
        self, rank: int, command: Sequence[str], environment: Mapping[str, str]
    ) -> None:
        process = subprocess.Popen(
            [*_GUARD, "exec", str(os.getpid()), *command],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env=os.environ | dict(environment),
            start_new_session=True,
        )
        self._tell_guard(f"+{process.pid}\n")
        member = _Member(
            rank=rank,
            process=process,
            lines=collections.deque(maxlen=_NUM_LINES),
            rest={"stdout": b"", "stderr": b""},
        )
        self._members.append(member)
        for name in ("stdout", "stderr"):
            stream = getattr(process, name)
            os.set_blocking(stream.fileno(), False)
            self._selector.register(
                stream, selectors.EVENT_READ, (member, name, stream)
            )

    def _tell_guard(self, text: str) -> None:
        assert self._watch.stdin is not None
        try:
            self._watch.stdin.write(text.encode())
            self._watch.stdin.flush()
        except OSError as error:
            raise RuntimeError("the guard of the gang has been killed") from error

    def _read(self, member: _Member, name: str, stream: BinaryIO) -> bool:
        """Pass on what a process has written; False at the end of it."""
        try:
            data = os.read(stream.fileno(), 1 << 16)
        except BlockingIOError:
            return False
        if not data:
            self._selector.unregister(stream)
            stream.close()
            return False
        *lines, member.rest[name] = (member.rest[name] + data).split(b"\n")
        texts = [line.decode(errors="replace") for line in lines]
        member.lines.extend(texts)
        if any(not _is_library_log(text) for text in texts):
            self.output_time = time.monotonic()
        if member.rank:  # a line at a time, with the rank
            data = b"".join(b"[%d] %s\n" % (member.rank, line) for line in lines)
        _write(sys.stdout if name == "stdout" else sys.stderr, data)
        return True

    def _finish(self, member: _Member) -> None:
        """Note the end of a process; nothing that it has started goes on."""
        _kill_group(member.process.pid)
        self._tell_guard_quietly(f"-{member.process.pid}\n")
        deadline = time.monotonic() + _REST_SECONDS
        for name in ("stdout", "stderr"):
            stream = getattr(member.process, name)
            while not stream.closed and time.monotonic() < deadline:
                if not self._read(member, name, stream) and not stream.closed:
                    time.sleep(0.01)
            if not stream.closed:  # held by a process that is no longer of the group
                self._selector.unregister(stream)
                stream.close()
            if rest := member.rest[name].decode(errors="replace"):
                member.lines.append(rest)
        member.end = End(
            rank=member.rank,
            host=socket.gethostname(),
            code=member.process.returncode,
            lines=tuple(member.lines),
        )

    def _tell_guard_quietly(self, text: str) -> None:
        with contextlib.suppress(RuntimeError):
            self._tell_guard(text)


def _is_library_log(line: str) -> bool:
    """Return True for a line of XLA's own log, which a hung gang writes too."""
    return len(line) > 5 and line[0] in "IWEF" and line[1:5].isdigit()


def _kill_group(group: int) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(group, signal.SIGKILL)


def _is_stopped(pid: int) -> bool:
    """Return True if a process stands still by SIGSTOP."""
    try:
        text = pathlib.Path(f"/proc/{pid}/stat").read_text()
    except OSError:  # not Linux, or gone
        command = ["ps", "-o", "state=", "-p", str(pid)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        return done.stdout.strip().startswith("T")
    return text.rpartition(")")[2].split()[0] in ("T", "t")


def _write(stream: object, data: bytes) -> None:
    """Write to this process's own output; one that is closed or full loses it."""
    with contextlib.suppress(OSError, ValueError):
        stream.buffer.write(data)  # type: ignore[attr-defined]
        stream.flush()  # type: ignore[attr-defined]

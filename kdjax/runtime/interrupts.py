"""Ctrl-C and SIGTERM: as a request to the training loop, and for whole commands.

Exit codes of commands: 0 success, 1 an error with a line that says it, 130 Ctrl-C, 141
nobody reads the output, 143 SIGTERM (what was done is saved: start the same command
again), 75 another process of the run was lost (start all again), 78 the processes of
the run differ (starting again does not help).
"""

import os
import signal
import socket
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import FrameType

# 128 + the signal, as shells have it.
SIGINT_CODE, SIGPIPE_CODE, SIGTERM_CODE = 130, 141, 143
# Of processes of one run (EX_TEMPFAIL and EX_CONFIG of sysexits.h): another process was
# lost or did not come, so that the same command may be tried again; or processes differ
# in config, data, versions or devices, and would differ again.
PEER_LOST_CODE, RANKS_DIFFER_CODE = 75, 78
_NOTICE_SECONDS = 0.5  # a command that ends sooner needs no word before
_FLUSH_SECONDS = 1.0
_SHOW_CURSOR = "\x1b[?25h"  # a progress bar hides it
_notices: list[str] = []  # of the innermost part of the program that stops late


class Terminated(SystemExit):
    """The end of a process by SIGTERM, with a line of what was left.

    Args:
      message: what is kept, and how to go on.
    """

    def __init__(self, message: str = "") -> None:
        super().__init__(SIGTERM_CODE)
        self.message = message


class StopRequest:
    """Signals as a request: whoever asks `received` ends at the next good moment.

    A second Ctrl-C raises KeyboardInterrupt. Outside the main thread, which alone gets
    signals, it does nothing. Use as a context manager.

    Args:
      forward: called as well with a signal; it makes all processes of a run stop.
      signals: those that are requests.
    """

    def __init__(
        self,
        forward: Callable[[int], None] | None = None,
        signals: Sequence[int] = (signal.SIGINT, signal.SIGTERM),
    ) -> None:
        self.received: int | None = None
        self._forward, self._signals = forward, signals
        self._previous: dict[int, object] = {}

    def __enter__(self) -> "StopRequest":
        """Install the handlers."""
        if threading.current_thread() is threading.main_thread():
            for number in self._signals:
                # Jobs in the background ignore Ctrl-C, and so they shall.
                if signal.getsignal(number) != signal.SIG_IGN:
                    self._previous[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *exception: object) -> None:
        """Restore the handlers that were there before."""
        for number, handler in self._previous.items():
            signal.signal(number, handler)  # type: ignore[arg-type]
        self._previous = {}

    def _note(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT and self.received == signal.SIGINT:
            signal.default_int_handler(number, frame)
        self.received = number
        if self._forward is not None:
            self._forward(number)

    def stop(self, message: str) -> BaseException:
        """Return what ends the process after the signal that was received.

        Args:
          message: what was left, and how to go on.
        """
        return stop_by(self.received, message)


def stop_by(number: int | None, message: str) -> BaseException:
    """Return what ends a process after a signal.

    Args:
      number: of the signal.
      message: what was left, and how to go on.
    """
    if number == signal.SIGINT:
        return KeyboardInterrupt(message)
    return Terminated(message)


@contextmanager
def notice(text: str) -> Iterator[None]:
    """Have a first Ctrl-C answered by a text, which says why the end takes a while."""
    _notices.append(text)
    try:
        yield
    finally:
        _notices.pop()


_silent = threading.Event()


def install(program: str) -> None:
    """Make signals end this process as a command: for the commands' edge alone.

    SIGTERM raises `Terminated`. The first Ctrl-C raises KeyboardInterrupt, or what a
    `StopRequest` does; the second one ends the process at once, even if it computes or
    compiles.

    Args:
      program: name of the command, for its lines on stderr.
    """
    signal.signal(signal.SIGTERM, _terminate)
    # The interpreter writes each signal's number there, whatever the main thread does.
    reader, writer = socket.socketpair()
    writer.setblocking(False)
    signal.set_wakeup_fd(writer.fileno(), warn_on_full_buffer=False)
    watcher = threading.Thread(
        target=_watch, args=(program, reader, writer), daemon=True, name="signals"
    )
    watcher.start()
    os.register_at_fork(after_in_child=_uninstall)


def _uninstall() -> None:
    """Give a forked process, which has no watcher, the usual handlers."""
    if threading.current_thread() is threading.main_thread():
        signal.set_wakeup_fd(-1)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        signal.signal(signal.SIGINT, signal.default_int_handler)


def _terminate(number: int, frame: FrameType | None) -> None:
    del number, frame
    raise Terminated


def _watch(program: str, reader: socket.socket, writer: socket.socket) -> None:
    """Answer the first Ctrl-C if the process does not end soon, obey the second."""
    del writer  # kept open
    count = 0
    while True:
        for number in reader.recv(64):
            if number != signal.SIGINT:
                continue
            count += 1
            if count > 1:
                end_at_once(program)
            threading.Thread(target=_announce, args=(program,), daemon=True).start()


def silence() -> None:
    """Answer no further first Ctrl-C: the last line of the process is about to come."""
    _silent.set()


def _announce(program: str) -> None:
    if _silent.wait(_NOTICE_SECONDS):
        return
    text = _notices[-1] if _notices else "stopping"
    print(f"{program}: {text}; Ctrl-C again: at once", file=sys.stderr, flush=True)


def end_at_once(
    program: str, message: str = "ended at once", code: int = SIGINT_CODE
) -> None:
    """End this process without any cleaning up; its locks are free with it.

    Args:
      program: name of the command.
      message: its last line.
      code: of the exit.
    """
    cursor = f"\n{_SHOW_CURSOR}" if sys.stderr.isatty() else ""
    # What was printed may be held by a thread that never goes on.
    flush = threading.Thread(target=sys.stdout.flush, daemon=True)
    flush.start()
    flush.join(_FLUSH_SECONDS)
    os.write(2, f"{cursor}{program}: {message}\n".encode())
    os._exit(code)

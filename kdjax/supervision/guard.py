"""No process outlives its supervisor: a program of the standard library alone.

    python -I -S guard.py exec PARENT COMMAND...   is killed when PARENT ends
    python -I -S guard.py watch                    kills groups at the end of stdin

`exec` asks the kernel (Linux) for a SIGKILL at the parent's end, and becomes the
command. `watch` reads "+PID" and "-PID" lines; when its stdin ends, as it does with the
process that holds the other end, however that ends, it kills the groups that are still
listed. The latter needs nothing but pipes, and reaches what the command started.
"""

import contextlib
import os
import signal
import sys

_PR_SET_PDEATHSIG = 1


def execute(parent: int, command: list[str]) -> None:
    """Become a command that the kernel kills when the parent process has ended."""
    if sys.platform == "linux":
        import ctypes

        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != parent:  # it ended before
        os._exit(1)
    try:
        os.execvp(command[0], command)
    except OSError as error:
        print(f"{command[0]}: {error.strerror}", file=sys.stderr)
        os._exit(127 if isinstance(error, FileNotFoundError) else 126)


def watch() -> None:
    """Kill the process groups that are listed when stdin ends."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)  # it ends with its stdin alone
    groups: set[int] = set()
    for line in sys.stdin:
        change = groups.add if line[0] == "+" else groups.discard
        change(int(line[1:]))
    for group in groups:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(group, signal.SIGKILL)


if __name__ == "__main__":
    if sys.argv[1] == "watch":
        watch()
    else:
        execute(int(sys.argv[2]), sys.argv[3:])

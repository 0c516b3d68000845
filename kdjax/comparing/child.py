"""Becomes a process of a comparison: child.py PARENT CORES COMMAND ...

A script of its own, since the parent cannot do this between fork and exec: it may have
threads, which a fork does not copy. CORES are numbers joined by commas, or nothing.
"""

import ctypes
import os
import signal
import sys

_PR_SET_PDEATHSIG = 1  # of Linux


def main(parent: int, cores: str, command: list[str]) -> None:
    """Keeps to some cores, ends when the parent does, and runs the command."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:
            os._exit(1)
        if cores:
            os.sched_setaffinity(0, map(int, cores.split(",")))
    os.execv(command[0], command)


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2], sys.argv[3:])

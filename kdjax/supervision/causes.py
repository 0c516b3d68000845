"""Why the processes of a gang ended, and which end was the first cause."""

import dataclasses
import re
import signal
from collections.abc import Collection, Sequence

from kdjax.runtime import interrupts

# Ends that somebody asked for: what is complete is saved.
STOP_CODES = (
    interrupts.SIGINT_CODE,
    interrupts.SIGTERM_CODE,
    -signal.SIGINT,  # before the command could answer it
    -signal.SIGTERM,
)
# Processes differ; and, of shells and of the guard: there is no such command.
_FINAL_CODES = (interrupts.RANKS_DIFFER_CODE, 126, 127)
# Commands end so for what a user must mend: NAME: error: REASON.
_ERROR = re.compile(r"^(?:\d+: )?\w+: error: ")
# What is said of another process: an echo of the first cause.
_ECHOES = (
    "lost another process",
    "Gloo",
    "Connection closed by peer",
    "Connection reset by peer",
    "coordination service",
    "CoordinationService",
    "heartbeat",
    "Terminating process because the JAX distributed service detected fatal errors",
    "another task",
)
# Errors that pass: the disk, another writer's end, a port, the network.
_PASSING = (
    "No space left on device",
    "Disk quota exceeded",
    "Input/output error",
    "Stale file handle",
    "Connection timed out",
    "Too many open files",
    "is being written by",
    "is not the folder of process 0",
    "Address already in use",
)
# srun: error: n2: task 3: Exited with exit code 1
_SRUN = re.compile(
    r"^srun: error: (\S+): tasks? ([\d,-]+): (?:Exited with exit code (\d+)|(\w.*))$"
)
_SRUN_SIGNALS = {"Killed": 9, "Terminated": 15, "Aborted": 6, "Segmentation fault": 11}
_SHOWN = 300  # characters of a line


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class End:
    """How a process ended."""

    rank: int
    host: str
    code: int  # exit code, or minus the signal that killed it
    lines: tuple[str, ...] = ()  # the last ones of its output

    @property
    def is_stop(self) -> bool:
        """Return True if somebody asked for it, and the process saved what it had."""
        return self.code in STOP_CODES

    @property
    def is_echo(self) -> bool:
        """Return True if the process only says that it lost another one."""
        if self.code == interrupts.PEER_LOST_CODE:
            return True
        if self.code <= 0 and self.code != -signal.SIGABRT:
            return False
        return any(sign in self.words for sign in _ECHOES)

    @property
    def is_final(self) -> bool:
        """Return True if the same command would end so again."""
        if self.code in _FINAL_CODES:
            return True
        if self.code <= 0 or self.is_stop or self.is_echo:
            return False
        passing = any(sign in self.words for sign in _PASSING)
        return bool(_ERROR.match(self.words)) and not passing

    @property
    def words(self) -> str:
        """Return the line that says why: an error's, else the last one."""
        lines = [line.strip() for line in self.lines if line.strip()]
        errors = [line for line in lines if _ERROR.match(line)]
        if not errors:  # the end of a traceback, or of the distributed runtime's log
            errors = [ln for ln in lines if re.match(r"^[\w.]*(Error|Exception)\b", ln)]
        if not errors:
            errors = [ln for ln in lines if any(sign in ln for sign in _ECHOES)][:1]
        return next(iter([*errors[-1:], *lines[-1:]]), "")[:_SHOWN]

    def __str__(self) -> str:
        who = f"rank {self.rank} on host {self.host}"
        if self.code < 0:
            what = f"{who} was killed by {_signal_name(-self.code)}"
            return what + (
                " (kill -9, or the system was out of memory)" if self.code == -9 else ""
            )
        reason = f": {self.words}" if self.words else ""
        return f"{who} ended with exit code {self.code}{reason}"


def first(ends: Sequence[End], suspects: Collection[int] = ()) -> End | None:
    """Return the end that was the cause of the others, or None.

    Args:
      ends: of those that failed, in the order in which they were noticed.
      suspects: ranks that run, and are known to be the cause: then there is no end.
    """
    own = [end for end in ends if not end.is_echo]
    killed = [end for end in own if end.code < 0]
    if suspects and not own:
        return None
    return next(iter([*killed, *own, *ends]), None)


def srun_ends(lines: Sequence[str]) -> list[End]:
    """Return the ends of tasks that Slurm's srun names, in its order.

    Args:
      lines: of its output, with `--label`: "RANK: text".
    """
    ends = []
    for line in lines:
        match = _SRUN.match(line.strip())
        if match is None:
            continue
        host, ranks, code, what = match.groups()
        rank = int(re.split(r"[,-]", ranks)[0])
        by_signal = _SRUN_SIGNALS.get((what or "").split(" (")[0], signal.SIGKILL)
        number = int(code) if code else -by_signal
        labels = re.compile(rf"^\s*{rank}: (.*)$")
        own = tuple(m[1] for text in lines if (m := labels.match(text)))
        ends.append(End(rank=rank, host=host, code=number, lines=own))
    return ends


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"

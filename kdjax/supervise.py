r"""A run that is started again until it is done: python -m kdjax.supervise -- COMMAND.

    python -m kdjax.supervise --processes=4 -- \
        python -m kdjax.train --config=FILE.py --workdir=DIR

starts the command as a gang of processes, the ranks of one run. If one of them fails or
all hang, it says the first cause, ends the others and starts all again, with a new port
and a growing delay, until the command is done, is stopped (SIGTERM, Ctrl-C), cannot
succeed, or has saved nothing new for some attempts. DIR/attempts.jsonl has the cause
and the loss of each attempt. docs/launch.md.
"""

import pathlib
import sys
from collections.abc import Sequence

from absl import flags

from kdjax import cli
from kdjax.supervision import supervisor

for _name in ("config", "workdir"):
    flags.declare_key_flag(_name)
_PROCESSES = flags.DEFINE_integer(
    "processes",
    0,
    "Processes on this machine, as ranks of one run; 0: the command as it is.",
    lower_bound=0,
)
_RANK = flags.DEFINE_integer(
    "rank", None, "Of this host's process, where each host runs a supervisor.", 0
)
_LAUNCHER = flags.DEFINE_bool(
    "launcher", False, "The command starts all ranks itself, as `srun --label` does."
)
_HOST = flags.DEFINE_string(
    "coordinator_host", "127.0.0.1", "Name by which all ranks reach rank 0's machine."
)
_PORT = flags.DEFINE_integer(
    "port", 0, "First port of the coordinator; 0: any free one.", 0, 65000
)
_CPU_DEVICES = flags.DEFINE_integer(
    "cpu_devices", 0, "Virtual CPU devices of each process; 0: as they are.", 0
)
_GPUS = flags.DEFINE_integer(
    "gpus_per_process", 0, "GPUs of this machine for each process; 0: all.", 0
)
_STALLED = flags.DEFINE_integer(
    "stalled_attempts", 3, "Attempts in a row that save nothing new, then the end.", 1
)
_DELAY = flags.DEFINE_float(
    "delay", 1.0, "Seconds to the next attempt; doubled while nothing is saved.", 0.0
)
_MAX_DELAY = flags.DEFINE_float("max_delay", 60.0, "Seconds; no delay is longer.", 0.0)
_MEDIANS = flags.DEFINE_float(
    "step_medians",
    20.0,
    "A gang is hung that gives no sign of life for so many median times between rows "
    "of metrics.jsonl.",
    2.0,
)
_MIN_SILENCE = flags.DEFINE_float(
    "min_silence", 600.0, "Seconds; a shorter silence never counts as hung.", 1.0
)
_QUIET = flags.DEFINE_float(
    "quiet",
    3600.0,
    "Seconds of silence before the first rows that count as hung; 0: any may pass.",
    0.0,
)
_MAX_STOPPED = flags.DEFINE_float(
    "max_stopped", 60.0, "Seconds that one rank may be stopped by SIGSTOP.", 1.0
)
_GRACE = flags.DEFINE_float(
    "grace", 600.0, "Seconds from SIGTERM to SIGKILL, in which a step is saved.", 0.0
)


def workdir_of(command: Sequence[str], given: str | None) -> pathlib.Path:
    """Return the working directory that a command names, or --workdir.

    Raises:
      ValueError: there is none, or two that differ.
    """
    named = None
    for index, argument in enumerate(command):
        name, equals, value = argument.partition("=")
        if name in ("--workdir", "-workdir"):
            named = value if equals else next(iter(command[index + 1 :]), None)
    if given and named and pathlib.Path(given) != pathlib.Path(named):
        raise ValueError(
            f"--workdir={given!r} is not the command's --workdir={named!r}: give the "
            "command's alone"
        )
    if not (given or named):
        raise ValueError(
            "the command has no --workdir=DIR, by which its progress is known: give it "
            "one"
        )
    return pathlib.Path(named or given or "")


def run(command: list[str]) -> None:
    """Supervise a command, and end with its exit code."""
    if not command:
        raise ValueError("no command: python -m kdjax.supervise [FLAGS] -- COMMAND")
    if _LAUNCHER.value and _PROCESSES.value:
        raise ValueError(
            f"--processes={_PROCESSES.value} with --launcher: the launcher starts them"
        )
    if _RANK.value is not None and (_LAUNCHER.value or _PROCESSES.value):
        raise ValueError(
            f"--rank={_RANK.value} with --launcher or --processes: for a host with "
            "one process"
        )
    options = supervisor.Options(
        rank=_RANK.value,
        processes=_PROCESSES.value,
        launcher=_LAUNCHER.value,
        coordinator_host=_HOST.value,
        port=_PORT.value,
        cpu_devices=_CPU_DEVICES.value,
        gpus_per_process=_GPUS.value,
        stalled_attempts=_STALLED.value,
        delay=_DELAY.value,
        max_delay=_MAX_DELAY.value,
        step_medians=_MEDIANS.value,
        min_silence=_MIN_SILENCE.value,
        quiet=_QUIET.value,
        max_stopped=_MAX_STOPPED.value,
        grace=_GRACE.value,
    )
    workdir = workdir_of(command, flags.FLAGS.workdir)
    sys.exit(supervisor.Supervisor(command, workdir, options).run())


if __name__ == "__main__":
    cli.run_actions(run, resumes=True)

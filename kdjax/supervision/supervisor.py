"""Attempts of a gang: started, watched, ended, started again while that helps."""

import dataclasses
import math
import os
import pathlib
import signal
import socket
import sys
import time
from collections.abc import Sequence

from kdjax.runtime import interrupts, locks
from kdjax.supervision import causes
from kdjax.supervision.attempts import ATTEMPTS, Attempts
from kdjax.supervision.causes import End
from kdjax.supervision.gang import Gang
from kdjax.supervision.progress import Progress

LOCK = ".supervise.lock"
_POLL_SECONDS = 0.2
_WATCH_SECONDS = 0.5  # between two looks at the files
_STOOD_STILL_SECONDS = 30.0  # between two polls: this process was suspended
_LAUNCHER_SECONDS = 60.0  # for a launcher, from SIGINT to SIGKILL
_NUM_PORTS = 32  # that are tried, from the one that is given


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Options:
    """How a gang is started and supervised."""

    processes: int = 0  # on this machine, as ranks of one run; 0 = the command as it is
    rank: int | None = (
        None  # of this host's process; others run theirs; None = all here
    )
    launcher: bool = False  # the command starts all ranks itself: srun
    coordinator_host: str = "127.0.0.1"  # that the ranks reach rank 0's machine by
    port: int = 0  # of the coordinator, the first that is tried; 0 = any free one
    cpu_devices: int = 0  # virtual CPU devices of each process; 0 = as they are
    gpus_per_process: int = 0  # of this machine; 0 = each process sees all
    stalled_attempts: int = 3  # in a row without anything new that is saved: the end
    delay: float = 1.0  # seconds to the next attempt, doubled while nothing is saved
    max_delay: float = 60.0  # seconds
    step_medians: float = 20.0  # median times between rows of metrics.jsonl
    min_silence: float = 600.0  # seconds; less never counts as hung
    quiet: float = 3600.0  # seconds without a sign of life before rows; 0 = any
    max_stopped: float = 60.0  # seconds that a rank may be stopped by SIGSTOP
    settle: float = 5.0  # seconds for the first cause to end after its echo
    grace: float = 600.0  # seconds from a signal to the gang's end


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Outcome:
    """How an attempt ended."""

    kind: str  # done, stopped, failed, hung or final
    code: int  # to exit with, if it is the last attempt
    cause: str = ""
    host: str = ""
    rank: int | None = None
    codes: Sequence[int | None] = ()  # by rank; None = it ran until it was killed


class Supervisor:
    """Runs a command as a gang until it has ended for good.

    Args:
      command: of each process.
      workdir: where the run writes.
      options: how.
    """

    def __init__(
        self, command: Sequence[str], workdir: pathlib.Path, options: Options
    ) -> None:
        self._command, self._workdir, self._options = command, workdir, options
        self._progress = Progress(workdir)
        self._running_time = 0.0  # when no rank was stopped last

    def run(self) -> int:
        """Run attempts until one succeeds, is stopped, or another would not help.

        Returns:
          The exit code of the gang.

        Raises:
          ValueError: another supervisor, or another run, works in the directory.
        """
        attempts_name, lock_name = ATTEMPTS, LOCK
        if self._options.rank:  # beside those of rank 0
            attempts_name = f"attempts-{self._options.rank}.jsonl"
            lock_name = f".supervise-{self._options.rank}.lock"
        lock = locks.hold(self._workdir, remedy="another --workdir", file=lock_name)
        with lock, interrupts.StopRequest() as request:
            attempts = Attempts(self._workdir / attempts_name)
            stalled = 0
            while True:
                self._wait_for_the_directory(request)
                before = self._progress.durable()
                outcome = self._attempt(attempts, request)
                after = self._progress.durable()
                if outcome.kind in ("done", "stopped", "final"):
                    return outcome.code
                new = any(b > a for a, b in zip(before, after, strict=True))
                stalled = 0 if new else stalled + 1
                if stalled >= self._options.stalled_attempts:
                    _say(
                        f"{stalled} attempts in a row have saved nothing new: this was "
                        f"the last; {self._workdir / attempts_name} has their causes"
                    )
                    return outcome.code
                exponent = max(0, stalled - 1)
                delay = min(self._options.delay * 2**exponent, self._options.max_delay)
                _say(f"the gang starts again in {delay:.0f} s")
                attempts.flush()
                deadline = time.monotonic() + delay
                while time.monotonic() < deadline and request.received is None:
                    time.sleep(_POLL_SECONDS)
                if request.received is not None:
                    return 128 + request.received

    def _attempt(self, attempts: Attempts, request: interrupts.StopRequest) -> Outcome:
        """Run the gang once, and say how it ended."""
        start = time.monotonic()
        port = free_port(self._options.port + attempts.number % _NUM_PORTS)
        if not self._options.port:
            port = free_port(0)
        environments = self._environments(port)
        self._progress.start()
        first_rank = self._options.rank or 0
        with Gang(self._command, environments, first_rank=first_rank) as gang:
            attempts.started(port=port, pids=gang.pids)
            pids = " ".join(map(str, gang.pids))
            _say(f"attempt {attempts.number}: pids {pids}, coordinator port {port}")
            outcome = self._watch(gang, request, attempts)
            self._end(gang)
        step, saved = self._progress.step, self._progress.saved_step
        lost = max(0, step - saved) if outcome.kind in ("failed", "hung") else 0
        seconds = time.monotonic() - start
        attempts.ended(
            outcome=outcome.kind,
            cause=outcome.cause,
            host=outcome.host,
            rank=outcome.rank,
            codes=list(outcome.codes),
            seconds=round(seconds, 1),
            first_step=self._progress.first_step,
            last_step=step,
            saved_step=saved,
            steps_lost=lost,
        )
        if outcome.kind != "done":
            steps = f"step {saved} is saved" + (f", {lost} are lost" if lost else "")
            _say(
                f"attempt {attempts.number} {outcome.kind} after {seconds:.0f} s: "
                f"{outcome.cause}; {steps}"
            )
        return outcome

    def _watch(
        self, gang: Gang, request: interrupts.StopRequest, attempts: Attempts
    ) -> Outcome:
        """Wait for the gang's end, or for what makes one necessary."""
        options, progress = self._options, self._progress
        deadline, echo_deadline, next_look = math.inf, math.inf, 0.0
        sent = False
        before = self._running_time = time.monotonic()
        while gang.running:
            gang.wait(_POLL_SECONDS)
            now = time.monotonic()
            if now - before > _STOOD_STILL_SECONDS:
                progress.forgive(now - before)
                self._running_time = now
            before = now
            if request.received is not None and not sent:
                sent, deadline = True, now + options.grace
                # A launcher passes SIGTERM on; Ctrl-C it asks about.
                gang.send(signal.SIGTERM if options.launcher else request.received)
            if any(end.is_stop for end in gang.ends):  # the others save the same step
                deadline = min(deadline, now + options.grace)
            elif failed := [end for end in self._ends(gang) if end.code]:
                if any(not end.is_echo for end in failed):
                    break
                echo_deadline = min(echo_deadline, now + options.settle)
            if now > min(deadline, echo_deadline):
                break
            if now >= next_look:
                next_look = now + _WATCH_SECONDS
                attempts.flush()  # of rows for which a full disk had no room
                progress.poll(now, gang.output_time)
                if not sent and (hung := self._hung(gang, now)):
                    return hung
        return self._outcome(gang, request.received)

    def _hung(self, gang: Gang, now: float) -> Outcome | None:
        """Return the outcome of a gang that gives no sign of life for too long."""
        progress, options = self._progress, self._options
        age = progress.age(now)
        limit = progress.limit(
            medians=options.step_medians,
            least=options.min_silence,
            quiet=options.quiet,
        )
        host = socket.gethostname()
        stopped = gang.stopped()
        if not stopped:
            self._running_time = now
        if now - self._running_time < options.max_stopped and age < limit:
            return None
        if stopped:
            cause = f"rank {_ranks(stopped)} on host {host} is stopped (SIGSTOP)"
        else:
            cause = f"the gang on host {host} hangs"
        cause += f"; no sign of life for {age:.0f} s"
        if not math.isnan(progress.median):
            cause += f", a row of metrics takes {progress.median:.1f} s in the median"
        return Outcome(
            kind="hung",
            code=1,
            cause=cause,
            host=host,
            rank=stopped[0] if stopped else None,
            codes=gang.codes,
        )

    def _outcome(self, gang: Gang, received: int | None) -> Outcome:
        """Say how a gang ended."""
        codes, stopped = gang.codes, gang.stopped()
        ends = [end for end in self._ends(gang) if end.code]
        if not gang.running and not any(codes):
            return Outcome(kind="done", code=0, codes=codes)
        stops = [end for end in ends if end.is_stop]
        if received is not None or (stops and len(stops) == len(ends)):
            code = _exit_code(stops[0]) if stops else 128 + (received or signal.SIGTERM)
            cause = "stopped" if not gang.running else "did not stop in time: killed"
            return Outcome(kind="stopped", code=code, cause=cause, codes=codes)
        end = causes.first(ends, suspects=stopped)
        if end is None:
            host = socket.gethostname()
            return Outcome(
                kind="failed",
                code=1,
                cause=f"rank {_ranks(stopped)} on host {host} is stopped (SIGSTOP)",
                host=host,
                rank=stopped[0],
                codes=codes,
            )
        return Outcome(
            kind="final" if end.is_final else "failed",
            code=_exit_code(end),
            cause=str(end),
            host=end.host,
            rank=end.rank,
            codes=codes,
        )

    def _ends(self, gang: Gang) -> list[End]:
        """Return the ends of ranks; those that a launcher names, if it does."""
        named = causes.srun_ends(gang.lines) if self._options.launcher else []
        return named or gang.ends

    def _end(self, gang: Gang) -> None:
        """End what still runs; a launcher is given the time to end its ranks."""
        if self._options.launcher and gang.running:
            gang.send(signal.SIGINT)
            deadline = time.monotonic() + _LAUNCHER_SECONDS
            while gang.running and time.monotonic() < deadline:
                gang.wait(_POLL_SECONDS)
        gang.kill()

    def _environments(self, port: int) -> list[dict[str, str]]:
        """Return the variables of each process of the gang."""
        options = self._options
        coordinator = {"KDJAX_COORDINATOR": f"{options.coordinator_host}:{port}"}
        if options.launcher:
            return [coordinator]
        environments = []
        for rank in range(max(1, options.processes)):
            variables = {}
            if options.processes > 1:
                variables = coordinator | {
                    "KDJAX_NUM_PROCESSES": str(options.processes),
                    "KDJAX_PROCESS_ID": str(rank),
                }
            if options.cpu_devices:
                flags = os.environ.get("XLA_FLAGS", "")
                device = f"--xla_force_host_platform_device_count={options.cpu_devices}"
                variables["XLA_FLAGS"] = f"{flags} {device}".strip()
            if options.gpus_per_process:
                first = rank * options.gpus_per_process
                gpus = range(first, first + options.gpus_per_process)
                variables["CUDA_VISIBLE_DEVICES"] = ",".join(map(str, gpus))
            environments.append(variables)
        return environments

    def _wait_for_the_directory(self, request: interrupts.StopRequest) -> None:
        """Wait until a dead run's lock has gone stale.

        The owner on a lost machine is known to be dead after two minutes of silence.

        Raises:
          ValueError: the owner lives.
        """
        if self._options.rank:  # rank 0 may be under way
            return
        deadline = time.monotonic() + locks.STALE_SECONDS + 2 * locks.HEARTBEAT_SECONDS
        said = False
        while (owner := locks.holder(self._workdir)) and request.received is None:
            if time.monotonic() > deadline:
                raise ValueError(
                    f"workdir={str(self._workdir)!r} is being written by {owner}: wait "
                    "for its end, or use another --workdir"
                )
            if not said:
                said = True
                _say(f"waiting for {owner}, which holds {self._workdir}")
            time.sleep(_POLL_SECONDS)


def free_port(first: int) -> int:
    """Return a TCP port that nobody listens on; the first one of those from `first` on.

    Args:
      first: 0 = any.

    Raises:
      ValueError: none of `first` ... is free.
    """
    for port in range(first, first + _NUM_PORTS) if first else [0]:
        with socket.socket() as listener:
            try:
                listener.bind(("", port))
            except OSError:
                continue
            return int(listener.getsockname()[1])
    raise ValueError(
        f"port={first}: it and the {_NUM_PORTS - 1} after it are taken: use another one"
    )


def _exit_code(end: End) -> int:
    return end.code if end.code > 0 else 128 - end.code


def _ranks(ranks: Sequence[int]) -> str:
    return ", ".join(map(str, ranks))


def _say(text: str) -> None:
    try:
        print(f"supervise: {text}", file=sys.stderr, flush=True)
    except OSError:  # its reader is gone, or the disk full: the gang goes on
        return

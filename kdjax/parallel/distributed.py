"""Several processes as one run: start, agreement, barriers, losses, a common stop.

The processes (ranks) meet on the coordinator's port before JAX does, compare what they
are about to run, and stay connected: `kdjax.parallel.hub` has the whole of it.
"""

import atexit
import hashlib
import inspect
import json
import os
import pathlib
import signal
import socket
import sys
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from kdjax.config import DistributedConfig
from kdjax.parallel import agreement, link
from kdjax.parallel.wire import Rank
from kdjax.runtime import interrupts

_VARIABLES = ("KDJAX_COORDINATOR", "KDJAX_NUM_PROCESSES", "KDJAX_PROCESS_ID")
# Variables with the number of processes that a scheduler has started for one command.
_SCHEDULERS = ("SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE")
# JAX's own heartbeats only end processes that the channel did not: it aborts them.
_JAX_HEARTBEATS = 3
_LOOKS, _LOOK_SECONDS = 30, 2.0  # at files that a host may see late
_link: link.Link | None = None
_coordinator = ""  # host:port


def meet(config: DistributedConfig) -> bool:
    """Join the other processes of this run, if there are any; JAX is started later.

    True if there are.

    The processes are found from KDJAX_COORDINATOR (host:port), KDJAX_NUM_PROCESSES and
    KDJAX_PROCESS_ID where those are set (launch/local.sh sets them); else from Slurm,
    Open MPI or a TPU slice that has started several; else, where KDJAX_DISTRIBUTED=1,
    from any scheduler that JAX knows (Kubernetes). KDJAX_DISTRIBUTED=0 forbids both.
    With the variables a process has all devices that it sees; by the scheduler it has
    what JAX takes: under Slurm and Open MPI one GPU per task.

    Raises:
      ValueError: some of the three variables are missing, or the scheduler is unknown.
      link.PeerLost: rank 0 cannot be reached, or its port is taken.
    """
    global _link, _coordinator
    found = _find(config)
    if found is None or found[1] == 1:
        return False
    coordinator, num, index = found
    _link = link.meet(
        coordinator,
        Rank(index=index, num=num, host=socket.gethostname(), pid=os.getpid()),
        heartbeat=config.heartbeat_seconds,
        patience=config.initialization_seconds,
        lose=_leave,
        say=lambda text: print(f"{_program()}: {text}", file=sys.stderr, flush=True),
    )
    _coordinator = coordinator
    return True


def initialize(config: DistributedConfig) -> None:
    """Start JAX's distributed runtime, after `meet`; nothing in a run of one.

    Raises:
      agreement.RanksDiffer: the ranks have other kinds or numbers of devices.
    """
    if _link is None:
        return
    handler = signal.getsignal(signal.SIGTERM)
    options: dict[str, Any] = {
        "initialization_timeout": config.initialization_seconds,
        "heartbeat_timeout_seconds": _JAX_HEARTBEATS * config.heartbeat_seconds,
        "shutdown_timeout_seconds": config.shutdown_seconds,
    }
    if all(os.environ.get(name) for name in _VARIABLES):
        # Whoever set them has chosen this process's devices, too: JAX would take the
        # one device with the number of the scheduler's task.
        options["cluster_detection_method"] = "deactivate"
    known = inspect.signature(jax.distributed.initialize).parameters
    jax.distributed.initialize(
        coordinator_address=_coordinator,
        num_processes=_link.rank.num,
        process_id=_link.rank.index,
        **{name: value for name, value in options.items() if name in known},
    )
    # JAX's handler would keep SIGTERM to itself until a training step asks.
    if handler is not None:
        signal.signal(signal.SIGTERM, handler)
    atexit.register(_end_normally)  # before JAX's own, which is registered already
    devices = jax.local_devices()
    agree(
        "devices",
        {
            "devices.platform": devices[0].platform,
            "devices.kind": devices[0].device_kind,
            "devices.number": str(len(devices)),
            "devices.processes": str(jax.process_count()),
        },
    )


def _find(config: DistributedConfig) -> tuple[str, int, int] | None:
    """Return coordinator, number of processes and the index of this one, or None."""
    values = [os.environ.get(name) for name in _VARIABLES]
    if all(values):
        return str(values[0]), _number(_VARIABLES[1]), _number(_VARIABLES[2])
    if any(values):
        missing = [n for n, v in zip(_VARIABLES, values, strict=True) if not v]
        raise ValueError(f"{missing} not set: set all of {_VARIABLES}, or none of them")
    wish = os.environ.get("KDJAX_DISTRIBUTED")
    several = any(os.environ.get(name, "1") not in ("1", "") for name in _SCHEDULERS)
    several |= "," in os.environ.get("TPU_WORKER_HOSTNAMES", "")
    if wish == "0" or (wish != "1" and not several):
        return None
    return _detect(config)


def _number(name: str) -> int:
    value = os.environ[name]
    if not value.isdigit():
        raise ValueError(f"{name}={value!r} is no number: use 0, 1, 2, ...")
    return int(value)


def _detect(config: DistributedConfig) -> tuple[str, int, int]:
    """Ask JAX which scheduler has started this process, and as which of how many."""
    found: tuple[Any, ...] = (None, None, None)
    try:
        from jax._src.clusters import ClusterEnv

        found = ClusterEnv.auto_detect_unset_distributed_params(
            None, None, None, None, None, config.initialization_seconds
        )
    except ImportError:  # another version of JAX
        pass
    coordinator, num, index = found[:3]
    if coordinator is None or num is None or index is None:
        raise ValueError(
            f"KDJAX_DISTRIBUTED={os.environ.get('KDJAX_DISTRIBUTED')!r}, and JAX knows "
            f"no scheduler here (Slurm, Open MPI, TPU, Kubernetes): set {_VARIABLES}"
        )
    return str(coordinator), int(num), int(index)


def _program() -> str:
    return pathlib.Path(sys.argv[0]).stem


def _leave(text: str, code: int) -> None:
    """End this process since another one is lost; in the channel's thread."""
    own = f" [this is rank {_link.rank.index}]" if _link is not None else ""
    remedy = ": start all ranks again; what is complete is kept"
    differs = code == interrupts.RANKS_DIFFER_CODE
    interrupts.end_at_once(
        _program(), f"error: {text}{'' if differs else remedy}{own}", code
    )


def _end_normally() -> None:
    """Tell the others of an orderly end, or of a bug that nobody has caught."""
    if _link is not None:
        error = getattr(sys, "last_value", None)
        _link.end(0 if error is None else 1, repr(error) if error else "")


def agree(topic: str, fields: Mapping[str, str], *, is_final: bool = True) -> None:
    """Compare named fields over all ranks; in a run of one nothing.

    All ranks call it with the same topic. Nothing is compiled where they have met by
    `meet`.

    Args:
      topic: of the comparison, for errors.
      fields: name -> value.
      is_final: the run ends where they differ; False if it will be asked again.

    Raises:
      agreement.RanksDiffer: on every rank: the field, its values, and whose they are.
    """
    if _link is not None:
        _link.agree(topic, fields, is_final=is_final)
    elif is_several():  # joined by the caller's own program
        _gather(topic, fields)


def agree_on_files(topic: str, look: Callable[[], Mapping[str, str]]) -> None:
    """Compare what all ranks see of files that another run may just have written.

    Network file systems show new files late on other hosts, so it looks again for a
    minute before it says that the ranks differ.

    Args:
      topic: as of `agree`.
      look: returns the fields; it is called on every rank.

    Raises:
      agreement.RanksDiffer: as `agree` does.
    """
    if not is_several():
        return
    for _ in range(_LOOKS):
        try:
            return agree(topic, look(), is_final=False)
        except agreement.RanksDiffer:
            time.sleep(_LOOK_SECONDS)
    agree(topic, look())


def _gather(topic: str, fields: Mapping[str, str]) -> None:
    """Compare fields through JAX's collectives."""
    content = np.frombuffer(json.dumps(dict(fields)).encode(), np.uint8)
    digest = hashlib.sha256(topic.encode() + content.tobytes()).digest()[:8]
    heads = np.concatenate([np.frombuffer(digest, np.uint32), [len(content)]])
    every = np.asarray(multihost_utils.process_allgather(heads.astype(np.uint32)))
    if (every[:, :2] == every[0, :2]).all():
        return
    padded = np.zeros(int(every[:, 2].max()), np.uint8)
    padded[: len(content)] = content
    rows = np.asarray(multihost_utils.process_allgather(padded))
    texts = [row[:n].tobytes() for row, n in zip(rows, every[:, 2], strict=True)]
    hosts = ["unknown"] * len(texts)
    text = agreement.describe([json.loads(text) for text in texts], hosts)
    raise agreement.RanksDiffer(text or f"the ranks are not all at {topic!r}")


def is_several() -> bool:
    """Return True if there are other processes of this run."""
    if _link is not None:
        return True
    # Asked of the service first: the backend need not be started for the answer.
    return jax.distributed.is_initialized() and jax.process_count() > 1


def is_main() -> bool:
    """Return True in the process that writes files and prints."""
    return jax.process_index() == 0


def barrier(name: str) -> None:
    """Wait for all processes."""
    if _link is not None:
        _link.agree(name, {})
    elif jax.process_count() > 1:
        multihost_utils.sync_global_devices(name)


def abandon(message: str, code: int = 1) -> None:
    """End one of several processes at once; does nothing in a run of one.

    Args:
      message: last words, on stderr.
      code: of the exit.

    An orderly exit waits minutes for the other processes, which wait for this one.
    """
    if _link is None and not jax.distributed.is_initialized():
        return
    print(message, file=sys.stderr, flush=True)
    if _link is not None:
        words = message.removeprefix(f"{_program()}: error: ").strip()
        if words.startswith("Traceback"):
            words = words.splitlines()[-1]
        _link.end(code, words)
    os._exit(code)


def wait_for_cause() -> None:
    """Wait for the first cause of an error of communication, which ends this process.

    A collective may fail before a silent rank is known to be lost.
    """
    if _link is not None:
        _link.wait_for_cause()


class Preemption:
    """Ctrl-C and SIGTERM: the loop saves and stops at the end of a step.

    A signal to any of several processes makes all stop after the same step. Use as a
    context manager.
    """

    def __init__(self) -> None:
        self._several = jax.process_count() > 1
        if _link is not None:
            self._request = interrupts.StopRequest(_link.request_stop)
        elif self._several:  # JAX's service hears SIGTERM alone
            self._request = interrupts.StopRequest(_terminate_self, [signal.SIGINT])
        else:
            self._request = interrupts.StopRequest()

    def __enter__(self) -> "Preemption":
        """Install the handlers."""
        if _link is not None:
            _link.begin_steps()
        self._request.__enter__()
        return self

    def __exit__(self, *exception: object) -> None:
        """Restore the handlers that were there before."""
        self._request.__exit__(*exception)
        if _link is not None:
            _link.begin_steps()

    def requested(self, step: int) -> bool:
        """Return True to stop after `step`; the same on every process."""
        if _link is not None:
            return _link.reached(step)
        if self._several:
            return bool(multihost_utils.reached_preemption_sync_point(step))
        return self.received

    @property
    def received(self) -> bool:
        """Return True after a signal, if no other process waits for this one."""
        if _link is not None:
            return _link.stop_signal > 0
        return not self._several and self._request.received is not None

    def stop(self, message: str) -> BaseException:
        """Return what ends the process after the signal that was received.

        Args:
          message: what was left, and how to go on.
        """
        if _link is not None:
            _link.has_agreed = True
            return interrupts.stop_by(_link.stop_signal, message)
        return self._request.stop(message)


def _terminate_self(number: int) -> None:
    """Tell JAX's service, which hears SIGTERM alone."""
    del number
    os.kill(os.getpid(), signal.SIGTERM)

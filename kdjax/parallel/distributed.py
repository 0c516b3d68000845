"""Several processes as one run: start, barriers and a common stop."""

import logging
import os
import signal
import sys

import jax
from jax.experimental import multihost_utils

from kdjax.runtime import interrupts

_SCHEDULERS = ("SLURM_NTASKS", "OMPI_COMM_WORLD_SIZE")  # number of processes


def start() -> None:
    """Join the other processes of this run, if there are any.

    The processes are found from KDJAX_COORDINATOR (host:port), KDJAX_NUM_PROCESSES and
    KDJAX_PROCESS_ID where those are set (launch/local.sh sets them), else from the
    scheduler (Slurm, Open MPI, TPU pods, Kubernetes) where KDJAX_DISTRIBUTED=1.

    Raises:
      ValueError: some of the three variables are missing.
    """
    names = ("KDJAX_COORDINATOR", "KDJAX_NUM_PROCESSES", "KDJAX_PROCESS_ID")
    values = [os.environ.get(name) for name in names]
    if all(values):
        coordinator, num_processes, process_id = values
        jax.distributed.initialize(
            coordinator_address=coordinator,
            num_processes=int(num_processes or 0),
            process_id=int(process_id or 0),
        )
    elif any(values):
        missing = [n for n, v in zip(names, values, strict=True) if not v]
        raise ValueError(f"{missing} not set: set all of {names}, or none of them")
    elif os.environ.get("KDJAX_DISTRIBUTED") == "1":
        jax.distributed.initialize()
    elif any(int(os.environ.get(name, 1)) > 1 for name in _SCHEDULERS):
        logging.warning(
            "a scheduler started this process but KDJAX_DISTRIBUTED is not 1: "
            "running as one process"
        )


def is_main() -> bool:
    """Return True in the process that writes files and prints."""
    return jax.process_index() == 0


def barrier(name: str) -> None:
    """Wait for all processes."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(name)


def abandon(message: str, code: int = 1) -> None:
    """End one of several processes at once; does nothing in a run of one.

    Args:
      message: last words, on stderr.
      code: of the exit.

    An orderly exit waits minutes for the other processes, which wait for this one.
    """
    # Asked of the service, not of the backend, which an error need not start.
    if jax.distributed.is_initialized():
        print(message, file=sys.stderr, flush=True)
        os._exit(code)


class Preemption:
    """Ctrl-C and SIGTERM: the loop saves and stops at the end of a step.

    Several processes leave SIGTERM to JAX's own service, which makes all of them stop
    after the same step; Ctrl-C becomes one. Use as a context manager.
    """

    def __init__(self) -> None:
        several = jax.process_count() > 1
        self._request = interrupts.StopRequest(_terminate_self if several else None)

    def __enter__(self) -> "Preemption":
        """Install the handlers."""
        self._request.__enter__()
        return self

    def __exit__(self, *exception: object) -> None:
        """Restore the handlers that were there before."""
        self._request.__exit__(*exception)

    def requested(self, step: int) -> bool:
        """Return True to stop after `step`; the same on every process."""
        if jax.process_count() > 1:
            return bool(multihost_utils.reached_preemption_sync_point(step))
        return self.received

    @property
    def received(self) -> bool:
        """Return True if this process alone got a signal, and no other waits for it."""
        return jax.process_count() == 1 and self._request.received is not None

    def stop(self, message: str) -> BaseException:
        """Return what ends the process after the signal that was received.

        Args:
          message: what was left, and how to go on.
        """
        return self._request.stop(message)


def _terminate_self(number: int) -> None:
    """Tell JAX's service, which hears SIGTERM alone."""
    del number
    os.kill(os.getpid(), signal.SIGTERM)

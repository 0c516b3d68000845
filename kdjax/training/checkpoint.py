"""Checkpoints of a TrainState. The only file that imports orbax."""

import concurrent.futures
import contextlib
import json
import os
import pathlib
import shutil
import sys
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
import xxhash
from jax.experimental import multihost_utils
from orbax.checkpoint import v1 as ocp

from kdjax.experiment.run import Run
from kdjax.parallel import distributed
from kdjax.parallel.sharding import path_name
from kdjax.runtime import files, locks, malloc
from kdjax.training import trainable
from kdjax.training.state import PROJECTION, TrainState

CHECKSUMS = "checksums.json"  # in the folder of a checkpoint
_STATE = "state"  # orbax's name for it
_BLOCK_BYTES = 1 << 20


class Checkpoints:
    """Checkpoints of a run, to be read: nothing of them is written, cleared or awaited.

    So they can be read while the run is training; each one appears when it is complete,
    and hard links keep what is read from being removed meanwhile.

    Args:
      folder: of the checkpoints; it need not exist.
    """

    def __init__(self, folder: pathlib.Path) -> None:
        self._folder = pathlib.Path(folder).absolute()
        self._shown = self._folder  # in errors

    def steps(self) -> list[int]:
        """List the steps of the complete checkpoints, the newest last."""
        if not self._folder.is_dir():
            return []
        names = (path.name for path in self._folder.iterdir() if path.is_dir())
        return sorted(int(name) for name in names if name.isdecimal())

    def latest_step(self) -> int | None:
        """Return the step of the newest complete checkpoint, or None."""
        return max(self.steps(), default=None)

    def restore(self, abstract: TrainState, *, step: int | None = None) -> TrainState:
        """Read a checkpoint onto the devices that `abstract` names.

        Args:
          abstract: shapes, dtypes and shardings to restore.
          step: of the checkpoint; None = the newest.

        Raises:
          ValueError: there is none, it is damaged, or it does not fit: each path that
            differs is listed with the shape wanted and the shape found.
        """

        def read(checkpoints: Checkpoints, step: int) -> TrainState:
            checkpoints._check(abstract, step)
            return TrainState(**checkpoints._load(step, _stored(abstract)))

        return self._read(read, step)

    def restore_params(self, abstract: Any, *, step: int | None = None) -> Any:
        """Read a model's parameters alone, of those with averages the averages.

        Arguments and errors as `restore`.
        """
        return self.restore_step(abstract, step=step)[1]

    def restore_step(
        self, abstract: Any, *, step: int | None = None
    ) -> tuple[int, Any]:
        """Return the step of a checkpoint, and what `restore_params` does."""

        def read(checkpoints: Checkpoints, step: int) -> tuple[int, Any]:
            checkpoints._check({"params": abstract}, step, partial=True)
            stored = _shapes(checkpoints._metadata(step))
            averaged = {p.removeprefix("ema/") for p in stored if p.startswith("ema/")}
            params, ema = trainable.partition(abstract, averaged)
            target = {name: x for name, x in (("params", params), ("ema", ema)) if x}
            loading = ocp.options.PyTreeOptions.Loading(partial_load=True)
            options = ocp.options.PyTreeOptions(loading=loading)
            with ocp.Context(pytree_options=options):
                loaded = checkpoints._load(step, target)
            params = trainable.merge(loaded.get("params", {}), loaded.get("ema", {}))
            return step, params

        return self._read(read, step)

    def damage(self, step: int) -> str:
        """Compare the files of a checkpoint with their checksums, shared by processes.

        Returns:
          The first file that differs, or is missing; "" if there is none, or the
          checkpoint has no checksums (earlier versions wrote none).
        """
        folder = self._folder / str(step)
        if not (folder / CHECKSUMS).is_file():
            return ""
        try:
            checksums = files.read_json(folder / CHECKSUMS)["files"]
            names = sorted(checksums)
        except (ValueError, LookupError, TypeError):
            return CHECKSUMS
        first = len(names)
        for index in range(jax.process_index(), len(names), jax.process_count()):
            file = folder / names[index]
            if not file.is_file() or _checksum(file) != checksums[names[index]]:
                first = index
                break
        if jax.process_count() > 1:
            everywhere = multihost_utils.process_allgather(np.int64(first))
            first = int(np.min(everywhere))
        return names[first] if first < len(names) else ""

    def _read(self, read: Callable[["Checkpoints", int], Any], step: int | None) -> Any:
        """Call `read` with a step; None = the newest, also if it is being replaced."""
        steps = self.steps()
        if not steps:
            raise ValueError(f"{self._folder} has no checkpoint: train first")
        if step is not None and step not in steps:
            raise ValueError(
                f"step={step}: {self._folder} has no such checkpoint: use one of "
                f"{steps}"
            )
        while True:
            current = steps[-1] if step is None else step
            try:
                with self._pinned(current) as checkpoints:
                    if damaged := checkpoints.damage(current):
                        raise ValueError(self._damage_message(current, damaged))
                    return read(checkpoints, current)
            except Exception:
                # Training removes old checkpoints: then there is a newer one.
                if step is not None or self.steps()[-1:] in ([], steps[-1:]):
                    raise
                steps = self.steps()

    @contextlib.contextmanager
    def _pinned(self, step: int) -> Iterator["Checkpoints"]:
        """Yield checkpoints of which one stays, though a running training removes it.

        Raises:
          FileNotFoundError: it is being removed.
        """
        owner = locks.holder(self._folder.parent)
        if owner is None or owner.pid == os.getpid() or jax.process_count() > 1:
            yield self
            return
        source = self._folder / str(step)
        scratch = files.temporary(self._folder.with_name("reading"))
        shutil.rmtree(scratch, ignore_errors=True)
        pinned = Checkpoints(scratch)
        pinned._shown = self._folder
        try:
            try:
                names = _names(source)
                for name in names:
                    target = scratch / str(step) / name
                    target.parent.mkdir(parents=True, exist_ok=True)
                    os.link(source / name, target)
            except FileNotFoundError:
                raise
            except OSError:  # no right to, or no links here: then without
                pinned = self
            else:
                if _names(source) != names:
                    raise FileNotFoundError(f"{source} is being removed")
            yield pinned
        finally:
            shutil.rmtree(scratch, ignore_errors=True)

    def _damage_message(self, step: int, file: str) -> str:
        others = [other for other in self.steps() if other != step]
        remedy = "remove it"
        if others:
            remedy = f"use another (--step: {others}), or remove it"
        return (
            f"checkpoint {step} in {self._shown} is damaged: {file} is not as it was "
            f"written: {remedy}"
        )

    def _metadata(self, step: int) -> Any:
        """Read the tree of what a checkpoint holds."""
        with self._explained(step):
            tree = ocp.metadata(self._folder / str(step), _STATE).metadata
            if tree is None:
                raise ValueError("no description of its arrays")
            return tree

    def _load(self, step: int, target: Any) -> Any:
        with self._explained(step):
            return ocp.load(
                self._folder / str(step), target, checkpointable_name=_STATE
            )

    @contextlib.contextmanager
    def _explained(self, step: int) -> Iterator[None]:
        """Name the checkpoint in errors of a damaged one without checksums.

        Orbax and tensorstore raise anything; what the checksums find whole is not
        damaged.
        """
        try:
            yield
        except Exception as error:
            folder = self._folder / str(step)
            if (folder / CHECKSUMS).is_file() or not folder.is_dir():
                raise
            reason = (str(error) or type(error).__name__).splitlines()[0][:200]
            file = f"it cannot be read ({reason}); one of its files"
            raise ValueError(self._damage_message(step, file)) from error

    def _check(self, abstract: Any, step: int, *, partial: bool = False) -> None:
        stored = _shapes(self._metadata(step))
        expected = _shapes(abstract)
        if partial:  # only the model is read
            others = f"params/{PROJECTION}/"
            stored = {
                path: x
                for path, x in stored.items()
                if path.startswith("params/") and not path.startswith(others)
            }
        lines = [
            f"  {path}: wanted {expected.get(path, 'nothing')}, "
            f"found {stored.get(path, 'nothing')}"
            for path in sorted(expected.keys() | stored.keys())
            if expected.get(path) != stored.get(path)
        ]
        if lines:
            raise ValueError(
                f"checkpoint {step} in {self._shown} does not fit "
                f"this config: {len(lines)} arrays differ (use the run's own "
                "config.json, or another --workdir)\n" + "\n".join(lines[:20])
            )


class CheckpointWriter(Checkpoints):
    """Checkpoints of the run that this process trains: saved in the background, pruned.

    Each gets checksums of its files once it is complete. Use as a context manager.

    Args:
      folder: made when missing; nobody else writes there.
      keep_last: most recent checkpoints kept.
      keep_best: also keep the one with the lowest held-out NLL.
      config_json: the run's configuration, stored with each checkpoint.
    """

    def __init__(
        self,
        folder: pathlib.Path,
        *,
        keep_last: int = 2,
        keep_best: bool = True,
        config_json: str = "{}",
    ) -> None:
        super().__init__(folder)
        self._keep = keep_last, keep_best
        self._config = json.loads(config_json)
        self._checkpointer: Any = None
        self._saved: int | None = None  # the step of the last save
        self._sealing: concurrent.futures.Future[None] | None = None
        self._pool = concurrent.futures.ThreadPoolExecutor(1, "checksums")

    def resume(self, abstract: TrainState) -> tuple[int, TrainState | None]:
        """Read the newest checkpoint that is not damaged; damaged ones are set aside.

        Args:
          abstract: shapes, dtypes and shardings to restore.

        Returns:
          Its step and state; 0 and None if there is no checkpoint.

        Raises:
          ValueError: all are damaged, or the newest does not fit.
        """
        distributed.agree_on_files(
            "resume", lambda: {f"checkpoints in {self._folder}": f"{self.steps()}"}
        )
        steps = self.steps()
        for step in reversed(steps):
            damaged = self.damage(step)
            if not damaged:
                return step, self.restore(abstract, step=step)
            if step == steps[0]:
                raise ValueError(
                    self._damage_message(step, damaged)
                    + "; there is no sound one, without any training starts afresh"
                )
            self._set_aside(step, damaged)
        return 0, None

    def _set_aside(self, step: int, damaged: str) -> None:
        target = self._folder.with_name("damaged_checkpoints") / str(step)
        if distributed.is_main():
            print(
                f"checkpoint {step} in {self._folder} is damaged: {damaged} is not as "
                f"it was written; it is moved to {target}, an older one is used",
                file=sys.stderr,
                flush=True,
            )
            target.parent.mkdir(exist_ok=True)
            shutil.rmtree(target, ignore_errors=True)
            (self._folder / str(step)).rename(target)
        distributed.barrier(f"damaged {step}")

    def save(self, step: int, state: TrainState, *, nll: float | None = None) -> None:
        """Start writing a checkpoint; the state may be donated right after.

        Args:
          step: optimizer steps done.
          state: all of it is saved.
          nll: held-out NLL, nats per token, by which the best one is kept.

        Raises:
          OSError, RuntimeError: the one before could not be written.
        """
        self._wait()
        if step == self._saved or step in self.steps():
            return
        response = self._open().save_async(
            step,
            _stored(state),
            force=True,
            metrics=None if nll is None else {"nll": float(nll)},
            custom_metadata={"config": self._config},
        )
        self._saved = step
        self._sealing = self._pool.submit(self._seal, step, response)

    def _open(self) -> Any:
        """Return orbax's checkpointer, made at the first save."""
        if self._checkpointer is None:
            keep_last, keep_best = self._keep
            policies = ocp.training.preservation_policies
            keep: list[Any] = [policies.LatestN(keep_last)]
            if keep_best:
                keep.append(
                    policies.BestN(
                        get_metric_fn=lambda metrics: -metrics["nll"],
                        n=1,
                        keep_checkpoints_without_metrics=False,
                    )
                )
            self._checkpointer = ocp.training.Checkpointer(
                self._folder,
                preservation_policy=policies.AnyPreservationPolicy(keep),
                # What a killed run left half-written is not a checkpoint.
                cleanup_tmp_directories=True,
            )
        return self._checkpointer

    def _seal(self, step: int, response: Any) -> None:
        """Write the checksums of a checkpoint as soon as it is complete."""
        response.result()
        malloc.trim()
        if not distributed.is_main():
            return
        folder = self._folder / str(step)
        checksums = {name: _checksum(folder / name) for name in _names(folder)}
        value = {"algorithm": "xxh3_128", "files": checksums}
        files.write_json(folder / CHECKSUMS, value)

    def _wait(self) -> None:
        """Wait for the checkpoint that is being written; raise what went wrong."""
        sealing, self._sealing = self._sealing, None
        if sealing is not None:
            sealing.result()

    def check(self) -> None:
        """Raise what went wrong with the last save, if that is known by now."""
        if self._sealing is not None and self._sealing.done():
            self._wait()

    def __enter__(self) -> "CheckpointWriter":
        """Return self."""
        return self

    def __exit__(self, kind: type[BaseException] | None, *rest: object) -> None:
        """Close; but one of several processes that fails waits for no other."""
        if kind is None or jax.process_count() == 1:
            self.close()

    def close(self) -> None:
        """Wait for checkpoints that are being written, and close."""
        checkpointer, self._checkpointer = self._checkpointer, None
        try:
            self._wait()
        finally:
            self._pool.shutdown()
            if checkpointer is not None:
                checkpointer.close()


def _names(folder: pathlib.Path) -> list[str]:
    """List the files below a folder."""
    files_below = (path for path in folder.rglob("*") if path.is_file())
    return sorted(path.relative_to(folder).as_posix() for path in files_below)


def _checksum(file: pathlib.Path) -> str:
    """Return the XXH3 of a file, 128 bits, hex."""
    digest = xxhash.xxh3_128()
    with file.open("rb") as stream:
        while block := stream.read(_BLOCK_BYTES):
            digest.update(block)
    return digest.hexdigest()


def _stored(state: TrainState) -> dict[str, Any]:
    """Return the fields of a state that are not None."""
    return {name: x for name, x in state._asdict().items() if x is not None}


def _shapes(tree: Any) -> dict[str, str]:
    """Return "dtype[shape]" of every array of a tree, by path."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
    return {
        path_name(path): f"{x.dtype}[{','.join(map(str, x.shape))}]"
        for path, x in leaves
    }


def load_student(run: Run, *, step: int | None = None) -> Any:
    """Read the student's parameters at a checkpoint (None = the newest).

    Adapters stay beside their kernels; where averages are kept, these are read.
    """
    checkpoints = Checkpoints(run.workdir / "checkpoints")
    return checkpoints.restore_params(run.student.abstract, step=step)

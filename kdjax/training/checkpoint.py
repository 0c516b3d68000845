"""Checkpoints of a TrainState. The only file that imports orbax."""

import json
import pathlib
from typing import Any

import jax
from orbax.checkpoint import v1 as ocp

from kdjax.experiment.run import Run
from kdjax.parallel.sharding import path_name
from kdjax.training import trainable
from kdjax.training.state import PROJECTION, TrainState


class Checkpoints:
    """Checkpoints of one run: written in the background, pruned, restored exactly.

    Args:
      folder: made when missing.
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
        self._config = json.loads(config_json)
        self._closed = False
        self._checkpointer = ocp.training.Checkpointer(
            pathlib.Path(folder).absolute(),
            preservation_policy=policies.AnyPreservationPolicy(keep),
            # What a killed run left half-written is not a checkpoint.
            cleanup_tmp_directories=True,
        )

    def latest_step(self) -> int | None:
        """Return the step of the newest complete checkpoint, or None."""
        latest = self._checkpointer.latest
        return None if latest is None else latest.step

    def save(self, step: int, state: TrainState, *, nll: float | None = None) -> None:
        """Start writing a checkpoint; the state may be donated right after.

        Args:
          step: optimizer steps done.
          state: all of it is saved.
          nll: held-out NLL, nats per token, by which the best one is kept.
        """
        if self.latest_step() == step:
            return
        self._checkpointer.save_async(
            step,
            _stored(state),
            force=True,
            metrics=None if nll is None else {"nll": float(nll)},
            custom_metadata={"config": self._config},
        )

    def restore(self, abstract: TrainState, *, step: int | None = None) -> TrainState:
        """Read a checkpoint onto the devices that `abstract` names.

        Args:
          abstract: shapes, dtypes and shardings to restore.
          step: of the checkpoint; None = the newest.

        Raises:
          ValueError: there is none, or it does not fit: each path that differs is
            listed with the shape wanted and the shape found.
        """
        step = self._resolve(step)
        self._check(abstract, step)
        return TrainState(**self._checkpointer.load(step, _stored(abstract)))

    def restore_params(self, abstract: Any, *, step: int | None = None) -> Any:
        """Read a model's parameters alone, of those with averages the averages.

        Arguments and errors as `restore`.
        """
        step = self._resolve(step)
        self._check({"params": abstract}, step, partial=True)
        stored = _shapes(self._checkpointer.metadata(step).metadata)
        averaged = {p.removeprefix("ema/") for p in stored if p.startswith("ema/")}
        params, ema = trainable.partition(abstract, averaged)
        target = {name: x for name, x in (("params", params), ("ema", ema)) if x}
        loading = ocp.options.PyTreeOptions.Loading(partial_load=True)
        with ocp.Context(pytree_options=ocp.options.PyTreeOptions(loading=loading)):
            loaded = self._checkpointer.load(step, target)
        return trainable.merge(loaded.get("params", {}), loaded.get("ema", {}))

    def _resolve(self, step: int | None) -> int:
        step = self.latest_step() if step is None else step
        if step is None:
            raise ValueError(
                f"{self._checkpointer.directory} has no checkpoint: train first"
            )
        return step

    def _check(self, abstract: Any, step: int, *, partial: bool = False) -> None:
        stored = _shapes(self._checkpointer.metadata(step).metadata)
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
                f"checkpoint {step} in {self._checkpointer.directory} does not fit "
                f"this config: {len(lines)} arrays differ (use the run's own "
                "config.json, or another --workdir)\n" + "\n".join(lines[:20])
            )

    def __enter__(self) -> "Checkpoints":
        """Return self."""
        return self

    def __exit__(self, kind: type[BaseException] | None, *rest: object) -> None:
        """Close; but one of several processes that fails waits for no other."""
        if kind is None or jax.process_count() == 1:
            self.close()

    def close(self) -> None:
        """Wait for checkpoints that are being written, and close."""
        if not self._closed:
            self._checkpointer.close()
        self._closed = True


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
    with Checkpoints(run.workdir / "checkpoints") as checkpoints:
        return checkpoints.restore_params(run.student.abstract, step=step)

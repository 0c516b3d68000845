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
    """The checkpoints of one run: written in the background, pruned, restored exactly.

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
        """The newest complete checkpoint's step, or None."""
        latest = self._checkpointer.latest
        return None if latest is None else latest.step

    def save(self, step: int, state: TrainState, *, nll: float | None = None) -> None:
        """Starts writing a checkpoint; the state may be donated right after.

        Args:
          step: optimizer steps done.
          state: what is saved.
          nll: held-out NLL, nats a token, by which the best one is kept.
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
        """Reads a checkpoint onto the devices that `abstract` names.

        Args:
          abstract: shapes, dtypes and shardings wanted.
          step: which one; None = the newest.

        Raises:
          ValueError: there is none, or it does not fit: each path that differs is
            listed with the shape wanted and the shape found.
        """
        step = self._found(step)
        self._check(abstract, step)
        return TrainState(**self._checkpointer.load(step, _stored(abstract)))

    def restore_params(self, abstract: Any, *, step: int | None = None) -> Any:
        """Reads a model's parameters alone, of those with averages the averages.

        Arguments and errors as `restore`.
        """
        step = self._found(step)
        self._check({"params": abstract}, step, partial=True)
        found = _shapes(self._checkpointer.metadata(step).metadata)
        averaged = {p.removeprefix("ema/") for p in found if p.startswith("ema/")}
        params, ema = trainable.partition(abstract, averaged)
        wanted = {name: x for name, x in (("params", params), ("ema", ema)) if x}
        loading = ocp.options.PyTreeOptions.Loading(partial_load=True)
        with ocp.Context(pytree_options=ocp.options.PyTreeOptions(loading=loading)):
            loaded = self._checkpointer.load(step, wanted)
        return trainable.merge(loaded.get("params", {}), loaded.get("ema", {}))

    def _found(self, step: int | None) -> int:
        step = self.latest_step() if step is None else step
        if step is None:
            raise ValueError(
                f"{self._checkpointer.directory} has no checkpoint: train first"
            )
        return step

    def _check(self, abstract: Any, step: int, *, partial: bool = False) -> None:
        found = _shapes(self._checkpointer.metadata(step).metadata)
        wanted = _shapes(abstract)
        if partial:  # of what is stored beside the model nothing is wanted
            others = f"params/{PROJECTION}/"
            found = {
                path: x
                for path, x in found.items()
                if path.startswith("params/") and not path.startswith(others)
            }
        lines = [
            f"  {path}: wanted {wanted.get(path, 'nothing')}, "
            f"found {found.get(path, 'nothing')}"
            for path in sorted(wanted.keys() | found.keys())
            if wanted.get(path) != found.get(path)
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
        """Closes; but one of several processes that fails waits for no other."""
        if kind is None or jax.process_count() == 1:
            self.close()

    def close(self) -> None:
        """Waits for what is being written."""
        if not self._closed:
            self._checkpointer.close()
        self._closed = True


def _stored(state: TrainState) -> dict[str, Any]:
    """The fields of a state that there are: without averages there is no trace."""
    return {name: x for name, x in state._asdict().items() if x is not None}


def _shapes(tree: Any) -> dict[str, str]:
    """Path -> "dtype[shape]" of every array of a tree."""
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

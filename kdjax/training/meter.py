"""Metrics, throughput and MFU of the training loop."""

import math
import time
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from kdjax.config import Config
from kdjax.data.loader import BatchPlan
from kdjax.experiment import methods, mixture
from kdjax.experiment.rows import flops_kwargs
from kdjax.models import flops
from kdjax.models.lm import Shape
from kdjax.runtime import chips
from kdjax.runtime.metrics_writer import MetricsWriter
from kdjax.training import trainable
from kdjax.training.state import TrainState


class Meter:
    """Metrics of a run's steps, their throughput, and a check that they are finite.

    Args:
      config: the run.
      shape: the trained model's, for its FLOPs.
      plan: to name the examples of a step.
      views: names of the views.
      writer: gets one object every `train.log_every` steps.
      frozen_params: keywords of `flops.train_flops` for parameters that are not
        trained.
    """

    def __init__(
        self,
        config: Config,
        shape: Shape,
        plan: BatchPlan,
        views: Sequence[str],
        writer: MetricsWriter,
        frozen_params: Mapping[str, Any],
    ) -> None:
        self._config, self._plan = config, plan
        self._terms = mixture.terms(config)
        self._views, self._writer = views, writer
        divergence = config.method.divergence
        self._soft_name = "kl" if divergence == "forward_kl" else divergence
        sizes = flops_kwargs(shape, config.train) | dict(frozen_params)
        self._flops = flops.train_flops(shape, **sizes)
        self._peak = chips.peak_flops(jax.devices()[0], config.train.dtype)
        self._waited = 0.0  # seconds for data since the last line
        self._tokens = self._targets = self._steps = self._skipped = 0
        self._since: float | None = None  # the first step compiles: not timed
        self._total = {"tokens": 0, "targets": 0, "steps": 0, "seconds": 0.0}

    def timed(self, batches: Iterable[Any]) -> Iterator[Any]:
        """Yield the same batches, and measure how long the loop waits for them."""
        iterator = iter(batches)
        while True:
            start = time.perf_counter()
            try:
                item = next(iterator)
            except StopIteration:
                return
            self._waited += time.perf_counter() - start
            yield item

    def report(self, step: int, metrics: dict[str, Any]) -> None:
        """Read a finished step's metrics and write them every `train.log_every` steps.

        Raises:
          ValueError: the loss or gradient is not finite and train.non_finite="stop".
        """
        values = jax.device_get(metrics)
        if not values["finite"]:
            self._raise_or_count(step, values)
        if self._since is None:
            self._since, self._waited = time.perf_counter(), 0.0
        else:
            self._tokens += int(values["num_tokens"])
            self._targets += int(values["count"].sum())
            self._steps += 1
        if step % self._config.train.log_every and step != self._config.train.steps:
            return
        self._writer.write(step, self._scalars(values) | self._speed())

    def held_out(self, step: int, metrics: dict[str, float]) -> dict[str, float]:
        """Write and return held-out metrics; their time is not training time."""
        self._writer.write(step, {f"eval/{k}": v for k, v in metrics.items()})
        if self._since is not None:
            self._since, self._waited = time.perf_counter(), 0.0
            self._tokens = self._targets = self._steps = 0
        return metrics

    def throughput(self) -> dict[str, float]:
        """Return means over all timed steps (tokens_per_second, ...); {} if none."""
        total = self._total
        if not total["steps"]:
            return {}
        seconds = total["seconds"]
        speed = {
            "tokens_per_second": total["tokens"] / seconds,
            "target_tokens_per_second": total["targets"] / seconds,
            "step_seconds": seconds / total["steps"],
            "skipped_steps": self._skipped,
        }
        return speed | self._mfu(seconds / total["steps"])

    def _mfu(self, step_seconds: float) -> dict[str, float]:
        value = flops.mfu(
            self._flops,
            seconds_per_step=step_seconds,
            num_devices=jax.device_count(),
            peak=self._peak,
        )
        return {} if value is None else {"mfu": value}

    def _scalars(self, values: dict[str, np.ndarray]) -> dict[str, float]:
        counts = np.maximum(values["count"], 1)
        means = {
            kind: values[name] / counts
            for kind, name in methods.SUMS.items()
            if name in values
        }
        scalars = {
            name: float(values[name]) for name in ("loss", "grad_norm", "learning_rate")
        }
        scalars |= {f"loss/{t.name}": float(means[t.kind][t.view]) for t in self._terms}
        if any(t.kind == "soft" for t in self._terms):
            scalars[self._soft_name] = float(values["kl"].sum() / counts.sum())
        return scalars

    def _speed(self) -> dict[str, float]:
        if not self._steps or self._since is None:
            return {}
        now = time.perf_counter()
        seconds = now - self._since
        speed = {
            "tokens_per_second": self._tokens / seconds,
            "data_wait_fraction": self._waited / seconds,
        } | self._mfu(seconds / self._steps)
        for name, amount in (
            ("tokens", self._tokens),
            ("targets", self._targets),
            ("steps", self._steps),
            ("seconds", seconds),
        ):
            self._total[name] += amount
        self._since, self._waited = now, 0.0
        self._tokens = self._targets = self._steps = 0
        return speed

    def _raise_or_count(self, step: int, values: dict[str, np.ndarray]) -> None:
        """Raise for a step whose update was not applied, or count it (`non_finite`)."""
        if self._config.train.non_finite == "skip":
            self._skipped += 1
            self._writer.write(step, {"skipped_steps": self._skipped})
            return
        bad = [
            t.name
            for t in self._terms
            if not math.isfinite(values[methods.SUMS[t.kind]][t.view])
        ]
        rows = [
            items
            for items, finite in zip(
                self._plan.batch(step - 1), values["finite_rows"].ravel(), strict=True
            )
            if not finite
        ]
        ids = [self._plan.segments[item].example_id for row in rows for item in row]
        where = f"examples {ids[:10]}" if ids else "no single example"
        raise ValueError(
            f"step {step}: loss={float(values['loss'])}, "
            f"grad_norm={float(values['grad_norm'])} is not finite; terms "
            f"{bad or 'none (only the gradient)'}, {where}. The last checkpoint is "
            "sound: lower optim.learning_rate or optim.clip_norm, look at those "
            "examples, or use train.non_finite='skip'"
        )


def state_table(
    abstract: TrainState, frozen_paths: Collection[str]
) -> list[dict[str, str]]:
    """Tabulate what a state holds over all devices, and what is trained of it.

    Args:
      abstract: the state.
      frozen_paths: of the parameters that are not trained.
    """
    parts = {
        "parameters": abstract.params,
        "of them trained": trainable.partition(abstract.params, frozen_paths)[0],
        "optimizer state": abstract.opt_state,
        "averages": abstract.ema,
    }
    leaves_of = {name: jax.tree.leaves(part) for name, part in parts.items()}
    return [
        {
            "what": name,
            "numbers": f"{sum(x.size for x in leaves):,}",
            "bytes": f"{sum(x.size * x.dtype.itemsize for x in leaves):,}",
        }
        for name, leaves in leaves_of.items()
        if leaves
    ]


def epoch_table(plan: BatchPlan) -> list[dict[str, str]]:
    """Tabulate how well the segments of the first epoch fill their rows."""
    return [
        {
            "steps": f"{plan.steps_per_epoch(0):,}",
            "rows per step": str(plan.batch_size),
            "tokens per row": str(plan.row_length),
            "packing efficiency": f"{plan.packing_efficiency():.0%}",
        }
    ]

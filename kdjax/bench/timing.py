"""Timing of variants against each other: rounds in turn, medians, ratios, rates.

A machine is never as fast twice, so what is compared runs in one process in short
rounds that take turns; the median over rounds forgets a disturbance that hit one.
"""

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np


@dataclass(slots=True)
class Samples:
    """Seconds of each step of one variant, by round."""

    rounds: list[list[float]] = field(default_factory=list)

    @property
    def all(self) -> list[float]:
        """Return the seconds of every step."""
        return [seconds for part in self.rounds for seconds in part]

    @property
    def total(self) -> float:
        """Return the seconds of all steps together."""
        return sum(self.all)

    @property
    def median(self) -> float:
        """Return the median over rounds of the median step of a round, seconds."""
        return statistics.median(self.round_medians)

    @property
    def p90(self) -> float:
        """Return the 90th percentile over all steps, seconds."""
        return float(np.quantile(self.all, 0.9))

    @property
    def round_medians(self) -> list[float]:
        """Return the median step of each round, seconds."""
        return [statistics.median(part) for part in self.rounds]


def alternate(
    variants: Mapping[str, Callable[[], Any]],
    *,
    rounds: int,
    steps: int,
    advance: Callable[[int], None] = lambda amount: None,
) -> dict[str, Samples]:
    """Run the variants in turn, the order reversed every other round.

    As in training, a step is dispatched before the one before it is waited for; the
    seconds of a step are those between two completions, so they add up to the round.

    Args:
      variants: name -> starts one step and returns something to wait for. Each has
        run before, so that nothing is compiled here.
      rounds: of each variant.
      steps: of a round.
      advance: called with the steps done since the last call.
    """
    samples = {name: Samples() for name in variants}
    for index in range(rounds):
        names = list(variants)
        for name in names if index % 2 == 0 else reversed(names):
            samples[name].rounds.append(_round(variants[name], steps))
            advance(steps)
    return samples


def _round(start_step: Callable[[], Any], steps: int) -> list[float]:
    seconds, pending, since = [], None, time.perf_counter()
    for index in range(steps + 1):
        started = start_step() if index < steps else None
        if index:
            jax.block_until_ready(pending)
            now = time.perf_counter()
            seconds.append(now - since)
            since = now
        pending = started
    return seconds


def compare(one: Samples, other: Samples) -> dict[str, float]:
    """Compare the durations of `one` with those of `other`.

    Returns:
      "ratio" of the medians, and "lowest" and "highest" ratio of one round.
    """
    pairs = zip(one.round_medians, other.round_medians, strict=True)
    ratios = [mine / its for mine, its in pairs]
    return {
        "ratio": one.median / other.median,
        "lowest": min(ratios),
        "highest": max(ratios),
    }


@dataclass(frozen=True, kw_only=True, slots=True)
class Matmul:
    """A large square matrix product on one device, which shows its peak rate."""

    call: Callable[[], jax.Array]  # one product
    flops: int  # of one product


def matmul(dtype: str, *, size: int = 0) -> Matmul:
    """Make the product by which rates are measured; compiled and run once.

    Args:
      dtype: of the operands; products are accumulated in float32.
      size: rows and columns; 0 = 2,048 on a CPU, 8,192 elsewhere.
    """
    size = size or (2048 if jax.devices()[0].platform == "cpu" else 8192)
    matrix = jnp.ones((size, size), dtype)
    product = jax.jit(lambda x, y: jnp.matmul(x, y, preferred_element_type=dtype))
    product(matrix, matrix).block_until_ready()
    return Matmul(call=lambda: product(matrix, matrix), flops=2 * size**3)


def memory(compiled: Any) -> dict[str, int]:
    """Return the bytes on one device that a compiled function takes.

    Returns:
      "temporary_bytes" (neither argument nor result), "argument_bytes",
      "output_bytes", "reused_bytes" (arguments whose memory a result takes) and
      "peak_bytes" of all together; {} where the backend does not say.
    """
    stats = compiled.memory_analysis()
    if stats is None:
        return {}
    temporary, arguments = stats.temp_size_in_bytes, stats.argument_size_in_bytes
    outputs, reused = stats.output_size_in_bytes, stats.alias_size_in_bytes
    return {
        "temporary_bytes": temporary,
        "argument_bytes": arguments,
        "output_bytes": outputs,
        "reused_bytes": reused,
        "peak_bytes": arguments + outputs - reused + temporary,
    }


def work(compiled: Any) -> dict[str, float]:
    """Return FLOPs and bytes moved on one device as XLA counts them, or {}.

    XLA counts the body of a loop of unknown length once, so a scan over layers or
    chunks makes these too low: bounds are made from `kdjax.models.flops`.
    """
    costs = compiled.cost_analysis() or {}
    if isinstance(costs, list):  # older versions: one per device
        costs = costs[0]
    names = {"flops": "xla_flops", "bytes accessed": "xla_bytes_accessed"}
    return {name: float(costs[key]) for key, name in names.items() if key in costs}

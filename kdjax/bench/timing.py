"""Timing variants against each other: rounds in turn, medians, ratios, rates.

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
        """Seconds of every step."""
        return [seconds for part in self.rounds for seconds in part]

    @property
    def total(self) -> float:
        """Seconds of all steps together."""
        return sum(self.all)

    @property
    def median(self) -> float:
        """Median over rounds of the median step of a round, seconds."""
        return statistics.median(self.round_medians)

    @property
    def p90(self) -> float:
        """What nine steps in ten did not exceed, seconds."""
        return float(np.quantile(self.all, 0.9))

    @property
    def round_medians(self) -> list[float]:
        """Median step of each round, seconds."""
        return [statistics.median(part) for part in self.rounds]


def alternate(
    variants: Mapping[str, Callable[[], Any]],
    *,
    rounds: int,
    steps: int,
    advance: Callable[[int], None] = lambda amount: None,
) -> dict[str, Samples]:
    """Runs the variants in turn, the order reversed every other round.

    As in training, a step is dispatched before the one before it is waited for; the
    seconds of a step are those between two completions, so they add up to the round.

    Args:
      variants: name -> starts one step and returns something to wait for. Each has
        run before, so that nothing is compiled here.
      rounds: of each variant.
      steps: of a round.
      advance: told the steps done.
    """
    found = {name: Samples() for name in variants}
    for index in range(rounds):
        names = list(variants)
        for name in names if index % 2 == 0 else reversed(names):
            found[name].rounds.append(_round(variants[name], steps))
            advance(steps)
    return found


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
    """How much longer `one` takes than `other`, and how far rounds disagree.

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
    """A large square matrix product on one device: what the device can do."""

    call: Callable[[], jax.Array]  # one product
    flops: int  # of one product


def matmul(dtype: str, *, size: int = 0) -> Matmul:
    """The product by which rates are measured; compiled and run once.

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
    """Bytes on one device that a compiled function takes, as its compiler says.

    Returns:
      "temporary_bytes" (neither argument nor result), "argument_bytes",
      "output_bytes", "reused_bytes" (arguments whose memory a result takes) and
      "peak_bytes" of all together; {} where the backend does not say.
    """
    found = compiled.memory_analysis()
    if found is None:
        return {}
    temporary, arguments = found.temp_size_in_bytes, found.argument_size_in_bytes
    outputs, reused = found.output_size_in_bytes, found.alias_size_in_bytes
    return {
        "temporary_bytes": temporary,
        "argument_bytes": arguments,
        "output_bytes": outputs,
        "reused_bytes": reused,
        "peak_bytes": arguments + outputs - reused + temporary,
    }


def work(compiled: Any) -> dict[str, float]:
    """FLOPs and bytes moved on one device as XLA counts them; {} if it does not.

    XLA counts the body of a loop of unknown length once, so a scan over layers or
    chunks makes these too low: bounds are made from `kdjax.models.flops`.
    """
    found = compiled.cost_analysis() or {}
    if isinstance(found, list):  # older versions: one a device
        found = found[0]
    names = {"flops": "xla_flops", "bytes accessed": "xla_bytes_accessed"}
    return {name: float(found[key]) for key, name in names.items() if key in found}

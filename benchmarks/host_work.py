"""Host work of a training step, of one host among many.

    python benchmarks/host_work.py [--segments=1000000] [--rows=8] [--row_length=2048]
        [--hosts=1,16,256] [--steps=60] [--json=FILE]

Every host makes its own `--rows` packed rows of a batch of rows x hosts, with records
of a teacher cache in memory (top 64), as `loader.make_batch` does in training: the
order and packing of the whole batch, the counts that weights are divided by, its own
rows and their records, and the placement of the arrays on a device. The order follows
from the seed alone, so each host computes that of the whole batch: the part that
grows with the hosts. Median and mean seconds of consecutive steps but the first; the
mean holds the share of packing new windows. Segments have the lengths of
GSM8K (prompts of some 100 tokens, targets of some 130) and are made when they are read.
"""

import argparse
import functools
import json
import pathlib
import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from kdjax.data import loader
from kdjax.data.segments import Segments
from kdjax.data.views import Segment
from kdjax.experiment.methods import Term
from kdjax.runtime.console import print_table
from kdjax.teacher.codec import Record

K, VOCAB, LONGEST = 64, 49_152, 640


class Synthetic(Segments):
    """Segments of given lengths, whose tokens are made when they are read."""

    def __init__(self, num: int) -> None:
        rng = np.random.default_rng(0)
        self._prompts = np.clip(rng.normal(100, 40, num), 20, 400).astype(np.int32)
        self._targets = np.clip(rng.normal(130, 60, num), 20, 600).astype(np.int32)
        self._tokens = rng.integers(VOCAB, size=LONGEST).astype(np.int32)
        self._alternatives = np.arange(num, dtype=np.int32)

    def __len__(self) -> int:
        return len(self._prompts)

    @property
    def views(self) -> np.ndarray:
        """All are of one view."""
        return np.zeros(len(self), np.int8)

    @property
    def alternatives(self) -> np.ndarray:
        """No segment has an alternative."""
        return self._alternatives

    @property
    def keys(self) -> np.ndarray:
        """Nobody reads them."""
        raise NotImplementedError

    def _column(self, name: str) -> np.ndarray:
        columns = {"prompt_lengths": self._prompts, "target_lengths": self._targets}
        columns["loss_lengths"] = self._targets
        return columns.get(name, np.zeros(len(self), np.int32))

    def read(self, index: int) -> Segment:
        """Return the segment at an index."""
        return Segment(
            example_id=str(index),
            view=0,
            prompt_ids=self._tokens[: self._prompts[index]],
            target_ids=self._tokens[: self._targets[index]],
            key=index.to_bytes(16),
        )


class Cache:
    """Records of a top-k cache in memory, which are parts of one long record."""

    kind, k, temperatures = "top_k", K, (1.0,)

    def __init__(self, data: Synthetic) -> None:
        rng = np.random.default_rng(1)
        self._data = data
        self._ids = rng.integers(VOCAB, size=(LONGEST, K)).astype(np.int32)
        self._log_probs = -rng.random((LONGEST, K), np.float32)
        self._log_z = np.zeros((LONGEST, 1), np.float32)

    def has(self, key: bytes) -> bool:
        """Every segment has a record."""
        return True

    def read(self, key: bytes) -> Record:
        """Return the record of a segment."""
        target = self._data.read(int.from_bytes(key)).target_ids
        own = slice(len(target))
        log_z = self._log_z[own]
        return Record(
            ids=self._ids[own],
            log_probs=self._log_probs[own],
            target_ids=target,
            target_log_probs=self._log_probs[own, 0],
            log_z=log_z,
            entropy=log_z,
            counts=np.zeros(0, np.int32),
            kind=self.kind,
        )


def place(batch: Any) -> None:
    """Put the arrays on the device."""
    jax.block_until_ready(jax.device_put(batch))


def timed(seconds: list[float], function: Callable[..., Any], *arguments: Any) -> Any:
    """Call a function, and note how long that took."""
    start = time.perf_counter()
    result = function(*arguments)
    seconds.append(time.perf_counter() - start)
    return result


def measure(data: Synthetic, hosts: int, args: argparse.Namespace) -> dict:
    """Make the first batches of host 0."""
    start = time.perf_counter()
    plan = loader.BatchPlan(
        data, batch_size=args.rows * hosts, row_length=args.row_length
    )
    row = {"hosts": hosts, "start_s": time.perf_counter() - start}
    terms = [
        Term(name=kind, view=0, kind=kind, weight=0.5) for kind in ("hard", "soft")
    ]
    make = functools.partial(
        loader.make_batch, terms=terms, cache=Cache(data), rows=slice(0, args.rows)
    )
    parts: dict[str, list[float]] = {"order": [], "batch": [], "place": []}
    for step in range(args.steps):
        timed(parts["order"], plan.batch, step)
        batch = timed(parts["batch"], make, plan, step)
        timed(parts["place"], place, batch)
    for name, seconds in parts.items():
        row[f"{name}_median_ms"] = 1e3 * statistics.median(seconds[1:])
        row[f"{name}_mean_ms"] = 1e3 * statistics.mean(seconds[1:])
    return row


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--segments", type=int, default=1_000_000)
    parser.add_argument("--rows", type=int, default=8)
    parser.add_argument("--row_length", type=int, default=2048)
    parser.add_argument("--hosts", default="1,16,256")
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--json", type=pathlib.Path)
    args = parser.parse_args()
    data = Synthetic(args.segments)
    rows = [measure(data, int(hosts), args) for hosts in args.hosts.split(",")]
    print_table("host work of a step", rows)
    if args.json:
        args.json.write_text(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()

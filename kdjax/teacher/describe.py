"""Statistics of a teacher cache: sizes, captured mass, entropies.

Shapes: T target tokens of a record, K stored pairs.
"""

import os
from collections.abc import Callable
from typing import Any

import numpy as np

from kdjax.runtime import untrusted
from kdjax.teacher import cache as cache_lib
from kdjax.teacher.manifest import Manifest

_EDGES = np.linspace(0, 8, 33)  # nats, of the histogram of entropies
_BAR = 40  # characters of the longest bar


def summarize(
    cache: cache_lib.TeacherCache,
    *,
    advance: Callable[[int], None] = lambda num_tokens: None,
) -> dict[str, Any]:
    """Compute statistics over all records.

    Args:
      cache: an open cache.
      advance: called with the target tokens of every record read.

    Returns:
      "kind", "k", "records", "tokens", "bytes", "bytes_per_token", "bytes_per_pair"
      (top_k), "teacher_nll" (nats per target token), "entropy" (nats, by temperature),
      "mass" (mean probability of the first 1, 2, 4, ... pairs; top_k),
      "distinct_ids" (mean per token, temperature and round; sampled) and "histogram":
      target tokens by entropy at the first temperature, in bins between "edges".
      Statistics that the origin does not give are left out.
    """
    manifest = cache.manifest
    widths = [2**i for i in range(manifest.k.bit_length()) if 2**i < manifest.k]
    widths.append(manifest.k)
    mass = np.zeros(len(widths))
    entropy = np.zeros(len(manifest.temperatures))
    histogram = np.zeros(len(_EDGES) - 1, np.int64)
    nll = distinct = 0.0
    for key in cache:
        record = cache.read(key)
        nll -= record.target_log_probs.sum(dtype=np.float64)
        entropy += record.entropy.sum(axis=0, dtype=np.float64)
        clipped = np.clip(record.entropy[:, 0], 0, _EDGES[-1])
        histogram += np.histogram(clipped, _EDGES)[0]
        if record.kind == "top_k":
            totals_TK = np.exp(record.log_probs).cumsum(axis=1, dtype=np.float64)
            mass += totals_TK[:, [w - 1 for w in widths]].sum(axis=0)
        elif record.kind == "sampled":
            distinct += float((record.counts > 0).sum(axis=-1).mean(axis=(1, 2)).sum())
        advance(record.num_tokens)
    num_tokens = max(1, cache.num_tokens)
    num_bytes = sum(
        (cache.folder / shard.name).stat().st_size for shard in manifest.shards
    )
    summary: dict[str, Any] = {
        "kind": manifest.kind,
        "k": manifest.k,
        "records": cache.num_records,
        "tokens": cache.num_tokens,
        "bytes": num_bytes,
        "bytes_per_token": num_bytes / num_tokens,
    }
    if manifest.kind == "top_k":
        summary["bytes_per_pair"] = num_bytes / num_tokens / manifest.k
        summary["mass"] = dict(zip(widths, (mass / num_tokens).tolist(), strict=True))
    if manifest.kind == "sampled":
        summary["distinct_ids"] = distinct / num_tokens
    if "target_log_probs" not in manifest.missing:
        summary["teacher_nll"] = float(nll) / num_tokens
    if "entropy" not in manifest.missing:
        means = (entropy / num_tokens).tolist()
        summary["entropy"] = dict(zip(manifest.temperatures, means, strict=True))
        summary |= {"histogram": histogram.tolist(), "edges": _EDGES.tolist()}
    return summary


def provenance(manifest: Manifest) -> dict[str, str]:
    """Describe where a cache comes from and what it cannot answer, in words."""
    origin, _, _ = manifest.teacher_fingerprint.partition(":")
    if not manifest.missing:
        weights = manifest.teacher_fingerprint[:12]
        origin = f"labelled by kdjax in {manifest.dtype}, weights {weights}"
    return {
        "teacher": untrusted.quote(manifest.teacher_path),
        "origin": untrusted.quote(origin),
        "temperatures": ", ".join(f"{t:g}" for t in manifest.temperatures),
        "missing": ", ".join(manifest.missing) or "nothing",
        "data": untrusted.quote(manifest.data),
        "tokenizer": untrusted.quote(manifest.tokenizer_fingerprint[:12]),
    }


def histogram_lines(summary: dict[str, Any]) -> list[str]:
    """Format the histogram of entropies as text; empty if there is none."""
    counts = summary.get("histogram")
    if not counts:
        return []
    total, peak = sum(counts), max(counts, default=0)
    last = max((i for i, count in enumerate(counts) if count), default=-1)
    return [
        f"{low:5.2f} to {high:5.2f} nats {count / total:7.2%} "
        f"{'#' * round(_BAR * count / peak)}"
        for low, high, count in zip(
            summary["edges"][: last + 1],
            summary["edges"][1 : last + 2],
            counts[: last + 1],
            strict=True,
        )
    ]


def plot(summary: dict[str, Any], path: str | os.PathLike) -> None:
    """Plot the histogram of entropies and the mass captured by the first pairs."""
    from matplotlib.figure import Figure  # half a second, which print needs not

    figure = Figure(figsize=(9, 3.5), layout="constrained")
    left, right = figure.subplots(1, 2)
    if "histogram" in summary:
        left.stairs(summary["histogram"], summary["edges"], fill=True)
    left.set(xlabel="teacher entropy, nats", ylabel="target tokens")
    if "mass" in summary:
        mass = summary["mass"]
        right.semilogx(list(mass), list(mass.values()), "o-", base=2)
    right.set(xlabel="stored pairs per token", ylabel="mean probability captured")
    figure.savefig(path, dpi=120)

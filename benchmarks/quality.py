"""Quality per stored byte: the same student on several caches of the same teacher.

    python benchmarks/quality.py --out=DIR [--seeds=0,1] [--arms=dense,...] -- FLAGS

FLAGS are those of kdjax.train for configs/smollm2_gsm8k.py (or another config of one
decoder teacher): --config, --config.data.path and so on. In turn: the teacher's whole
rows are stored (kind dense: 140 kB a token), the smaller caches are made of them, each
arm is trained on each seed, and every student is scored against the whole rows, so
that NLL and KL mean the same in each line. All that is there already is skipped. The
arms differ in the training cache and its tail policy, in nothing else; `hard` has no
teacher. Two processes may share a folder once the caches are there.
"""

import dataclasses
import functools
import itertools
import json
import pathlib
import statistics
import subprocess
import sys
from collections.abc import Iterator

import jax
import numpy as np
from absl import app, flags

from kdjax.config import CacheConfig
from kdjax.losses.chunk_label import chunk_label
from kdjax.runtime.console import print_table, progress
from kdjax.teacher import cache as cache_lib
from kdjax.teacher import sampling
from kdjax.teacher.cache import Manifest, Record, TeacherCache

_OUT = flags.DEFINE_string("out", None, "Caches, runs and results.", required=True)
_SEEDS = flags.DEFINE_list("seeds", ["0", "1"], "Seeds.")
_ROWS = 128  # rows of the teacher that are worked on at a time
_SHARD_SIZE = 512  # records of the small caches

# name of the arm -> cache, overrides
ARMS = {
    "hard": ("", {"method.hard_weight": 1.0, "method.soft_weight": 0.0}),
    "dense": ("dense", {}),
    "top12_renormalised": ("top_12", {"method.tail": "renormalize_teacher"}),
    "top12_bucket": ("top_12", {}),
    "top64_bucket": ("top_64", {}),
    "draws50": ("draws_50", {}),
}
_ARMS = flags.DEFINE_list("arms", list(ARMS), f"Arms, of {list(ARMS)}.")


def small(cache: str, split: str) -> tuple[str, int]:
    """Kind of a cache, and its pairs or draws per token.

    The held-out rows of a sampled cache are the top k, of the default k.
    """
    kind, _, number = cache.rpartition("_")
    if kind == "draws" and split == "train":
        return "sampled", int(number)
    return "top_k", CacheConfig().k if kind == "draws" else int(number)


def settings(cache: str) -> dict[str, object]:
    """Return the overrides that name a cache."""
    if cache == "dense":
        return {"cache.kind": "dense"}
    kind, number = small(cache, "train")
    name = "cache.num_draws" if kind == "sampled" else "cache.k"
    return {"cache.kind": kind, name: number}


def derive(
    dense: TeacherCache, folder: pathlib.Path, *, kind: str, number: int
) -> None:
    """Write the cache that labelling would have, from the whole rows of the teacher.

    Args:
      dense: the rows.
      folder: the new cache.
      kind: "top_k" or "sampled".
      number: pairs, or draws per token.
    """
    if (folder / cache_lib.MANIFEST).is_file():
        return
    sampled = kind == "sampled"
    manifest = dataclasses.replace(
        dense.manifest,
        kind=kind,
        k=number,
        num_rounds=int(sampled),
        shard_size=_SHARD_SIZE,
        shards=(),
    )
    label = jax.jit(
        functools.partial(
            chunk_label,
            k=None if sampled else number,
            temperatures=manifest.temperatures,
        )
    )
    keys = list(dense)
    with progress(dense.num_tokens, f"{kind} {number}") as advance:

        def made(part: list[bytes]) -> Iterator[tuple[bytes, Record]]:
            for key in part:
                record = dense.read(key)
                yield key, _reduced(key, record, label, manifest)
                advance(record.num_tokens)

        starts = range(0, len(keys), _SHARD_SIZE)
        parts = [keys[start : start + _SHARD_SIZE] for start in starts]
        for index, part in enumerate(parts):
            cache_lib.write_shard(folder, index, len(parts), made(part), manifest)
    cache_lib.finish(folder, manifest, num_shards=len(parts))


def _reduced(key: bytes, record: Record, label, manifest: Manifest) -> Record:
    """One record of a smaller cache; the rows are padded to one compiled shape."""
    num_tokens = record.num_tokens
    padded = -(-num_tokens // _ROWS) * _ROWS
    rows = np.zeros((padded, record.log_probs.shape[1]), np.float32)
    rows[:num_tokens] = record.log_probs
    targets = np.zeros(padded, np.int32)
    targets[:num_tokens] = record.target_ids
    shape = (num_tokens, len(manifest.temperatures), manifest.num_rounds, manifest.k)
    uniforms = np.zeros(
        (padded, shape[1], manifest.num_rounds * manifest.k), np.float32
    )
    if manifest.kind == "sampled":
        uniforms[:num_tokens] = sampling.stratified_uniforms(key, *shape).reshape(
            num_tokens, shape[1], -1
        )
    found: dict[str, list[np.ndarray]] = {}
    for start in range(0, padded, _ROWS):
        part = slice(start, start + _ROWS)
        at = uniforms[part] if manifest.kind == "sampled" else None
        for name, array in label(rows[part], targets[part], uniforms_CSP=at).items():
            found.setdefault(name, []).append(np.asarray(array))
    of = {name: np.concatenate(parts)[:num_tokens] for name, parts in found.items()}
    record = record._replace(kind=manifest.kind)
    if manifest.kind == "top_k":
        return record._replace(ids=of["ids_NK"], log_probs=of["log_probs_NK"])
    ids, counts = sampling.count_draws(of["drawn_ids_NSP"].reshape(shape))
    return record._replace(
        ids=ids, counts=counts, log_probs=np.zeros((num_tokens, 0), np.float32)
    )


def run(verb: str, given: list[str], **overrides: object) -> None:
    """Run one command in its own process."""
    extra = [f"--config.{name}={value}" for name, value in overrides.items()]
    command = [sys.executable, "-m", f"kdjax.{verb}", *given, *extra]
    subprocess.run(command, check=True)


def bytes_per_token(folder: pathlib.Path) -> float:
    """Size of the shards of a cache over its target tokens."""
    manifest = cache_lib.read_manifest(folder)
    size = sum((folder / shard.name).stat().st_size for shard in manifest.shards)
    return size / manifest.num_tokens


def trained(arm: str, seed: str, out: pathlib.Path, given: list[str]) -> dict:
    """Return the held-out metrics of one run, which is made if it is not there."""
    cache, overrides = ARMS[arm]
    workdir = out / "runs" / f"{arm}-{seed}"
    result = workdir / "quality.json"
    exact = {"cache.path": out / "dense", "cache.kind": "dense"}
    if not result.is_file():
        named = {"cache.path": out / cache} | settings(cache) if cache else exact
        # Nothing is evaluated on the way: the whole rows judge at the end.
        given = [*given, f"--workdir={workdir}", f"--config.seed={seed}"]
        fewer = {"data.num_eval": 4, "train.eval_every": 0}
        run("train", given, **overrides, **named, **fewer)
        judged = [*given, f"--json={result}"]
        run("evaluate", judged, **overrides, **exact)
    summary = json.loads((workdir / "summary.json").read_text())
    return json.loads(result.read_text()) | {
        "bytes_per_token": bytes_per_token(out / cache / "train") if cache else 0.0,
        "step_seconds": summary["throughput"]["step_seconds"],
    }


def main(argv: list[str]) -> None:
    """Labels, derives, trains and prints."""
    out, given = pathlib.Path(_OUT.value), argv[1:]
    dense = {"cache.path": out / "dense", "cache.kind": "dense", "cache.shard_size": 16}
    run("label", [*given, f"--workdir={out / 'label'}"], **dense)
    for cache in {ARMS[arm][0] for arm in _ARMS.value} - {"", "dense"}:
        for split in ("train", "eval"):
            kind, number = small(cache, split)
            rows = cache_lib.load_cache(out / "dense" / split)
            derive(rows, out / cache / split, kind=kind, number=number)
    found: dict[str, list[dict]] = {arm: [] for arm in _ARMS.value}
    for seed, arm in itertools.product(_SEEDS.value, _ARMS.value):
        found[arm].append(trained(arm, seed, out, given))
    (out / "quality.json").write_text(json.dumps(found, indent=2) + "\n")
    print_table(
        "Held-out quality by cache",
        [
            {
                "cache": arm,
                "bytes per token": runs[0]["bytes_per_token"],
                "NLL": statistics.mean(r["nll"] for r in runs),
                "KL": statistics.mean(r["kl"] for r in runs),
                "agreement": statistics.mean(r["agreement"] for r in runs),
                "NLL by seed": " ".join(f"{r['nll']:.4f}" for r in runs),
                "KL by seed": " ".join(f"{r['kl']:.4f}" for r in runs),
            }
            for arm, runs in found.items()
        ],
    )


if __name__ == "__main__":
    app.run(main)

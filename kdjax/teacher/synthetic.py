"""Synthetic segments and teacher caches for benchmarks.

Bytes, shapes and reading are those of a real cache; the numbers in it are random. Ids
are drawn with a density of about 1 / id, as in text, so that they pack as ids of text.

Shapes: T target tokens, K stored pairs.
"""

import hashlib
import os

import numpy as np
from jaxtyping import Int32

from kdjax.data.views import Segment
from kdjax.teacher import cache
from kdjax.teacher.cache import Manifest, Record, TeacherCache

_SHARD_SIZE = 64  # records
_DECAY = 1.2  # the r-th most probable id has about r^-1.2 of the first one's share
_TAIL = 0.1  # most mass outside the stored pairs, of that inside


def make_segments(
    num_rows: int,
    *,
    row_length: int,
    vocab_size: int,
    prompt_length: int = 1,
    num_views: int = 1,
    seed: int,
) -> list[Segment]:
    """Make segments of random tokens, each of which fills one row.

    `prompt_length` tokens of prompt, 1 for decoder-only models, and `row_length` target
    tokens: every position is trained on.
    """
    rng = np.random.default_rng([seed, 0])
    segments = []
    for index in range(num_rows):
        ids = _ids(rng, row_length + prompt_length, 1, vocab_size)[:, 0]
        key = hashlib.blake2b(ids.tobytes(), digest_size=cache.KEY_BYTES)
        segments.append(
            Segment(
                example_id=f"synthetic-{index}",
                view=index % num_views,
                prompt_ids=ids[:prompt_length],
                target_ids=ids[prompt_length:],
                key=key.digest(),
            )
        )
    return segments


def write_cache(
    folder: str | os.PathLike,
    segments: list[Segment],
    *,
    vocab_size: int,
    k: int,
    temperatures: tuple[float, ...],
    seed: int,
) -> TeacherCache:
    """Write and open a cache of random rows for `segments`.

    Every row is a distribution: K pairs and a flat tail, log Z and entropy exact.

    Args:
      folder: empty folder to write.
      segments: with distinct keys.
      vocab_size: of the teacher.
      k: pairs per token; at most the vocabulary.
      temperatures: those declared.
      seed: of the rows.
    """
    k = min(k, vocab_size)
    manifest = Manifest(
        kind="top_k",
        k=k,
        vocab_size=vocab_size,
        temperatures=temperatures,
        tokenizer_fingerprint="synthetic",
        teacher_path="synthetic",
        teacher_fingerprint="synthetic",
        data="random tokens",
        shard_size=_SHARD_SIZE,
    )
    rng = np.random.default_rng([seed, 1])
    parts = [
        segments[start : start + _SHARD_SIZE]
        for start in range(0, len(segments), _SHARD_SIZE)
    ]
    for index, part in enumerate(parts):
        records = ((s.key, _record(rng, s.target_ids, manifest)) for s in part)
        cache.write_shard(folder, index, len(parts), records, manifest)
    cache.finish(folder, manifest, num_shards=len(parts))
    return cache.load_cache(folder)


def _record(
    rng: np.random.Generator, target_ids: Int32[np.ndarray, "T"], manifest: Manifest
) -> Record:
    num_tokens, k = len(target_ids), manifest.k
    num_tail = manifest.vocab_size - k
    ids_TK = _ids(rng, num_tokens, k, manifest.vocab_size)
    noise_TK = rng.normal(scale=0.2, size=(num_tokens, k))
    weights_TK = np.exp(noise_TK - _DECAY * np.log1p(np.arange(k)))
    weights_TK = -np.sort(-weights_TK, axis=1)
    # No id of the tail is more probable than one that is stored.
    share_T = rng.uniform(0, _TAIL, num_tokens) / max(1, num_tail)
    tail_T = np.minimum(share_T * weights_TK.sum(1), weights_TK[:, -1])
    total_T = weights_TK.sum(1) + num_tail * tail_T
    p_TK, tail_T = weights_TK / total_T[:, None], tail_T / total_T
    is_target_TK = ids_TK == target_ids[:, None]
    target_T = np.where(
        is_target_TK.any(1), (p_TK * is_target_TK).sum(1), np.maximum(tail_T, 1e-30)
    )
    log_z, entropy = [], []
    for t in manifest.temperatures:
        z_T = (p_TK ** (1 / t)).sum(1) + num_tail * tail_T ** (1 / t)
        pt_TK, tail_t_T = p_TK ** (1 / t) / z_T[:, None], tail_T ** (1 / t) / z_T
        log_tail_T = np.log(np.maximum(tail_t_T, 1e-300))
        log_z.append(np.log(z_T) if t != 1.0 else np.zeros(num_tokens))
        entropy.append(
            -(pt_TK * np.log(pt_TK)).sum(1) - num_tail * tail_t_T * log_tail_T
        )
    return Record(
        ids=ids_TK,
        log_probs=np.log(p_TK).astype(np.float32),
        target_ids=target_ids,
        target_log_probs=np.log(target_T).astype(np.float32),
        log_z=np.stack(log_z, 1).astype(np.float32),
        entropy=np.stack(entropy, 1).astype(np.float32),
    )


def _ids(
    rng: np.random.Generator, num_tokens: int, k: int, vocab_size: int
) -> Int32[np.ndarray, "T K"]:
    """Draw ids of density about 1 / (1 + id), distinct in a row, in random order."""
    num_free = vocab_size - k  # gaps left when K ids are distinct
    spread = np.exp(rng.uniform(0, np.log(num_free + 1), (num_tokens, k)))
    ids = np.sort(np.minimum(spread.astype(np.int32) - 1, num_free), axis=1)
    return rng.permuted(ids + np.arange(k, dtype=np.int32), axis=1)

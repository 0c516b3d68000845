"""Read speed and size of a teacher cache beside other tools' formats.

    python benchmarks/teacher_cache.py FOLDER [--passes=5] [--json=FILE]

FOLDER holds a manifest.json. One process pinned to one core reads every record in
random order, decoded to arrays; the first pass (which also compares the checksums of
the files) is reported by itself, of the others the median. Bytes of the other formats
are calculated from their layouts, for the same number of pairs and vocabulary.
"""

import json
import math
import os
import statistics
import sys
import time

import numpy as np
from absl import app, flags

from kdjax.runtime.console import print_table
from kdjax.teacher import cache as cache_lib

_PASSES = flags.DEFINE_integer("passes", 5, "Readings after the first.", lower_bound=1)
_JSON = flags.DEFINE_string("json", None, "Where to write what is printed.")


def other_formats(k: int, vocab_size: int) -> dict[str, float]:
    """Bytes a token of other tools' formats for k pairs, without their compression.

    DistillKit: its recommended setting (16 exact values in bfloat16, six float32
    coefficients) and ids of ceil(log2 V) bits; its raw parquet. Megatron-LM: float16
    values, uint16 low ids and a bool for bit 17. MaxText: float32 logits and int64 ids
    as tf.Example writes them (varints of 7 bits a byte).
    """
    id_bits = math.ceil(math.log2(vocab_size))
    varint = 1 + (vocab_size - 1 >= 2**7) + (vocab_size - 1 >= 2**14)
    return {
        "DistillKit, compressed": math.ceil(k * id_bits / 8) + min(16, k) * 2 + 6 * 4,
        "DistillKit, raw parquet": k * (8 + 4),
        "Megatron-LM": k * (2 + 2 + 1),
        "MaxText": k * (4 + varint),
    }


def read_all(cache: cache_lib.TeacherCache, keys: list[bytes]) -> float:
    """Seconds for one pass."""
    start = time.perf_counter()
    for key in keys:
        cache.read(key)
    return time.perf_counter() - start


def main(argv: list[str]) -> None:
    """Read, print and write."""
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    cache = cache_lib.load_cache(argv[1])
    keys = list(cache)
    rng = np.random.default_rng(0)
    first = read_all(cache, keys)
    seconds = []
    for _ in range(_PASSES.value):
        rng.shuffle(keys)
        seconds.append(read_all(cache, keys))
    size = sum((cache.folder / s.name).stat().st_size for s in cache.manifest.shards)
    found = {
        "kind": cache.kind,
        "k": cache.k,
        "tokens": cache.num_tokens,
        "bytes_per_token": size / cache.num_tokens,
        "tokens_per_second": cache.num_tokens / statistics.median(seconds),
        "tokens_per_second_first_pass": cache.num_tokens / first,
    }
    rows = [{"format": "this cache", "bytes_per_token": found["bytes_per_token"]}] + [
        {"format": name, "bytes_per_token": float(value)}
        for name, value in other_formats(cache.k, cache.vocab_size).items()
    ]
    print_table(argv[1], [found])
    print_table(f"k={cache.k}, V={cache.vocab_size}", rows)
    if _JSON.value:
        with open(_JSON.value, "w") as file:
            json.dump(found | {"formats": rows}, file, indent=2)


if __name__ == "__main__":
    app.run(main, argv=sys.argv)

"""Latency, throughput and memory of decoding by a student's shape."""

import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from kdjax.config import Config
from kdjax.experiment.data import load_tokenizer
from kdjax.experiment.models import make_model, student_shape
from kdjax.models import generate, lm
from kdjax.parallel import sharding

BATCH_SIZES = (1, 32)
_MIB = 2**20


def measure(
    config: Config,
    *,
    batch_sizes: tuple[int, ...] = BATCH_SIZES,
    rounds: int = 5,
    advance: Callable[[int], None] = lambda amount: None,
) -> dict[str, float]:
    """Time greedy decoding by a student's shape, compiled and warm.

    The weights are random and no row ends before `evaluation.max_new_tokens`; prompts
    have `data.max_prompt` tokens, or as many as fit.

    Args:
      config: of the student's run; adapters count as merged.
      batch_sizes: B, prompts decoded together.
      rounds: timed calls of each, in turn.
      advance: called with the calls done since the last one.

    Returns:
      For each B: latency/B, milliseconds per new token of a row (a call's, prefill
      included, over its new tokens; median); decoded_per_second/B, new tokens per
      second of all rows; memory/B, MiB of parameters, cache and temporary arrays.
    """
    mesh = sharding.make_mesh(config.mesh)
    shape = student_shape(config, load_tokenizer(config))
    model = make_model(shape, mesh, dtype=config.train.dtype)
    params = jax.jit(
        lambda key: lm.init_params(shape, key), out_shardings=model.shardings
    )(jax.random.key(0))
    new_tokens = config.evaluation.max_new_tokens
    length = min(config.data.max_prompt, lm.max_prompt_length(shape, new_tokens))
    decoding = generate.Decoding(max_new_tokens=new_tokens, eos_ids=(), pad_id=0)
    decode: Any = generate.make_generate(
        shape, model.graphdef, decoding, max_prompt=length
    )
    calls, memory = {}, {}
    for size in batch_sizes:
        prompts = np.ones((size, length), np.int32)
        lengths = np.full(size, length, np.int32)
        keys = generate.row_keys(decoding.seed, np.arange(size, dtype=np.uint32))
        arguments = (params, prompts, lengths, keys)
        compiled = decode.lower(*arguments).compile()
        stats: Any = compiled.memory_analysis()
        memory[size] = stats.argument_size_in_bytes + stats.temp_size_in_bytes
        jax.block_until_ready(compiled(*arguments))
        calls[size] = compiled, arguments
        advance(1)
    seconds: dict[int, list[float]] = {size: [] for size in batch_sizes}
    for _ in range(rounds):
        for size, (compiled, arguments) in calls.items():
            start = time.perf_counter()
            jax.block_until_ready(compiled(*arguments))
            seconds[size].append(time.perf_counter() - start)
            advance(1)
    metrics = {}
    for size, samples in seconds.items():
        median = statistics.median(samples)
        metrics[f"latency/{size}"] = 1000 * median / new_tokens
        metrics[f"decoded_per_second/{size}"] = size * new_tokens / median
        metrics[f"memory/{size}"] = memory[size] / _MIB
    return metrics

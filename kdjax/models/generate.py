"""Batched decoding with a key/value cache: greedy or sampled.

Shapes: B rows, P prompt time (right padded), N new tokens, V vocabulary.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int

from kdjax.models import lm

# Prompts are padded to a power of two from the first to the second, then to multiples
# of the second or, where that is more, of a sixteenth of the next power of two.
MIN_PROMPT_SHAPE, PROMPT_STEP = 16, 128


def make_generate(
    config: lm.Shape,
    graphdef: nnx.GraphDef,
    *,
    max_prompt: int,
    max_new_tokens: int,
    eos_id: int,
    pad_id: int,
    top_k: int = 0,
    top_p: float = 1.0,
    num_shared: int = 0,
) -> Callable[..., Int[Array, "B N"]]:
    """Compile-once generation: one pass over the prompts, then one token at a time.

    The loop ends when every row has produced `eos_id` or `max_new_tokens` tokens.

    Args:
      config: shape of the model.
      graphdef: from `lm.create`; its compute dtype is also the cache's.
      max_prompt: P, columns of the prompt array.
      max_new_tokens: N, most tokens generated for a row.
      eos_id: token that ends a row; -1 = none does.
      pad_id: fills a row after its end.
      top_k: sample among the k most probable tokens; 0 = all.
      top_p: sample among the fewest most probable tokens whose probabilities (at the
        sampling temperature) sum to at least p; 1 = all.
      num_shared: of `SharedPrefix`.

    Returns:
      Jitted `generate(params, prompts_BP, lengths_B, key, temperature, *shared) ->
      tokens_BN`, int32; shared: `SharedPrefix.arrays` where num_shared is not 0.
      Prompts are right padded (with any id); a row of length 0 stays empty: all
      `pad_id`. Temperature 0 takes the most probable token; the end token is included.
      `key` may be an array of B keys: a row's draws then hang on its own key alone.

    Raises:
      ValueError: more tokens than the model's max_length, or a top_k or top_p out of
        range.

    Source: Holtzman et al., 2020, arXiv 1904.09751, section 3.1 (top_p).
    """
    check(config, max_prompt, max_new_tokens, top_k, top_p)

    @jax.jit
    def generate(params, prompts_BP, lengths_B, key, temperature, *shared):
        prompts_BP, lengths_B = (
            prompts_BP.astype(jnp.int32),
            lengths_B.astype(jnp.int32),
        )
        temperature = jnp.asarray(temperature, jnp.float32)
        num_rows = prompts_BP.shape[0]
        hidden_BD, first_B, cache = lm.prefill(
            config,
            graphdef,
            params,
            prompts_BP,
            lengths_B,
            max_new_tokens=max_new_tokens,
            num_shared=num_shared,
            groups=shared,
        )
        tokens_BN = jnp.full((num_rows, max_new_tokens), pad_id, jnp.int32)

        def unfinished(carry):
            step, _, done_B, _, _ = carry
            return (step < max_new_tokens) & ~jnp.all(done_B)

        def extend(carry):
            step, hidden_BD, done_B, tokens_BN, cache = carry
            logits_BV = lm.logits(graphdef, params, hidden_BD)
            token_B = choose(
                logits_BV, key, step, temperature, top_k=top_k, top_p=top_p
            )
            token_B = jnp.where(done_B, jnp.int32(pad_id), token_B)
            tokens_BN = jax.lax.dynamic_update_index_in_dim(tokens_BN, token_B, step, 1)
            done_B = done_B | (token_B == eos_id)
            hidden_BD, cache = lm.decode(
                graphdef, params, token_B, first_B + step, cache
            )
            return step + 1, hidden_BD, done_B, tokens_BN, cache

        start = (jnp.int32(0), hidden_BD, lengths_B == 0, tokens_BN, cache)
        return jax.lax.while_loop(unfinished, extend, start)[3]

    return generate


def choose(
    logits_BV: Float[Array, "B V"],
    key: Array,
    step: Int[Array, ""],
    temperature: Float[Array, ""],
    *,
    top_k: int = 0,
    top_p: float = 1.0,
) -> Int[Array, "B"]:
    """The next token of each row: the most probable one, or one drawn.

    Args:
      logits_BV: up to a constant a row.
      key: one random key, or B of them.
      step: number of the token; draws differ between steps.
      temperature: 0 = the most probable one.
      top_k: see `make_generate`.
      top_p: see `make_generate`.
    """

    def sample(_):
        scaled_BV = filter_logits(logits_BV / temperature, top_k=top_k, top_p=top_p)
        if not _is_rows(key):
            step_key = jax.random.fold_in(key, step)
            return jax.random.categorical(step_key, scaled_BV).astype(jnp.int32)
        keys_B = jax.vmap(jax.random.fold_in, (0, None))(key, step)
        return jax.vmap(jax.random.categorical)(keys_B, scaled_BV).astype(jnp.int32)

    def greedy(_):
        return jnp.argmax(logits_BV, axis=-1).astype(jnp.int32)

    return jax.lax.cond(temperature > 0, sample, greedy, None)


def _is_rows(key: Array) -> bool:
    """Whether there is a key for each row; old keys are arrays of two numbers."""
    typed = jax.dtypes.issubdtype(key.dtype, jax.dtypes.prng_key)
    return typed and key.ndim == 1


def filter_logits(
    logits_BV: Float[Array, "B V"], *, top_k: int = 0, top_p: float = 1.0
) -> Float[Array, "B V"]:
    """Set to -inf what top_k or top_p excludes; ties with the last kept one stay."""
    if top_k:
        kth_B1 = jax.lax.top_k(logits_BV, min(top_k, logits_BV.shape[-1]))[0][:, -1:]
        logits_BV = jnp.where(logits_BV < kth_B1, -jnp.inf, logits_BV)
    if top_p < 1:
        sorted_BV = jnp.sort(logits_BV, axis=-1, descending=True)
        probs_BV = jax.nn.softmax(sorted_BV, axis=-1)
        before_BV = jnp.cumsum(probs_BV, axis=-1) - probs_BV
        kept_BV = jnp.where(before_BV < top_p, sorted_BV, jnp.inf)
        threshold_B1 = jnp.min(kept_BV, axis=-1, keepdims=True)
        logits_BV = jnp.where(logits_BV < threshold_B1, -jnp.inf, logits_BV)
    return logits_BV


def generate_texts(
    config: lm.Shape,
    graphdef: nnx.GraphDef,
    params: lm.Params,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    eos_id: int,
    pad_id: int,
    batch_size: int = 16,
    key: Array | None = None,
    temperature: float = 0.0,
    top_k: int = 0,
    top_p: float = 1.0,
    compiled: dict[Any, Callable] | None = None,
    place: Callable[[np.ndarray], Any] = lambda x: x,
    on_batch: Callable[[int], None] = lambda num_prompts: None,
) -> list[list[int]]:
    """Continue tokenised prompts, batched by length and padded to few shapes.

    Args:
      config: shape of the model.
      graphdef: from `lm.create`.
      params: its parameters.
      prompts: token ids, each at least one; T5's end with its end token.
      max_new_tokens: most tokens generated for a prompt.
      eos_id: token that ends a continuation; -1 = none does.
      pad_id: fills up rows.
      batch_size: prompts decoded together.
      key: random key, needed when temperature > 0; or one for each prompt, so that what
        is drawn does not hang on the other prompts.
      temperature: 0 = most probable token, else sampling.
      top_k: see `make_generate`.
      top_p: see `make_generate`.
      compiled: filled with one compiled function a prompt shape; pass the same dict
        with the same arguments again (other params, prompts) to compile nothing.
      place: puts the arrays of a batch, [batch_size, ...], on devices.
      on_batch: called with the number of prompts done since the last call.

    Returns:
      The continuation of each prompt, in order, without the end token.

    Raises:
      ValueError: an empty prompt, sampling without a key, or a prompt too long for the
        model.
    """
    if temperature > 0 and key is None:
        raise ValueError(f"temperature={temperature} samples: pass a random key")
    for index, prompt in enumerate(prompts):
        if not len(prompt):
            raise ValueError(f"prompts[{index}] is empty: give it at least one token")
    key = jax.random.key(0) if key is None else key
    order = sorted(range(len(prompts)), key=lambda index: len(prompts[index]))
    compiled = {} if compiled is None else compiled
    results: list[list[int]] = [[] for _ in prompts]
    for start in range(0, len(order), batch_size):
        chosen = order[start : start + batch_size]
        longest = len(prompts[chosen[-1]])
        width = prompt_shape(longest, lm.max_prompt_length(config, max_new_tokens))
        rows = [prompts[i] for i in chosen]
        shared = find_shared_prefix(config, rows, batch_size, width)
        if (kind := (width, *shared.kind)) not in compiled:
            compiled[kind] = make_generate(
                config,
                graphdef,
                max_prompt=width,
                max_new_tokens=max_new_tokens,
                eos_id=eos_id,
                pad_id=pad_id,
                top_k=top_k,
                top_p=top_p,
                num_shared=shared.num_tokens,
            )
        arrays = padded(rows, batch_size, width, pad_id)
        if _is_rows(key):
            filled = chosen + chosen[:1] * (batch_size - len(chosen))
            batch_key = key[np.asarray(filled)]
        else:
            batch_key = jax.random.fold_in(key, start)
        tokens_BN = np.asarray(
            compiled[kind](
                params, *map(place, arrays), batch_key, temperature, *shared.arrays
            )
        )
        for row, index in enumerate(chosen):
            (ends,) = np.nonzero(tokens_BN[row] == eos_id)
            stop = ends[0] if len(ends) else max_new_tokens
            results[index] = tokens_BN[row, :stop].tolist()
        on_batch(len(chosen))
    return results


def padded(
    prompts: Sequence[Sequence[int]], num_rows: int, width: int, pad_id: int
) -> tuple[np.ndarray, np.ndarray]:
    """Prompts as rows, right padded, and their lengths; rows without one have 0."""
    prompts_BP = np.full((num_rows, width), pad_id, np.int32)
    lengths_B = np.zeros(num_rows, np.int32)
    for row, prompt in enumerate(prompts):
        lengths_B[row] = len(prompt)
        prompts_BP[row, : len(prompt)] = prompt
    return prompts_BP, lengths_B


@dataclass(frozen=True, kw_only=True, slots=True)
class SharedPrefix:
    """Groups of prompts that begin alike: what they share is read once a group."""

    num_tokens: int = 0  # that the prompts of a group share; 0 = nothing is
    arrays: tuple[np.ndarray, ...] = ()  # a row of each group [G], group of a row [B]

    @property
    def kind(self) -> tuple[int, ...]:
        """What code is compiled for."""
        return self.num_tokens, *(len(array) for array in self.arrays[:1])


def find_shared_prefix(
    config: lm.Shape, prompts: Sequence[Sequence[int]], num_rows: int, width: int
) -> SharedPrefix:
    """The groups that leave the fewest pieces of prompts to be read.

    Args:
      config: shape of the model.
      prompts: of the first rows of a batch; [] = a row has none.
      num_rows: of the batch.
      width: to which prompts are padded.
    """
    piece = lm.prefill_chunk_size(config, width)
    num_pieces = -(-width // piece)
    best, fewest = SharedPrefix(), num_pieces * num_rows
    shortest = min((len(prompt) for prompt in prompts if prompt), default=0)
    # The last token of a prompt is its own: what follows it is wanted.
    for shared in range(1, (shortest - 1) // piece + 1):
        leaders: dict[tuple[int, ...], int] = {}
        groups = np.zeros(num_rows, np.int32)
        starts = [tuple(prompt[: shared * piece]) for prompt in prompts]
        for row, start in enumerate(starts):
            if start:
                leaders.setdefault(start, row)
        numbers = {start: number for number, start in enumerate(leaders)}
        for row, start in enumerate(starts):
            groups[row] = numbers.get(start, 0)
        read = shared * len(leaders) + (num_pieces - shared) * num_rows
        if read < fewest:
            rows = np.array([*leaders.values()], np.int32)
            best = SharedPrefix(num_tokens=shared * piece, arrays=(rows, groups))
            fewest = read
    return best


def prompt_shape(longest: int, limit: int) -> int:
    """The smallest allowed padded length; `limit` itself is the last one.

    Few, as each is compiled for, and of long prompts never an eighth too long.
    """
    if longest > limit:
        raise ValueError(
            f"a prompt of {longest} tokens leaves no room: at most {limit} fit with "
            "max_new_tokens under the model's max_length; shorten one of them"
        )
    width = MIN_PROMPT_SHAPE
    while width < longest:
        width *= 2
    step = min(width, max(PROMPT_STEP, width // 16))
    return min(-(-longest // step) * step, limit)


def check(
    config: lm.Shape, max_prompt: int, max_new_tokens: int, top_k: int, top_p: float
) -> None:
    """Refuses what `make_generate` cannot do, with a ValueError."""
    if max_prompt < 1 or max_new_tokens < 1:
        raise ValueError(
            f"max_prompt={max_prompt}, max_new_tokens={max_new_tokens}: use at least 1"
        )
    if (limit := lm.max_prompt_length(config, max_new_tokens)) < max_prompt:
        raise ValueError(
            f"max_prompt={max_prompt} + max_new_tokens={max_new_tokens} exceeds the "
            f"model's max_length={limit + max_new_tokens}: shorten one of them"
        )
    if top_k < 0 or not 0 < top_p <= 1:
        raise ValueError(
            f"top_k={top_k}, top_p={top_p}: use top_k >= 0 and 0 < top_p <= 1"
        )

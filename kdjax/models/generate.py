"""Batched decoding with a key/value cache: greedy, sampled or contrastive.

With a contrast, a prompt and another one, which states a different answer, are
continued by the same tokens. Each is the one with the greatest

  log p(token | prompt, tokens before) - weight * log p(token | contrast, tokens before)

so that text which suits the other answer as well becomes less likely. Where both agree
that a text is over, the difference says nothing of its end: `contrast_stop="teacher"`
ends it where the end token is the most probable one given the prompt alone. Both are
rows of one batch, the prompts before their contrasts; prefixes that rows share are read
once.

Shapes: B prompts decoded together, R rows (B, or 2 B with contrasts), P prompt time
(right padded), N new tokens, F of them forced, V vocabulary.

Batches end with their slowest row. So many prompts of models that only decode go
through `continuous` instead, which refills the slots of finished rows. Both draw the
same tokens, up to rounding; its program takes longer to compile.

Source: Wang et al., 2023, SCOTT, arXiv 2305.01879, section 3.1 (contrasts).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Int

from kdjax.config import CONTRAST_STOPS, DecoderConfig
from kdjax.models import lm
from kdjax.models.continuous import Batching, Continuation, Engine, Request
from kdjax.models.decode_loop import ROW_AXES
from kdjax.models.sampling import filter_logits, row_keys

# Prompts are padded to a power of two from the first to the second, then to multiples
# of the second or, where that is more, of a sixteenth of the next power of two.
MIN_PROMPT_SHAPE, PROMPT_STEP = 16, 128
_FEW_BATCHES = 2  # for more than so many, slots are refilled


@dataclass(frozen=True, kw_only=True, slots=True)
class Decoding:
    """The decoding method, static in the compiled program.

    Raises:
      ValueError: a value out of range.
    """

    max_new_tokens: int  # most tokens generated per prompt
    eos_ids: tuple[int, ...]  # each of them ends a continuation
    pad_id: int  # fills rows before and after their end
    temperature: float = 0.0  # 0 = the most probable token, else sampling
    top_k: int = 0  # sample among the k most probable tokens; 0 = all
    top_p: float = 1.0  # among the fewest tokens of at least this probability; 1 = all
    seed: int = 0  # of sampling; a prompt's draws follow from it and its own seed
    contrast_weight: float | None = None  # of log p given the contrast; None = without
    # "teacher": a text ends where one of `eos_ids` is the most probable token given the
    # prompt, and only there; "contrast": where the contrast leads to one of them
    contrast_stop: str = "teacher"

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1:
            raise ValueError(f"max_new_tokens={self.max_new_tokens}: use at least 1")
        if self.top_k < 0 or not 0 < self.top_p <= 1:
            raise ValueError(
                f"top_k={self.top_k}, top_p={self.top_p}: use top_k >= 0 and "
                "0 < top_p <= 1"
            )
        if self.contrast_stop not in CONTRAST_STOPS:
            raise ValueError(
                f"contrast_stop={self.contrast_stop!r}: use one of {CONTRAST_STOPS}"
            )

    @property
    def rows_per_prompt(self) -> int:
        """2 with contrasts, else 1."""
        return 1 if self.contrast_weight is None else 2


class Generator:
    """Continues tokenised prompts.

    Args:
      shape: of the model.
      graphdef: from `lm.create`; its compute dtype is also the cache's.
      decoding: the method.
      batch_size: B, prompts decoded together.
      mesh: rows are split over its (data, fsdp), which divide B; None = one device.
      cache_dtype: as `continuous.Batching.cache_dtype`.
      stop: a text ends where it has one of these, or a batch's later.
      decode_text: text of tokens, for `stop`.

    Attributes:
      compiled: of batches, one program per padded prompt length, forced length and
        shared prefix.
      engine: continuous batching; None in an encoder-decoder model, or with contrasts.

    Raises:
      ValueError: `cache_dtype` without an engine.
    """

    def __init__(
        self,
        shape: lm.Shape,
        graphdef: nnx.GraphDef,
        decoding: Decoding,
        *,
        batch_size: int = 16,
        mesh: Mesh | None = None,
        cache_dtype: str = "compute",
        stop: tuple[str, ...] = (),
        decode_text: Callable[[list[int]], str] | None = None,
    ) -> None:
        self.shape, self.graphdef, self.decoding = shape, graphdef, decoding
        self.batch_size, self._mesh, self._stop = batch_size, mesh, stop
        self.compiled: dict[tuple[int, ...], Callable[..., Any]] = {}
        self.engine: Engine | None = None
        if isinstance(shape, DecoderConfig) and decoding.contrast_weight is None:
            self.engine = Engine(
                shape,
                graphdef,
                eos_ids=decoding.eos_ids,
                batching=Batching(num_slots=batch_size, cache_dtype=cache_dtype),
                seed=decoding.seed,
                mesh=mesh,
                decode_text=decode_text,
            )
        elif cache_dtype != "compute":
            raise ValueError(
                f"cache_dtype={cache_dtype!r}: encoder-decoder models and contrasts "
                "have a cache of the compute dtype: use cache_dtype='compute'"
            )

    def __call__(
        self,
        params: lm.Params,
        prompts: Sequence[Sequence[int]],
        *,
        contrasts: Sequence[Sequence[int]] | None = None,
        forced: Sequence[Sequence[int]] | None = None,
        seeds: Sequence[int] | None = None,
        on_finish: Callable[[int, list[int]], None] | None = None,
    ) -> list[list[int]]:
        """Continue prompts.

        Args:
          params: of the model.
          prompts: token ids, each at least one; T5's end with its end token.
          contrasts: one per prompt, if and only if `contrast_weight` is set.
          forced: tokens that each continuation begins with, of `max_new_tokens`; in an
            encoder-decoder model the decoder reads them. None = none.
          seeds: one per prompt, below 2^32: its draws do not depend on other prompts;
            None = their numbers.
          on_finish: called with the number of each prompt and its continuation, as soon
            as that is known.

        Returns:
          The continuation of each prompt, in order, without what was forced and
          without the end token.

        Raises:
          ValueError: an empty prompt, contrasts that do not fit the method, or a prompt
            too long for the model.
        """
        decoding, size = self.decoding, self.batch_size
        sides = {"prompts": prompts}
        if contrasts is not None:
            sides["contrasts"] = contrasts
        if len(sides) != decoding.rows_per_prompt:
            raise ValueError(
                f"contrast_weight={decoding.contrast_weight} with contrasts="
                f"{contrasts}: give both, or neither"
            )
        for name, side in sides.items():
            for index, ids in enumerate(side):
                if not len(ids):
                    raise ValueError(
                        f"{name}[{index}] is empty: give it at least one token"
                    )
        if forced is None:
            forced = [[]] * len(prompts)
        longest_forced = max(map(len, forced), default=0)
        if longest_forced >= decoding.max_new_tokens:
            raise ValueError(
                f"max_new_tokens={decoding.max_new_tokens}: {longest_forced} tokens "
                "are forced, which leaves no room: use more"
            )
        seeds = range(len(prompts)) if seeds is None else seeds
        if self.engine is not None and (
            self.engine.batching.cache_dtype != "compute"
            or len(prompts) > _FEW_BATCHES * self.batch_size
        ):
            return self._refill(params, prompts, forced, seeds, on_finish)
        lengths = [max(map(len, ids)) for ids in zip(*sides.values(), strict=True)]
        order = sorted(range(len(prompts)), key=lambda index: lengths[index])
        limit = lm.max_prompt_length(self.shape, decoding.max_new_tokens)
        seeds_N = np.asarray(seeds, np.uint32)
        results: list[list[int]] = [[] for _ in prompts]
        for start in range(0, len(order), size):
            batch = order[start : start + size]
            width = padded_length(lengths[batch[-1]], limit)
            blank: list[Sequence[int]] = [[]] * (size - len(batch))
            rows = [
                ids
                for side in sides.values()
                for ids in (*(side[index] for index in batch), *blank)
            ]
            filled = batch + batch[:1] * len(blank)
            forced_BF = np.full((size, longest_forced), -1, np.int32)
            for row, index in enumerate(batch):
                forced_BF[row, : len(forced[index])] = forced[index]
            tokens_BN = self._decode(params, rows, width, forced_BF, seeds_N[filled])
            for tokens_N, index in zip(tokens_BN, batch, strict=False):
                new_N = tokens_N[len(forced[index]) :]
                (ends,) = np.nonzero(np.isin(new_N, decoding.eos_ids))
                results[index] = new_N[: ends[0] if len(ends) else None].tolist()
                if on_finish is not None:
                    on_finish(index, results[index])
        return results

    def _refill(
        self,
        params: lm.Params,
        prompts: Sequence[Sequence[int]],
        forced: Sequence[Sequence[int]],
        seeds: Sequence[int],
        on_finish: Callable[[int, list[int]], None] | None,
    ) -> list[list[int]]:
        """Decode all prompts in slots that are refilled; forced tokens are read."""
        assert self.engine is not None
        decoding = self.decoding
        requests = [
            Request(
                prompt=[*prompt, *start],
                max_new_tokens=decoding.max_new_tokens - len(start),
                seed=int(seed),
                temperature=decoding.temperature,
                top_k=decoding.top_k,
                top_p=decoding.top_p,
                stop=self._stop,
            )
            for prompt, start, seed in zip(prompts, forced, seeds, strict=True)
        ]

        def finish(index: int, done: Continuation) -> None:
            if on_finish is not None:
                on_finish(index, done.text_tokens)

        return [
            done.text_tokens for done in self.engine(params, requests, on_finish=finish)
        ]

    def _place(self, array: np.ndarray) -> Any:
        """Split the rows of a batch over the devices of this process."""
        if self._mesh is None or self._mesh.is_multi_process:
            return array
        return jax.device_put(array, NamedSharding(self._mesh, P(ROW_AXES)))

    def _decode(
        self,
        params: lm.Params,
        rows: Sequence[Sequence[int]],
        width: int,
        forced_BF: np.ndarray,
        seeds_B: np.ndarray,
    ) -> np.ndarray:
        """Decode one batch, [B, N]; an empty row has no prompt."""
        prefix = find_shared_prefix(self.shape, rows, width)
        signature = (width, forced_BF.shape[1], *prefix.signature)
        if signature not in self.compiled:
            self.compiled[signature] = make_generate(
                self.shape,
                self.graphdef,
                self.decoding,
                max_prompt=width,
                num_forced=forced_BF.shape[1],
                num_shared=prefix.num_tokens,
            )
        arrays = map(self._place, pad_prompts(rows, width, self.decoding.pad_id))
        keys_B = row_keys(self.decoding.seed, seeds_B)
        more = (*([forced_BF] if forced_BF.shape[1] else []), *prefix.arrays)
        return np.asarray(self.compiled[signature](params, *arrays, keys_B, *more))


def make_generate(
    shape: lm.Shape,
    graphdef: nnx.GraphDef,
    decoding: Decoding,
    *,
    max_prompt: int,
    num_forced: int = 0,
    num_shared: int = 0,
) -> Callable[..., Int[Array, "B N"]]:
    """Compile one pass over the prompts, then a loop over new tokens.

    The loop ends when every prompt has produced one of `eos_ids`, or
    `max_new_tokens` tokens.

    Args:
      shape: of the model.
      graphdef: from `lm.create`.
      decoding: the method.
      max_prompt: P, columns of the prompt array.
      num_forced: F, tokens that continuations may have to begin with.
      num_shared: tokens of `SharedPrefix`.

    Returns:
      Jitted `generate(params, prompts_RP, lengths_R, keys_B, *more) -> tokens_BN`,
      int32; more: forced tokens [B, F], -1 where the model chooses, if num_forced is
      not 0, then `SharedPrefix.arrays` if num_shared is not 0. Prompts are right
      padded (with any id), contrasts after them. A prompt of length 0 stays empty: all
      `pad_id`. The end token is included.

    Raises:
      ValueError: more tokens than the model's max_length.
    """
    limit = lm.max_prompt_length(shape, decoding.max_new_tokens)
    if max_prompt > limit:
        raise ValueError(
            f"max_prompt={max_prompt} + max_new_tokens={decoding.max_new_tokens} "
            f"exceeds the model's max_length={limit + decoding.max_new_tokens}: "
            "shorten one of them"
        )
    pad_id, rows_per_prompt = jnp.int32(decoding.pad_id), decoding.rows_per_prompt

    @jax.jit
    def generate(params, prompts_RP, lengths_R, keys_B, *more):
        forced_BF, shared = (more[0], more[1:]) if num_forced else (None, more)
        num_prompts = prompts_RP.shape[0] // rows_per_prompt
        hidden_RD, first_R, cache = lm.prefill(
            shape,
            graphdef,
            params,
            prompts_RP.astype(jnp.int32),
            lengths_R.astype(jnp.int32),
            max_new_tokens=decoding.max_new_tokens,
            num_shared=num_shared,
            groups=shared,
        )
        tokens_BN = jnp.full((num_prompts, decoding.max_new_tokens), pad_id)

        def unfinished(carry):
            step, done_B, *_ = carry
            return (step < decoding.max_new_tokens) & ~jnp.all(done_B)

        def extend(carry):
            step, done_B, tokens_BN, hidden_RD, cache = carry
            logits_BV = lm.logits(graphdef, params, hidden_RD)
            if decoding.contrast_weight is not None:
                # Up to a constant per row, the difference of the log-probabilities.
                logits_BV = contrasted_logits(*jnp.split(logits_BV, 2), decoding)
            token_B = next_tokens(logits_BV, keys_B, step, decoding)
            if forced_BF is not None:
                column_B = forced_BF[:, jnp.minimum(step, num_forced - 1)]
                is_forced_B = (step < num_forced) & (column_B >= 0)
                token_B = jnp.where(is_forced_B, column_B, token_B)
            token_B = jnp.where(done_B, pad_id, token_B)
            tokens_BN = jax.lax.dynamic_update_index_in_dim(tokens_BN, token_B, step, 1)
            for eos_id in decoding.eos_ids:
                done_B |= token_B == eos_id
            token_R = jnp.tile(token_B, rows_per_prompt)
            hidden_RD, cache = lm.decode(
                graphdef, params, token_R, first_R + step, cache
            )
            return step + 1, done_B, tokens_BN, hidden_RD, cache

        done_B = lengths_R[:num_prompts] == 0
        start = (jnp.int32(0), done_B, tokens_BN, hidden_RD, cache)
        return jax.lax.while_loop(unfinished, extend, start)[2]

    return generate


def contrasted_logits(
    own_BV: Float[Array, "B V"], contrast_BV: Float[Array, "B V"], decoding: Decoding
) -> Float[Array, "B V"]:
    """Return the scores of the next tokens, of which the greatest is chosen.

    The difference own - weight * contrast; with `contrast_stop="teacher"` end tokens
    have the only finite scores where one of them is the most probable one of `own_BV`,
    and none elsewhere.
    """
    score_BV = own_BV - jnp.float32(decoding.contrast_weight) * contrast_BV
    if decoding.contrast_stop == "contrast" or not decoding.eos_ids:
        return score_BV
    is_end_1V = jnp.isin(
        jnp.arange(own_BV.shape[-1]), jnp.asarray(decoding.eos_ids, jnp.int32)
    )[None]
    best_B1 = jnp.argmax(own_BV, axis=-1, keepdims=True)
    ends_B1 = jnp.take_along_axis(is_end_1V, best_B1.T, axis=1).T
    return jnp.where(is_end_1V == ends_B1, score_BV, -jnp.inf)


def next_tokens(
    logits_BV: Float[Array, "B V"],
    keys_B: Array,
    step: Int[Array, ""],
    decoding: Decoding,
) -> Int[Array, "B"]:
    """Choose the next token of each prompt: the most probable one, or one drawn.

    Args:
      logits_BV: up to a constant per row.
      keys_B: random keys.
      step: number of the token; draws differ between steps.
      decoding: the method.
    """
    if decoding.temperature == 0:
        return jnp.argmax(logits_BV, axis=-1).astype(jnp.int32)
    logits_BV = filter_logits(
        logits_BV / jnp.float32(decoding.temperature),
        top_k=decoding.top_k,
        top_p=decoding.top_p,
    )
    keys_B = jax.vmap(jax.random.fold_in, (0, None))(keys_B, step)
    return jax.vmap(jax.random.categorical)(keys_B, logits_BV).astype(jnp.int32)


def pad_prompts(
    prompts: Sequence[Sequence[int]], width: int, pad_id: int
) -> tuple[Int[np.ndarray, "R P"], Int[np.ndarray, "R"]]:
    """Return prompts as right-padded rows, and their lengths."""
    prompts_RP = np.full((len(prompts), width), pad_id, np.int32)
    for row, prompt in enumerate(prompts):
        prompts_RP[row, : len(prompt)] = prompt
    return prompts_RP, np.asarray([len(prompt) for prompt in prompts], np.int32)


@dataclass(frozen=True, kw_only=True, slots=True)
class SharedPrefix:
    """Groups of prompts with a common prefix, which is read once per group."""

    num_tokens: int = 0  # of the prefix; 0 = none is shared
    arrays: tuple[np.ndarray, ...] = ()  # a row of each group [G], group of a row [R]

    @property
    def signature(self) -> tuple[int, ...]:
        """Static sizes: tokens of the prefix, and groups if there are some."""
        return self.num_tokens, *(len(array) for array in self.arrays[:1])


def find_shared_prefix(
    shape: lm.Shape, prompts: Sequence[Sequence[int]], width: int
) -> SharedPrefix:
    """Group prompts by the prefix that leaves the fewest chunks to be read.

    Args:
      shape: of the model.
      prompts: rows of a batch; [] = a row without one.
      width: to which prompts are padded.
    """
    chunk_size, num_rows = lm.prefill_chunk_size(shape, width), len(prompts)
    num_chunks = -(-width // chunk_size)
    best, fewest = SharedPrefix(), num_chunks * num_rows
    shortest = min((len(prompt) for prompt in prompts if prompt), default=0)
    # The last token of a prompt is never shared: its hidden state is needed.
    for shared in range(1, (shortest - 1) // chunk_size + 1):
        starts = [tuple(prompt[: shared * chunk_size]) for prompt in prompts]
        leaders: dict[tuple[int, ...], int] = {}  # prefix -> its first row
        for row, start in enumerate(starts):
            if start:
                leaders.setdefault(start, row)
        chunks = shared * len(leaders) + (num_chunks - shared) * num_rows
        if chunks < fewest:
            fewest = chunks
            numbers = {start: number for number, start in enumerate(leaders)}
            groups = [numbers.get(start, 0) for start in starts]
            arrays = tuple(
                np.asarray(x, np.int32) for x in ([*leaders.values()], groups)
            )
            best = SharedPrefix(num_tokens=shared * chunk_size, arrays=arrays)
    return best


def padded_length(longest: int, limit: int) -> int:
    """Return the smallest allowed padded length; `limit` itself is the last one.

    Allowed lengths are few, as each is compiled for, and pad long prompts by at most an
    eighth.
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

"""Contrastive decoding: what one prompt makes likelier than another one does.

Two prompts of a row, which state different answers, are continued by the same tokens.
Each is the one with the greatest

  log p(token | prompt, tokens before) - weight * log p(token | contrast, tokens before)

so that what would be said of the other answer as well is said less. Both are rows of
one batch, the prompts before their contrasts; what the two begin with is read once.

Shapes: B rows, P prompt time (right padded), N new tokens, V vocabulary.

Source: Wang et al., 2023, SCOTT, arXiv 2305.01879, section 3.1.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Int

from kdjax.models import generate, lm


def make_generate(
    config: lm.Shape,
    graphdef: nnx.GraphDef,
    *,
    max_prompt: int,
    max_new_tokens: int,
    eos_id: int,
    pad_id: int,
    top_p: float = 1.0,
    num_shared: int = 0,
) -> Callable[..., Int[Array, "B N"]]:
    """Compile-once contrastive generation, as `generate.make_generate`.

    Args:
      config: shape of the model.
      graphdef: from `lm.create`.
      max_prompt: P, columns of the prompt array.
      max_new_tokens: N, most tokens generated for a row.
      eos_id: token that ends a row; -1 = none does.
      pad_id: fills a row after its end.
      top_p: see `generate.make_generate`; of the scores' softmax.
      num_shared: of `generate.SharedPrefix`.

    Returns:
      Jitted `generate(params, prompts_2BP, lengths_2B, weight, key, temperature,
      *shared) -> tokens_BN`, int32: B prompts, then their contrasts. Weight 0 is
      `generate`'s own decoding; a row whose prompt has length 0 stays empty. Sampling
      draws from the softmax of the scores / temperature.

    Raises:
      ValueError: more tokens than the model's max_length, or a top_p out of range.
    """
    generate.check(config, max_prompt, max_new_tokens, 0, top_p)

    @jax.jit
    def call(params, prompts_2BP, lengths_2B, weight, key, temperature, *shared):
        weight = jnp.asarray(weight, jnp.float32)
        temperature = jnp.asarray(temperature, jnp.float32)
        hidden_2BD, first_2B, cache = lm.prefill(
            config,
            graphdef,
            params,
            prompts_2BP.astype(jnp.int32),
            lengths_2B.astype(jnp.int32),
            max_new_tokens=max_new_tokens,
            num_shared=num_shared,
            groups=shared,
        )
        num_rows = prompts_2BP.shape[0] // 2
        tokens_BN = jnp.full((num_rows, max_new_tokens), pad_id, jnp.int32)

        def unfinished(carry):
            step, done_B, *_ = carry
            return (step < max_new_tokens) & ~jnp.all(done_B)

        def extend(carry):
            step, done_B, tokens_BN, hidden_2BD, cache = carry
            # Normalisers are constants of a row: logits choose as log-probabilities do,
            # and with a weight of 0 these are exactly the model's own.
            logits_2BV = lm.logits(graphdef, params, hidden_2BD)
            score_BV = logits_2BV[:num_rows] - weight * logits_2BV[num_rows:]
            token_B = generate.choose(score_BV, key, step, temperature, top_p=top_p)
            token_B = jnp.where(done_B, jnp.int32(pad_id), token_B)
            tokens_BN = jax.lax.dynamic_update_index_in_dim(tokens_BN, token_B, step, 1)
            done_B = done_B | (token_B == eos_id)
            hidden_2BD, cache = lm.decode(
                graphdef, params, jnp.tile(token_B, 2), first_2B + step, cache
            )
            return step + 1, done_B, tokens_BN, hidden_2BD, cache

        done_B = lengths_2B[:num_rows] == 0
        start = (jnp.int32(0), done_B, tokens_BN, hidden_2BD, cache)
        return jax.lax.while_loop(unfinished, extend, start)[2]

    return call


def generate_texts(
    config: lm.Shape,
    graphdef: nnx.GraphDef,
    params: lm.Params,
    prompts: Sequence[Sequence[int]],
    contrasts: Sequence[Sequence[int]],
    *,
    weight: float,
    max_new_tokens: int,
    eos_id: int,
    pad_id: int,
    batch_size: int = 16,
    keys: Array,
    temperature: float = 0.0,
    top_p: float = 1.0,
    compiled: dict[Any, Callable] | None = None,
    place: Callable[[np.ndarray], Any] = lambda x: x,
) -> list[list[int]]:
    """Continue tokenised prompts against others, in their order.

    Args:
      config: shape of the model.
      graphdef: from `lm.create`.
      params: its parameters.
      prompts: token ids, each at least one.
      contrasts: of each prompt the one decoded against; each at least one id.
      weight: lambda, of the contrasts' log-probabilities.
      max_new_tokens: most tokens generated for a prompt.
      eos_id: token that ends a continuation; -1 = none does.
      pad_id: fills up rows.
      batch_size: prompts decoded together.
      keys: random keys, one for each prompt.
      temperature: 0 = the greatest score, else sampling.
      top_p: see `make_generate`.
      compiled: filled with one compiled function a prompt shape.
      place: puts the arrays of a batch, [batch_size, ...], on devices.

    Returns:
      The continuation of each prompt without the end token.

    Raises:
      ValueError: an empty prompt, or one too long for the model.
    """
    compiled = {} if compiled is None else compiled
    results = []
    for start in range(0, len(prompts), batch_size):
        chosen = range(start, min(start + batch_size, len(prompts)))
        sides = [[side[index] for index in chosen] for side in (prompts, contrasts)]
        for index, pair in zip(chosen, zip(*sides, strict=True), strict=True):
            if not all(map(len, pair)):
                raise ValueError(
                    f"prompts[{index}] or contrasts[{index}] is empty: give both at "
                    "least one token"
                )
        longest = max(len(ids) for side in sides for ids in side)
        width = generate.prompt_shape(
            longest, lm.max_prompt_length(config, max_new_tokens)
        )
        # Rows without a prompt stand between the two sides.
        none: list[Sequence[int]] = [[]] * (batch_size - len(chosen))
        both = [*sides[0], *none, *sides[1], *none]
        shared = generate.find_shared_prefix(config, both, 2 * batch_size, width)
        if (kind := (width, *shared.kind)) not in compiled:
            compiled[kind] = make_generate(
                config,
                graphdef,
                max_prompt=width,
                max_new_tokens=max_new_tokens,
                eos_id=eos_id,
                pad_id=pad_id,
                top_p=top_p,
                num_shared=shared.num_tokens,
            )
        arrays = map(place, generate.padded(both, 2 * batch_size, width, pad_id))
        filled = [*chosen, *[start] * (batch_size - len(chosen))]
        batch_keys = keys[np.asarray(filled)]
        tokens_BN = np.asarray(
            compiled[kind](
                params, *arrays, weight, batch_keys, temperature, *shared.arrays
            )
        )
        for row in tokens_BN[: len(chosen)]:
            (ends,) = np.nonzero(row == eos_id)
            results.append(row[: ends[0] if len(ends) else max_new_tokens].tolist())
    return results

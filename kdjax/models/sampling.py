"""Choice of the next token: greedy, or drawn with settings of each row's own.

Shapes: B rows, V vocabulary.

Source: Holtzman et al., 2020, arXiv 1904.09751, section 3.1 (top_p).
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int


class Settings(NamedTuple):
    """Sampling settings of rows."""

    temperature: Float[Array, "B"]  # 0 = the most probable token
    top_k: Int[Array, "B"]  # draw among the k most probable tokens; 0 = all
    top_p: Float[Array, "B"]  # among the fewest tokens of this probability; 1 = all


def row_keys(seed: int, seeds_B: Int[np.ndarray, "B"]) -> Array:
    """Return the random key of each row, from the run's seed and its own."""
    return jax.vmap(jax.random.fold_in, (None, 0))(jax.random.key(seed), seeds_B)


def choose(
    logits_VB: Float[Array, "V B"],
    keys_B: Array,
    steps_B: Int[Array, "B"],
    settings: Settings,
    *,
    draws: bool,
    filters: bool,
) -> tuple[Int[Array, "B"], Float[Array, "B"]]:
    """Choose the next token of each row, and return its log-probability.

    Args:
      logits_VB: of the model, a column per row.
      keys_B: random keys of the rows.
      steps_B: number of the token in its row; draws differ between them.
      settings: of the rows.
      draws: whether any row has a temperature above 0.
      filters: whether any of these has a top_k or top_p.

    Returns:
      Tokens, and their log-probabilities under the model: temperature 1, the whole
      vocabulary, whatever the settings; nats.
    """
    token_B, best_B = _greatest(logits_VB)
    chosen_B = best_B
    if draws:
        logits_BV = logits_VB.T
        temperature_B1 = settings.temperature[:, None]
        scaled_BV = logits_BV / jnp.where(temperature_B1 > 0, temperature_B1, 1.0)
        if filters:
            scaled_BV = filter_rows(scaled_BV, settings.top_k, settings.top_p)
        keys_B = jax.vmap(jax.random.fold_in)(keys_B, steps_B)
        drawn_B = jax.vmap(jax.random.categorical)(keys_B, scaled_BV)
        token_B = jnp.where(
            settings.temperature > 0, drawn_B.astype(jnp.int32), token_B
        )
        chosen_B = jnp.take_along_axis(logits_BV, token_B[:, None], axis=1)[:, 0]
    sum_B = jnp.exp(logits_VB - best_B[None]).sum(0)
    return token_B, chosen_B - best_B - jnp.log(sum_B)


def _greatest(
    logits_VB: Float[Array, "V B"],
) -> tuple[Int[Array, "B"], Float[Array, "B"]]:
    """Return the id of the greatest logit of each column, the first of equal ones.

    By a maximum and a minimum: a CPU takes several times as long for `argmax`.
    """
    num = logits_VB.shape[0]
    best_B = logits_VB.max(0)
    ids_V1 = jnp.arange(num, dtype=jnp.int32)[:, None]
    token_B = jnp.where(logits_VB == best_B[None], ids_V1, num - 1).min(0)
    return token_B, best_B


def most_probable(logits_BV: Float[Array, "B V"]) -> Int[Array, "B"]:
    """Return the id of the greatest logit of each row, the first of equal ones."""
    return jnp.argmax(logits_BV, axis=-1).astype(jnp.int32)


def filter_logits(
    logits_BV: Float[Array, "B V"], *, top_k: int = 0, top_p: float = 1.0
) -> Float[Array, "B V"]:
    """Set to -inf what top_k or top_p excludes; ties with the last one remain."""
    if top_k:
        kth_B1 = jax.lax.top_k(logits_BV, min(top_k, logits_BV.shape[-1]))[0][:, -1:]
        logits_BV = jnp.where(logits_BV < kth_B1, -jnp.inf, logits_BV)
    if top_p < 1:
        sorted_BV = jnp.sort(logits_BV, axis=-1, descending=True)
        threshold_B1 = _nucleus(sorted_BV, jnp.float32(top_p))
        logits_BV = jnp.where(logits_BV < threshold_B1, -jnp.inf, logits_BV)
    return logits_BV


def filter_rows(
    logits_BV: Float[Array, "B V"], top_k_B: Int[Array, "B"], top_p_B: Float[Array, "B"]
) -> Float[Array, "B V"]:
    """Apply `filter_logits` with settings of each row's own."""
    num = logits_BV.shape[-1]
    sorted_BV = jnp.sort(logits_BV, axis=-1, descending=True)
    last_B = jnp.where(top_k_B > 0, jnp.minimum(top_k_B, num), num) - 1
    kth_B1 = jnp.take_along_axis(sorted_BV, last_B[:, None], axis=1)
    sorted_BV = jnp.where(sorted_BV < kth_B1, -jnp.inf, sorted_BV)
    threshold_B1 = jnp.where(
        top_p_B[:, None] < 1, _nucleus(sorted_BV, top_p_B[:, None]), -jnp.inf
    )
    excluded_BV = (logits_BV < kth_B1) | (logits_BV < threshold_B1)
    return jnp.where(excluded_BV, -jnp.inf, logits_BV)


def _nucleus(
    sorted_BV: Float[Array, "B V"], top_p: Float[Array, "..."]
) -> Float[Array, "B 1"]:
    """Return the least logit among the fewest of probability top_p."""
    probs_BV = jax.nn.softmax(sorted_BV, axis=-1)
    before_BV = jnp.cumsum(probs_BV, axis=-1) - probs_BV
    nucleus_BV = jnp.where(before_BV < top_p, sorted_BV, jnp.inf)
    return jnp.min(nucleus_BV, axis=-1, keepdims=True)

"""Outputs of single layers, kept while a scan runs over all of them.

Shapes: B rows, T time, D width, n layers that are watched.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int


class Watch(NamedTuple):
    """Which layers' outputs are kept."""

    layers: tuple[int, ...] = ()  # distinct
    attention: bool = False  # their attention weights too


NOTHING = Watch()


class Watched(NamedTuple):
    """Outputs of the n layers of a `Watch`, in its order."""

    states_nBTD: Float[Array, "n B T D"]
    """The residual stream after the layer, in the compute dtype; no norm is applied."""
    attention_nBTT: Float[Array, "n B T T"] | None
    """Attention weights, mean over the heads, float32; None if not asked for."""


def room(
    watch: Watch, x_BTD: Float[Array, "B T D"], *, num_layers: int
) -> tuple[Watched | None, Int[Array, "L"] | None]:
    """Zeros for what is watched, and the place of each layer in them, n for none."""
    if not watch.layers:
        return None, None
    n = len(watch.layers)
    slots_L = np.full(num_layers, n, np.int32)
    slots_L[list(watch.layers)] = np.arange(n)
    attention = None
    if watch.attention:
        num_rows, length, _ = x_BTD.shape
        attention = jnp.zeros((n, num_rows, length, length), jnp.float32)
    states = jnp.zeros((n, *x_BTD.shape), x_BTD.dtype)
    return Watched(states, attention), jnp.asarray(slots_L)


def keep(
    watched: Watched | None,
    slot: Int[Array, ""],
    x_BTD: Float[Array, "B T D"],
    attention: Callable[[], Float[Array, "B T T"]],
) -> Watched | None:
    """Puts a layer's outputs into their slot; a slot beyond the last keeps nothing."""
    if watched is None:
        return None
    states, maps = watched
    if maps is not None:
        maps = jax.lax.cond(
            slot < len(maps), lambda: maps.at[slot].set(attention()), lambda: maps
        )
    return Watched(states.at[slot].set(x_BTD, mode="drop"), maps)

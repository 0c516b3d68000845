"""Outputs of single layers, stored while a scan runs over all of them.

Shapes: B rows, T time, D width, L layers of the model, n captured layers.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int


class Capture(NamedTuple):
    """Layers whose outputs a forward pass returns beside its hidden states."""

    layers: tuple[int, ...] = ()  # distinct
    attention: bool = False  # their attention weights too


NO_CAPTURE = Capture()


class CapturedOutputs(NamedTuple):
    """Outputs of the n layers of a `Capture`, in its order."""

    states_nBTD: Float[Array, "n B T D"]
    """The residual stream after the layer, in the compute dtype; no norm is applied."""
    attention_nBTT: Float[Array, "n B T T"] | None
    """Attention weights, mean over the heads, float32; None if not captured."""


def allocate(
    capture: Capture, x_BTD: Float[Array, "B T D"], *, num_layers: int
) -> tuple[CapturedOutputs | None, Int[Array, "L"] | None]:
    """Return zeroed outputs, and the slot of each layer in them (n for no slot)."""
    if not capture.layers:
        return None, None
    n = len(capture.layers)
    slots_L = np.full(num_layers, n, np.int32)
    slots_L[list(capture.layers)] = np.arange(n)
    attention = None
    if capture.attention:
        num_rows, length, _ = x_BTD.shape
        attention = jnp.zeros((n, num_rows, length, length), jnp.float32)
    states = jnp.zeros((n, *x_BTD.shape), x_BTD.dtype)
    return CapturedOutputs(states, attention), jnp.asarray(slots_L)


def store(
    captured: CapturedOutputs | None,
    slot: Int[Array, ""],
    x_BTD: Float[Array, "B T D"],
    attention: Callable[[], Float[Array, "B T T"]],
) -> CapturedOutputs | None:
    """Return the outputs with a layer's in its slot; slot n stores nothing."""
    if captured is None:
        return None
    states, weights = captured
    if weights is not None:
        weights = jax.lax.cond(
            slot < len(weights),
            lambda: weights.at[slot].set(attention()),
            lambda: weights,
        )
    return CapturedOutputs(states.at[slot].set(x_BTD, mode="drop"), weights)

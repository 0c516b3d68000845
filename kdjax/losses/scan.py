"""A scan over chunks of tokens beside a head that every device holds whole.

Shapes: N tokens, C tokens of a chunk, V vocabulary, D width.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, PartitionSpec
from jaxtyping import Array, Bool, Float


@dataclass(frozen=True)
class Placement:
    """The mesh the head runs on; its axes together split the tokens."""

    mesh: Mesh
    weight_spec: PartitionSpec  # layout of the head's weight, and of its gradient


def scan_tokens(
    step: Callable[..., tuple[jax.Array | None, Any]],
    hidden_ND: Float[Array, "N D"],
    weight_VD: Float[Array, "V D"],
    tokens: Any,
    *,
    chunk_size: int,
    placement: Placement | None,
    active_N: Bool[Array, "N"] | None = None,
    accumulate: bool = False,
) -> tuple[Float[Array, "V D"] | None, Any]:
    """Run `step` over chunks of tokens, on every device of the placement.

    Each device gathers the weight once, scans over its own tokens without
    communication, and the carry is reduced once at the end. Active tokens are moved to
    the front and the scan ends with the last chunk that has one: prompts and padding
    cost nothing. Tokens are padded to fill the chunks and the devices; the padding is
    cut off again.

    Args:
      step: (carry, weight_VD, hidden_CD, tokens of the chunk) -> (carry, tree of
        arrays [C, ...]).
      hidden_ND: hidden states.
      weight_VD: head, cast to the dtype of the hidden states before it is gathered.
      tokens: tree of arrays [N, ...].
      chunk_size: most tokens in a chunk; chunks are of equal size.
      placement: None = leave the arrays where they are.
      active_N: tokens that matter; for the others `step` need not run, and their part
        of the result is 0. None = all.
      accumulate: carry a float32 [V, D] sum that starts from zero.

    Returns:
      The carry summed over devices (None unless `accumulate`) and the arrays that
      `step` returned for all N tokens.
    """
    weight_VD = weight_VD.astype(hidden_ND.dtype)

    if active_N is None:
        active_N = jnp.ones(hidden_ND.shape[:1], bool)

    def local(hidden_ND, weight_VD, tokens, active_N):
        carry = jnp.zeros(weight_VD.shape, jnp.float32) if accumulate else None
        num_tokens = hidden_ND.shape[0]
        num_chunks = max(1, math.ceil(num_tokens / chunk_size))
        size = math.ceil(num_tokens / num_chunks)
        active_N = _pad(active_N, num_chunks * size)
        order_N = jnp.argsort(~active_N, stable=True)
        num_used = (active_N.sum(dtype=jnp.int32) + size - 1) // size
        chunks = jax.tree.map(
            lambda x: _pad(x, num_chunks * size)[order_N].reshape(
                num_chunks, size, *x.shape[1:]
            ),
            (hidden_ND, tokens),
        )

        def run(index, carry):
            chunk = jax.tree.map(
                lambda x: jax.lax.dynamic_index_in_dim(x, index, keepdims=False), chunks
            )
            return step(carry, weight_VD, *chunk)

        def body(index, state):
            carry, out = state
            carry, new = run(index, carry)
            return carry, jax.tree.map(lambda o, n: o.at[index].set(n), out, new)

        out = jax.tree.map(
            lambda x: jnp.zeros((num_chunks, *x.shape), x.dtype),
            jax.eval_shape(lambda carry: run(0, carry)[1], carry),
        )
        carry, out = jax.lax.fori_loop(0, num_used, body, (carry, out))
        back_N = jnp.argsort(order_N)[:num_tokens]

        def restore(x: jax.Array) -> jax.Array:
            x = x.reshape(-1, *x.shape[2:])[back_N]
            keep = active_N[:num_tokens].reshape(-1, *[1] * (x.ndim - 1))
            return jnp.where(keep, x, 0)

        return carry, jax.tree.map(restore, out)

    if placement is None:
        return local(hidden_ND, weight_VD, tokens, active_N)

    mesh, weight_spec = placement.mesh, placement.weight_spec
    token_spec = PartitionSpec(mesh.axis_names)

    def on_device(hidden_ND, weight_VD, tokens, active_N):
        weight_VD = _gather(weight_VD, weight_spec)
        carry, out = local(hidden_ND, weight_VD, tokens, active_N)
        if accumulate:
            carry = _reduce(carry, weight_spec, mesh.axis_names)
        return carry, out

    num_tokens = hidden_ND.shape[0]
    padded = math.ceil(num_tokens / mesh.size) * mesh.size
    carry, out = jax.shard_map(
        on_device,
        mesh=mesh,
        in_specs=(token_spec, weight_spec, token_spec, token_spec),
        out_specs=(weight_spec, token_spec),
        check_vma=False,  # gradients are explicit: nothing is differentiated inside
    )(
        _pad(hidden_ND, padded),
        weight_VD,
        jax.tree.map(lambda x: _pad(x, padded), tokens),
        _pad(active_N, padded),
    )
    return carry, jax.tree.map(lambda x: x[:num_tokens], out)


def _gather(weight: jax.Array, spec: PartitionSpec) -> jax.Array:
    """Return the whole array from the local part of it."""
    for dim, axes in enumerate(spec):
        if axes:
            weight = jax.lax.all_gather(weight, axes, axis=dim, tiled=True)
    return weight


def _reduce(sums: jax.Array, spec: PartitionSpec, axis_names: tuple) -> jax.Array:
    """Sum over all devices and keep the local part, float32."""
    others = set(axis_names)
    for dim, axes in enumerate(spec):
        if axes:
            sums = jax.lax.psum_scatter(sums, axes, scatter_dimension=dim, tiled=True)
            others -= {axes} if isinstance(axes, str) else set(axes)
    return jax.lax.psum(sums, tuple(a for a in axis_names if a in others))


def _pad(x: jax.Array, length: int) -> jax.Array:
    """Append zeros along axis 0: tokens that are not active."""
    if x.shape[0] == length:
        return x
    return jnp.pad(x, [(0, length - x.shape[0])] + [(0, 0)] * (x.ndim - 1))

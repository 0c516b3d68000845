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
from jaxtyping import Array, Float


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
    accumulate: bool = False,
) -> tuple[Float[Array, "V D"] | None, Any]:
    """Run `step` over chunks of tokens, on every device of the placement.

    Each device gathers the weight once, scans over its own tokens without
    communication, and the carry is reduced once at the end. Tokens are padded with
    zeros to fill the chunks and the devices; the padding is cut off again.

    Args:
      step: (carry, weight_VD, hidden_CD, tokens of the chunk) -> (carry, tree of
        arrays [C, ...]).
      hidden_ND: hidden states.
      weight_VD: head, cast to the dtype of the hidden states before it is gathered.
      tokens: tree of arrays [N, ...].
      chunk_size: most tokens in a chunk; chunks are of equal size.
      placement: None = leave the arrays where they are.
      accumulate: carry a float32 [V, D] sum that starts from zero.

    Returns:
      The carry summed over devices (None unless `accumulate`) and the arrays that
      `step` returned for all N tokens.
    """
    weight_VD = weight_VD.astype(hidden_ND.dtype)

    def local(hidden_ND, weight_VD, tokens):
        carry = jnp.zeros(weight_VD.shape, jnp.float32) if accumulate else None
        num_tokens = hidden_ND.shape[0]
        num_chunks = max(1, math.ceil(num_tokens / chunk_size))
        size = math.ceil(num_tokens / num_chunks)
        chunks = jax.tree.map(
            lambda x: _pad(x, num_chunks * size).reshape(-1, size, *x.shape[1:]),
            (hidden_ND, tokens),
        )
        carry, out = jax.lax.scan(
            lambda carry, chunk: step(carry, weight_VD, *chunk), carry, chunks
        )
        return carry, jax.tree.map(
            lambda x: x.reshape(-1, *x.shape[2:])[:num_tokens], out
        )

    if placement is None:
        return local(hidden_ND, weight_VD, tokens)

    mesh, weight_spec = placement.mesh, placement.weight_spec
    token_spec = PartitionSpec(mesh.axis_names)

    def on_device(hidden_ND, weight_VD, tokens):
        carry, out = local(hidden_ND, _gather(weight_VD, weight_spec), tokens)
        if accumulate:
            carry = _reduce(carry, weight_spec, mesh.axis_names)
        return carry, out

    num_tokens = hidden_ND.shape[0]
    padded = math.ceil(num_tokens / mesh.size) * mesh.size
    carry, out = jax.shard_map(
        on_device,
        mesh=mesh,
        in_specs=(token_spec, weight_spec, token_spec),
        out_specs=(weight_spec, token_spec),
        check_vma=False,  # gradients are explicit: nothing is differentiated inside
    )(
        _pad(hidden_ND, padded),
        weight_VD,
        jax.tree.map(lambda x: _pad(x, padded), tokens),
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
    """Append zeros along axis 0; zero weights make them count nothing."""
    if x.shape[0] == length:
        return x
    return jnp.pad(x, [(0, length - x.shape[0])] + [(0, 0)] * (x.ndim - 1))

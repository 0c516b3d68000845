"""A scan over chunks of tokens, beside a head or a slice of one.

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
    """The mesh that the head runs on, and how its work is split.

    Without a vocabulary axis all axes together split the tokens and every device has
    the whole head. With one, that axis splits the vocabulary and the others the tokens.
    """

    mesh: Mesh
    weight_spec: PartitionSpec  # layout of the head's weight, and of its gradient
    vocab_axis: str | None = None

    @property
    def split(self) -> str | None:
        """The vocabulary axis, where there is more than one device along it."""
        axis = self.vocab_axis
        return axis if axis is not None and self.mesh.shape[axis] > 1 else None

    @property
    def token_axes(self) -> tuple[str, ...]:
        """The axes that split the tokens."""
        return tuple(a for a in self.mesh.axis_names if a != self.split)

    def spec(self, ndim: int) -> PartitionSpec:
        """How a weight [V, D] or a bias [V] reaches the devices."""
        if ndim == 1:
            return PartitionSpec(self.split)
        if self.split is None:
            return self.weight_spec
        width = self.weight_spec[1] if len(self.weight_spec) > 1 else None
        axes = (width,) if isinstance(width, str) else width or ()
        return PartitionSpec(self.split, tuple(a for a in axes if a != self.split))


def scan_tokens(
    step: Callable[..., tuple[Any, tuple[Any, Any]]],
    hidden_ND: Float[Array, "N D"],
    heads: tuple[Any, Any],
    tokens: Any,
    *,
    chunk_size: int,
    placement: Placement | None,
    rows_NV: Float[Array, "N V"] | None = None,
    active_N: Bool[Array, "N"] | None = None,
    accumulate: bool = False,
) -> tuple[Any, Any, Any]:
    """Run `step` over chunks of tokens, on every device of the placement.

    Each device gathers its heads once, scans over its own tokens, and the carry is
    reduced once at the end; the loop itself communicates nothing but what `step` does.
    Active tokens come first and the scan ends with the last chunk that has one: prompts
    and padding cost nothing. Tokens are padded to fill the chunks and the devices.

    Args:
      step: (carry, heads, hidden_CD, (tokens, rows_CV)) -> (carry, (out, partial)),
        trees of arrays [C, ...]. `partial` is summed over the vocabulary axis.
      hidden_ND: hidden states.
      heads: (the head that is trained, others), trees of weights [V, D] and biases [V].
        Weights are cast to the dtype of the hidden states before they are gathered. V
        divides by the vocabulary axis.
      tokens: tree of arrays [N, ...].
      chunk_size: most tokens in a chunk; chunks are of equal size.
      placement: None = leave the arrays where they are.
      rows_NV: one number a vocabulary row, split as the heads are; None = none.
      active_N: tokens that matter; for the others `step` need not run, and their part
        of the result is 0. None = all.
      accumulate: carry float32 sums, from zero, of the shapes of the trained head.

    Returns:
      The carry summed over devices (None unless `accumulate`), and `out` and `partial`
      for all N tokens.
    """
    heads = jax.tree.map(
        lambda x: x.astype(hidden_ND.dtype) if x.ndim == 2 else x, heads
    )
    tokens = (tokens, rows_NV)
    if active_N is None:
        active_N = jnp.ones(hidden_ND.shape[:1], bool)

    def local(hidden_ND, heads, tokens, active_N):
        sums = None
        if accumulate:
            sums = jax.tree.map(lambda x: jnp.zeros(x.shape, jnp.float32), heads[0])
        num_tokens = hidden_ND.shape[0]
        num_chunks = max(1, math.ceil(num_tokens / chunk_size))
        size = math.ceil(num_tokens / num_chunks)
        order_N = jnp.argsort(~active_N, stable=True).astype(jnp.int32)
        # Rows from num_tokens on do not exist: they read as 0 and write nothing.
        beyond = num_tokens + jnp.arange(num_chunks * size, dtype=jnp.int32)
        num_active = active_N.sum(dtype=jnp.int32)
        places = jnp.arange(num_tokens, dtype=jnp.int32)
        order_N = jnp.where(places < num_active, order_N, beyond[:num_tokens])
        order_N = jnp.concatenate([order_N, beyond[num_tokens:]])

        def run(index, carry):
            rows = jax.lax.dynamic_slice_in_dim(order_N, index * size, size)
            chunk = jax.tree.map(
                lambda x: (
                    jnp.asarray(x)
                    .at[rows]
                    .get(
                        mode="fill",
                        fill_value=0,
                        unique_indices=True,
                        indices_are_sorted=True,
                    )
                ),
                (hidden_ND, tokens),
            )
            return rows, step(carry, heads, *chunk)

        def body(index, state):
            carry, out = state
            rows, (carry, new) = run(index, carry)
            out = jax.tree.map(
                lambda o, n: o.at[rows].set(
                    n, mode="drop", unique_indices=True, indices_are_sorted=True
                ),
                out,
                new,
            )
            return carry, out

        out = jax.tree.map(
            lambda x: jnp.zeros((num_tokens, *x.shape[1:]), x.dtype),
            jax.eval_shape(lambda carry: run(0, carry)[1][1], sums),
        )
        num_used = (num_active + size - 1) // size
        return jax.lax.fori_loop(0, num_used, body, (sums, out))

    if placement is None:
        carry, out = local(hidden_ND, heads, tokens, active_N)
        return carry, *out

    token_spec = PartitionSpec(placement.token_axes)
    tokens_spec = (token_spec, PartitionSpec(placement.token_axes, placement.split))
    specs = jax.tree.map(lambda x: placement.spec(x.ndim), heads)

    def on_device(hidden_ND, heads, tokens, active_N):
        heads = jax.tree.map(lambda x: _gather(x, placement), heads)
        carry, (out, partial) = local(hidden_ND, heads, tokens, active_N)
        carry = jax.tree.map(lambda x: _reduce(x, placement), carry)
        if placement.split is not None:
            partial = jax.tree.map(lambda x: jax.lax.psum(x, placement.split), partial)
        return carry, (out, partial)

    num_tokens = hidden_ND.shape[0]
    shares = math.prod(placement.mesh.shape[a] for a in placement.token_axes)
    padded = math.ceil(num_tokens / shares) * shares
    carry, out = jax.shard_map(
        on_device,
        mesh=placement.mesh,
        in_specs=(token_spec, specs, tokens_spec, token_spec),
        out_specs=(specs[0] if accumulate else None, token_spec),
        check_vma=False,  # gradients are explicit: nothing is differentiated inside
    )(
        _pad(hidden_ND, padded),
        heads,
        jax.tree.map(lambda x: _pad(x, padded), tokens),
        _pad(active_N, padded),
    )
    return carry, *jax.tree.map(lambda x: x[:num_tokens], out)


def _gather(weight: jax.Array, placement: Placement) -> jax.Array:
    """Return the rows of this device's vocabulary, whole, from the local part."""
    for dim, axes in enumerate(placement.spec(weight.ndim)):
        if axes != placement.split and (axes := _several(axes, placement)):
            weight = jax.lax.all_gather(weight, axes, axis=dim, tiled=True)
    return weight


def _reduce(sums: jax.Array, placement: Placement) -> jax.Array:
    """Sum over the devices with other tokens and keep the local part, float32."""
    others = _several(placement.token_axes, placement)
    for dim, axes in enumerate(placement.spec(sums.ndim)):
        if axes != placement.split and (axes := _several(axes, placement)):
            sums = jax.lax.psum_scatter(sums, axes, scatter_dimension=dim, tiled=True)
            others = tuple(a for a in others if a not in axes)
    return jax.lax.psum(sums, others) if others else sums


def _several(axes: str | tuple[str, ...] | None, placement: Placement) -> tuple:
    """Return the axes with more than one device: along the others there is nothing to
    exchange, and XLA would copy the head for each of them.
    """
    axes = (axes,) if isinstance(axes, str) else axes or ()
    return tuple(a for a in axes if placement.mesh.shape[a] > 1)


def _pad(x: jax.Array, length: int) -> jax.Array:
    """Append zeros along axis 0: tokens that are not active."""
    if x.shape[0] == length:
        return x
    return jnp.pad(x, [(0, length - x.shape[0])] + [(0, 0)] * (x.ndim - 1))

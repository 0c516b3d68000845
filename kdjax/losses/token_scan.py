"""A scan over chunks of tokens, beside a head or a shard of one.

Shapes: N tokens, C tokens of a chunk, V vocabulary, D width.
"""

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, PartitionSpec
from jaxtyping import Array, Bool, Float, Int

Tree = Any  # of arrays
Step = Callable[[Tree, Tree, jax.Array, Tree], tuple[Tree, tuple[Tree, Tree]]]


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
    def num_shards(self) -> int:
        """Number of shards of the vocabulary."""
        return 1 if self.split is None else self.mesh.shape[self.split]

    @property
    def token_axes(self) -> tuple[str, ...]:
        """The axes that split the tokens."""
        return tuple(a for a in self.mesh.axis_names if a != self.split)

    @property
    def token_spec(self) -> PartitionSpec:
        """Layout of arrays [N, ...] that every shard of the vocabulary needs."""
        return PartitionSpec(self.token_axes)

    @property
    def row_spec(self) -> PartitionSpec:
        """Layout of rows [N, V] that are split as the vocabulary is."""
        return PartitionSpec(self.token_axes, self.split)

    def head_spec(self, ndim: int) -> PartitionSpec:
        """Return the layout in which a weight [V, D] or a bias [V] reaches the scan."""
        if ndim == 1:
            return PartitionSpec(self.split)
        if self.split is None:
            return self.weight_spec
        width = self.weight_spec[1] if len(self.weight_spec) > 1 else None
        axes = (width,) if isinstance(width, str) else width or ()
        return PartitionSpec(self.split, tuple(a for a in axes if a != self.split))

    def without_vocab_axis(self) -> "Placement":
        """Return the placement in which all axes split the tokens."""
        return replace(self, vocab_axis=None)


def scan_tokens(
    step: Step,
    hidden_ND: Float[Array, "N D"],
    heads: tuple[Tree, Tree],
    tokens: Tree,
    *,
    chunk_size: int,
    placement: Placement | None,
    token_specs: Tree = None,
    active_N: Bool[Array, "N"] | None = None,
    accumulate: bool = False,
) -> tuple[Tree, Tree, Tree]:
    """Run `step` over chunks of tokens, on every device of the placement.

    Each device gathers its heads once, scans over its own tokens, and the carry is
    reduced once at the end; the loop itself communicates nothing but what `step` does.
    Active tokens come first and the scan ends with the last chunk that has one: prompts
    and padding cost nothing. Tokens are padded to fill the chunks and the devices.

    Args:
      step: (carry, heads, hidden_CD, tokens) -> (carry, (out, partial)), trees of
        arrays [C, ...]. `partial` is summed over the vocabulary axis.
      hidden_ND: hidden states.
      heads: (the head that is trained, others), trees of weights [V, D] and biases [V].
        Weights are cast to the dtype of the hidden states before they are gathered. V
        divides by the vocabulary axis.
      tokens: tree of arrays [N, ...].
      chunk_size: most tokens in a chunk; chunks are of equal size.
      placement: None = leave the arrays where they are.
      token_specs: layouts of `tokens`; None = `placement.token_spec` for all.
      active_N: tokens that matter; for the others `step` need not run, and their entry
        in the result is 0. None = all.
      accumulate: carry float32 sums, from zero, of the shapes of the trained head.

    Returns:
      The carry summed over devices (None unless `accumulate`), and `out` and `partial`
      for all N tokens.
    """
    heads = jax.tree.map(
        lambda x: x.astype(hidden_ND.dtype) if x.ndim == 2 else x, heads
    )
    if active_N is None:
        active_N = jnp.ones(hidden_ND.shape[:1], bool)
    scan = functools.partial(
        _scan_chunks, step, chunk_size=chunk_size, accumulate=accumulate
    )
    if placement is None:
        carry, outputs = scan(hidden_ND, heads, tokens, active_N)
        return carry, *outputs

    def scan_on_device(
        hidden_ND: jax.Array, heads: Tree, tokens: Tree, active_N: jax.Array
    ) -> tuple[Tree, tuple[Tree, Tree]]:
        heads = jax.tree.map(lambda x: _gather(x, placement), heads)
        carry, (out, partial) = scan(hidden_ND, heads, tokens, active_N)
        carry = jax.tree.map(lambda x: _reduce(x, placement), carry)
        if placement.split is not None:
            partial = jax.tree.map(lambda x: jax.lax.psum(x, placement.split), partial)
        return carry, (out, partial)

    num_tokens = hidden_ND.shape[0]
    num_devices = math.prod(placement.mesh.shape[a] for a in placement.token_axes)
    padded = math.ceil(num_tokens / num_devices) * num_devices
    head_specs = jax.tree.map(lambda x: placement.head_spec(x.ndim), heads)
    token_spec = placement.token_spec
    token_specs = token_spec if token_specs is None else token_specs
    carry, outputs = jax.shard_map(
        scan_on_device,
        mesh=placement.mesh,
        in_specs=(token_spec, head_specs, token_specs, token_spec),
        out_specs=(head_specs[0] if accumulate else None, token_spec),
        check_vma=False,  # gradients are explicit: nothing is differentiated inside
    )(
        _pad(hidden_ND, padded),
        heads,
        jax.tree.map(lambda x: _pad(x, padded), tokens),
        _pad(active_N, padded),
    )
    return carry, *jax.tree.map(lambda x: x[:num_tokens], outputs)


def _scan_chunks(
    step: Step,
    hidden_ND: Float[Array, "N D"],
    heads: tuple[Tree, Tree],
    tokens: Tree,
    active_N: Bool[Array, "N"],
    *,
    chunk_size: int,
    accumulate: bool,
) -> tuple[Tree, tuple[Tree, Tree]]:
    """Run `step` over the chunks of one device that hold an active token.

    Args and Returns as `scan_tokens`, before anything is reduced over devices.
    """
    sums = None
    if accumulate:
        sums = jax.tree.map(lambda x: jnp.zeros(x.shape, jnp.float32), heads[0])
    num_tokens = hidden_ND.shape[0]
    num_chunks = max(1, math.ceil(num_tokens / chunk_size))
    size = math.ceil(num_tokens / num_chunks)
    order_X = _active_first(active_N, num_chunks * size)

    def run(index: Any, carry: Tree) -> tuple[jax.Array, tuple[Tree, Tree]]:
        rows_C = jax.lax.dynamic_slice_in_dim(order_X, index * size, size)
        hidden_CD, chunk = _take((hidden_ND, tokens), rows_C)
        return rows_C, step(carry, heads, hidden_CD, chunk)

    def body(index: Any, state: tuple[Tree, Tree]) -> tuple[Tree, Tree]:
        carry, outputs = state
        rows_C, (carry, updates) = run(index, carry)
        return carry, _put(outputs, rows_C, updates)

    outputs = jax.tree.map(
        lambda x: jnp.zeros((num_tokens, *x.shape[1:]), x.dtype),
        jax.eval_shape(lambda carry: run(0, carry)[1][1], sums),
    )
    num_used = (active_N.sum(dtype=jnp.int32) + size - 1) // size
    return jax.lax.fori_loop(0, num_used, body, (sums, outputs))


def _active_first(active_N: Bool[Array, "N"], length: int) -> Int[Array, "X"]:
    """Return the order of the tokens: active ones, then indices that do not exist.

    Indices from N on read as 0 and write nothing. They are sorted and distinct.
    """
    num_tokens = active_N.shape[0]
    order_N = jnp.argsort(~active_N, stable=True).astype(jnp.int32)
    beyond_X = num_tokens + jnp.arange(length, dtype=jnp.int32)
    num_active = active_N.sum(dtype=jnp.int32)
    positions_N = jnp.arange(num_tokens, dtype=jnp.int32)
    order_N = jnp.where(positions_N < num_active, order_N, beyond_X[:num_tokens])
    return jnp.concatenate([order_N, beyond_X[num_tokens:]])


def _take(tree: Tree, rows_C: Int[Array, "C"]) -> Tree:
    """Return these rows of every array; 0 where a row does not exist."""
    return jax.tree.map(
        lambda x: (
            jnp.asarray(x)
            .at[rows_C]
            .get(
                mode="fill",
                fill_value=0,
                unique_indices=True,
                indices_are_sorted=True,
            )
        ),
        tree,
    )


def _put(tree: Tree, rows_C: Int[Array, "C"], updates: Tree) -> Tree:
    """Return the arrays with these rows replaced, those of them that exist."""
    return jax.tree.map(
        lambda x, update: x.at[rows_C].set(
            update, mode="drop", unique_indices=True, indices_are_sorted=True
        ),
        tree,
        updates,
    )


def _gather(weight: jax.Array, placement: Placement) -> jax.Array:
    """Return all columns of the rows of this device's vocabulary."""
    for dim, axes in enumerate(placement.head_spec(weight.ndim)):
        if axes != placement.split and (axes := _exchanging(axes, placement)):
            weight = jax.lax.all_gather(weight, axes, axis=dim, tiled=True)
    return weight


def _reduce(sums: jax.Array, placement: Placement) -> jax.Array:
    """Return the local slice of the sum over the devices with other tokens, float32."""
    others = _exchanging(placement.token_axes, placement)
    for dim, axes in enumerate(placement.head_spec(sums.ndim)):
        if axes != placement.split and (axes := _exchanging(axes, placement)):
            sums = jax.lax.psum_scatter(sums, axes, scatter_dimension=dim, tiled=True)
            others = tuple(a for a in others if a not in axes)
    return jax.lax.psum(sums, others) if others else sums


def _exchanging(
    axes: str | tuple[str, ...] | None, placement: Placement
) -> tuple[str, ...]:
    """Return the axes with more than one device.

    Along the others there is nothing to exchange, and XLA would copy the head for each.
    """
    axes = (axes,) if isinstance(axes, str) else axes or ()
    return tuple(a for a in axes if placement.mesh.shape[a] > 1)


def _pad(x: jax.Array, length: int) -> jax.Array:
    """Append zeros along axis 0: tokens that are not active."""
    if x.shape[0] == length:
        return x
    return jnp.pad(x, [(0, length - x.shape[0])] + [(0, 0)] * (x.ndim - 1))

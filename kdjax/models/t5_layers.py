"""Layers of T5, as flax.nnx modules.

Shapes: B rows, T time, S time of what is read, C cache slots, D width, H heads, K per
head, F inner width of the MLP. Parameters are float32, as in `kdjax.models.layers`.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from kdjax.config import T5Config
from kdjax.models import attention
from kdjax.models.layers import Linear, RMSNorm, normal, recomputing, scan_layers

_UNSCALED = attention.ScoreOptions(scalar=1.0)
Memory = dict[str, Array]  # "key", "value": [B, S, H, K], what a layer attends to


class Reads(NamedTuple):
    """Keys, values and attention functions that all layers of a stack share."""

    attend: attention.Attend  # to the stack's own keys and values
    encoded: Array | None = None  # [B, S, D], the encoder's result, unless cached
    attend_encoded: attention.Attend | None = None  # to it; None in the encoder
    slots: Array | None = None  # [B, T], where the cache takes new keys and values


def relative_buckets(
    distance: Int[Array, "..."],
    *,
    bidirectional: bool,
    num_buckets: int,
    max_distance: int,
) -> Int[Array, "..."]:
    """Return the bucket of each distance, key position minus query position.

    Half of the buckets hold one distance each, the other half ever wider ranges of
    distances up to `max_distance`. With `bidirectional`, positions ahead have buckets
    of their own; else they share the bucket of distance 0.

    Source: `_relative_position_bucket` of mesh_tensorflow's transformer_layers.py.
    """
    ahead = jnp.zeros_like(distance)
    if bidirectional:
        num_buckets //= 2
        ahead = num_buckets * (distance > 0).astype(distance.dtype)
        distance = jnp.abs(distance)
    else:
        distance = jnp.maximum(-distance, 0)
    # A table: where a range ends must not depend on how a device rounds logarithms.
    table = jnp.asarray(_bucket_table(num_buckets, max_distance), distance.dtype)
    return ahead + table[jnp.minimum(distance, max_distance)]


def _bucket_table(num_buckets: int, max_distance: int) -> np.ndarray:
    """Return the bucket of each distance from 0 to `max_distance`."""
    exact = num_buckets // 2
    distance = np.arange(max_distance + 1)
    ratio = np.maximum(distance, exact).astype(np.float32) / np.float32(exact)
    # Float32, as those who trained the models: it moves the ends of some ranges.
    share = np.log(ratio, dtype=np.float64).astype(np.float32) / np.float32(
        np.log(max_distance / exact)
    )
    wide = exact + (share * np.float32(num_buckets - exact)).astype(np.int64)
    return np.where(distance < exact, distance, np.minimum(wide, num_buckets - 1))


def split_keys(keys_B: Array, count: int) -> Array:
    """Split the random key of each row: [count, B]."""
    return jax.vmap(lambda key: jax.random.split(key, count), out_axes=1)(keys_B)


def _droppers(rate: float, keys_B: Array | None, count: int) -> list[Callable]:
    """Return functions that each set a share of an array to 0 and scale up the rest.

    Every row has a key of its own, so what is dropped does not depend on how rows are
    cut into microbatches or spread over devices. The share is exact to 2^-32.
    """
    if keys_B is None or rate == 0:
        return [lambda x: x] * count
    dropped = round(rate * 2**32)
    scale = 2**32 / (2**32 - dropped)

    def drop(keys_B: Array, x: Array) -> Array:
        mask = random_bits(keys_B, x.shape[1:]) >= jnp.uint32(dropped)
        return jnp.where(mask, x * scale, 0.0)

    return [functools.partial(drop, keys_B) for keys_B in split_keys(keys_B, count)]


def random_bits(keys_B: Array, shape: tuple[int, ...]) -> Array:
    """Hash each row's key and the position to uniform random uint32, [B, *shape].

    For dropout only. `jax.random.bits` writes and reads whole arrays of a CPU's memory
    ten times; this is one pass, which compilers fuse with what uses it.

    Source of the hash: lowbias32 of Wellons, 2018, "Prospecting for hash functions",
    taken twice with a word of the key each.
    """
    words_B2 = jax.random.key_data(keys_B)
    first, second = (words_B2[:, i].reshape(-1, *[1] * len(shape)) for i in (0, 1))
    place = jnp.zeros((1, *shape), jnp.uint32)
    for axis, size in enumerate(shape, 1):
        index = jax.lax.broadcasted_iota(jnp.uint32, place.shape, axis)
        place = place * jnp.uint32(size) + index
    return _hash(_hash(place + first) ^ second)


def _hash(x: Array) -> Array:
    x ^= x >> jnp.uint32(16)
    x *= jnp.uint32(0x7FEB352D)
    x ^= x >> jnp.uint32(15)
    x *= jnp.uint32(0x846CA68B)
    return x ^ (x >> jnp.uint32(16))


class PositionBias(nnx.Module):
    """A learned bias of scores by distance and head."""

    def __init__(self, config: T5Config, *, bidirectional: bool, rngs: nnx.Rngs):
        """Draw the table that all layers of a stack share."""
        self.bidirectional = bidirectional
        self.num_buckets = config.num_buckets
        self.max_distance = config.max_distance
        shape = (config.num_buckets, config.num_heads)
        self.table = normal(rngs.params(), shape, config.width**-0.5)

    def __call__(self, distance_BTS: Int[Array, "B T S"]) -> Float[Array, "B H T S"]:
        """Look up each distance, float32."""
        bucket_BTS = relative_buckets(
            distance_BTS,
            bidirectional=self.bidirectional,
            num_buckets=self.num_buckets,
            max_distance=self.max_distance,
        )
        return self.table[...][bucket_BTS].transpose(0, 3, 1, 2)


class Attention(nnx.Module):
    """Attention without a scale: the query's small initial weights stand for it."""

    def __init__(self, config: T5Config, *, rngs: nnx.Rngs):
        """Draw the four kernels."""
        width, inner = config.width, config.num_heads * config.head_dim
        self.head_dim = config.head_dim
        query_std = (width * config.head_dim) ** -0.5
        self.query = Linear(width, inner, std=query_std, rngs=rngs)
        self.key = Linear(width, inner, std=width**-0.5, rngs=rngs)
        self.value = Linear(width, inner, std=width**-0.5, rngs=rngs)
        self.out = Linear(inner, width, std=inner**-0.5, rngs=rngs)

    def memory(self, x_BSD: Float[Array, "B S D"]) -> Memory:
        """Keys and values of what is attended to."""
        split = (*x_BSD.shape[:2], -1, self.head_dim)
        layers = {"key": self.key, "value": self.value}
        return {name: layer(x_BSD).reshape(split) for name, layer in layers.items()}

    def __call__(
        self, x_BTD: Float[Array, "B T D"], memory: Memory, attend: attention.Attend
    ) -> Float[Array, "B T D"]:
        """Read `memory` by `attend`: (query, key, value) -> mixed values."""
        query = self.query(x_BTD).reshape(*x_BTD.shape[:2], -1, self.head_dim)
        key, value = (memory[name].astype(x_BTD.dtype) for name in ("key", "value"))
        return self.out(attend(query, key, value).reshape(*x_BTD.shape[:2], -1))


class MLP(nnx.Module):
    """down(gelu(gate(x)) * up(x)), gelu by its tanh form, or down(relu(up(x)))."""

    def __init__(self, config: T5Config, *, rngs: nnx.Rngs):
        """Draw the kernels."""
        width, inner = config.width, config.mlp_width
        self.gated = config.gated
        self.up = Linear(width, inner, std=width**-0.5, rngs=rngs)
        self.down = Linear(inner, width, std=inner**-0.5, rngs=rngs)
        if config.gated:
            self.gate = Linear(width, inner, std=width**-0.5, rngs=rngs)

    def __call__(self, x_BTD: Float[Array, "B T D"], drop: Callable) -> Array:
        """Apply to every position; `drop` to the inner one."""
        inner = self.up(x_BTD)
        if self.gated:
            inner *= jax.nn.gelu(self.gate(x_BTD), approximate=True)
        else:
            inner = jax.nn.relu(inner)
        return self.down(drop(inner))


class Block(nnx.Module):
    """Attention, in a decoder attention to the encoder's result, MLP; each added."""

    def __init__(self, config: T5Config, *, is_decoder: bool, rngs: nnx.Rngs):
        """Draw the parameters of one layer."""
        self.rate = config.dropout
        self.attention_norm = RMSNorm(config.width, eps=config.norm_eps)
        self.attention = Attention(config, rngs=rngs)
        if is_decoder:
            self.cross_norm = RMSNorm(config.width, eps=config.norm_eps)
            self.cross = Attention(config, rngs=rngs)
        self.mlp_norm = RMSNorm(config.width, eps=config.norm_eps)
        self.mlp = MLP(config, rngs=rngs)

    def __call__(self, x_BTD, dropout, reads, cache):
        """Apply one layer; also return keys and values if there is a cache."""
        drops = _droppers(self.rate, dropout, 6)
        normed_BTD = self.attention_norm(x_BTD)
        memory = self.attention.memory(normed_BTD)
        if cache is not None:
            memory = _extended(cache["own"], memory, reads.slots)
        attend = functools.partial(reads.attend, drop=drops[0])
        x_BTD += drops[1](self.attention(normed_BTD, memory, attend))
        if reads.attend_encoded is not None:
            encoded = cache["encoded"] if cache else self.cross.memory(reads.encoded)
            attend = functools.partial(reads.attend_encoded, drop=drops[2])
            x_BTD += drops[3](self.cross(self.cross_norm(x_BTD), encoded, attend))
        x_BTD += drops[5](self.mlp(self.mlp_norm(x_BTD), drops[4]))
        return x_BTD, None if cache is None else memory


class Stack(nnx.Module):
    """Dropout, a scan over stacked blocks, final norm, dropout."""

    def __init__(
        self,
        config: T5Config,
        num_layers: int,
        *,
        is_decoder: bool,
        remat: str,
        unroll: bool,
        rngs: nnx.Rngs,
    ):
        """Draw all parameters of a stack."""
        self.remat, self.unroll, self.rate = remat, unroll, config.dropout
        self.position_bias = PositionBias(
            config, bidirectional=not is_decoder, rngs=rngs
        )

        def block(key: Array) -> Block:
            return Block(config, is_decoder=is_decoder, rngs=nnx.Rngs(params=key))

        self.layers = nnx.vmap(block)(jax.random.split(rngs.params(), num_layers))
        self.norm = RMSNorm(config.width, eps=config.norm_eps)

    def attend(self, mask_BTS, distance_BTS) -> attention.Attend:
        """Return attention where the mask is true, biased by distance."""
        return attending(mask_BTS, self.position_bias(distance_BTS))

    def __call__(self, x_BTD, reads, dropout=None, cache=None):
        """Compute hidden states after the final norm, and new keys and values."""
        graphdef, stacked = nnx.split(self.layers)
        keys_L = keys_B = None
        if dropout is not None:
            num_layers = jax.tree.leaves(stacked)[0].shape[0]
            keys_B, *keys_L = split_keys(dropout, num_layers + 1)
            keys_L = jnp.stack(keys_L)
        drops = _droppers(self.rate, keys_B, 2)

        def body(x_BTD, layer):
            params, keys_B, cache = layer
            return nnx.merge(graphdef, params)(x_BTD, keys_B, reads, cache)

        body = recomputing(body, self.remat)
        x_BTD, memory = scan_layers(
            body, drops[0](x_BTD), (stacked, keys_L, cache), unroll=self.unroll
        )
        return drops[1](self.norm(x_BTD)), memory


def attending(
    mask_BTS: Bool[Array, "B T S"], bias_BHTS: Float[Array, "#B H T S"] | None = None
) -> attention.Attend:
    """Return T5's attention where the mask is true: biased, not scaled."""
    return functools.partial(
        attention.attend,
        mask_B1TS=mask_BTS[:, None],
        options=_UNSCALED,
        bias_BHTS=bias_BHTS,
    )


def _extended(old: Memory, new: Memory, slots_BT) -> Memory:
    """Write new keys and values at their slots; one beyond the last is dropped."""
    rows_B1 = jnp.arange(slots_BT.shape[0])[:, None]
    return {
        name: old[name]
        .at[rows_B1, slots_BT]
        .set(new[name].astype(old[name].dtype), mode="drop")
        for name in old
    }

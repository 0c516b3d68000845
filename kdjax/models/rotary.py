"""Rotary positions: angles of each kind of layer, and the rotation by them.

Shapes: B rows, T time, H heads, K per head, R kinds of layers.
"""

import math
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from kdjax.config import DecoderConfig

Angles = tuple[Array, Array]  # cosine and sine, [B, T, 1, K/2] or [R, B, T, 1, K/2]


@dataclass(frozen=True, kw_only=True, slots=True)
class Rope:
    """The frequencies of a kind of layer: a static part of a model."""

    head_dim: int
    theta: float  # the base; 0 = layers without positions
    type: str = "default"
    factor: float = 1.0
    original_length: int = 0
    low: float = 1.0  # turns within the original length, below which all is stretched
    high: float = 1.0  # and above which nothing is
    attention_factor: float = 1.0  # multiplies cosine and sine


def ropes(config: DecoderConfig) -> tuple[Rope, ...]:
    """Return the frequencies of each of `kinds(config)`."""
    return tuple(_rope(config, kind) for kind in kinds(config))


def kinds(config: DecoderConfig) -> tuple[str, ...]:
    """Return the kinds of rotary positions that layers of a model have."""
    return tuple(sorted(set(config.rotary))) or ("global",)


def _rope(config: DecoderConfig, kind: str) -> Rope:
    if kind == "none":
        return Rope(head_dim=config.head_dim, theta=0.0)
    if kind == "local":
        return Rope(head_dim=config.head_dim, theta=config.local_rope_theta)
    rope, is_yarn = config.rope, config.rope.type == "yarn"
    return Rope(
        head_dim=config.head_dim,
        theta=config.rope_theta,
        type=rope.type,
        factor=rope.factor,
        original_length=rope.original_length,
        low=rope.beta_slow if is_yarn else rope.low_freq_factor,
        high=rope.beta_fast if is_yarn else rope.high_freq_factor,
        attention_factor=(rope.attention_factor or 0.1 * math.log(rope.factor) + 1)
        if is_yarn
        else 1.0,
    )


def frequencies(rope: Rope) -> Float[Array, "K/2"]:
    """Compute radians per position of each pair of dimensions, theta^(-2i/K), scaled.

    default  as they are; linear: divided by the factor
    llama3   a frequency that turns fewer than `low` times within the original length
             is divided by the factor, one of more than `high` turns is kept, those
             between are blended, linearly in their turns
    yarn     the same, but linearly in the index i between the two limits

    Source: Su et al., 2021, arXiv 2104.09864, section 3.2; linear: Chen et al., 2023,
    arXiv 2306.15595, section 2.3; llama3: Llama team, 2024, arXiv 2407.21783, section
    3.2, and `transformers.modeling_rope_utils`; yarn: Peng et al., 2023, arXiv
    2309.00071, section 3.2, limits rounded as transformers does.
    """
    if not rope.theta:
        return jnp.zeros(rope.head_dim // 2, jnp.float32)
    exponent = jnp.arange(0, rope.head_dim, 2, dtype=jnp.float32) / rope.head_dim
    plain = jnp.float32(rope.theta) ** -exponent
    if rope.type == "default":
        return plain
    stretched = plain / rope.factor
    if rope.type == "linear":
        return stretched
    if rope.type == "llama3":
        turns = rope.original_length * plain / (2 * math.pi)
        kept = (turns - rope.low) / (rope.high - rope.low)
    else:
        first, last = (_index(rope, turns) for turns in (rope.high, rope.low))
        start, stop = max(math.floor(first), 0), min(math.ceil(last), rope.head_dim - 1)
        index = jnp.arange(rope.head_dim // 2, dtype=jnp.float32)
        kept = 1 - (index - start) / max(stop - start, 1e-3)
    kept = jnp.clip(kept, 0, 1)
    return stretched * (1 - kept) + plain * kept


def _index(rope: Rope, turns: float) -> float:
    """Return the fractional index of the frequency with so many turns in the length."""
    base = rope.original_length / (turns * 2 * math.pi)
    return rope.head_dim * math.log(base) / (2 * math.log(rope.theta))


def angles(all_ropes: tuple[Rope, ...], positions_BT: Int[Array, "B T"]) -> Angles:
    """Compute cosine and sine of position * frequency, float32; stacked for kinds."""
    position = positions_BT[:, :, None, None].astype(jnp.float32)
    pairs = []
    for rope in all_ropes:
        angle = position * frequencies(rope)[None, None, None, :]
        pair = jnp.cos(angle), jnp.sin(angle)
        if rope.attention_factor != 1.0:
            pair = pair[0] * rope.attention_factor, pair[1] * rope.attention_factor
        pairs.append(pair)
    if len(pairs) == 1:
        return pairs[0]
    cosines, sines = zip(*pairs, strict=True)
    return jnp.stack(cosines), jnp.stack(sines)


def look_up(table: Angles, positions_BT: Int[Array, "B T"]) -> Angles:
    """Return the rows of `angles` of the positions 0, 1, ..., [1, P]."""

    def rows(x: Float[Array, "... 1 P 1 K/2"]) -> Float[Array, "... B T 1 K/2"]:
        return jnp.take(x[..., 0, :, :, :], positions_BT, axis=-3, mode="clip")

    return jax.tree.map(rows, table)


def rotate(
    x_BTHK: Float[Array, "B T H K"],
    angles: tuple[Float[Array, "B T 1 K/2"], Float[Array, "B T 1 K/2"]],
) -> Float[Array, "B T H K"]:
    """Rotate dimension pairs (i, i + K/2) by their angles, in float32."""
    cos, sin = angles
    first, second = jnp.split(x_BTHK.astype(jnp.float32), 2, axis=-1)
    rotated = (first * cos - second * sin, second * cos + first * sin)
    return jnp.concatenate(rotated, axis=-1).astype(x_BTHK.dtype)

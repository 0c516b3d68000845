"""Layers of the Llama family, as flax.nnx modules.

Shapes: B rows, T time, S key/value time, D width, H query heads, G key/value heads,
K per head, F inner width of the MLP, V vocabulary. Parameters are float32; every layer
casts them to its compute dtype where they are used. Norms, rotary angles and softmax
are computed in float32 whatever the compute dtype.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from kdjax.models.attention import Attend


def normal(key: Array, shape: tuple[int, ...], std: float) -> nnx.Param:
    """Float32 parameter drawn from a normal distribution around 0."""
    return nnx.Param(std * jax.random.normal(key, shape, jnp.float32))


def recomputing(body: Callable, remat: str) -> Callable:
    """The body of a scan over layers, with what its backward pass recomputes.

    Args:
      body: (carry, layer) -> (carry, output).
      remat: "none"; "dots" (all but matmuls with parameters); "full" (all of it).
    """
    if remat == "none":
        return body
    dots = jax.checkpoint_policies.dots_with_no_batch_dims_saveable
    policy = dots if remat == "dots" else None
    # A scan's body cannot be merged with its recomputation: no barrier needed.
    return jax.checkpoint(body, policy=policy, prevent_cse=False)


def rotary_angles(
    positions_BT: Int[Array, "B T"], *, head_dim: int, theta: float
) -> tuple[Float[Array, "B T 1 K/2"], Float[Array, "B T 1 K/2"]]:
    """Cosine and sine of position * theta^(-2i/head_dim), float32.

    Source: Su et al., 2021, arXiv 2104.09864, section 3.2.
    """
    exponent = jnp.arange(0, head_dim, 2, dtype=jnp.float32) / head_dim
    frequency = jnp.float32(theta) ** -exponent
    position = positions_BT[:, :, None, None].astype(jnp.float32)
    angle = position * frequency[None, None, None, :]
    return jnp.cos(angle), jnp.sin(angle)


def rotate(
    x_BTHK: Float[Array, "B T H K"],
    angles: tuple[Float[Array, "B T 1 K/2"], Float[Array, "B T 1 K/2"]],
) -> Float[Array, "B T H K"]:
    """Rotate dimension pairs (i, i + K/2) by their angles, in float32."""
    cos, sin = angles
    first, second = jnp.split(x_BTHK.astype(jnp.float32), 2, axis=-1)
    rotated = (first * cos - second * sin, second * cos + first * sin)
    return jnp.concatenate(rotated, axis=-1).astype(x_BTHK.dtype)


class Linear(nnx.Module):
    """x @ kernel, without bias, in the dtype of x."""

    def __init__(self, in_dim: int, out_dim: int, *, std: float, rngs: nnx.Rngs):
        """Draw a kernel of shape [in_dim, out_dim]."""
        self.kernel = normal(rngs.params(), (in_dim, out_dim), std)

    def __call__(self, x: Float[Array, "B T I"]) -> Float[Array, "B T O"]:
        """Apply to the last axis."""
        # One row axis: the kernel's gradient then contracts one axis, not two, which
        # XLA's CPU backend multiplies nearly twice as fast.
        kernel = self.kernel[...].astype(x.dtype)
        return (x.reshape(-1, x.shape[-1]) @ kernel).reshape(*x.shape[:-1], -1)


class RMSNorm(nnx.Module):
    """x / sqrt(mean(x^2) + eps) * scale, in float32, returned in the dtype of x.

    Source: Zhang and Sennrich, 2019, arXiv 1910.07467, equation 4.
    """

    def __init__(self, dim: int, *, eps: float):
        """Start with a scale of 1."""
        self.eps = eps
        self.scale = nnx.Param(jnp.ones((dim,), jnp.float32))

    def __call__(self, x_BTD: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        """Normalise the last axis."""
        x = x_BTD.astype(jnp.float32)
        inverse = jax.lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + self.eps)
        return (x * inverse * self.scale[...][None, None, :]).astype(x_BTD.dtype)


class Embedding(nnx.Module):
    """Rows of a table."""

    def __init__(self, num: int, dim: int, *, std: float, rngs: nnx.Rngs):
        """Draw a table of shape [num, dim]."""
        self.embedding = normal(rngs.params(), (num, dim), std)

    def __call__(self, ids_BT: Int[Array, "B T"], dtype) -> Float[Array, "B T D"]:
        """Look up each id."""
        return self.embedding[...][ids_BT].astype(dtype)


class Head(nnx.Module):
    """The untied output weight, one row a vocabulary entry; applied by the losses."""

    def __init__(self, num: int, dim: int, *, std: float, rngs: nnx.Rngs):
        """Draw a weight of shape [num, dim]."""
        self.weight = normal(rngs.params(), (num, dim), std)


class MLP(nnx.Module):
    """SwiGLU: down(silu(gate(x)) * up(x)).

    Source: Shazeer, 2020, arXiv 2002.05202, equation 6.
    """

    def __init__(self, dim: int, inner_dim: int, *, std: float, rngs: nnx.Rngs):
        """Draw the three kernels."""
        self.gate = Linear(dim, inner_dim, std=std, rngs=rngs)
        self.up = Linear(dim, inner_dim, std=std, rngs=rngs)
        self.down = Linear(inner_dim, dim, std=std, rngs=rngs)

    def __call__(self, x_BTD: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        """Apply to every position."""
        return self.down(jax.nn.silu(self.gate(x_BTD)) * self.up(x_BTD))


class Attention(nnx.Module):
    """Grouped-query attention with rotary positions.

    Source: Ainslie et al., 2023, arXiv 2305.13245, section 2.2.
    """

    def __init__(
        self,
        dim: int,
        *,
        num_heads: int,
        num_kv_heads: int,
        head_dim: int,
        std: float,
        rngs: nnx.Rngs,
    ):
        """Draw the four kernels."""
        self.head_dim = head_dim
        self.query = Linear(dim, num_heads * head_dim, std=std, rngs=rngs)
        self.key = Linear(dim, num_kv_heads * head_dim, std=std, rngs=rngs)
        self.value = Linear(dim, num_kv_heads * head_dim, std=std, rngs=rngs)
        self.out = Linear(num_heads * head_dim, dim, std=std, rngs=rngs)

    def __call__(
        self,
        x_BTD: Float[Array, "B T D"],
        angles: tuple[Array, Array],
        attend: Attend,
        cache: dict[str, Float[Array, "B S G K"]] | None = None,
        slots_BT: Int[Array, "B T"] | None = None,
    ) -> tuple[Float[Array, "B T D"], dict[str, Float[Array, "B S G K"]] | None]:
        """Mix the values by `attend`: (query, key, value) -> mixed values.

        With a cache, the new keys and values are written at `slots_BT` of each row
        (a slot beyond the cache is dropped) and attention reads the whole cache.

        Returns:
          The attended rows and the updated cache (None without one).
        """
        split = (*x_BTD.shape[:2], -1, self.head_dim)
        query = rotate(self.query(x_BTD).reshape(split), angles)
        key = rotate(self.key(x_BTD).reshape(split), angles)
        value = self.value(x_BTD).reshape(split)
        if cache is not None:
            rows_B1 = jnp.arange(x_BTD.shape[0])[:, None]

            def write(old: Array, new: Array) -> Array:
                return old.at[rows_B1, slots_BT].set(new.astype(old.dtype), mode="drop")

            cache = {
                "key": write(cache["key"], key),
                "value": write(cache["value"], value),
            }
            key, value = (cache[n].astype(x_BTD.dtype) for n in ("key", "value"))
        mixed = attend(query, key, value)
        return self.out(mixed.reshape(*x_BTD.shape[:2], -1)), cache

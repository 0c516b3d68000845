"""Layers of decoders, as flax.nnx modules.

Shapes: B rows, T time, S key/value time, D width, H query heads, G key/value heads,
K per head, F inner width of the MLP, V vocabulary. Parameters are float32; every layer
casts them to its compute dtype where they are used. Norms, rotary angles and softmax
are computed in float32 whatever the compute dtype.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from kdjax.config import DecoderConfig
from kdjax.models import rotary
from kdjax.models.attention import Attend

ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    "silu": jax.nn.silu,
    "gelu": functools.partial(jax.nn.gelu, approximate=False),
    "gelu_tanh": functools.partial(jax.nn.gelu, approximate=True),
}


def normal(key: Array, shape: tuple[int, ...], std: float) -> nnx.Param:
    """Float32 parameter drawn from a normal distribution around 0."""
    return nnx.Param(std * jax.random.normal(key, shape, jnp.float32))


def recomputing(body: Callable, remat: str) -> Callable:
    """Wrap the body of a scan over layers, so that its backward pass recomputes.

    Args:
      body: (carry, layer) -> (carry, output).
      remat: "none"; "dots" (all but matmuls with parameters, and attention where a
        kernel of cuDNN makes it); "full" (all of it).
    """
    if remat == "none":
        return body
    policy = _is_matmul_or_attention if remat == "dots" else None
    # A scan's body cannot be merged with its recomputation: no barrier needed.
    return jax.checkpoint(body, policy=policy, prevent_cse=False)


def _is_matmul_or_attention(primitive: Any, *arguments: Any, **parameters: Any) -> Any:
    """Save the results of matmuls with parameters, and those of cuDNN's attention.

    The latter are as small as a matmul's: the mixed values, and a number per head and
    token. Attention by XLA has matmuls with batch dimensions and its scores are not
    kept.
    """
    if primitive.name.startswith("dot_product_attention_fwd"):
        return True
    matmuls = jax.checkpoint_policies.dots_with_no_batch_dims_saveable
    return matmuls(primitive, *arguments, **parameters)


MAX_UNROLLED_LAYERS = 8  # more would take long to compile


def scan_layers(body: Callable, start: Any, layers: Any, *, unroll: bool) -> Any:
    """Scan over the layers with `jax.lax.scan`, as a loop or unrolled.

    Unrolled, a step takes a tenth less time on a CPU: residuals of the backward pass
    are not copied into stacked arrays and back. On accelerators the loop costs nothing.

    Args:
      body: (carry, layer) -> (carry, output).
      start: the first carry.
      layers: tree of arrays, each with its layers on axis 0.
      unroll: unroll up to MAX_UNROLLED_LAYERS layers.
    """
    num_layers = jax.tree.leaves(layers)[0].shape[0]
    unroll = unroll and num_layers <= MAX_UNROLLED_LAYERS
    return jax.lax.scan(body, start, layers, unroll=num_layers if unroll else 1)


class Linear(nnx.Module):
    """x @ kernel, and a bias where there is one, in the dtype of x.

    With an adapter (`models.lora`) lora_scale * (x @ lora_a) @ lora_b is added. The
    kernel may be held transposed (`transpose_kernels`).
    """

    lora_a: nnx.Param  # [in_dim, rank], and [rank, out_dim]; only with an adapter
    lora_b: nnx.Param

    def __init__(
        self,
        in_dim: int,
        out_dim: int,
        *,
        std: float,
        bias: bool = False,
        rngs: nnx.Rngs,
    ):
        """Draw a kernel of shape [in_dim, out_dim]; a bias starts at 0."""
        self.kernel = normal(rngs.params(), (in_dim, out_dim), std)
        if bias:
            self.bias = nnx.Param(jnp.zeros((out_dim,), jnp.float32))
        self.has_bias = bias
        self.is_transposed = False
        self.lora_scale = 0.0  # without an adapter

    def __call__(self, x: Float[Array, "B T I"]) -> Float[Array, "B T O"]:
        """Apply to the last axis."""
        # One row axis: the kernel's gradient then contracts one axis, not two, which
        # XLA's CPU backend multiplies nearly twice as fast.
        rows = x.reshape(-1, x.shape[-1])
        kernel = self.kernel[...].astype(x.dtype)
        product = _by_columns(kernel, rows) if self.is_transposed else rows @ kernel
        if self.lora_scale:
            inner = self.lora_scale * (rows @ self.lora_a[...].astype(x.dtype))
            product += inner @ self.lora_b[...].astype(x.dtype)
        if self.has_bias:
            product += self.bias[...].astype(x.dtype)[None]
        return product.reshape(*x.shape[:-1], -1)


def _by_columns(kernel_OI: Array, rows_NI: Array) -> Float[Array, "N O"]:
    """Multiply rows with a transposed kernel, each of them as a column.

    The barriers keep XLA's CPU backend from taking the transpositions into the product,
    which it then computes as if the kernel were not transposed; with sums in float32 it
    multiplies bfloat16 as it is.
    """
    columns_IN = jax.lax.optimization_barrier(rows_NI.T)
    product_ON = jnp.matmul(kernel_OI, columns_IN, preferred_element_type=jnp.float32)
    return jax.lax.optimization_barrier(product_ON).T.astype(rows_NI.dtype)


def transpose_kernels(model: nnx.Module) -> None:
    """Let the linear layers of a model take their kernels as [out_dim, in_dim].

    A CPU multiplies few rows with such kernels in about three quarters of the time:
    its tiles lie along the kernel's rows, not along those of x.
    """
    for _, module in nnx.iter_graph(model):
        if isinstance(module, Linear):
            module.is_transposed = True


class RMSNorm(nnx.Module):
    """x / sqrt(mean(x^2) + eps) * (offset + scale), float32, in the dtype of x.

    Source: Zhang and Sennrich, 2019, arXiv 1910.07467, equation 4.
    """

    def __init__(self, dim: int, *, eps: float, offset: float = 0.0):
        """Start with a factor of 1."""
        self.eps, self.offset = eps, offset
        self.scale = nnx.Param(jnp.full((dim,), 1 - offset, jnp.float32))

    def __call__(self, x_in: Float[Array, "... D"]) -> Float[Array, "... D"]:
        """Normalise the last axis."""
        x = x_in.astype(jnp.float32)
        inverse = jax.lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + self.eps)
        scale = self.scale[...]
        if self.offset:
            scale += self.offset
        scale = scale.reshape((1,) * (x.ndim - 1) + scale.shape)
        return (x * inverse * scale).astype(x_in.dtype)


class Embedding(nnx.Module):
    """Rows of a table."""

    def __init__(self, num: int, dim: int, *, std: float, rngs: nnx.Rngs):
        """Draw a table of shape [num, dim]."""
        self.embedding = normal(rngs.params(), (num, dim), std)

    def __call__(self, ids_BT: Int[Array, "B T"], dtype) -> Float[Array, "B T D"]:
        """Look up each id."""
        return self.embedding[...][ids_BT].astype(dtype)


class Head(nnx.Module):
    """The untied output weight, one row per vocabulary entry; applied by the losses."""

    def __init__(self, num: int, dim: int, *, std: float, rngs: nnx.Rngs):
        """Draw a weight of shape [num, dim]."""
        self.weight = normal(rngs.params(), (num, dim), std)


class MLP(nnx.Module):
    """A gated MLP: down(activation(gate(x)) * up(x)).

    Source: Shazeer, 2020, arXiv 2002.05202, equation 6.
    """

    def __init__(self, config: DecoderConfig, *, rngs: nnx.Rngs):
        """Draw the three kernels."""
        dims = (config.width, config.mlp_width)
        linear = functools.partial(
            Linear, std=config.init_std, bias=config.mlp_bias, rngs=rngs
        )
        self.gate, self.up = linear(*dims), linear(*dims)
        self.down = linear(*dims[::-1])
        self.activation = config.activation

    def __call__(self, x_BTD: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        """Apply to every position."""
        activation = ACTIVATIONS[self.activation]
        return self.down(activation(self.gate(x_BTD)) * self.up(x_BTD))


class Attention(nnx.Module):
    """Grouped-query attention with rotary positions.

    Source: Ainslie et al., 2023, arXiv 2305.13245, section 2.2; norms of queries and
    keys: Dehghani et al., 2023, arXiv 2302.05442, section 2.
    """

    def __init__(self, config: DecoderConfig, *, rngs: nnx.Rngs):
        """Draw the four kernels."""
        self.head_dim = config.head_dim
        width, std = config.width, config.init_std
        inner, shared = (
            num * config.head_dim for num in (config.num_heads, config.num_kv_heads)
        )
        linear = functools.partial(Linear, std=std, bias=config.qkv_bias, rngs=rngs)
        self.query = linear(width, inner)
        self.key = linear(width, shared)
        self.value = linear(width, shared)
        self.out = Linear(inner, width, std=std, bias=config.out_bias, rngs=rngs)
        self.has_norms = config.qk_norm
        if config.qk_norm:
            norm = functools.partial(
                RMSNorm,
                config.head_dim,
                eps=config.norm_eps,
                offset=config.norm_offset,
            )
            self.query_norm, self.key_norm = norm(), norm()

    def __call__(
        self,
        x_BTD: Float[Array, "B T D"],
        angles: rotary.Angles,
        attend: Attend,
    ) -> Float[Array, "B T D"]:
        """Mix the values by `attend`: (query, key, value) -> mixed values."""
        split = (*x_BTD.shape[:2], -1, self.head_dim)
        query = self.query(x_BTD).reshape(split)
        key = self.key(x_BTD).reshape(split)
        if self.has_norms:
            query, key = self.query_norm(query), self.key_norm(key)
        query, key = rotary.rotate(query, angles), rotary.rotate(key, angles)
        value = self.value(x_BTD).reshape(split)
        mixed = attend(query, key, value)
        return self.out(mixed.reshape(*x_BTD.shape[:2], -1))

"""One decoder-only transformer of the Llama family; models differ by config values.

Parameters are a plain nested dict of float32 arrays with the layers stacked on axis 0,
so that one `jax.lax.scan` runs them and one path names a parameter in all layers:

    embed/embedding [V, D]        norm/scale [D]        head/weight [V, D] (if untied)
    layers/attention_norm/scale [L, D]      layers/mlp_norm/scale [L, D]
    layers/attention/{query,key,value}/kernel [L, D, heads * head_dim]
    layers/attention/out/kernel [L, H * head_dim, D]
    layers/mlp/{gate,up}/kernel [L, D, F]   layers/mlp/down/kernel [L, F, D]

The forward pass stops at the hidden states: logits belong to the fused head of
`kdjax.losses.head`, which never holds them all. Shapes: B rows, T time, S cache slots,
D width, H query heads, G key/value heads, K per head, F inner width, L layers,
V vocabulary.
"""

import functools

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from kdjax.config import DTYPES, REMATS, DecoderConfig
from kdjax.models import attention
from kdjax.models.attention import Kernel
from kdjax.models.layers import MLP, Attention, Embedding, Head, RMSNorm, rotary_angles

Params = dict  # nested: name -> dict or array
Cache = dict[str, Array]  # "key", "value": [L, B, S, G, K]


class Block(nnx.Module):
    """x + attention(norm(x)), then x + mlp(norm(x))."""

    def __init__(self, config: DecoderConfig, *, rngs: nnx.Rngs):
        """Draw the parameters of one layer."""
        std = config.init_std
        self.attention_norm = RMSNorm(config.width, eps=config.norm_eps)
        self.attention = Attention(
            config.width,
            num_heads=config.num_heads,
            num_kv_heads=config.num_kv_heads,
            head_dim=config.head_dim,
            std=std,
            rngs=rngs,
        )
        self.mlp_norm = RMSNorm(config.width, eps=config.norm_eps)
        self.mlp = MLP(config.width, config.mlp_width, std=std, rngs=rngs)

    def __call__(self, x_BTD, angles, attend, cache, slots_BT):
        """One layer; `cache` is this layer's slice or None."""
        attended, cache = self.attention(
            self.attention_norm(x_BTD), angles, attend, cache, slots_BT
        )
        x_BTD = x_BTD + attended
        return x_BTD + self.mlp(self.mlp_norm(x_BTD)), cache


class Decoder(nnx.Module):
    """Embedding, a scan over stacked blocks, final norm."""

    def __init__(
        self,
        config: DecoderConfig,
        *,
        dtype: str,
        remat: str,
        kernel: Kernel,
        rngs: nnx.Rngs,
    ):
        """Draw all parameters."""
        self.dtype, self.remat, self.kernel = dtype, remat, kernel
        self.head_dim, self.rope_theta = config.head_dim, config.rope_theta
        shape = (config.vocab_size, config.width)
        self.embed = Embedding(*shape, std=config.init_std, rngs=rngs)
        self.layers = nnx.vmap(lambda key: Block(config, rngs=nnx.Rngs(params=key)))(
            jax.random.split(rngs.params(), config.num_layers)
        )
        self.norm = RMSNorm(config.width, eps=config.norm_eps)
        if not config.tie_embeddings:
            self.head = Head(*shape, std=config.init_std, rngs=rngs)

    def __call__(self, tokens_BT, positions_BT, attend, cache=None):
        """Hidden states after the final norm, and the updated cache."""
        block_graphdef, stacked = nnx.split(self.layers)
        angles = rotary_angles(
            positions_BT, head_dim=self.head_dim, theta=self.rope_theta
        )

        def body(x_BTD, layer):
            block_params, layer_cache = layer
            block = nnx.merge(block_graphdef, block_params)
            return block(x_BTD, angles, attend, layer_cache, positions_BT)

        if self.remat != "none":
            # A scan's body cannot be merged with its recomputation: no barrier needed.
            dots = jax.checkpoint_policies.dots_with_no_batch_dims_saveable
            policy = dots if self.remat == "dots" else None
            body = jax.checkpoint(body, policy=policy, prevent_cse=False)
        x_BTD = self.embed(tokens_BT, jnp.dtype(self.dtype))
        x_BTD, cache = jax.lax.scan(body, x_BTD, (stacked, cache))
        return self.norm(x_BTD), cache


def create(
    config: DecoderConfig,
    *,
    dtype: str = "float32",
    remat: str = "none",
    kernel: Kernel = attention.XLA,
) -> tuple[nnx.GraphDef, Params]:
    """Describe a model without allocating it.

    Args:
      config: shape of the model.
      dtype: compute dtype, "float32" or "bfloat16"; parameters are float32.
      remat: what the backward pass recomputes: "none"; "dots" (everything but matmuls
        with parameters); "full" (whole layers, keeping their inputs).
      kernel: what attends within packed rows, from `attention.choose`.

    Returns:
      The graph definition that the functions below take, and the parameters as a
      nested dict of `jax.ShapeDtypeStruct`.

    Raises:
      ValueError: a config that describes no model.
    """
    _check(config, dtype, remat)
    model = nnx.eval_shape(
        lambda: Decoder(
            config, dtype=dtype, remat=remat, kernel=kernel, rngs=nnx.Rngs(params=0)
        )
    )
    graphdef, state = nnx.split(model)
    return graphdef, nnx.to_pure_dict(state)


def init_params(config: DecoderConfig, key: Array) -> Params:
    """Random float32 parameters: normal(0, init_std), norms 1.

    Pure, so that `jax.jit(init_params, static...)` with `out_shardings` makes each
    device draw its own slice: wrap it as `lambda key: init_params(config, key)`.
    """
    _check(config, "float32", "none")
    rngs = nnx.Rngs(params=key)
    model = Decoder(
        config, dtype="float32", remat="none", kernel=attention.XLA, rngs=rngs
    )
    return nnx.to_pure_dict(nnx.state(model))


def hidden_states(
    graphdef: nnx.GraphDef,
    params: Params,
    tokens_BT: Int[Array, "B T"],
    positions_BT: Int[Array, "B T"],
    segments_BT: Int[Array, "B T"],
) -> Float[Array, "B T D"]:
    """Hidden states after the final norm, for packed rows.

    Args:
      graphdef: from `create`.
      params: nested dict of arrays.
      tokens_BT: ids; anything within the vocabulary where the segment is 0.
      positions_BT: position within its example, restarting at 0 in each segment.
      segments_BT: 0 for padding, 1, 2, ... for the examples packed in a row. Attention
        is causal and within equal segments; padding attends to padding, which keeps its
        (unused) values and gradients finite.

    Returns:
      Hidden states in the compute dtype.
    """
    model = nnx.merge(graphdef, params)
    attend = attention.within_segments(model.kernel, segments_BT)
    return model(tokens_BT, positions_BT, attend)[0]


def head_weight(params: Params) -> Float[Array, "V D"]:
    """The output weight: the embedding if tied, else the head's own."""
    head = params.get("head")
    return params["embed"]["embedding"] if head is None else head["weight"]


def logits(params: Params, hidden: Float[Array, "... D"]) -> Float[Array, "... V"]:
    """All logits in float32: for generation and tests; training uses the fused head."""
    weight_VD = head_weight(params).astype(hidden.dtype)
    return jnp.einsum(
        "...d,vd->...v", hidden, weight_VD, preferred_element_type=jnp.float32
    )


def init_cache(
    config: DecoderConfig, batch_size: int, max_length: int, dtype: str
) -> Cache:
    """Zeroed keys and values: "key" and "value", each [L, B, max_length, G, K]."""
    heads = (config.num_kv_heads, config.head_dim)
    shape = (config.num_layers, batch_size, max_length, *heads)
    return {name: jnp.zeros(shape, dtype) for name in ("key", "value")}


def decode(
    graphdef: nnx.GraphDef,
    params: Params,
    tokens_BT: Int[Array, "B T"],
    positions_BT: Int[Array, "B T"],
    cache: Cache,
) -> tuple[Float[Array, "B T D"], Cache]:
    """Hidden states of the next tokens of each row, reading and extending the cache.

    The slot of a token in the cache is its position, and a token reads slots up to its
    own. So rows may stand at different positions, and what right padding wrote beyond a
    prompt is overwritten before anything reads it. Positions of a row must grow
    without gaps from 0; one beyond the cache is not stored.

    Returns:
      Hidden states after the final norm, and the updated cache.
    """
    slots = jnp.arange(cache["key"].shape[2])
    mask_BTS = slots[None, None, :] <= positions_BT[:, :, None]
    attend = functools.partial(attention.attend, mask_B1TS=mask_BTS[:, None])
    model = nnx.merge(graphdef, params)
    return model(tokens_BT, positions_BT, attend, cache)


def _check(config: DecoderConfig, dtype: str, remat: str) -> None:
    sizes = ("vocab_size", "width", "num_layers", "num_heads", "num_kv_heads")
    for name in (*sizes, "head_dim", "mlp_width"):
        if getattr(config, name) < 1:
            raise ValueError(
                f"{name}={getattr(config, name)} must be at least 1: set it"
            )
    if config.num_heads % config.num_kv_heads:
        raise ValueError(
            f"num_kv_heads={config.num_kv_heads} does not divide "
            f"num_heads={config.num_heads}: use a divisor"
        )
    if config.head_dim % 2:
        raise ValueError(
            f"head_dim={config.head_dim} is odd, rotary needs pairs: use even"
        )
    for name, value, known in (("dtype", dtype, DTYPES), ("remat", remat, REMATS)):
        if value not in known:
            raise ValueError(f"{name}={value!r} is unknown: use one of {known}")

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
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int

from kdjax.config import DTYPES, REMATS, DecoderConfig
from kdjax.models import attention
from kdjax.models.attention import Kernel
from kdjax.models.layers import MLP, Attention, Embedding, Head, RMSNorm, rotary_angles

Params = dict  # nested: name -> dict or array
Cache = dict[str, Array]  # "key", "value": [L, B, S, G, K]


class Watch(NamedTuple):
    """Which layers' outputs are kept."""

    layers: tuple[int, ...] = ()  # distinct
    attention: bool = False  # their attention weights too


class Watched(NamedTuple):
    """Outputs of the n layers of a `Watch`, in its order."""

    states_nBTD: Float[Array, "n B T D"]
    """The residual stream after the layer, in the compute dtype; no norm is applied."""
    attention_nBTT: Float[Array, "n B T T"] | None
    """Attention weights, mean over the heads, float32; None if not asked for."""


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
        self.num_layers = config.num_layers
        self.head_dim, self.rope_theta = config.head_dim, config.rope_theta
        shape = (config.vocab_size, config.width)
        self.embed = Embedding(*shape, std=config.init_std, rngs=rngs)
        self.layers = nnx.vmap(lambda key: Block(config, rngs=nnx.Rngs(params=key)))(
            jax.random.split(rngs.params(), config.num_layers)
        )
        self.norm = RMSNorm(config.width, eps=config.norm_eps)
        if not config.tie_embeddings:
            self.head = Head(*shape, std=config.init_std, rngs=rngs)

    def __call__(
        self, tokens_BT, positions_BT, attend, cache=None, *, watch=None, mean=None
    ):
        """Hidden states after the final norm, the updated cache, and what is watched.

        `mean` makes attention weights of query and key, for a `watch` that wants them.
        """
        block_graphdef, stacked = nnx.split(self.layers)
        angles = rotary_angles(
            positions_BT, head_dim=self.head_dim, theta=self.rope_theta
        )

        x_BTD = self.embed(tokens_BT, jnp.dtype(self.dtype))
        watched, slots_L = _room(watch, x_BTD, num_layers=self.num_layers)

        def body(carry, layer):
            x_BTD, watched = carry
            block_params, layer_cache, slot = layer
            block, seen = nnx.merge(block_graphdef, block_params), []

            def watching(query, key, value):
                seen.append((query, key))
                return attend(query, key, value)

            x_BTD, layer_cache = block(
                x_BTD, angles, watching, layer_cache, positions_BT
            )
            watched = _keep(watched, slot, x_BTD, lambda: mean(*seen[0]))
            return (x_BTD, watched), layer_cache

        if self.remat != "none":
            # A scan's body cannot be merged with its recomputation: no barrier needed.
            dots = jax.checkpoint_policies.dots_with_no_batch_dims_saveable
            policy = dots if self.remat == "dots" else None
            body = jax.checkpoint(body, policy=policy, prevent_cse=False)
        (x_BTD, watched), cache = jax.lax.scan(
            body, (x_BTD, watched), (stacked, cache, slots_L)
        )
        return self.norm(x_BTD), cache, watched


def _room(watch, x_BTD, *, num_layers):
    """Zeros for what is watched, and the place of each layer in them, n for none."""
    if watch is None or not watch.layers:
        return None, None
    n = len(watch.layers)
    slots_L = np.full(num_layers, n, np.int32)
    slots_L[list(watch.layers)] = np.arange(n)
    states = jnp.zeros((n, *x_BTD.shape), x_BTD.dtype)
    maps = None
    if watch.attention:
        maps = jnp.zeros((n, *x_BTD.shape[:2], x_BTD.shape[1]), jnp.float32)
    return Watched(states, maps), jnp.asarray(slots_L)


def _keep(watched, slot, x_BTD, attention):
    """Puts a layer's outputs into their slot; a slot beyond the last keeps nothing."""
    if watched is None:
        return None
    states, maps = watched
    if maps is not None:
        maps = jax.lax.cond(
            slot < len(maps),
            lambda: maps.at[slot].set(attention()),
            lambda: maps,
        )
    return Watched(states.at[slot].set(x_BTD, mode="drop"), maps)


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
    return watched_states(
        graphdef, params, tokens_BT, positions_BT, segments_BT, watch=Watch()
    )[0]


def watched_states(
    graphdef: nnx.GraphDef,
    params: Params,
    tokens_BT: Int[Array, "B T"],
    positions_BT: Int[Array, "B T"],
    segments_BT: Int[Array, "B T"],
    *,
    watch: Watch,
) -> tuple[Float[Array, "B T D"], Watched | None]:
    """Hidden states as `hidden_states`, and outputs of single layers.

    Only the layers that are watched take memory. Attention weights are computed beside
    the attention kernel, for those layers alone.

    Args:
      graphdef: from `create`.
      params: nested dict of arrays.
      tokens_BT: as in `hidden_states`, like the next two.
      positions_BT: see there.
      segments_BT: see there.
      watch: the layers; none give None.
    """
    model = nnx.merge(graphdef, params)
    attend = attention.within_segments(model.kernel, segments_BT)
    mean = functools.partial(attention.mean_weights, segments_BT=segments_BT)
    hidden_BTD, _, watched = model(
        tokens_BT, positions_BT, attend, watch=watch, mean=mean
    )
    return hidden_BTD, watched


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
    return model(tokens_BT, positions_BT, attend, cache)[:2]


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

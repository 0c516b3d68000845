"""One decoder-only transformer; families and models differ by config values.

Parameters are a plain nested dict of float32 arrays with the layers stacked on axis 0,
so that one `jax.lax.scan` runs them and one path names a parameter in all layers:

    embed/embedding [V, D]        norm/scale [D]        head/weight [V, D] (if untied)
    layers/attention_norm/scale [L, D]      layers/mlp_norm/scale [L, D]
    layers/attention/{query,key,value}/kernel [L, D, heads * head_dim]
    layers/attention/out/kernel [L, H * head_dim, D]
    layers/mlp/{gate,up}/kernel [L, D, F]   layers/mlp/down/kernel [L, F, D]

and where a family has them layers/attention/{query,key,value,out}/bias,
layers/mlp/{gate,up,down}/bias, layers/attention/{query,key}_norm/scale [L, K],
layers/{attention,mlp}_post_norm/scale [L, D]. Settings that differ between layers, the
window and the kind of rotary positions, are numbers per layer, scanned along with them.

The forward pass stops at the hidden states: logits belong to the fused head of
`losses.fused_head`, which never holds them all. Shapes: B rows, T time, S cache slots,
D width, H query heads, G key/value heads, K per head, F inner width, L layers,
V vocabulary.
"""

import functools

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from kdjax.config import DTYPES, REMATS, DecoderConfig, LoraConfig
from kdjax.losses.options import IDENTITY, LogitTransform
from kdjax.models import attention, lora, rotary
from kdjax.models.attention import Kernel
from kdjax.models.capture import NO_CAPTURE, Capture, CapturedOutputs, allocate, store
from kdjax.models.decoder_shape import check_choice, check_shape
from kdjax.models.layers import (
    MLP,
    Attention,
    Embedding,
    Head,
    RMSNorm,
    recomputing,
    scan_layers,
)

Params = dict  # nested: name -> dict or array
Cache = dict[str, Array]  # "key", "value": [L, B, S, G, K]


class Block(nnx.Module):
    """x + attention(norm(x)), then x + mlp(norm(x)); post norms act before each sum."""

    def __init__(self, config: DecoderConfig, *, rngs: nnx.Rngs):
        """Draw the parameters of one layer."""
        norm = functools.partial(
            RMSNorm, config.width, eps=config.norm_eps, offset=config.norm_offset
        )
        self.attention_norm = norm()
        self.attention = Attention(config, rngs=rngs)
        self.mlp_norm = norm()
        self.mlp = MLP(config, rngs=rngs)
        self.has_post_norms = config.post_norms
        if config.post_norms:
            self.attention_post_norm, self.mlp_post_norm = norm(), norm()

    def __call__(self, x_BTD, angles, attend):
        """Apply one layer."""
        attended = self.attention(self.attention_norm(x_BTD), angles, attend)
        if self.has_post_norms:
            attended = self.attention_post_norm(attended)
        x_BTD = x_BTD + attended
        mlp_out = self.mlp(self.mlp_norm(x_BTD))
        if self.has_post_norms:
            mlp_out = self.mlp_post_norm(mlp_out)
        return x_BTD + mlp_out


class Decoder(nnx.Module):
    """Embedding, a scan over stacked blocks, final norm."""

    def __init__(
        self,
        config: DecoderConfig,
        *,
        dtype: str,
        remat: str,
        kernel: Kernel,
        unroll: bool = False,
        rngs: nnx.Rngs,
    ):
        """Draw all parameters."""
        self.dtype, self.remat, self.kernel = dtype, remat, kernel
        self.unroll = unroll
        self.num_layers = config.num_layers
        self.embedding_scale = config.width**0.5 if config.scale_embeddings else 1.0
        self.logit_transform = LogitTransform(softcap=config.final_softcap or None)
        self.score_options = attention.score_options(config)
        self.ropes = rotary.ropes(config)
        self.windows, self.rotary = config.windows, config.rotary
        self.rotary_kinds = rotary.kinds(config)
        shape = (config.vocab_size, config.width)
        self.embed = Embedding(*shape, std=config.init_std, rngs=rngs)
        self.layers = nnx.vmap(lambda key: Block(config, rngs=nnx.Rngs(params=key)))(
            jax.random.split(rngs.params(), config.num_layers)
        )
        self.norm = RMSNorm(
            config.width, eps=config.norm_eps, offset=config.norm_offset
        )
        if not config.tie_embeddings:
            self.head = Head(*shape, std=config.init_std, rngs=rngs)

    def __call__(
        self,
        tokens_BT,
        positions_BT,
        attend,
        cache=None,
        *,
        capture=NO_CAPTURE,
        mean=None,
    ):
        """Compute hidden states, the updated cache, and the captured outputs.

        `mean` computes attention weights from query and key, for a `capture` of them.
        """
        block_graphdef, stacked = nnx.split(self.layers)
        all_angles = rotary.angles(self.ropes, positions_BT)
        x_BTD = self._embedded(tokens_BT)
        captured, slots_L = allocate(capture, x_BTD, num_layers=self.num_layers)

        def body(carry, layer):
            x_BTD, captured, cache = carry
            block_params, number, own, slot = layer
            block, seen = nnx.merge(block_graphdef, block_params), []
            angles, window = all_angles, {}
            if "rotary" in own:
                angles = jax.tree.map(lambda x: x[own["rotary"]], all_angles)
            if "window" in own:
                window = {"window": own["window"]}

            def mix(query, key, value):
                nonlocal cache
                seen.append((query, key))
                if cache is not None:
                    cache = _updated_cache(cache, number, positions_BT, key, value)
                    key, value = _read(cache, number, query.dtype)
                return attend(query, key, value, **window)

            x_BTD = block(x_BTD, angles, mix)
            captured = store(captured, slot, x_BTD, lambda: mean(*seen[0], **window))
            return (x_BTD, captured, cache), None

        numbers_L = jnp.arange(self.num_layers)
        layers = (stacked, numbers_L, self._per_layer(), slots_L)
        (x_BTD, captured, cache), _ = scan_layers(
            recomputing(body, self.remat),
            (x_BTD, captured, cache),
            layers,
            unroll=self.unroll,
        )
        return self.norm(x_BTD), cache, captured

    def extend(self, tokens_BT, all_angles, attend, layers, cache):
        """Compute hidden states of new tokens, which come into a cache.

        Args:
          tokens_BT: new tokens.
          all_angles: of their positions, from `rotary.angles` with `self.ropes`.
          attend: (query, key, value, cache, number of the layer, window) -> mixed
            values, and the cache with the new tokens of the layer.
          layers: parameters of the layers, stacked, or one tree each as a tuple, which
            is unrolled: a CPU would copy each layer's weights out of the stack.
          cache: of all layers.

        Returns:
          Hidden states after the final norm, and the cache.
        """
        block_graphdef, _ = nnx.split(self.layers)

        def body(carry, layer):
            x_BTD, cache = carry
            block_params, number, own = layer
            block, angles = nnx.merge(block_graphdef, block_params), all_angles
            if "rotary" in own:
                angles = jax.tree.map(lambda x: x[own["rotary"]], all_angles)
            window = own.get("window", jnp.int32(self.score_options.windows[0]))

            def mix(query, key, value):
                nonlocal cache
                mixed, cache = attend(query, key, value, cache, number, window)
                return mixed

            x_BTD = block(x_BTD, angles, mix)
            return (x_BTD, cache), None

        carry, own = (self._embedded(tokens_BT), cache), self._per_layer()
        if isinstance(layers, tuple):
            for number, layer in enumerate(layers):
                of_layer = {name: x[number] for name, x in own.items()}
                carry, _ = body(carry, (layer, number, of_layer))
        else:
            numbers_L = jnp.arange(self.num_layers, dtype=jnp.int32)
            carry, _ = jax.lax.scan(body, carry, (layers, numbers_L, own))
        return self.norm(carry[0]), carry[1]

    def _embedded(self, tokens_BT: Int[Array, "B T"]) -> Float[Array, "B T D"]:
        x_BTD = self.embed(tokens_BT, jnp.dtype(self.dtype))
        if self.embedding_scale != 1.0:
            x_BTD *= jnp.asarray(self.embedding_scale, x_BTD.dtype)
        return x_BTD

    def _per_layer(self) -> dict[str, Int[Array, "L"]]:
        """Return the settings that differ between layers, int32 [L]; {} if none do."""
        own = {}
        if len(self.rotary_kinds) > 1:
            numbers = [self.rotary_kinds.index(kind) for kind in self.rotary]
            own["rotary"] = jnp.asarray(numbers, jnp.int32)
        if len(self.score_options.windows) > 1:
            own["window"] = jnp.asarray(self.windows, jnp.int32)
        return own


def create(
    config: DecoderConfig,
    *,
    dtype: str = "float32",
    remat: str = "none",
    kernel: Kernel = attention.XLA,
    unroll: bool = False,
    adapters: LoraConfig | None = None,
) -> tuple[nnx.GraphDef, Params]:
    """Describe a model without allocating it.

    Args:
      config: shape of the model.
      dtype: compute dtype, "float32" or "bfloat16"; parameters are float32.
      remat: what the backward pass recomputes: "none"; "dots" (everything but matmuls
        with parameters); "full" (whole layers, keeping their inputs).
      kernel: of attention within packed rows, from `attention.select_kernel`.
      unroll: write out the layers where they are few, as suits a CPU; see
        `layers.scan_layers`.
      adapters: low-rank ones beside the linear layers (`lora`); None = none.

    Returns:
      The graph definition that the functions below take, and the parameters as a
      nested dict of `jax.ShapeDtypeStruct`.

    Raises:
      ValueError: a config that describes no model, or adapters of no layer.
    """
    check_shape(config)
    check_choice("dtype", dtype, DTYPES)
    check_choice("remat", remat, REMATS)

    def make() -> Decoder:
        rngs = nnx.Rngs(params=0)
        model = Decoder(
            config, dtype=dtype, remat=remat, kernel=kernel, unroll=unroll, rngs=rngs
        )
        return lora.add(model, adapters)

    model = nnx.eval_shape(make)
    graphdef, state = nnx.split(model)
    return graphdef, nnx.to_pure_dict(state)


def init_params(config: DecoderConfig, key: Array) -> Params:
    """Draw random float32 parameters: normal(0, init_std), norms 1.

    Pure, so that `jax.jit(init_params, static...)` with `out_shardings` makes each
    device draw its own slice: wrap it as `lambda key: init_params(config, key)`.
    """
    check_shape(config)
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
    """Compute hidden states after the final norm for packed rows.

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
    return captured_states(
        graphdef, params, tokens_BT, positions_BT, segments_BT, capture=NO_CAPTURE
    )[0]


def captured_states(
    graphdef: nnx.GraphDef,
    params: Params,
    tokens_BT: Int[Array, "B T"],
    positions_BT: Int[Array, "B T"],
    segments_BT: Int[Array, "B T"],
    *,
    capture: Capture,
) -> tuple[Float[Array, "B T D"], CapturedOutputs | None]:
    """Compute hidden states as `hidden_states`, and capture outputs of single layers.

    Only captured layers take memory. Attention weights are computed beside the
    attention kernel, for those layers alone.

    Args:
      graphdef: from `create`.
      params: nested dict of arrays.
      tokens_BT: as in `hidden_states`, like the next two.
      positions_BT: see there.
      segments_BT: see there.
      capture: the layers.

    Returns:
      Hidden states, and the captured outputs; None for a capture of no layers.
    """
    model = nnx.merge(graphdef, params)
    attend = attention.within_segments(model.kernel, segments_BT, model.score_options)
    mean = functools.partial(
        attention.mean_weights, segments_BT=segments_BT, options=model.score_options
    )
    hidden_BTD, _, captured = model(
        tokens_BT, positions_BT, attend, capture=capture, mean=mean
    )
    return hidden_BTD, captured


def head_weight(params: Params) -> Float[Array, "V D"]:
    """Return the output weight: the embedding if tied, else the head's own."""
    head = params.get("head")
    return params["embed"]["embedding"] if head is None else head["weight"]


def logits(
    params: Params,
    hidden: Float[Array, "... D"],
    *,
    transform: LogitTransform = IDENTITY,
) -> Float[Array, "... V"]:
    """Compute all logits in float32, for generation; training uses the fused head.

    Args:
      params: of the model.
      hidden: states after the final norm.
      transform: the model's `logit_transform`.
    """
    weight_VD = head_weight(params).astype(hidden.dtype)
    products = jnp.einsum(
        "...d,vd->...v", hidden, weight_VD, preferred_element_type=jnp.float32
    )
    return transform(products)


def transposed_logits(
    params: Params,
    hidden_BD: Float[Array, "B D"],
    *,
    transform: LogitTransform = IDENTITY,
) -> Float[Array, "V B"]:
    """Compute all logits in float32, a column per row of hidden states.

    The weight, [V, D], then lies as a CPU multiplies best; `logits` transposes it.
    """
    products = jnp.matmul(
        head_weight(params).astype(hidden_BD.dtype),
        hidden_BD.T,
        preferred_element_type=jnp.float32,
    )
    return transform(products)


def init_cache(
    config: DecoderConfig, batch_size: int, max_length: int, dtype: str
) -> Cache:
    """Return zeroed keys [L, B, G, K, max_length] and values [L, B, G, max_length, K].

    The layouts are those that products with the queries of one token read.
    """
    rows = (config.num_layers, batch_size, config.num_kv_heads)
    return {
        "key": jnp.zeros((*rows, config.head_dim, max_length), dtype),
        "value": jnp.zeros((*rows, max_length, config.head_dim), dtype),
    }


def num_slots(cache: Cache) -> int:
    """Return the number of tokens per row that a cache can hold."""
    return cache["key"].shape[-1]


def pick_rows(cache: Cache, rows_B: Int[Array, "B"]) -> Cache:
    """Select rows of a cache in this order, each as often as it is named."""
    return jax.tree.map(lambda x: x[:, rows_B], cache)


def extend_cache(cache: Cache, max_length: int) -> Cache:
    """Pad a cache with zeroed slots up to `max_length`."""
    more, rows = (0, max_length - num_slots(cache)), [(0, 0)] * 3
    return {
        "key": jnp.pad(cache["key"], [*rows, (0, 0), more]),
        "value": jnp.pad(cache["value"], [*rows, more, (0, 0)]),
    }


def _updated_cache(cache: Cache, number, slots_BT, key_BTGK, value_BTGK) -> Cache:
    """Write a layer's keys and values of new tokens at their slots.

    The cache is the scan's carry and not one of its outputs, so that it is updated in
    place. A slot beyond its end is dropped.
    """
    rows_B1 = jnp.arange(slots_BT.shape[0])[:, None]
    places = {
        "key": cache["key"].at[number, rows_B1, :, :, slots_BT],
        "value": cache["value"].at[number, rows_B1, :, slots_BT],
    }
    new = {"key": key_BTGK, "value": value_BTGK}
    return {
        name: place.set(new[name].astype(cache[name].dtype), mode="drop")
        for name, place in places.items()
    }


def _read(cache: Cache, number, dtype) -> tuple[Array, Array]:
    """Return a layer's keys and values, [B, S, G, K]."""
    key_BGKS, value_BGSK = (cache[n][number].astype(dtype) for n in ("key", "value"))
    return key_BGKS.transpose(0, 3, 1, 2), value_BGSK.transpose(0, 2, 1, 3)


def decode(
    graphdef: nnx.GraphDef,
    params: Params,
    tokens_BT: Int[Array, "B T"],
    positions_BT: Int[Array, "B T"],
    cache: Cache,
) -> tuple[Float[Array, "B T D"], Cache]:
    """Compute hidden states of new tokens per row, reading and extending the cache.

    The slot of a token in the cache is its position, and a token reads slots up to its
    own. So rows may stand at different positions, and what right padding wrote beyond a
    prompt is overwritten before anything reads it. Positions of a row must grow
    without gaps from 0; one beyond the cache is not stored.

    Returns:
      Hidden states after the final norm, and the updated cache.
    """
    model = nnx.merge(graphdef, params)
    slots_11S = jnp.arange(num_slots(cache))[None, None, :]
    positions_BT1 = positions_BT[:, :, None]
    attend = attention.masked(
        slots_11S <= positions_BT1, positions_BT1 - slots_11S, model.score_options
    )
    return model(tokens_BT, positions_BT, attend, cache)[:2]

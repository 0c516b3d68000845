"""T5 v1.0, v1.1 and FLAN: a decoder that reads what an encoder made of the prompt.

Parameters are a plain nested dict of float32 arrays; the layers of each stack lie on
axis 0 and one `jax.lax.scan` runs them:

    embed/embedding [V, D]            head/weight [V, D] (if untied)
    {encoder,decoder}/position_bias/table [N, H]
    {encoder,decoder}/norm/scale [D]
    {encoder,decoder}/layers/{attention,mlp}_norm/scale [L, D]
    {encoder,decoder}/layers/attention/{query,key,value}/kernel [L, D, H * K]
    {encoder,decoder}/layers/attention/out/kernel [L, H * K, D]
    {encoder,decoder}/layers/mlp/{gate,up}/kernel [L, D, F] (gate if gated)
    {encoder,decoder}/layers/mlp/down/kernel [L, F, D]
    decoder/layers/cross_norm/scale and decoder/layers/cross/..., as attention

Rows are packed in pairs: segment n of a decoder row reads segment n of the encoder row.
Positions are relative, so only differences of them enter. Within a segment these are
differences of columns: the same for all rows, which share one array of biases.

Shapes: B rows, S encoder time, T decoder time, C cache slots, D width, H heads, K per
head, F inner width, L layers, N buckets, V vocabulary.

Source: Raffel et al., 2020, T5, arXiv 1910.10683, section 2.1; v1.1: Shazeer, 2020,
arXiv 2002.05202, equation 6 (GEGLU).
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from kdjax.config import DTYPES, REMATS, LoraConfig, T5Config, check
from kdjax.losses.options import LogitTransform
from kdjax.models import lora
from kdjax.models.decoder_shape import check_choice
from kdjax.models.layers import Embedding, Head
from kdjax.models.t5_layers import Memory, Reads, Stack, attending, split_keys

Params = dict  # nested: name -> dict or array
Cache = dict  # "own", "encoded": a Memory of [L, ...]; "readable" [B, S]: is a prompt's


class Rows(NamedTuple):
    """Packed rows of the encoder or the decoder."""

    tokens: Int[Array, "B T"]  # ids; anything in the vocabulary where the segment is 0
    segments: Int[Array, "B T"]  # 0 for padding, 1, 2, ... side by side


class T5(nnx.Module):
    """Embedding, the two stacks, and the head if it is not the embedding."""

    def __init__(
        self,
        config: T5Config,
        *,
        dtype: str,
        remat: str,
        unroll: bool = False,
        rngs: nnx.Rngs,
    ):
        """Draw all parameters."""
        self.dtype = dtype
        self.logit_transform = LogitTransform(
            scale=config.width**-0.5 if config.scale_outputs else 1.0
        )
        shape = (config.vocab_size, config.width)
        self.embed = Embedding(*shape, std=1.0, rngs=rngs)
        stack = functools.partial(Stack, config, remat=remat, unroll=unroll, rngs=rngs)
        self.encoder = stack(config.num_encoder_layers, is_decoder=False)
        self.decoder = stack(config.num_decoder_layers, is_decoder=True)
        if not config.tie_embeddings:
            self.head = Head(*shape, std=config.width**-0.5, rngs=rngs)

    def encode(self, rows: Rows, dropout=None):
        """Compute the encoder's hidden states."""
        mask_BSS = _same(rows.segments, rows.segments)
        attend = self.encoder.attend(mask_BSS, _distances(rows.segments.shape[1]))
        x_BSD = self.embed(rows.tokens, jnp.dtype(self.dtype))
        return self.encoder(x_BSD, Reads(attend), dropout)[0]

    def decode(self, tokens_BT, reads, dropout=None, cache=None):
        """Compute the decoder's hidden states, and new keys and values."""
        x_BTD = self.embed(tokens_BT, jnp.dtype(self.dtype))
        return self.decoder(x_BTD, reads, dropout, cache)


def create(
    config: T5Config,
    *,
    dtype: str = "float32",
    remat: str = "none",
    unroll: bool = False,
    adapters: LoraConfig | None = None,
) -> tuple[nnx.GraphDef, Params]:
    """Describe a model without allocating it.

    Args:
      config: shape of the model.
      dtype: compute dtype, "float32" or "bfloat16"; parameters are float32.
      remat: what the backward pass recomputes: "none"; "dots" (everything but matmuls
        with parameters); "full" (whole layers, keeping their inputs).
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

    def make() -> T5:
        rngs = nnx.Rngs(params=0)
        model = T5(config, dtype=dtype, remat=remat, unroll=unroll, rngs=rngs)
        return lora.add(model, adapters)

    model = nnx.eval_shape(make)
    graphdef, state = nnx.split(model)
    return graphdef, nnx.to_pure_dict(state)


def init_params(config: T5Config, key: Array) -> Params:
    """Draw random float32 parameters, pure; see `decoder.init_params`.

    Normal with standard deviation `init_factor` times: 1 (embedding), (D K)^-0.5
    (queries), (H K)^-0.5 (attention's output), F^-0.5 (MLP's output), else D^-0.5.
    Norms are `init_factor`. An untied head has D^-0.5, as Mesh TensorFlow's dense
    layers: with transformers' 1, its first logits would be sqrt(D) times too large.

    Source: transformers, `T5PreTrainedModel._init_weights`, after Mesh TensorFlow.
    """
    check_shape(config)
    model = T5(config, dtype="float32", remat="none", rngs=nnx.Rngs(params=key))
    params = nnx.to_pure_dict(nnx.state(model))
    return jax.tree.map(lambda leaf: config.init_factor * leaf, params)


def hidden_states(
    graphdef: nnx.GraphDef,
    params: Params,
    encoder_rows: Rows,
    decoder_rows: Rows,
    *,
    dropout: Array | None = None,
) -> Float[Array, "B T D"]:
    """Compute the decoder's hidden states after the final norm, for packed row pairs.

    Args:
      graphdef: from `create`.
      params: nested dict of arrays.
      encoder_rows: prompts, [B, S].
      decoder_rows: targets shifted right, each after the start token, [B, T].
        Attention is causal within equal segments, and reads the encoder's result where
        that has the same segment.
      dropout: a random key for each row, [B]; None turns dropout off.

    Returns:
      Hidden states in the compute dtype, of which `logit_transform` makes logits.
    """
    model = nnx.merge(graphdef, params)
    keys = (None, None) if dropout is None else split_keys(dropout, 2)
    segments_BT = decoder_rows.segments
    distance_1TT = _distances(segments_BT.shape[1])
    mask_BTT = _same(segments_BT, segments_BT) & (distance_1TT <= 0)
    reads = Reads(
        attend=model.decoder.attend(mask_BTT, distance_1TT),
        encoded=model.encode(encoder_rows, keys[0]),
        attend_encoded=attending(_same(segments_BT, encoder_rows.segments)),
    )
    return model.decode(decoder_rows.tokens, reads, keys[1])[0]


def init_cache(
    config: T5Config, batch_size: int, max_length: int, dtype: str
) -> Memory:
    """Return zeroed keys and values of decoder tokens, [L, B, max_length, H, K]."""
    heads = (config.num_heads, config.head_dim)
    shape = (config.num_decoder_layers, batch_size, max_length, *heads)
    return {name: jnp.zeros(shape, dtype) for name in ("key", "value")}


def prefill(
    config: T5Config,
    graphdef: nnx.GraphDef,
    params: Params,
    rows: Rows,
    *,
    max_length: int,
) -> Cache:
    """Encode prompts, one a row, and project them for every layer of the decoder.

    Args:
      config: shape of the model.
      graphdef: from `create`; its compute dtype is also the cache's.
      params: nested dict of arrays.
      rows: prompts; segment 1 where there are tokens, 0 in padding.
      max_length: most tokens that `decode` will read in a row, start token included.
    """
    model = nnx.merge(graphdef, params)
    encoded_BSD = model.encode(rows)
    block_graphdef, stacked = nnx.split(model.decoder.layers)

    def project(_, params):
        return None, nnx.merge(block_graphdef, params).cross.memory(encoded_BSD)

    return {
        "own": init_cache(config, len(rows.tokens), max_length, model.dtype),
        "encoded": jax.lax.scan(project, None, stacked)[1],
        "readable": rows.segments > 0,
    }


def decode(
    graphdef: nnx.GraphDef,
    params: Params,
    tokens_BT: Int[Array, "B T"],
    positions_BT: Int[Array, "B T"],
    cache: Cache,
) -> tuple[Float[Array, "B T D"], Cache]:
    """Compute hidden states of new tokens per row, reading and extending the cache.

    The start token has position 0. Slots are positions, as in `decoder.decode`.

    Returns:
      Hidden states after the final norm, and the updated cache.
    """
    model = nnx.merge(graphdef, params)
    slots_C = jnp.arange(cache["own"]["key"].shape[2], dtype=positions_BT.dtype)
    distance_BTC = slots_C[None, None, :] - positions_BT[:, :, None]
    reads = Reads(
        attend=model.decoder.attend(distance_BTC <= 0, distance_BTC),
        attend_encoded=attending(cache["readable"][:, None, :]),
        slots=positions_BT,
    )
    layers = {name: cache[name] for name in ("own", "encoded")}
    hidden_BTD, own = model.decode(tokens_BT, reads, cache=layers)
    return hidden_BTD, cache | {"own": own}


def _same(segments_BT, segments_BS) -> Array:
    return segments_BT[:, :, None] == segments_BS[:, None, :]


def _distances(length: int) -> Int[Array, "1 T T"]:
    """Return key column minus query column, for all rows."""
    column = jnp.arange(length, dtype=jnp.int32)
    return (column[None, :] - column[:, None])[None]


def check_shape(config: T5Config) -> None:
    """Raise ValueError, naming a field, for a config that describes no model."""
    check(config)
    if not config.vocab_size:
        raise ValueError("vocab_size=0 must be at least 1: set it")
    if config.num_buckets % 2:
        raise ValueError(
            f"num_buckets={config.num_buckets} is not an even number from 4 on: use 32"
        )
    if config.max_distance <= config.num_buckets // 2:
        raise ValueError(
            f"max_distance={config.max_distance} must exceed half of num_buckets="
            f"{config.num_buckets}, distances that have their own: use 128"
        )

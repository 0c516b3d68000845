"""One interface to decoder-only and encoder-decoder language models.

Decoder-only models read prompt and target in one row; those with an encoder (T5) read
the prompt there. What differs between them is here and in how rows are laid out:
batches of the second kind have an `encoder`.

Shapes: B rows, G groups, P prompt time (right padded), C time of a chunk, T time,
D width, V vocabulary.
"""

import dataclasses
import sys
from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from kdjax.config import DecoderConfig, LoraConfig, T5Config
from kdjax.data.batch import Batch
from kdjax.losses.options import LogitTransform
from kdjax.models import attention, decoder, decoder_shape, t5

Shape = DecoderConfig | T5Config
Params = dict  # nested: name -> dict or array

_MIN_CHUNK, _MAX_CHUNKS = 256, 8  # tokens per prefill chunk; chunks per prompt


def create(
    shape: Shape,
    *,
    dtype: str = "float32",
    remat: str = "none",
    kernel: attention.Kernel = attention.XLA,
    unroll: bool = False,
    adapters: LoraConfig | None = None,
) -> tuple[nnx.GraphDef, Params]:
    """Describe a model without allocating it, as `decoder.create`.

    T5's biased scores are computed by XLA whatever the kernel.
    """
    if isinstance(shape, T5Config):
        return t5.create(
            shape, dtype=dtype, remat=remat, unroll=unroll, adapters=adapters
        )
    return decoder.create(
        shape,
        dtype=dtype,
        remat=remat,
        kernel=kernel,
        unroll=unroll,
        adapters=adapters,
    )


def init_params(shape: Shape, key: Array) -> Params:
    """Draw random float32 parameters; a pure function."""
    if isinstance(shape, T5Config):
        return t5.init_params(shape, key)
    return decoder.init_params(shape, key)


def stacks(shape: Shape) -> dict[str, int]:
    """Return path -> number of layers for each stack among the parameters."""
    if not isinstance(shape, T5Config):
        return {"layers": shape.num_layers}
    return {
        "encoder/layers": shape.num_encoder_layers,
        "decoder/layers": shape.num_decoder_layers,
    }


def reads_encoder(path: str) -> bool:
    """Return whether a T5 kernel multiplies the encoder's tokens, not the decoder's."""
    cross = ("decoder/layers/cross/key", "decoder/layers/cross/value")
    return path.startswith(("encoder/", *cross))


def select_layers(shape: Shape, layers: Mapping[str, Sequence[int]]) -> Shape:
    """Return the shape of a model made of some layers of another.

    Args:
      shape: the other's.
      layers: path of a stack -> its layers, in this order.
    """
    if not isinstance(shape, T5Config):
        return decoder_shape.select_layers(shape, layers["layers"])
    return dataclasses.replace(
        shape,
        num_encoder_layers=len(layers["encoder/layers"]),
        num_decoder_layers=len(layers["decoder/layers"]),
    )


def dropout(shape: Shape) -> float:
    """Return the dropout rate in training; decoder-only models have none."""
    return shape.dropout if isinstance(shape, T5Config) else 0.0


def hidden_states(
    graphdef: nnx.GraphDef, params: Params, rows: Batch
) -> Float[Array, "B T D"]:
    """Compute hidden states after the final norm for packed rows, in the compute dtype.

    Args:
      graphdef: from `create`.
      params: nested dict of arrays.
      rows: a microbatch, [B, T]. With dropout keys, a model that has dropout uses them.
    """
    if rows.encoder is None:
        return decoder.hidden_states(
            graphdef, params, rows.tokens, rows.positions, rows.segments
        )
    keys = rows.dropout_keys
    return t5.hidden_states(
        graphdef,
        params,
        t5.Rows(rows.encoder.tokens, rows.encoder.segments),
        t5.Rows(rows.tokens, rows.segments),
        dropout=None if keys is None else jax.random.wrap_key_data(keys),
    )


def head_weight(params: Params) -> Float[Array, "V D"]:
    """Return the output weight: the embedding if tied, else the head's own."""
    return decoder.head_weight(params)


def logit_transform(graphdef: nnx.GraphDef, params: Params) -> LogitTransform:
    """Return the map from the head's products to the model's logits.

    Args:
      graphdef: the model's structure.
      params: its parameters, or their shapes.
    """
    return nnx.merge(graphdef, params).logit_transform


def logits(
    graphdef: nnx.GraphDef, params: Params, hidden: Float[Array, "... D"]
) -> Float[Array, "... V"]:
    """Compute all logits in float32, for generation; training uses the fused head."""
    return decoder.logits(params, hidden, transform=logit_transform(graphdef, params))


def max_prompt_length(shape: Shape, max_new_tokens: int) -> int:
    """Return the longest prompt, in tokens, that `max_new_tokens` still fit after."""
    if isinstance(shape, T5Config):
        return sys.maxsize  # positions are relative, and prompts have rows of their own
    return shape.max_length - max_new_tokens


def prefill_chunk_size(shape: Shape, max_prompt: int) -> int:
    """Return the tokens per prefill chunk: an eighth of a long prompt, all in T5."""
    if isinstance(shape, T5Config):
        return max_prompt
    return max(_MIN_CHUNK, -(-max_prompt // _MAX_CHUNKS))


def prefill(
    shape: Shape,
    graphdef: nnx.GraphDef,
    params: Params,
    prompts_BP: Int[Array, "B P"],
    lengths_B: Int[Array, "B"],
    *,
    max_new_tokens: int,
    num_shared: int = 0,
    groups: Sequence[Int[Array, "_"]] = (),
) -> tuple[Float[Array, "B D"], Int[Array, "B"], dict]:
    """Run the model over prompts, chunk by chunk, and fill its key/value cache.

    Args:
      shape: of the model.
      graphdef: from `create`.
      params: nested dict of arrays.
      prompts_BP: right padded.
      lengths_B: 0 where there is no prompt.
      max_new_tokens: that `decode` will read.
      num_shared: length in tokens, a multiple of the chunk size and less than any
        prompt's, of the prefix that the prompts of a group share; it is read once per
        group (not in T5, whose encoder also sees what follows).
      groups: if num_shared is not 0, one row of each group [G] and the group of each
        row [B].

    Returns:
      The hidden states that predict the first new token of each row, the position of
      that token, and the cache that `decode` extends.
    """
    num_rows, max_prompt = prompts_BP.shape
    time_P = jnp.arange(max_prompt, dtype=jnp.int32)
    if isinstance(shape, T5Config):
        segments_BP = (time_P[None, :] < lengths_B[:, None]).astype(jnp.int32)
        prompts = t5.Rows(prompts_BP, segments_BP)
        cache = t5.prefill(
            shape, graphdef, params, prompts, max_length=max_new_tokens + 1
        )
        first_B1 = jnp.full((num_rows, 1), shape.start_id, jnp.int32)
        hidden_B1D, cache = t5.decode(
            graphdef, params, first_B1, jnp.zeros_like(first_B1), cache
        )
        return hidden_B1D[:, 0], jnp.ones_like(lengths_B), cache
    dtype = nnx.merge(graphdef, params).dtype
    last_B = jnp.maximum(lengths_B - 1, 0)
    hidden_BD = jnp.zeros((num_rows, shape.width), dtype)
    # By chunks: no scores of later tokens are computed, nor held for whole rows.
    chunk = prefill_chunk_size(shape, max_prompt)
    read_GP = prompts_BP[groups[0]] if num_shared else prompts_BP
    cache = decoder.init_cache(shape, read_GP.shape[0], 0, dtype)
    for begin in range(0, max_prompt, chunk):
        stop = min(begin + chunk, max_prompt)
        if begin and begin == num_shared:
            read_GP, cache = prompts_BP, decoder.pick_rows(cache, groups[1])
        hidden_BCD, cache = decoder.decode(
            graphdef,
            params,
            read_GP[:, begin:stop],
            jnp.broadcast_to(time_P[begin:stop], (read_GP.shape[0], stop - begin)),
            decoder.extend_cache(cache, stop),
        )
        if stop <= num_shared:  # no prompt ends here
            continue
        column_B11 = jnp.clip(last_B - begin, 0, stop - begin - 1)[:, None, None]
        last_BD = jnp.take_along_axis(hidden_BCD, column_B11, axis=1)[:, 0]
        hidden_BD = jnp.where((last_B >= begin)[:, None], last_BD, hidden_BD)
    cache = decoder.extend_cache(cache, max_prompt + max_new_tokens)
    return hidden_BD, lengths_B, cache


def decode(
    graphdef: nnx.GraphDef,
    params: Params,
    token_B: Int[Array, "B"],
    position_B: Int[Array, "B"],
    cache: dict,
) -> tuple[Float[Array, "B D"], dict]:
    """Compute hidden states of one more token per row, and the extended cache."""
    model = t5 if "encoded" in cache else decoder
    hidden_B1D, cache = model.decode(
        graphdef, params, token_B[:, None], position_B[:, None], cache
    )
    return hidden_B1D[:, 0], cache

"""A language model of either kind, as the steps and verbs call it.

Decoder-only models read prompt and target in one row; those with an encoder (T5) read
the prompt there. What differs between them is here and in how rows are laid out:
batches of the second kind have `encoder_tokens` and `encoder_segments`.

Shapes: B rows, P prompt time (right padded), T time, D width, V vocabulary.
"""

import dataclasses
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from kdjax.config import DecoderConfig, LoraConfig, T5Config
from kdjax.losses.options import LogitRule
from kdjax.models import attention, decoder, t5
from kdjax.models import shape_checks as decoder_shape

Shape = DecoderConfig | T5Config
Params = dict  # nested: name -> dict or array

_PIECE, _MOST_PIECES = 256, 8  # fewest tokens of a prompt's pieces, and most pieces


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
    """Random float32 parameters, pure."""
    if isinstance(shape, T5Config):
        return t5.init_params(shape, key)
    return decoder.init_params(shape, key)


def stacks(shape: Shape) -> dict[str, int]:
    """Path of each stack of layers among the parameters, and how many it has."""
    if not isinstance(shape, T5Config):
        return {"layers": shape.num_layers}
    return {
        "encoder/layers": shape.num_encoder_layers,
        "decoder/layers": shape.num_decoder_layers,
    }


def reads_encoder(path: str) -> bool:
    """Whether a T5's kernel multiplies the encoder's tokens, not the decoder's."""
    cross = ("decoder/layers/cross/key", "decoder/layers/cross/value")
    return path.startswith(("encoder/", *cross))


def kept_layers(shape: Shape, layers: Mapping[str, Sequence[int]]) -> Shape:
    """The shape of a model made of some layers of another.

    Args:
      shape: the other's.
      layers: path of a stack -> its layers, in this order.
    """
    if not isinstance(shape, T5Config):
        return decoder_shape.kept_layers(shape, layers["layers"])
    return dataclasses.replace(
        shape,
        num_encoder_layers=len(layers["encoder/layers"]),
        num_decoder_layers=len(layers["decoder/layers"]),
    )


def dropout(shape: Shape) -> float:
    """The rate in training; decoder-only models have none."""
    return shape.dropout if isinstance(shape, T5Config) else 0.0


def hidden_states(
    graphdef: nnx.GraphDef, params: Params, rows: dict[str, Any]
) -> Float[Array, "B T D"]:
    """Hidden states after the final norm, in the compute dtype, for packed rows.

    Args:
      graphdef: from `create`.
      params: nested dict of arrays.
      rows: tokens, positions, segments [B, T]; with an encoder its tokens and segments
        [B, S]. With dropout_keys, uint32 [B, 2], a model that has dropout uses it.
    """
    if "encoder_tokens" not in rows:
        return decoder.hidden_states(
            graphdef, params, rows["tokens"], rows["positions"], rows["segments"]
        )
    keys = rows.get("dropout_keys")
    return t5.hidden_states(
        graphdef,
        params,
        t5.Rows(rows["encoder_tokens"], rows["encoder_segments"]),
        t5.Rows(rows["tokens"], rows["segments"]),
        dropout=None if keys is None else jax.random.wrap_key_data(keys),
    )


def head_weight(params: Params) -> Float[Array, "V D"]:
    """The output weight: the embedding if tied, else the head's own."""
    return decoder.head_weight(params)


def logit_rule(graphdef: nnx.GraphDef, params: Params) -> LogitRule:
    """How a model makes its logits: what every call of a head is given.

    Args:
      graphdef: the model's structure.
      params: its parameters, or their shapes.
    """
    return nnx.merge(graphdef, params).logit_rule


def logits(
    graphdef: nnx.GraphDef, params: Params, hidden: Float[Array, "... D"]
) -> Float[Array, "... V"]:
    """All logits in float32: for generation and tests; training uses the fused head."""
    return decoder.logits(params, hidden, rule=logit_rule(graphdef, params))


def room(shape: Shape, max_new_tokens: int) -> int:
    """The longest prompt that leaves room for so many new tokens."""
    if isinstance(shape, T5Config):
        return sys.maxsize  # positions are relative, and prompts have rows of their own
    return shape.max_length - max_new_tokens


def piece_size(shape: Shape, max_prompt: int) -> int:
    """Tokens that `start` reads at once: of long prompts an eighth, all by encoders."""
    if isinstance(shape, T5Config):
        return max_prompt
    return max(_PIECE, -(-max_prompt // _MOST_PIECES))


def start(
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
    """Read prompts.

    Args:
      shape: of the model.
      graphdef: from `create`.
      params: nested dict of arrays.
      prompts_BP: right padded.
      lengths_B: 0 where there is no prompt.
      max_new_tokens: that `decode` will read.
      num_shared: whole pieces of tokens that the prompts of a group begin with, fewer
        than any prompt has; they are read once a group (not by an encoder, which sees
        what comes after them too).
      groups: where num_shared is not 0, a row of each group [G] and the group of each
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
        cache = t5.start(
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
    # Piece by piece: none has scores for what comes after it, nor whole rows of them.
    piece = piece_size(shape, max_prompt)
    read_GP = prompts_BP[groups[0]] if num_shared else prompts_BP
    cache = decoder.init_cache(shape, read_GP.shape[0], 0, dtype)
    for begin in range(0, max_prompt, piece):
        stop = min(begin + piece, max_prompt)
        if begin and begin == num_shared:
            read_GP, cache = prompts_BP, decoder.pick_rows(cache, groups[1])
        hidden_BCD, cache = decoder.decode(
            graphdef,
            params,
            read_GP[:, begin:stop],
            jnp.broadcast_to(time_P[begin:stop], (read_GP.shape[0], stop - begin)),
            decoder.extend_cache(cache, stop),
        )
        if stop <= num_shared:  # nobody's last token
            continue
        place_B = jnp.clip(last_B - begin, 0, stop - begin - 1)[:, None, None]
        found_BD = jnp.take_along_axis(hidden_BCD, place_B, axis=1)[:, 0]
        hidden_BD = jnp.where((last_B >= begin)[:, None], found_BD, hidden_BD)
    cache = decoder.extend_cache(cache, max_prompt + max_new_tokens)
    return hidden_BD, lengths_B, cache


def decode(
    graphdef: nnx.GraphDef,
    params: Params,
    token_B: Int[Array, "B"],
    position_B: Int[Array, "B"],
    cache: dict,
) -> tuple[Float[Array, "B D"], dict]:
    """Hidden states of one more token of each row, and the cache with it."""
    model = t5 if "encoded" in cache else decoder
    hidden_B1D, cache = model.decode(
        graphdef, params, token_B[:, None], position_B[:, None], cache
    )
    return hidden_B1D[:, 0], cache

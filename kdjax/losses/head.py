"""The output head of a model, applied to a chunk of tokens.

Shapes: N tokens, C tokens of a chunk, V vocabulary, D width, K stored pairs.
"""

import dataclasses
import math
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from kdjax.losses.options import LabelOptions, LogitTransform, LossOptions
from kdjax.losses.token_scan import Placement
from kdjax.losses.vocab_shard import VocabShard

_Options = TypeVar("_Options", LossOptions, LabelOptions)


class Head(NamedTuple):
    """Weight and bias that make logits of hidden states, or their gradients."""

    weight_VD: Float[Array, "V D"]
    bias_V: Float[Array, "V"] | None = None


Heads = tuple[Head, Head | None]  # of the student, of an online teacher


def chunk_size(memory_mib: float, vocab_size: int, *, at_most: int = 1024) -> int:
    """Return the tokens per chunk whose float32 logits fit in `memory_mib`.

    The largest power of two that fits, at most `at_most`; 8 where even 8 do not fit.
    While gradients are made, they are alive beside the logits, in the dtype of the
    hidden states.
    """
    fitting = memory_mib * 2**20 / (4 * vocab_size)
    return min(at_most, max(8, 2 ** math.floor(math.log2(max(fitting, 1)))))


def head_logits(
    hidden_CD: Float[Array, "C D"],
    head: Head,
    transform: LogitTransform,
    shard: VocabShard,
) -> Float[Array, "C V"]:
    """Return float32 logits of the vocabulary rows here, padding -inf."""
    products_CV = matmul("cd,vd->cv", hidden_CD, head.weight_VD)
    if head.bias_V is not None:
        products_CV += head.bias_V.astype(jnp.float32)[None]
    return shard.mask(transform(products_CV))


def vocab_shard(
    options: LossOptions | LabelOptions, placement: Placement | None, head: Head
) -> VocabShard:
    """Return the rows of the vocabulary that `head` has on this device."""
    return VocabShard(
        size=head.weight_VD.shape[0],
        num_valid=num_valid(options),
        axis=placement.split if placement else None,
    )


def with_num_valid(options: _Options, weight_VD: jax.Array) -> _Options:
    """Return the options with a number for `num_valid`: all rows where it is None."""
    if options.num_valid is not None:
        return options
    return dataclasses.replace(options, num_valid=weight_VD.shape[0])


def num_valid(options: LossOptions | LabelOptions) -> int:
    """Return `num_valid` of options that have been through `with_num_valid`."""
    assert options.num_valid is not None
    return options.num_valid


def matmul(formula: str, x: jax.Array, y: jax.Array) -> jax.Array:
    """Return an einsum that accumulates in float32."""
    return jnp.einsum(formula, x, y, preferred_element_type=jnp.float32)


def add_products(
    d_weight_VD: Float[Array, "V D"],
    d_logits_CV: Float[Array, "C V"],
    hidden_CD: Float[Array, "C D"],
    placement: Placement | None,
) -> Float[Array, "V D"]:
    """Return d_weight + d_logits^T hidden.

    A CPU multiplies into an array of its own and adds that: done for a slice of the
    vocabulary at a time, the array is about half as large as the logits of the chunk
    (a width below the chunk's tokens makes it no larger than those anyway).
    """
    num_rows, num_slices = d_weight_VD.shape[0], 1
    num_tokens, width = hidden_CD.shape
    if _platform(placement) == "cpu" and width > num_tokens:
        num_slices = 2 * width // num_tokens
    size = num_rows // num_slices

    def add(d_weight_VD: jax.Array, start: jax.Array | int, size: int) -> jax.Array:
        logits = jax.lax.dynamic_slice_in_dim(d_logits_CV, start, size, axis=1)
        sums = jax.lax.dynamic_slice_in_dim(d_weight_VD, start, size)
        sums += matmul("cv,cd->vd", logits, hidden_CD)
        return jax.lax.dynamic_update_slice_in_dim(d_weight_VD, sums, start, axis=0)

    if num_slices == 1:
        return add(d_weight_VD, 0, num_rows)
    d_weight_VD = jax.lax.fori_loop(
        0, num_slices, lambda i, d: add(d, i * size, size), d_weight_VD
    )
    rest = num_rows - num_slices * size
    return add(d_weight_VD, num_rows - rest, rest) if rest else d_weight_VD


def _platform(placement: Placement | None) -> str:
    if placement is None:
        return jax.default_backend()
    return placement.mesh.devices.flat[0].platform


def check_shapes(
    options: LossOptions | LabelOptions, hidden_ND: jax.Array, head: Head, tokens: Any
) -> None:
    """Raise ValueError for shapes that would fail late, or not at all."""
    vocab_size, width = head.weight_VD.shape
    if not 1 <= num_valid(options) <= vocab_size:
        raise ValueError(
            f"num_valid={options.num_valid} must lie in 1..{vocab_size}, the rows of "
            "weight_VD: use None if no row is padding"
        )
    if hidden_ND.shape[1] != width:
        raise ValueError(
            f"hidden_ND has width {hidden_ND.shape[1]} and weight_VD {width}: pass the "
            "head of the same model"
        )
    if head.bias_V is not None and head.bias_V.shape != (vocab_size,):
        raise ValueError(
            f"bias_V of shape {head.bias_V.shape} does not fit {vocab_size} rows of "
            "weight_VD: pass one number per row"
        )
    for leaf in jax.tree.leaves(tokens):
        if leaf.shape[0] != hidden_ND.shape[0]:
            raise ValueError(
                f"a token array of shape {leaf.shape} does not belong to "
                f"{hidden_ND.shape[0]} tokens: flatten batch and time alike"
            )

"""What is fixed when the fused head is compiled, and what cannot be.

Shapes: N tokens, V vocabulary, D width.
"""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from kdjax.losses.divergence import Divergence
from kdjax.losses.sparse import FORWARD_KL, check_tail
from kdjax.losses.token_scan import Placement


@dataclass(frozen=True)
class LogitRule:
    """How logits are made of the products of hidden states and head: z = f(h W^T + b).

    f(x) = softcap * tanh(scale * x / softcap), or scale * x without a cap.

    Source: softcap: Gemma Team, 2024, Gemma 2, arXiv 2408.00118, section 2.
    """

    scale: float = 1.0  # multiplies the products, > 0
    softcap: float | None = None  # logits stay within +-softcap; None = no cap

    def __call__(self, products: jax.Array) -> jax.Array:
        """Return the logits, float32."""
        if self.scale != 1.0:
            products = products * self.scale
        if self.softcap is None:
            return products
        return self.softcap * jnp.tanh(products / self.softcap)

    def pull(self, d_logits: jax.Array, logits: jax.Array) -> jax.Array:
        """Return the gradient in the products."""
        if self.softcap is not None:
            # A padded row's logit is -inf and its gradient 0.
            slope = 1.0 - (logits / self.softcap) ** 2
            d_logits = d_logits * jnp.where(logits > -jnp.inf, slope, 0.0)
        return d_logits if self.scale == 1.0 else d_logits * self.scale


PLAIN = LogitRule()


@dataclass(frozen=True, kw_only=True)
class Options:
    """Everything about the loss that is fixed when it is compiled."""

    chunk_size: int
    num_valid: int  # rows of the vocabulary from here on are padding
    temperature: float = 1.0
    scale_by_t2: bool = True
    divergence: Divergence = FORWARD_KL
    tail: str = "bucket"
    label_smoothing: float = 0.0
    logit_rule: LogitRule = PLAIN
    teacher_rule: LogitRule = PLAIN  # of a live teacher
    placement: Placement | None = None

    @property
    def soft_scale(self) -> float:
        """T^2 or 1."""
        return self.temperature**2 if self.scale_by_t2 else 1.0


def check(options: Options, hidden_ND, head: Any, tokens: Any) -> None:
    """Raise ValueError for what would otherwise fail late, or not at all."""
    check_tail(options.tail, options.divergence)
    if not options.temperature > 0:
        raise ValueError(f"temperature={options.temperature} must be > 0: use 1.0")
    if not 0 <= options.label_smoothing < 1:
        raise ValueError(
            f"label_smoothing={options.label_smoothing} is a share: use 0 to below 1"
        )
    for rule in (options.logit_rule, options.teacher_rule):
        if not rule.scale > 0 or not (rule.softcap is None or rule.softcap > 0):
            raise ValueError(
                f"scale={rule.scale}, softcap={rule.softcap} must be > 0 (no cap: None)"
            )
    if options.chunk_size < 1:
        raise ValueError(f"chunk_size={options.chunk_size} must be >= 1: use 128")
    vocab_size, width = head.weight_VD.shape
    if not 1 <= options.num_valid <= vocab_size:
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
            "weight_VD: pass one number a row"
        )
    for leaf in jax.tree.leaves(tokens):
        if leaf.shape[0] != hidden_ND.shape[0]:
            raise ValueError(
                f"a token array of shape {leaf.shape} does not belong to "
                f"{hidden_ND.shape[0]} tokens: flatten batch and time alike"
            )
    teacher = getattr(tokens, "teacher", None)
    if teacher is not None:
        _check_teacher(options, vocab_size, teacher)


def _check_teacher(options: Options, vocab_size: int, teacher: Any) -> None:
    if teacher.entropy_N is not None and options.divergence.name != "forward_kl":
        raise ValueError(
            f"divergence={options.divergence.name!r} with draws of the teacher: they "
            "estimate 'forward_kl' alone; use it, or label with cache.kind='top_k'"
        )
    if teacher.ids_NK is None and teacher.log_probs_NK is not None:
        num_columns = teacher.log_probs_NK.shape[1]
        if num_columns != vocab_size:
            raise ValueError(
                f"a dense teacher of {num_columns} columns does not fit {vocab_size} "
                "rows of weight_VD: pad its log-probabilities with -inf"
            )

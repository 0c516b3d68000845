"""What is fixed when the fused head is compiled, and what cannot be.

Shapes: N tokens, V vocabulary, D width.
"""

from dataclasses import dataclass
from typing import Any

import jax

from kdjax.losses.divergence import Divergence
from kdjax.losses.scan import Placement
from kdjax.losses.sparse import FORWARD_KL, check_tail


@dataclass(frozen=True)
class Options:
    """Everything about the loss that is fixed when it is compiled."""

    temperature: float
    scale_by_t2: bool
    tail: str
    chunk_size: int
    num_valid: int | None
    placement: Placement | None
    divergence: Divergence = FORWARD_KL

    @property
    def soft_scale(self) -> float:
        """T^2 or 1."""
        return self.temperature**2 if self.scale_by_t2 else 1.0


def check(options: Options, hidden_ND, weight_VD, tokens: Any) -> None:
    """Raise ValueError for what would otherwise fail late, or not at all."""
    check_tail(options.tail, options.divergence)
    if not options.temperature > 0:
        raise ValueError(f"temperature={options.temperature} must be > 0: use 1.0")
    if options.chunk_size < 1:
        raise ValueError(f"chunk_size={options.chunk_size} must be >= 1: use 128")
    vocab_size, width = weight_VD.shape
    if options.num_valid is not None and not 1 <= options.num_valid <= vocab_size:
        raise ValueError(
            f"num_valid={options.num_valid} must lie in 1..{vocab_size}, the rows of "
            "weight_VD: use None if no row is padding"
        )
    if hidden_ND.shape[1] != width:
        raise ValueError(
            f"hidden_ND has width {hidden_ND.shape[1]} and weight_VD {width}: pass the "
            "head of the same model"
        )
    for leaf in jax.tree.leaves(tokens):
        if leaf.shape[0] != hidden_ND.shape[0]:
            raise ValueError(
                f"a token array of shape {leaf.shape} does not belong to "
                f"{hidden_ND.shape[0]} tokens: flatten batch and time alike"
            )
    teacher = getattr(tokens, "teacher", None)
    drawn = teacher is not None and teacher.entropy_N is not None
    if drawn and options.divergence.name != "forward_kl":
        raise ValueError(
            f"divergence={options.divergence.name!r} with draws of the teacher: they "
            "estimate 'forward_kl' alone; use it, or label with cache.kind='top_k'"
        )
    if teacher is not None and teacher.ids_NK is None:
        num_columns = teacher.log_probs_NK.shape[1]
        if num_columns != vocab_size:
            raise ValueError(
                f"a dense teacher of {num_columns} columns does not fit {vocab_size} "
                "rows of weight_VD: pad its log-probabilities with -inf"
            )

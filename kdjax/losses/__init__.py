"""Losses against a teacher's distributions, made from hidden states in chunks.

The logits of all tokens never exist at once, and no array of size [tokens, vocabulary]
outlives a chunk. In a training loop of one's own:

    from kdjax import losses

    options = losses.LossOptions(temperature=2.0, chunk_size=128)

    def loss_fn(params, batch):
        hidden_ND = model(params, batch)  # [N, D], after the final norm
        teacher = losses.Teacher(ids_NK, log_probs_NK, log_z_N)  # the top k, stored
        loss, per_token = losses.fused_loss(
            hidden_ND, params["head"], targets_N, hard_weights_N, soft_weights_N,
            teacher, options,
        )
        return loss

Gradients reach the hidden states, the head and its bias. Weights per token are usually
1 / (number of target tokens of the batch), and 0 for padding.

`score` and `label` are the passes without gradient; `Placement` splits the work over a
mesh. Importing this package imports JAX and jaxtyping alone.
"""

from kdjax.losses.chunk_loss import Teacher
from kdjax.losses.divergence import DIVERGENCES, Divergence
from kdjax.losses.fused_head import OnlineTeacherLogits, fused_loss
from kdjax.losses.head import chunk_size
from kdjax.losses.inference import label, score
from kdjax.losses.options import LabelOptions, LogitTransform, LossOptions
from kdjax.losses.sparse import TAILS
from kdjax.losses.token_scan import Placement

__all__ = [
    "DIVERGENCES",
    "TAILS",
    "Divergence",
    "LabelOptions",
    "LogitTransform",
    "LossOptions",
    "OnlineTeacherLogits",
    "Placement",
    "Teacher",
    "chunk_size",
    "fused_loss",
    "label",
    "score",
]

"""Losses between layers of the student and layers of an online teacher.

Hidden states and attention cannot be stored for every token as cheaply as the top k of
a distribution: these terms want a teacher that runs beside the student.

Shapes: n pairs of layers, B rows, T time, S attended time, D width of the student,
E width of the teacher.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

_TINY = jnp.finfo(jnp.float32).tiny


def hidden_loss(
    student_nBTD: Float[Array, "n B T D"],
    teacher_nBTE: Float[Array, "n B T E"],
    *,
    kind: str,
    projection_nDE: Float[Array, "n D E"] | None = None,
) -> Float[Array, "B T"]:
    """Return the distance of the student's hidden states from the teacher's.

      mse     mean over the width of (h W - g)^2
      cosine  1 - cos(h W, g)

    with h the student's state, g the teacher's, W the learned projection (the identity
    without one); the mean over the pairs of layers, in float32.

    Args:
      student_nBTD: states after the student's mapped layers.
      teacher_nBTE: states after the teacher's.
      kind: "mse" or "cosine".
      projection_nDE: needed where the widths differ.

    Returns:
      float32 per position, never negative, without unit.

    Raises:
      ValueError: an unknown kind, or widths that differ without a projection.

    Source: mse: Jiao et al., 2020, TinyBERT, arXiv 1909.10351, equation 8; cosine: Sanh
    et al., 2019, DistilBERT, arXiv 1910.01108, section 3.
    """
    if projection_nDE is not None:
        student_nBTD = jnp.einsum(
            "nbtd,nde->nbte",
            student_nBTD,
            projection_nDE.astype(student_nBTD.dtype),
            preferred_element_type=jnp.float32,
        )
    if student_nBTD.shape != teacher_nBTE.shape:
        raise ValueError(
            f"hidden states of shapes {student_nBTD.shape} and {teacher_nBTE.shape} do "
            "not match: use a projection (method.hidden_projection=True)"
        )
    h, g = student_nBTD.astype(jnp.float32), teacher_nBTE.astype(jnp.float32)
    if kind == "mse":
        return ((h - g) ** 2).mean((0, -1))
    if kind == "cosine":
        # Half the squared distance of the unit vectors: never negative by rounding.
        return (0.5 * (_unit(h) - _unit(g)) ** 2).sum(-1).mean(0)
    raise ValueError(f"kind={kind!r} is unknown: use 'mse' or 'cosine'")


def attention_loss(
    student_nBTS: Float[Array, "n B T S"], teacher_nBTS: Float[Array, "n B T S"]
) -> Float[Array, "B T"]:
    """Return the KL of the student's attention from the teacher's.

      sum_s a_s log(a_s / b_s),  a the teacher's weights, b the student's, each the mean
      over the layer's heads; the mean over the pairs of layers.

    Means over heads compare models with different numbers of heads.

    Args:
      student_nBTS: float32 weights, which sum to 1 over S.
      teacher_nBTS: the same of the teacher.

    Returns:
      float32 nats per position that attends, never negative.

    Source: Wang et al., 2020, MiniLM, arXiv 2002.10957, equation 5, there head by head.
    """
    b, a = jnp.maximum(student_nBTS, _TINY), teacher_nBTS
    log_ratio = jnp.log(jnp.maximum(a, _TINY)) - jnp.log(b)
    # With - a + b, whose sum is 0 but for rounding, no summand is negative.
    return (a * log_ratio - a + b).sum(-1).mean(0)


def _unit(x: jax.Array) -> jax.Array:
    """Return vectors of length 1 along the last axis; 0 stays 0."""
    squared = (x * x).sum(-1, keepdims=True)
    return x * jax.lax.rsqrt(jnp.maximum(squared, _TINY))

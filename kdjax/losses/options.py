"""Options of the fused head, fixed when it is compiled."""

from dataclasses import dataclass

import jax.numpy as jnp
from jaxtyping import Array, Float

from kdjax.losses.divergence import Divergence
from kdjax.losses.sparse import FORWARD_KL, check_tail


@dataclass(frozen=True)
class LogitTransform:
    """Map from the products of hidden states and head to logits, z = f(h W^T + b).

    f(x) = softcap * tanh(scale * x / softcap), or scale * x without a cap.

    Raises:
      ValueError: a scale or a cap that is not positive.

    Source: softcap: Gemma Team, 2024, Gemma 2, arXiv 2408.00118, section 2.
    """

    scale: float = 1.0  # multiplies the products, > 0
    softcap: float | None = None  # logits stay within +-softcap, > 0; None = no cap

    def __post_init__(self) -> None:
        """Check the range of both."""
        if not self.scale > 0 or not (self.softcap is None or self.softcap > 0):
            raise ValueError(
                f"scale={self.scale}, softcap={self.softcap} must be > 0 (no cap: None)"
            )

    def __call__(self, products: Float[Array, "..."]) -> Float[Array, "..."]:
        """Return the logits, float32."""
        if self.scale != 1.0:
            products = products * self.scale
        if self.softcap is None:
            return products
        return self.softcap * jnp.tanh(products / self.softcap)

    def vjp(
        self, d_logits: Float[Array, "..."], logits: Float[Array, "..."]
    ) -> Float[Array, "..."]:
        """Return the gradient in the products, given that in the logits."""
        if self.softcap is not None:
            # A padded row's logit is -inf and its gradient 0.
            slope = 1.0 - (logits / self.softcap) ** 2
            d_logits = d_logits * jnp.where(logits > -jnp.inf, slope, 0.0)
        return d_logits if self.scale == 1.0 else d_logits * self.scale


IDENTITY = LogitTransform()


@dataclass(frozen=True, kw_only=True, slots=True)
class LossOptions:
    """Options of `fused_loss` and `score`.

    Raises:
      ValueError: an option out of range, or a tail that the divergence cannot have.
    """

    temperature: float = 1.0  # T of the soft term, > 0; log Z must be for this T
    scale_by_t2: bool = True  # times T^2: the soft gradient's size is that of T = 1
    divergence: Divergence = FORWARD_KL  # of the soft term; draws: forward KL alone
    tail: str = "bucket"  # stands for ids that are not stored, one of `sparse.TAILS`
    label_smoothing: float = 0.0  # share of the hard target spread over the vocabulary
    logit_transform: LogitTransform = IDENTITY  # of the student
    teacher_logit_transform: LogitTransform = IDENTITY  # of an online teacher
    chunk_size: int = 256  # most tokens whose logits are alive at once, per device
    num_valid: int | None = None  # head rows from here on are padding; None = no row is

    def __post_init__(self) -> None:
        """Check all that no array is needed for."""
        check_tail(self.tail, self.divergence)
        if not self.temperature > 0:
            raise ValueError(f"temperature={self.temperature} must be > 0: use 1.0")
        if not 0 <= self.label_smoothing < 1:
            raise ValueError(
                f"label_smoothing={self.label_smoothing} is a share: use 0 to below 1"
            )
        _check_chunk_size(self.chunk_size)

    @property
    def soft_scale(self) -> float:
        """T^2 or 1."""
        return self.temperature**2 if self.scale_by_t2 else 1.0


@dataclass(frozen=True, kw_only=True, slots=True)
class LabelOptions:
    """Options of `label`.

    Raises:
      ValueError: an option out of range.
    """

    k: int | None  # pairs stored per token, at most num_valid; None = the whole row
    temperatures: tuple[float, ...]  # declared temperatures, each > 0
    with_entropy: bool = True  # compute the teacher's entropies
    logit_transform: LogitTransform = IDENTITY  # of the teacher
    chunk_size: int = 256  # most tokens whose logits are alive at once, per device
    num_valid: int | None = None  # head rows from here on are padding; None = no row is

    def __post_init__(self) -> None:
        """Check all that no array is needed for."""
        if not self.temperatures or min(self.temperatures) <= 0:
            raise ValueError(
                f"temperatures={self.temperatures} must be > 0: declare one or more"
            )
        _check_chunk_size(self.chunk_size)


def _check_chunk_size(chunk_size: int) -> None:
    if chunk_size < 1:
        raise ValueError(f"chunk_size={chunk_size} must be >= 1: use 128")

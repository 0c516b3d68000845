"""The rows of the vocabulary that a device works on, and reductions over all of them.

Shapes: C tokens of a chunk, V vocabulary rows here, K stored pairs.
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int


@dataclass(frozen=True)
class VocabShard:
    """A device's shard of the vocabulary: all of it, or one of equal slices.

    Where it is one of several, every device of the axis works on the same tokens, and
    `sum` and `max` reduce over the shards: per-token numbers, the only ones that are
    exchanged while a chunk is worked on.
    """

    size: int  # rows here
    num_valid: int  # ids of the whole vocabulary that are not padding
    axis: str | None = None  # mesh axis over which the vocabulary is split

    def local(self, ids: Int[Array, "..."]) -> Int[Array, "..."]:
        """Return the ids counted from the first row here; `size` for all others."""
        ids = ids - self._first()
        return jnp.where((ids >= 0) & (ids < self.size), ids, self.size)

    def mask(self, logits_CV: Float[Array, "C V"]) -> Float[Array, "C V"]:
        """Return the logits with -inf for padding of the vocabulary."""
        if self.axis is None:
            if self.num_valid < self.size:
                logits_CV = logits_CV.at[:, self.num_valid :].set(-jnp.inf)
            return logits_CV
        valid_V = self._first() + jnp.arange(self.size) < self.num_valid
        return jnp.where(valid_V[None], logits_CV, -jnp.inf)

    def sum(self, x: Float[Array, "..."]) -> Float[Array, "..."]:
        """Return the sum of a per-token quantity over the shards."""
        return x if self.axis is None else jax.lax.psum(x, self.axis)

    def max(self, x: Float[Array, "..."]) -> Float[Array, "..."]:
        """Return the maximum of a per-token quantity over the shards."""
        return x if self.axis is None else jax.lax.pmax(x, self.axis)

    def peak(self, values_CV: Float[Array, "C V"]) -> Float[Array, "C"]:
        """Return the largest value of each row; 0 where none is above -inf."""
        peak_C = self.max(values_CV.max(-1))
        return jnp.where(peak_C > -jnp.inf, peak_C, 0.0)

    def logsumexp(
        self, values_CV: Float[Array, "C V"], peak_C: Float[Array, "C"], t: float
    ) -> Float[Array, "C"]:
        """Return log sum exp(values / t) over the rows; -inf if all are."""
        mass_C = jnp.exp((values_CV - peak_C[:, None]) / t).sum(-1)
        return jnp.log(self.sum(mass_C)) + peak_C / t

    def take(
        self, values_CV: Float[Array, "C V"], ids_C: Int[Array, "C"]
    ) -> Float[Array, "C"]:
        """Return the value of one id of each row."""
        rows_C = jnp.arange(ids_C.shape[0])
        values_C = values_CV.at[rows_C, self.local(ids_C)].get(
            mode="fill", fill_value=0
        )
        return self.sum(values_C)

    def _first(self) -> Int[Array, ""] | int:
        """Return the id of the first row here."""
        return 0 if self.axis is None else jax.lax.axis_index(self.axis) * self.size

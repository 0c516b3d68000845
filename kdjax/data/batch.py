"""The batch of a step: fields, shapes and dtypes in one place.

The same class serves the loader (NumPy arrays of this host's rows), the compiled steps
(traced arrays) and ahead-of-time compilation (shapes with shardings): `BatchSpec.build`
makes each of them.

Shapes: M microbatches, R rows of a microbatch, T row length, S length of the encoder's
row, K pairs of the teacher. Inside a step one microbatch is a batch without the axis M.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

Array = Any  # a NumPy array, a JAX array or a ShapeDtypeStruct


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class EncoderRows:
    """Prompts as an encoder reads them."""

    tokens: Array  # int32 [M, R, S]
    positions: Array  # int32 [M, R, S]
    segments: Array  # int32 [M, R, S]; 0 in padding, then 1..


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class TeacherRecords:
    """The teacher's distribution for each target; without a record see the defaults."""

    log_probs: Array  # float32 [M, R, T, K]; -inf. Sampled: log of the share of draws
    log_z: Array  # float32 [M, R, T], at the temperature of the step; 0
    ids: Array | None = (
        None  # int32 [M, R, T, K]; -1. None = dense, K is the vocabulary
    )
    entropy: Array | None = None  # float32 [M, R, T], nats; 0. None = not sampled


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Batch:
    """The arrays of one step."""

    tokens: Array  # int32 [M, R, T]
    targets: Array  # int32 [M, R, T], the next token
    positions: Array  # int32 [M, R, T], from 0 in each segment
    segments: Array  # int32 [M, R, T]; 0 in padding, then 1..
    view: Array  # int32 [M, R, T]; -1 where the target is not trained on
    weights: dict[str, Array]  # kind of a term -> float32 [M, R, T]
    encoder: EncoderRows | None = None  # None = decoder-only
    dropout_keys: Array | None = None  # uint32 [M, R, 2]; None = no dropout
    teacher: TeacherRecords | None = None  # None = no records

    @property
    def num_target_tokens(self) -> int:
        """The number of tokens that are trained on, of a batch on the host."""
        return int((self.view >= 0).sum())

    @property
    def num_tokens(self) -> Array:
        """The number of tokens that are no padding, the encoder's included."""
        total = (self.segments > 0).sum(dtype=np.int32)
        if self.encoder is not None:
            total += (self.encoder.segments > 0).sum(dtype=np.int32)
        return total

    def flattened(self) -> "Batch":
        """Merge the first two axes: rows of a batch, or tokens of a microbatch."""
        return jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), self)

    def without_teacher(self) -> "Batch":
        """Drop the teacher's records."""
        return dataclasses.replace(self, teacher=None)

    def without_dropout(self) -> "Batch":
        """Drop the keys, so that a model that reads the batch drops nothing."""
        return dataclasses.replace(self, dropout_keys=None)


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class BatchSpec:
    """What decides the arrays of a batch."""

    num_microbatches: int
    num_rows: int  # R
    row_length: int  # T
    encoder_length: int = 0  # S; 0 = decoder-only
    weight_kinds: tuple[str, ...] = ("hard", "soft")
    dropout: bool = False  # brings a key for each row
    teacher_kind: str | None = None  # one of CACHE_KINDS; None = no records
    num_pairs: int = 0  # K

    def build(self, make: Callable[[tuple[int, ...], Any, float], Array]) -> Batch:
        """Make a batch, each array by `make(shape, dtype, value without a token)`."""
        lead = (self.num_microbatches, self.num_rows)
        shape = (*lead, self.row_length)

        def integers(shape: tuple[int, ...] = shape, value: int = 0) -> Array:
            return make(shape, np.int32, value)

        def floats(shape: tuple[int, ...] = shape, value: float = 0.0) -> Array:
            return make(shape, np.float32, value)

        encoder = teacher = None
        if self.encoder_length:
            encoder_shape = (*lead, self.encoder_length)
            encoder = EncoderRows(
                tokens=integers(encoder_shape),
                positions=integers(encoder_shape),
                segments=integers(encoder_shape),
            )
        if self.teacher_kind is not None:
            pairs = (*shape, self.num_pairs)
            dense, sampled = (
                self.teacher_kind == "dense",
                self.teacher_kind == "sampled",
            )
            teacher = TeacherRecords(
                log_probs=floats(pairs, -np.inf),
                log_z=floats(),
                ids=None if dense else integers(pairs, -1),
                entropy=floats() if sampled else None,
            )
        return Batch(
            tokens=integers(),
            targets=integers(),
            positions=integers(),
            segments=integers(),
            view=integers(value=-1),
            weights={kind: floats() for kind in self.weight_kinds},
            encoder=encoder,
            dropout_keys=make((*lead, 2), np.uint32, 0) if self.dropout else None,
            teacher=teacher,
        )

    def empty(self) -> Batch:
        """Make a batch of padding, in NumPy."""
        return self.build(lambda shape, dtype, value: np.full(shape, value, dtype))

    def abstract(self, sharding: jax.sharding.Sharding) -> Batch:
        """Describe a batch whose arrays all have `sharding`, without memory."""
        return self.build(
            lambda shape, dtype, value: jax.ShapeDtypeStruct(
                shape, dtype, sharding=sharding
            )
        )

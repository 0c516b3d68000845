"""The compiled training step that a config stands for, and the shapes that it takes."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding

from kdjax import methods, optim, sharding, state, step
from kdjax.config import CacheConfig, Config
from kdjax.experiment import Model
from kdjax.losses import head
from kdjax.state import TrainState


@dataclass(frozen=True, kw_only=True, slots=True)
class Program:
    """A training step, compiled when it is first called (or lowered ahead of time)."""

    step: Callable[[TrainState, Any], tuple[TrainState, dict[str, Any]]]
    abstract: TrainState  # shapes and shardings of the state
    optimizer: optax.GradientTransformation
    num_rows: int  # rows of a microbatch, over all hosts


def make_program(
    config: Config, model: Model, mesh: Mesh, *, num_valid: int | None = None
) -> Program:
    """The step that `kdjax.train` runs; nothing is compiled or allocated yet.

    Args:
      config: the run.
      model: the student's structure and shardings.
      mesh: devices, real or described.
      num_valid: vocabulary rows of the student from here on are padding; None = none.
    """
    train, method = config.train, config.method
    optimizer = optim.make_optimizer(config.optim, steps=train.steps)
    abstract = state.abstract_state(model.abstract, optimizer, mesh)
    train_step = step.make_train_step(
        model.graphdef,
        optimizer,
        optim.make_schedule(config.optim, steps=train.steps),
        mesh,
        abstract,
        num_views=len(methods.views(method)),
        temperature=method.temperature,
        scale_by_t2=method.scale_by_t2,
        divergence=methods.divergence(method),
        tail=method.tail,
        chunk_size=chunk_size(config, model),
        num_valid=num_valid,
    )
    return Program(
        step=train_step,
        abstract=abstract,
        optimizer=optimizer,
        num_rows=train.batch_size // train.num_microbatches,
    )


def chunk_size(config: Config, model: Model) -> int:
    """Tokens of a chunk of the fused head."""
    train = config.train
    return train.chunk_size or head.chunk_size(train.memory_mib, model.shape.vocab_size)


def abstract_batch(
    config: Config, mesh: Mesh, *, vocab_size: int
) -> dict[str, jax.ShapeDtypeStruct]:
    """Shapes and shardings of the global batch of `loader.make_batch`.

    Args:
      config: the run; without soft terms the batch has no teacher.
      mesh: devices, real or described.
      vocab_size: of the teacher (a dense cache has so many columns).
    """
    train = config.train
    rows = (train.num_microbatches, train.batch_size // train.num_microbatches)
    lead = (*rows, train.row_length)
    placed = NamedSharding(mesh, sharding.BATCH_SPEC)

    def array(shape: tuple[int, ...], dtype: Any) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, dtype, sharding=placed)

    names = ("tokens", "targets", "positions", "segments", "view")
    batch = {name: array(lead, jnp.int32) for name in names}
    for name in ("hard_weights", "soft_weights"):
        batch[name] = array(lead, jnp.float32)
    if config.method.soft_weight:
        kind, pairs = config.cache.kind, stored_pairs(config.cache, vocab_size)
        batch["teacher_log_probs"] = array((*lead, pairs), jnp.float32)
        batch["teacher_log_z"] = array(lead, jnp.float32)
        if kind != "dense":
            batch["teacher_ids"] = array((*lead, pairs), jnp.int32)
        if kind == "sampled":
            batch["teacher_entropy"] = array(lead, jnp.float32)
    return batch


def stored_pairs(cache: CacheConfig, vocab_size: int) -> int:
    """Columns of the teacher's arrays in a training batch."""
    if cache.kind == "dense":
        return vocab_size
    return cache.num_draws if cache.kind == "sampled" else min(cache.k, vocab_size)

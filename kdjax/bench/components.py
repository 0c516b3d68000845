"""The parts of a training step, each compiled and run by itself, to time them.

Legend: M microbatches, N tokens of a microbatch, D width, V vocabulary, K stored pairs.
"""

import dataclasses
import functools
from collections.abc import Callable, Collection
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from kdjax import losses
from kdjax.bench.workload import Step, Workload
from kdjax.config import Config
from kdjax.data.batch import TeacherRecords
from kdjax.experiment.models import Model, make_model, shared_vocab_size
from kdjax.models import hf, lm
from kdjax.parallel import sharding
from kdjax.training import program, step, trainable

_TOKEN_SPEC = P(("data", "fsdp"))  # [N, ...]


def parts(load: Workload, whole: Step) -> dict[str, Callable[[], Any]]:
    """The parts of `whole` alone: one microbatch of student and head, one update.

    "student" is the forward and backward pass up to the hidden states, with their sum
    in place of the loss; "head" the loss and its gradients on given hidden states;
    "optimizer" the update with given gradients.
    """
    carry, mesh = whole.carry, load.mesh
    placed = NamedSharding(mesh, _TOKEN_SPEC)
    rows = jax.jit(
        lambda batch: jax.tree.map(lambda x: x[0], batch), out_shardings=placed
    )(whole.batch)
    frozen = whole.program.frozen
    student = _student_pass(load, frozen)
    fused_head = _head_pass(load, frozen)
    update = _update(whole.program)
    num_tokens = rows.tokens.size
    hidden_ND = jax.jit(
        lambda key: jax.random.normal(
            key, (num_tokens, load.model.shape.width), load.config.train.dtype
        ),
        out_shardings=placed,
    )(jax.random.key(0))

    def update_step() -> Any:
        old = carry.state
        trained, kept = trainable.split(old.params, frozen)
        trained, opt_state, norm = update(trained, old.opt_state)
        params = trainable.merged(kept, trained)
        carry.state = old._replace(params=params, opt_state=opt_state)
        return norm

    return {
        "student": lambda: student(carry.state.params, rows)[0],
        "head": lambda: fused_head(hidden_ND, lm.head_weight(carry.state.params), rows)[
            0
        ],
        "optimizer": update_step,
    }


def _student_pass(load: Workload, frozen: Collection[str]) -> Callable[[Any, Any], Any]:
    def loss_of(trained: Any, kept: Any, rows: Any) -> jax.Array:
        params = trainable.merged(kept, trained)
        hidden_BTD = lm.hidden_states(load.model.graphdef, params, rows)
        return hidden_BTD.astype(jnp.float32).sum()

    def gradient_of(params: Any, rows: Any) -> Any:
        return jax.value_and_grad(loss_of)(*trainable.split(params, frozen), rows)

    shardings = load.model.shardings
    everywhere = sharding.replicated(load.mesh)
    return jax.jit(
        gradient_of,
        in_shardings=(shardings, NamedSharding(load.mesh, _TOKEN_SPEC)),
        out_shardings=(everywhere, trainable.split(shardings, frozen)[0]),
    )


def _head_pass(
    load: Workload, frozen: Collection[str]
) -> Callable[[Any, Any, Any], Any]:
    options = program.loss_options(
        load.config,
        load.model,
        load.config.method.temperature,
        shared_vocab_size(load.model.shape, load.cache),
    )

    def loss_of(hidden_ND: Any, weight_VD: Any, rows: Any) -> jax.Array:
        flat = rows.flattened()
        return losses.fused_loss(
            hidden_ND,
            weight_VD,
            flat.targets,
            flat.weights["hard"],
            flat.weights["soft"],
            step.stored_teacher(rows),
            options,
            placement=losses.Placement(load.mesh, sharding.HEAD_SPEC, "tensor"),
        )[0]

    trains_head = lm.head_weight(trainable.trains(load.model.abstract, frozen))
    argnums = (0, 1) if trains_head else 0
    return jax.jit(jax.value_and_grad(loss_of, argnums=argnums))


def _update(made: program.Program) -> Callable[[Any, Any], Any]:
    """The step's update; the gradients are made from the trained parameters."""
    shardings = jax.tree.map(lambda x: x.sharding, made.abstract)
    placed = trainable.split(shardings.params, made.frozen)[0]

    def update(params: Any, opt_state: Any) -> Any:
        grads = jax.tree.map(lambda x: x * 1e-3, params)
        norm = optax.tree.norm(grads)
        with jax.numpy_dtype_promotion("standard"):  # as the step: optax is not strict
            updates, new_state = made.optimizer.update(grads, opt_state, params)
            new_params = optax.apply_updates(params, updates)
        new, old = (new_params, new_state), (params, opt_state)
        finite = jnp.isfinite(norm)
        chosen = jax.tree.map(lambda x, y: jnp.where(finite, x, y), new, old)
        return *chosen, norm

    return jax.jit(
        update,
        donate_argnums=(0, 1),
        out_shardings=(placed, shardings.opt_state, None),
    )


def online(load: Workload, whole: Step) -> dict[str, Callable[[], Any]]:
    """A live teacher's part of a step, and the step with it.

    The teacher has the shape of the config's, and random parameters. "label" is its
    forward pass and top k (dense: whole rows) on the prepared batch; "online" the
    training step with the teacher in it. {} without soft terms, or with draws.

    Args:
      load: the workload.
      whole: its step.
    """
    if load.cache is None or load.cache.kind == "sampled":
        return {}
    model, params = _random_teacher(load)
    k = None if load.cache.kind == "dense" else load.cache.k
    label = make_live_label(load, model, whole.batch, k=k)
    beside = Step(load, whole.carry, teacher=(model, params))
    return {"label": lambda: label(params), "online": beside.prepared}


def _random_teacher(load: Workload) -> tuple[Model, Any]:
    """A teacher of the config's shape, its parameters drawn at random."""
    config, mesh = load.config, load.mesh
    shape = teacher_shape(config, load.model.shape.vocab_size)
    model = make_model(shape, mesh, dtype=config.train.dtype)
    init = jax.jit(
        lambda key: lm.init_params(shape, key), out_shardings=model.shardings
    )
    return model, init(jax.random.key(config.teacher_seed))


def make_live_label(
    load: Workload, model: Model, batch: Any, *, k: int | None
) -> Callable[[Any], TeacherRecords]:
    """Compile the teacher's parameters -> its records for `batch`.

    Args:
      load: the workload.
      model: the teacher's.
      batch: on the devices.
      k: pairs a token; None = whole rows.
    """
    config, mesh = load.config, load.mesh
    label_step = step.make_label_step(
        model.graphdef,
        mesh,
        model.abstract,
        k=k,
        temperatures=(config.method.temperature,),
        chunk_size=config.cache.chunk_size
        or losses.chunk_size(config.cache.memory_mib, model.shape.vocab_size),
    )
    prompts = batch.without_teacher().without_dropout()
    lead = batch.tokens.shape
    placed = NamedSharding(mesh, sharding.BATCH_SPEC)

    @functools.partial(jax.jit, out_shardings=placed)
    def as_records(labels: dict[str, jax.Array]) -> TeacherRecords:
        records = TeacherRecords(
            log_probs=labels["log_probs_NK"],
            log_z=labels["log_z_NS"][:, 0],
            ids=None if k is None else labels["ids_NK"],
        )
        return jax.tree.map(lambda x: x.reshape(*lead, *x.shape[1:]), records)

    return lambda params: as_records(label_step(params, prompts, None))


def teacher_shape(config: Config, vocab_size: int) -> lm.Shape:
    """The shape of the config's teacher; only its config.json is read."""
    if config.teacher.path:
        return hf.read_config(config.teacher.path)
    shape = config.teacher.decoder
    return dataclasses.replace(shape, vocab_size=shape.vocab_size or vocab_size)

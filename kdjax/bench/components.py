"""Components of a training step, each compiled and run alone to be timed.

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
from kdjax.training import step, trainable
from kdjax.training.program import Program, loss_options
from kdjax.training.state import TrainState

_TOKEN_SPEC = P(("data", "fsdp"))  # [N, ...]


def components(workload: Workload, step: Step) -> dict[str, Callable[[], Any]]:
    """Make functions that run the components of a step, each alone.

    "student" is the forward and backward pass of one microbatch up to the hidden
    states, with their sum in place of the loss; "head" the loss of one microbatch and
    its gradients on given hidden states; "optimizer" the update with given gradients.
    """
    shared, mesh = step.shared, workload.mesh
    placed = NamedSharding(mesh, _TOKEN_SPEC)
    rows = jax.jit(
        lambda batch: jax.tree.map(lambda x: x[0], batch), out_shardings=placed
    )(step.batch)
    frozen_paths = step.program.frozen_paths
    student = _student_pass(workload, frozen_paths)
    head = _head_pass(workload, frozen_paths)
    update = _update(step.program, workload.config.optim.ema_decay)
    hidden_ND = jax.jit(
        lambda key: jax.random.normal(
            key,
            (rows.tokens.size, workload.model.shape.width),
            workload.config.train.dtype,
        ),
        out_shardings=placed,
    )(jax.random.key(0))

    def run_head() -> Any:
        return head(hidden_ND, lm.head_weight(shared.state.params), rows)[0]

    def run_optimizer() -> Any:
        shared.state, norm = update(shared.state)
        return norm

    return {
        "student": lambda: student(shared.state.params, rows)[0],
        "head": run_head,
        "optimizer": run_optimizer,
    }


def _student_pass(
    workload: Workload, frozen_paths: Collection[str]
) -> Callable[[Any, Any], Any]:
    def loss_of(trained: Any, frozen: Any, rows: Any) -> jax.Array:
        params = trainable.merge(frozen, trained)
        hidden_BTD = lm.hidden_states(workload.model.graphdef, params, rows)
        return hidden_BTD.astype(jnp.float32).sum()

    def gradient_of(params: Any, rows: Any) -> Any:
        trained, frozen = trainable.partition(params, frozen_paths)
        return jax.value_and_grad(loss_of)(trained, frozen, rows)

    shardings = workload.model.shardings
    everywhere = sharding.replicated(workload.mesh)
    return jax.jit(
        gradient_of,
        in_shardings=(shardings, NamedSharding(workload.mesh, _TOKEN_SPEC)),
        out_shardings=(everywhere, trainable.partition(shardings, frozen_paths)[0]),
    )


def _head_pass(
    workload: Workload, frozen_paths: Collection[str]
) -> Callable[[Any, Any, Any], Any]:
    options = loss_options(
        workload.config,
        workload.model,
        workload.config.method.temperature,
        shared_vocab_size(workload.model.shape, workload.cache),
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
            placement=losses.Placement(workload.mesh, sharding.HEAD_SPEC, "tensor"),
        )[0]

    mask = trainable.trainable_mask(workload.model.abstract, frozen_paths)
    trains_head = lm.head_weight(mask)
    argnums = (0, 1) if trains_head else 0
    return jax.jit(jax.value_and_grad(loss_of, argnums=argnums))


def _update(
    program: Program, ema_decay: float
) -> Callable[[TrainState], tuple[TrainState, jax.Array]]:
    """Compile the step's update, with gradients made of the trained parameters."""
    shardings = jax.tree.map(lambda x: x.sharding, program.abstract)

    def update(state: TrainState) -> tuple[TrainState, jax.Array]:
        trained, _ = trainable.partition(state.params, program.frozen_paths)
        grads = jax.tree.map(lambda x: x * 1e-3, trained)
        norm = optax.tree.norm(grads)
        state = step.apply_update(
            program.optimizer,
            state,
            grads,
            finite=jnp.isfinite(norm),
            frozen_paths=program.frozen_paths,
            ema_decay=ema_decay,
        )
        return state, norm

    return jax.jit(update, donate_argnums=0, out_shardings=(shardings, None))


def online_teacher(workload: Workload, offline: Step) -> dict[str, Callable[[], Any]]:
    """Make functions that run an online teacher alone, and the step with it.

    The teacher has the shape of the config's, and random parameters. "label" is its
    forward pass and top k (dense: whole rows) on the prepared batch; "online" the
    training step with the teacher in it. {} without soft terms, or with draws.

    Args:
      workload: the config, its student and its batches.
      offline: its step.
    """
    if workload.cache is None or workload.cache.kind == "sampled":
        return {}
    model, params = _random_teacher(workload)
    k = None if workload.cache.kind == "dense" else workload.cache.k
    label = make_online_label(workload, model, offline.batch, k=k)
    online = Step(workload, offline.shared, teacher=(model, params))
    return {"label": lambda: label(params), "online": online.prepared}


def _random_teacher(workload: Workload) -> tuple[Model, Any]:
    """Make a teacher of the config's shape with random parameters."""
    config, mesh = workload.config, workload.mesh
    shape = teacher_shape(config, workload.model.shape.vocab_size)
    model = make_model(shape, mesh, dtype=config.train.dtype)
    init = jax.jit(
        lambda key: lm.init_params(shape, key), out_shardings=model.shardings
    )
    return model, init(jax.random.key(config.teacher_seed))


def make_online_label(
    workload: Workload, model: Model, batch: Any, *, k: int | None
) -> Callable[[Any], TeacherRecords]:
    """Compile the teacher's parameters -> its records for `batch`.

    Args:
      workload: the config, its student and its batches.
      model: the teacher's.
      batch: on the devices.
      k: pairs per token; None = whole rows.
    """
    config, mesh = workload.config, workload.mesh
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
    """Return the shape of the config's teacher; only its config.json is read."""
    if config.teacher.path:
        return hf.read_config(config.teacher.path)
    shape = config.teacher.decoder
    return dataclasses.replace(shape, vocab_size=shape.vocab_size or vocab_size)

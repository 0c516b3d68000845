"""Compiled steps: an optimizer step, a scoring step and a labelling step.

Legend: M microbatches, B rows of a microbatch, T time, V vocabulary, D width,
N = B * T tokens, K stored pairs.
"""

import functools
from collections.abc import Callable, Collection
from typing import Any

import flax.nnx as nnx
import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding

from kdjax import losses
from kdjax.data.batch import Batch
from kdjax.models import decoder, lm
from kdjax.parallel import sharding
from kdjax.training import online_teacher, state, trainable
from kdjax.training.state import TrainState


def stored_teacher(batch: Batch, num_rows: int = 0) -> losses.Teacher | None:
    """Return the teacher's records of a batch, flattened to tokens, or None.

    Args:
      batch: with records or without.
      num_rows: of the model's head, to which whole rows are padded.
    """
    records = batch.teacher
    if records is None:
        return None
    num_pairs = records.log_probs.shape[-1]
    ids, entropy = records.ids, records.entropy
    log_probs_NK = records.log_probs.reshape(-1, num_pairs)
    if ids is None and num_pairs < num_rows:
        padding = ((0, 0), (0, num_rows - num_pairs))
        log_probs_NK = jnp.pad(log_probs_NK, padding, constant_values=-jnp.inf)
    return losses.Teacher(
        ids_NK=None if ids is None else ids.reshape(-1, num_pairs),
        log_probs_NK=log_probs_NK,
        log_z_N=records.log_z.reshape(-1),
        entropy_N=None if entropy is None else entropy.reshape(-1),
    )


def apply_update(
    optimizer: optax.GradientTransformation,
    old: TrainState,
    grads: Any,
    *,
    finite: jax.Array,
    frozen_paths: Collection[str] = (),
    ema_decay: float = 0.0,
) -> TrainState:
    """Update parameters, optimizer state and averages by a gradient, and count a step.

    Args:
      optimizer: of the state.
      old: the state before.
      grads: nested dict of the gradients of the trained parameters.
      finite: bool; where it is False nothing but the step changes.
      frozen_paths: of parameters that have no gradient.
      ema_decay: of the averages, where the state has them.
    """
    trained, frozen = trainable.partition(old.params, frozen_paths)
    with jax.numpy_dtype_promotion("standard"):  # ours is strict, optax is not
        updates, opt_state = optimizer.update(grads, old.opt_state, trained)
        params = optax.apply_updates(trained, updates)
    ema = state.update_ema(old.ema, params, decay=ema_decay, step=old.step)
    params, opt_state, ema = jax.tree.map(
        lambda new, old: jnp.where(finite, new, old),
        (params, opt_state, ema),
        (trained, old.opt_state, old.ema),
    )
    params = trainable.merge(frozen, params)
    return TrainState(old.step + 1, params, opt_state, ema)


def make_train_step(
    graphdef: nnx.GraphDef,
    optimizer: optax.GradientTransformation,
    schedule: optax.Schedule,
    mesh: Mesh,
    abstract: TrainState,
    *,
    num_views: int,
    loss_options: losses.LossOptions,
    teacher: online_teacher.OnlineTeacher | None = None,
    matching: online_teacher.LayerMatching | None = None,
    frozen_paths: Collection[str] = (),
    ema_decay: float = 0.0,
) -> Callable[..., tuple[TrainState, dict[str, Any]]]:
    """Compile (state, batch, the teacher's parameters or None) -> (state, metrics).

    The state's memory is reused.

    loss = sum over tokens of hard_weights * nll + soft_weights * kl (and what
    `matching` adds), the weights having been divided by the term's count in the whole
    global batch by the loader, so that microbatches and devices add. An update with a
    non-finite gradient is not applied.

    Args:
      graphdef: the student's structure.
      optimizer: applied to the summed gradient.
      schedule: only to report the learning rate.
      mesh: devices; the batch is split over (data, fsdp).
      abstract: shapes and shardings of the state.
      num_views: views are numbered 0..num_views-1 in `Batch.view`.
      loss_options: of `losses.fused_loss`, with the logit transforms of the models.
      teacher: one that runs in the step, without gradient; else the batch brings the
        cache's records where there are soft terms.
      matching: layers that are compared with those of `teacher`.
      frozen_paths: parameters that have no gradient, as in `abstract`.
      ema_decay: of the averages, where `abstract` has them.

    Returns:
      The compiled function. metrics has "loss", "grad_norm", "learning_rate", "finite"
      (1 or 0), "finite_rows" [M, B], "num_tokens" (padding not counted), and "nll",
      "kl", "count" [num_views]: sums in nats and numbers of target tokens of each view
      (and sums of "hidden" and "attention" where they are terms).
    """
    shardings = _placed(abstract)
    placement = losses.Placement(mesh, sharding.HEAD_SPEC, vocab_axis="tensor")

    def targets_of(teacher_params: Any, rows: Batch) -> online_teacher.TeacherTargets:
        num_rows = abstract.params["embed"]["embedding"].shape[0]
        if teacher is None:
            return online_teacher.TeacherTargets(stored_teacher(rows, num_rows))
        return online_teacher.teacher_targets(
            mesh,
            teacher,
            teacher_params,
            rows,
            matching,
            num_rows=num_rows,
            options=loss_options,
        )

    @jax.named_scope("student")
    def student_states(params: Any, rows: Batch) -> tuple[jax.Array, Any]:
        if matching is None:
            return lm.hidden_states(graphdef, params, rows), None
        return decoder.captured_states(
            graphdef,
            params,
            rows.tokens,
            rows.positions,
            rows.segments,
            capture=decoder.Capture(matching.student_layers, matching.attention),
        )

    def loss_of(
        trained: Any, frozen: Any, rows: Batch, targets: online_teacher.TeacherTargets
    ) -> tuple[jax.Array, Any]:
        params, projection_nDE = state.split_projection(
            trainable.merge(frozen, trained)
        )
        hidden_BTD, captured = student_states(params, rows)
        num_rows, length, width = hidden_BTD.shape
        with jax.named_scope("head_loss"):
            total, tokens = losses.fused_loss(
                hidden_BTD.reshape(num_rows * length, width),
                lm.head_weight(params),
                rows.targets.reshape(-1),
                rows.weights["hard"].reshape(-1),
                rows.weights["soft"].reshape(-1),
                targets.distribution,
                loss_options,
                placement=placement,
            )
        if matching is not None:
            layer_terms = online_teacher.layer_terms(
                matching, captured, targets.captured, projection_nDE
            )
            for name, each_BT in layer_terms.items():
                weights_BT = rows.weights[name]
                each_BT = jnp.where(weights_BT != 0, each_BT, 0.0)
                total += (weights_BT * each_BT).sum()
                tokens[name] = each_BT.reshape(-1)
        # Not a product: a non-finite value on a token of another view would spoil it.
        members = [rows.view.reshape(-1) == view for view in range(num_views)]
        sums = {
            name: jnp.stack([jnp.where(m, each, 0.0).sum() for m in members])
            for name, each in tokens.items()
        }
        each_N = functools.reduce(jnp.add, tokens.values())
        per_row = each_N.reshape(num_rows, length).sum(1)
        sums["count"] = jnp.stack([m.sum(dtype=jnp.int32) for m in members])
        sums["finite_rows"] = jnp.isfinite(per_row)
        return total, sums

    grad_of = jax.value_and_grad(loss_of, has_aux=True)

    def gradients(
        params: Any, batch: Batch, teacher_params: Any
    ) -> tuple[Any, Any, Any]:
        num_microbatches = batch.tokens.shape[0]
        trained, frozen = trainable.partition(params, frozen_paths)
        if num_microbatches == 1:
            rows = jax.tree.map(lambda x: x[0], batch)
            targets = targets_of(teacher_params, rows)
            (total, sums), grads = grad_of(trained, frozen, rows, targets)
            return total, jax.tree.map(lambda x: x[None], sums), grads

        def add(carry: Any, rows: Batch) -> tuple[Any, Any]:
            targets = targets_of(teacher_params, rows)
            (total, sums), grads = grad_of(trained, frozen, rows, targets)
            return jax.tree.map(jnp.add, carry, (total, grads)), sums

        zero = (jnp.zeros((), jnp.float32), jax.tree.map(jnp.zeros_like, trained))
        (total, grads), sums = jax.lax.scan(add, zero, batch)
        return total, sums, grads

    def train_step(
        old: TrainState, batch: Batch, teacher_params: Any = None
    ) -> tuple[TrainState, Any]:
        total, sums, grads = gradients(old.params, batch, teacher_params)
        with jax.named_scope("update"):
            grad_norm = optax.tree.norm(grads)
            finite = jnp.isfinite(total) & jnp.isfinite(grad_norm)
            new = apply_update(
                optimizer,
                old,
                grads,
                finite=finite,
                frozen_paths=frozen_paths,
                ema_decay=ema_decay,
            )
        with jax.numpy_dtype_promotion("standard"):  # optax is not strict
            learning_rate = schedule(old.step)
        metrics = {
            "loss": total,
            "grad_norm": grad_norm,
            "learning_rate": learning_rate,
            "finite": finite.astype(jnp.float32),
            "finite_rows": sums.pop("finite_rows"),
            "num_tokens": batch.num_tokens,
        } | jax.tree.map(lambda x: x.sum(0), sums)
        return new, metrics

    return jax.jit(
        train_step,
        donate_argnums=0,
        in_shardings=(
            shardings,
            NamedSharding(mesh, sharding.BATCH_SPEC),
            *(() if teacher is None else (_placed(teacher.abstract),)),
        ),
        out_shardings=(shardings, sharding.replicated(mesh)),
    )


def _placed(tree: Any) -> Any:
    return jax.tree.map(lambda x: x.sharding, tree)


def make_score_step(
    graphdef: nnx.GraphDef,
    mesh: Mesh,
    params: Any,
    *,
    tail: str,
    chunk_size: int,
    num_valid: int | None = None,
) -> Callable[[Any, Batch], dict[str, jax.Array]]:
    """Compile (params, batch) -> per-token scores [M * B, T] on every device.

    Args:
      graphdef: the scored model's structure.
      mesh: devices.
      params: its parameters, or their shapes with shardings.
      tail: as in training; the KL here is always at temperature 1.
      chunk_size: tokens of a chunk of the head.
      num_valid: vocabulary rows from here on are padding; None = none.

    Returns:
      The compiled function: "nll" of the target and, with teacher records, "kl" (nats)
      and "agrees" (1 where both have the same most probable token), each float32.
    """

    def score_step(params: Any, batch: Batch) -> dict[str, jax.Array]:
        batch = batch.flattened()
        hidden_BTD = lm.hidden_states(graphdef, params, batch)
        teacher = stored_teacher(batch, lm.head_weight(params).shape[0])
        scores = losses.score(
            hidden_BTD.reshape(-1, hidden_BTD.shape[-1]),
            lm.head_weight(params),
            batch.targets.reshape(-1),
            teacher,
            losses.LossOptions(
                tail=tail,
                logit_transform=lm.logit_transform(graphdef, params),
                chunk_size=chunk_size,
                num_valid=num_valid,
            ),
            active_N=batch.view.reshape(-1) >= 0,
            placement=losses.Placement(mesh, sharding.HEAD_SPEC),
        )
        per_token = {"nll": scores["nll"]}
        if teacher is not None and teacher.log_probs_NK is not None:
            best = jnp.argmax(teacher.log_probs_NK, axis=-1).astype(jnp.int32)
            if teacher.ids_NK is not None:
                best = jnp.take_along_axis(teacher.ids_NK, best[:, None], axis=-1)[:, 0]
            per_token["kl"] = scores["kl"]
            per_token["agrees"] = (best == scores["top1_ids"]).astype(jnp.float32)
        return jax.tree.map(lambda x: x.reshape(hidden_BTD.shape[:2]), per_token)

    return jax.jit(
        score_step,
        in_shardings=(
            _placed(params),
            NamedSharding(mesh, sharding.BATCH_SPEC),
        ),
        out_shardings=sharding.replicated(mesh),
    )


def make_label_step(
    graphdef: nnx.GraphDef,
    mesh: Mesh,
    params: Any,
    *,
    k: int | None,
    temperatures: tuple[float, ...],
    chunk_size: int,
    num_valid: int | None = None,
) -> Callable[[Any, Batch, Any], dict[str, jax.Array]]:
    """Compile (params, batch, uniforms or None) -> the teacher's record of every token.

    Args:
      graphdef: the teacher's structure.
      mesh: devices of this process.
      params: its parameters, or their shapes with shardings.
      k: pairs per token; None stores the whole row.
      temperatures: those for which log Z and entropy are computed.
      chunk_size: tokens of a chunk of the head.
      num_valid: vocabulary rows from here on are left out; None = none.

    Returns:
      The compiled function; arrays as in `losses.label`, first axis M * B * T.
      With uniforms [M, B, T, S, P] there are draws instead of the top k.
    """

    def label_step(params: Any, batch: Batch, uniforms: Any) -> dict[str, jax.Array]:
        batch = batch.flattened()
        hidden_BTD = lm.hidden_states(graphdef, params, batch)
        if uniforms is not None:
            uniforms = uniforms.reshape(-1, *uniforms.shape[3:])
        return losses.label(
            hidden_BTD.reshape(-1, hidden_BTD.shape[-1]),
            lm.head_weight(params),
            batch.targets.reshape(-1),
            losses.LabelOptions(
                k=k,
                temperatures=temperatures,
                logit_transform=lm.logit_transform(graphdef, params),
                chunk_size=chunk_size,
                num_valid=num_valid,
            ),
            uniforms_NSP=uniforms,
            active_N=batch.view.reshape(-1) >= 0,
            placement=losses.Placement(mesh, sharding.HEAD_SPEC),
        )

    return jax.jit(
        label_step,
        in_shardings=(
            _placed(params),
            NamedSharding(mesh, sharding.BATCH_SPEC),
            NamedSharding(mesh, sharding.BATCH_SPEC),
        ),
        out_shardings=sharding.replicated(mesh),
    )

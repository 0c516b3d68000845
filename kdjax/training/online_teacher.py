"""An online teacher: its distributions and layers, computed in the train step.

Legend: B rows of a microbatch, T time, N = B * T tokens, V vocabulary, D width of the
student, E of the teacher, n pairs of compared layers, K pairs.
"""

from typing import Any, NamedTuple

import flax.nnx as nnx
import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from kdjax import losses
from kdjax.data.batch import Batch
from kdjax.losses import layer_losses
from kdjax.models import decoder, lm
from kdjax.parallel import sharding


class OnlineTeacher(NamedTuple):
    """A teacher that runs in the train step, outside of the gradient."""

    graphdef: nnx.GraphDef
    abstract: Any  # its parameters' shapes and shardings
    num_pairs: int | None  # the top k serve as its rows; None = the whole rows
    soft: bool = True  # there is a soft term, which needs its distributions


class LayerMatching(NamedTuple):
    """Pairs of layers of student and teacher, and the losses between them."""

    student_layers: tuple[int, ...]
    teacher_layers: tuple[int, ...]  # one for each of the student's
    hidden: str | None  # kind of `losses.layer_losses.hidden_loss`; None = no such term
    attention: bool

    @property
    def teacher_capture(self) -> decoder.Capture:
        """Return the layers of the teacher to capture, each once."""
        return decoder.Capture(tuple(sorted(set(self.teacher_layers))), self.attention)

    def of_teacher(self, captured: decoder.CapturedOutputs) -> decoder.CapturedOutputs:
        """Select the teacher's outputs, one for each layer of the student."""
        layers = self.teacher_capture.layers
        places = jnp.asarray([layers.index(x) for x in self.teacher_layers])
        return jax.tree.map(lambda x: x[places], captured)


class TeacherTargets(NamedTuple):
    """The teacher's distributions and captured layers for a microbatch."""

    distribution: losses.Teacher | losses.OnlineTeacherLogits | None
    captured: decoder.CapturedOutputs | None = None


def layer_terms(
    matching: LayerMatching, student: Any, teacher: Any, projection_nDE: Any
) -> dict[str, jax.Array]:
    """Compute the losses between matched layers, each [B, T]."""
    terms = {}
    if matching.hidden is not None:
        terms["hidden"] = layer_losses.hidden_loss(
            student.states_nBTD,
            teacher.states_nBTD,
            kind=matching.hidden,
            projection_nDE=projection_nDE,
        )
    if matching.attention:
        terms["attention"] = layer_losses.attention_loss(
            student.attention_nBTT, teacher.attention_nBTT
        )
    return terms


def teacher_targets(
    mesh: Mesh,
    teacher: OnlineTeacher,
    params: Any,
    rows: Batch,
    matching: LayerMatching | None,
    *,
    num_rows: int,
    options: losses.LossOptions,
) -> TeacherTargets:
    """Compute the targets that the teacher sets for a microbatch.

    Args:
      mesh: devices.
      teacher: its structure.
      params: its parameters.
      rows: the microbatch; tokens without a soft weight get no distribution.
      matching: layers to capture; None = none.
      num_rows: of the student's head, to which a teacher's is cut, and a dense one's
        padded.
      options: of the loss, for its temperature, chunk size and the teacher's logits.
    """
    captured = None
    if matching is None:
        # A teacher in its own right has no dropout.
        hidden_BTE = lm.hidden_states(teacher.graphdef, params, rows.without_dropout())
    else:
        hidden_BTE, captured = decoder.captured_states(
            teacher.graphdef,
            params,
            rows.tokens,
            rows.positions,
            rows.segments,
            capture=matching.teacher_capture,
        )
        captured = captured and matching.of_teacher(captured)
    if not teacher.soft:
        return TeacherTargets(None, captured)
    hidden_NE = hidden_BTE.reshape(-1, hidden_BTE.shape[-1])
    # Rows that the student lacks have no token.
    weight_VE = lm.head_weight(params)[:num_rows]
    num_valid = options.num_valid and min(options.num_valid, weight_VE.shape[0])
    if teacher.num_pairs is None:
        missing = num_rows - weight_VE.shape[0]
        weight_VE = jnp.pad(weight_VE, ((0, missing), (0, 0)))
        return TeacherTargets(
            losses.OnlineTeacherLogits(hidden_NE, weight_VE), captured
        )
    labels = losses.label(
        hidden_NE,
        weight_VE,
        rows.targets.reshape(-1),
        losses.LabelOptions(
            k=teacher.num_pairs,
            temperatures=(options.temperature,),
            with_entropy=False,
            logit_transform=options.teacher_logit_transform,
            chunk_size=options.chunk_size,
            num_valid=num_valid,
        ),
        active_N=rows.weights["soft"].reshape(-1) != 0,
        placement=losses.Placement(mesh, sharding.HEAD_SPEC),
    )
    pairs = losses.Teacher(
        ids_NK=labels["ids_NK"],
        log_probs_NK=labels["log_probs_NK"],
        log_z_N=labels["log_z_NS"][:, 0],
    )
    return TeacherTargets(pairs, captured)

"""Models of a Config: structure, shardings and initial parameters."""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import flax.nnx as nnx
import jax
from jax.sharding import Mesh

from kdjax.config import Config, DecoderConfig, LoraConfig, T5Config
from kdjax.data import tokenizer as tokenizers
from kdjax.experiment.teacher import teacher_shape, with_vocabulary
from kdjax.models import attention, hf, lm, lora
from kdjax.models.lm import Shape
from kdjax.parallel import sharding


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Model:
    """A model as (graphdef, params): its shape, structure and shardings."""

    shape: Shape
    graphdef: nnx.GraphDef
    abstract: Any  # nested dict of ShapeDtypeStruct with shardings
    shardings: Any  # nested dict of NamedSharding


def make_model(
    shape: Shape,
    mesh: Mesh,
    *,
    dtype: str,
    remat: str = "none",
    kernel: str = "auto",
    adapters: LoraConfig | None = None,
) -> Model:
    """Describe a model whose parameters are split over `mesh`; no memory yet.

    The attention kernel follows from the devices: `attention.select_kernel`.
    `adapters` describes those of the linear layers, None = none.
    """
    attention_kernel = attention.XLA
    if isinstance(shape, DecoderConfig):
        attention_kernel = attention.select_kernel(
            shape, mesh, dtype=dtype, name=kernel
        )
    graphdef, shapes = lm.create(
        shape,
        dtype=dtype,
        remat=remat,
        kernel=attention_kernel,
        unroll=mesh.devices.flat[0].platform == "cpu" and remat == "none",
        adapters=adapters,
    )
    shardings = sharding.param_shardings(shapes, mesh)
    abstract = jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s),
        shapes,
        shardings,
    )
    return Model(shape=shape, graphdef=graphdef, abstract=abstract, shardings=shardings)


def load_model(path: str, mesh: Mesh, *, dtype: str) -> tuple[Model, Any]:
    """Load a model and its parameters from a Hugging Face folder or hub name."""
    model = make_model(hf.read_config(path), mesh, dtype=dtype)
    return model, hf.load_params(path, model.shape, shardings=model.shardings)


def student_shape(config: Config, tokenizer: Any) -> Shape:
    """Return the student's shape: its own, its folder's, or a part of the teacher's.

    Raises:
      ValueError: a layer the teacher lacks.
    """
    student = config.student
    if student.init == "folder":
        shape = hf.read_config(student.path)
    elif student.init == "teacher_layers":
        shape = teacher_shape(config, tokenizer)
        shape = lm.select_layers(shape, student_layers(config, shape))
    else:
        own = student.t5 if student.architecture == "t5" else student.decoder
        shape = with_vocabulary(own, tokenizer)
    if isinstance(shape, T5Config) and student.dropout >= 0:
        shape = dataclasses.replace(shape, dropout=student.dropout)
    return shape


def check_ids(model: str, shape: Shape, max_id: int, tokenizer: Any) -> None:
    """Check that a model's vocabulary has every id of the data.

    A tokenizer may have more of them.

    Args:
      model: "student" or "teacher", for the error.
      shape: the model's.
      max_id: largest id in the data.
      tokenizer: of the data.

    Raises:
      ValueError: it has not.
    """
    if max_id >= shape.vocab_size:
        token = tokenizer.convert_ids_to_tokens(max_id)
        raise ValueError(
            f"the {model}'s vocab_size={shape.vocab_size} has no row for token "
            f"{max_id}, {token!r}, which is in the data: use "
            "student.decoder.vocab_size=0, or models and a tokenizer that belong "
            "together"
        )


def student_layers(config: Config, teacher: Shape) -> dict[str, tuple[int, ...]]:
    """Return the teacher's layers that the student keeps, by their stack.

    Raises:
      ValueError: a layer the teacher lacks.
    """
    student = config.student
    fields = {"layers": ("keep_layers", student.keep_layers)}
    if isinstance(teacher, T5Config):
        encoder = student.keep_encoder_layers or range(teacher.num_encoder_layers)
        fields = {
            "decoder/layers": ("keep_layers", student.keep_layers),
            "encoder/layers": ("keep_encoder_layers", tuple(encoder)),
        }
    numbers = lm.stacks(teacher)
    for stack, (name, layers) in fields.items():
        if not set(layers) <= set(range(numbers[stack])):
            raise ValueError(
                f"student.{name}={layers}: the teacher has {stack} 0 to "
                f"{numbers[stack] - 1}"
            )
    return {stack: layers for stack, (_, layers) in fields.items()}


def student_params(config: Config, model: Model, teacher: str) -> Callable[[], Any]:
    """Return a function that makes the student's initial parameters, sharded."""
    student, shardings = config.student, lora.without(model.shardings)
    folder = student.path if student.init == "folder" else teacher
    init = jax.jit(
        lambda key: lm.init_params(model.shape, key), out_shardings=shardings
    )

    def make() -> Any:
        if student.init == "random":
            return init(jax.random.key(config.seed))
        layers = None
        if student.init == "teacher_layers":
            layers = student_layers(config, hf.read_config(folder))
        return hf.load_params(
            folder, model.shape, shardings=shardings, keep_layers=layers
        )

    key = jax.random.fold_in(jax.random.key(config.seed), 2)
    return lambda: lora.beside(make(), model.abstract, key)


def label_vocab_size(student: Shape, teacher: Shape, tokenizer: Any) -> int:
    """Return the first rows of a teacher's vocabulary that its softmax is over.

    All, where the student has as many. Else those that have a token: vocabularies of
    one tokenizer are padded to different sizes.
    """
    if student.vocab_size == teacher.vocab_size:
        return teacher.vocab_size
    sizes = (student.vocab_size, teacher.vocab_size)
    return min(*sizes, tokenizers.vocabulary_size(tokenizer))


class Vocabulary(NamedTuple):
    """The rows of an online teacher's vocabulary that are used."""

    vocab_size: int


def shared_vocab_size(shape: Shape, teacher: Any) -> int | None:
    """Return the vocabulary rows that student and teacher share; None = all.

    Args:
      shape: the student's.
      teacher: with `vocab_size`: a cache, a shape, or the rows in use of an online
        teacher; None = no teacher.

    Raises:
      ValueError: the teacher's ids do not fit the student's vocabulary.
    """
    if teacher is None or teacher.vocab_size == shape.vocab_size:
        return None
    if teacher.vocab_size > shape.vocab_size:
        raise ValueError(
            f"the student's vocab_size={shape.vocab_size} is below the teacher's "
            f"{teacher.vocab_size}: label again, into another folder, for this "
            "student, so that rows without a token are left out"
        )
    return teacher.vocab_size

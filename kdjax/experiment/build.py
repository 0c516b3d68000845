"""What several verbs make of one config: tokenizer, data, models, teacher folder."""

import dataclasses
import pathlib
import sys
from collections.abc import Callable
from typing import Any

import flax.nnx as nnx
import jax
from jax.sharding import Mesh

from kdjax.config import (
    Config,
    DecoderConfig,
    LoraConfig,
    MethodConfig,
    StudentConfig,
    T5Config,
    TrainConfig,
)
from kdjax.data import loader, selection, sources, views
from kdjax.data import tokenizer as tokenizers
from kdjax.data.views import Segment
from kdjax.experiment import methods
from kdjax.models import attention, hf, lm, lora
from kdjax.models.lm import Shape
from kdjax.parallel import sharding
from kdjax.training.checkpoint import Checkpoints


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Model:
    """A model as (graphdef, params), with its shape and where its parameters lie."""

    shape: Shape
    graphdef: nnx.GraphDef
    abstract: Any  # nested dict of ShapeDtypeStruct with shardings
    shardings: Any  # nested dict of NamedSharding


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Data:
    """Examples of a run, as text and as tokens."""

    tokenizer: Any
    views: tuple[str, ...]
    eval_views: tuple[str, ...]  # the first of `views`: `evaluation` has these
    train: list[Segment]
    evaluation: list[Segment]
    eval_examples: list[sources.Example]
    labels: dict[str, Any]  # of a teacher's answers: `selection.trusted`


def load_tokenizer(config: Config) -> Any:
    """The tokenizer: the data's own, the teacher's, the student's, the built-in one."""
    if path := tokenizer_path(config):
        return tokenizers.load(hf.resolve(path))
    prefixes = dataclasses.astuple(config.data.prefixes)
    return tokenizers.kinship(" ".join(prefixes).split())


def tokenizer_path(config: Config) -> str:
    """Folder or hub name of the tokenizer; "" = the built-in one."""
    student = config.student.path if config.student.init == "folder" else ""
    built_in = config.data.source == "kinship"
    paths = (config.data.tokenizer, config.teacher.path, "" if built_in else student)
    return next(filter(None, paths), "")


def has_teacher(config: Config) -> bool:
    """Whether there is a teacher: one that is named, or one that will be trained."""
    return bool(config.teacher.path) or config.data.source == "kinship"


def load_data(config: Config, *, splits: tuple[str, ...] = ("train", "eval")) -> Data:
    """Reads the examples and makes their segments; every data error surfaces here."""
    tokenizer = load_tokenizer(config)
    names = {
        "train": methods.views(config.method),
        "eval": methods.held_out_views(config.method),
    }
    examples = {
        split: sources.load_examples(config.data, split, seed=config.data.kinship.seed)
        for split in splits
    }
    segments: dict[str, list[Segment]] = {}
    labels: dict[str, Any] = {}
    for split, found in examples.items():
        chosen = selection.select(found, names[split], split, config.data)
        labels |= chosen.labels
        for note in chosen.notes:
            print(note, file=sys.stderr)
        segments[split], counts = views.make_segments(
            chosen.examples, names[split], tokenizer, config.data
        )
        if counts.truncated or counts.dropped:
            print(
                f"{split}: {counts.truncated} segments truncated, {counts.dropped} "
                f"dropped, {counts.segments} kept (data.on_long={config.data.on_long})",
                file=sys.stderr,
            )
    return Data(
        tokenizer=tokenizer,
        views=names["train"],
        eval_views=names["eval"],
        train=segments.get("train", []),
        evaluation=segments.get("eval", []),
        eval_examples=examples.get("eval", []),
        labels=labels,
    )


def make_model(
    shape: Shape,
    mesh: Mesh,
    *,
    dtype: str,
    remat: str = "none",
    kernel: str = "auto",
    adapters: LoraConfig | None = None,
) -> Model:
    """A model whose parameters are split over `mesh` by the table; no memory yet.

    What attends is chosen here, for the devices of the mesh: `attention.choose`.
    `adapters` describes those beside the linear layers, None = none.
    """
    chosen = attention.XLA
    if isinstance(shape, DecoderConfig):
        chosen = attention.choose(shape, mesh, dtype=dtype, name=kernel)
    graphdef, shapes = lm.create(
        shape,
        dtype=dtype,
        remat=remat,
        kernel=chosen,
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
    """A model and its parameters from a Hugging Face folder or hub name."""
    model = make_model(hf.read_config(path), mesh, dtype=dtype)
    return model, hf.load_params(path, model.shape, shardings=model.shardings)


def teacher_shape(config: Config, tokenizer: Any) -> Shape:
    """The teacher's shape: its folder's, or that of the one to be trained."""
    if config.teacher.path:
        return hf.read_config(config.teacher.path)
    return _sized(config.teacher.decoder, tokenizer)


def _sized(shape: Shape, tokenizer: Any) -> Shape:
    """The shape with what it takes from the tokenizer: vocabulary, T5's special ids."""
    vocab_size = shape.vocab_size or len(tokenizer)
    shape = dataclasses.replace(shape, vocab_size=vocab_size)
    if isinstance(shape, DecoderConfig) or not hasattr(tokenizer, "eos_token_id"):
        return shape
    eos_id, pad_id = tokenizer.eos_token_id, tokenizer.pad_token_id
    pad_id = eos_id if pad_id is None else pad_id
    return dataclasses.replace(shape, eos_id=eos_id, pad_id=pad_id, start_id=pad_id)


def student_shape(config: Config, tokenizer: Any) -> Shape:
    """The student's shape: its own, its folder's, or the teacher's with fewer layers.

    Raises:
      ValueError: a layer the teacher lacks, or ids that the student's vocabulary lacks.
    """
    student = config.student
    if student.init == "folder":
        shape = hf.read_config(student.path)
    elif student.init == "teacher_layers":
        shape = teacher_shape(config, tokenizer)
        shape = lm.kept_layers(shape, kept_layers(config, shape))
    else:
        own = student.t5 if student.architecture == "t5" else student.decoder
        shape = _sized(own, tokenizer)
    if isinstance(shape, T5Config) and student.dropout >= 0:
        shape = dataclasses.replace(shape, dropout=student.dropout)
    if shape.vocab_size < len(tokenizer):
        raise ValueError(
            f"student vocab_size={shape.vocab_size} is below the tokenizer's "
            f"{len(tokenizer)}: use student.decoder.vocab_size=0 or the student's own "
            "tokenizer"
        )
    return shape


def kept_layers(config: Config, teacher: Shape) -> dict[str, tuple[int, ...]]:
    """The teacher's layers that the student keeps, by their stack.

    Raises:
      ValueError: a layer the teacher lacks.
    """
    student = config.student
    found = {"layers": ("keep_layers", student.keep_layers)}
    if isinstance(teacher, T5Config):
        encoder = student.keep_encoder_layers or range(teacher.num_encoder_layers)
        found = {
            "decoder/layers": ("keep_layers", student.keep_layers),
            "encoder/layers": ("keep_encoder_layers", tuple(encoder)),
        }
    numbers = lm.stacks(teacher)
    for stack, (name, layers) in found.items():
        if not set(layers) <= set(range(numbers[stack])):
            raise ValueError(
                f"student.{name}={layers}: the teacher has {stack} 0 to "
                f"{numbers[stack] - 1}"
            )
    return {stack: layers for stack, (_, layers) in found.items()}


def student_params(config: Config, model: Model, teacher: str) -> Callable[[], Any]:
    """How to make the student's initial parameters, sharded."""
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
            layers = kept_layers(config, hf.read_config(folder))
        return hf.load_params(
            folder, model.shape, shardings=shardings, keep_layers=layers
        )

    key = jax.random.fold_in(jax.random.key(config.seed), 2)
    return lambda: lora.beside(make(), model.abstract, key)


def load_student(
    config: Config,
    workdir: pathlib.Path,
    mesh: Mesh,
    tokenizer: Any,
    *,
    step: int | None = None,
) -> tuple[Model, Any]:
    """The student of a run and its parameters at a checkpoint (None = the newest).

    Adapters stay beside their kernels; where there are averages, these are read.
    """
    shape = student_shape(config, tokenizer)
    model = make_model(
        shape, mesh, dtype=config.train.dtype, adapters=config.student.lora
    )
    checkpoints = Checkpoints(workdir / "checkpoints")
    params = checkpoints.restore_params(model.abstract, step=step)
    checkpoints.close()
    return model, params


def num_valid(shape: Shape, teacher: Any) -> int | None:
    """Vocabulary rows of the student that the teacher has too; None = all.

    Args:
      shape: the student's.
      teacher: a cache or a shape, with `vocab_size`; None = no teacher.

    Raises:
      ValueError: the teacher's ids do not fit the student's vocabulary.
    """
    if teacher is None or teacher.vocab_size == shape.vocab_size:
        return None
    if teacher.vocab_size > shape.vocab_size:
        raise ValueError(
            f"the student's vocab_size={shape.vocab_size} is below the teacher's "
            f"{teacher.vocab_size}: its ids need at least as many rows"
        )
    return teacher.vocab_size


def layout(shape: Shape, row_length: int, encoder_row_length: int) -> dict[str, Any]:
    """Keywords of `BatchPlan`: rows as a model reads them.

    Args:
      shape: the model's.
      row_length: tokens a row; with an encoder, of the decoder.
      encoder_row_length: tokens a row of the encoder; 0 = row_length.
    """
    if isinstance(shape, DecoderConfig):
        return {"row_length": row_length}
    return {
        "row_length": row_length,
        "encoder_length": encoder_row_length or row_length,
        "start_id": shape.start_id,
        "end_id": shape.eos_id,
    }


def whole_length(student: Shape, row_length: int, encoder_row_length: int) -> int:
    """Tokens of a row that holds prompt and target of what a student's rows hold.

    For a model that only decodes beside a student that has an encoder.
    """
    if isinstance(student, DecoderConfig):
        return row_length
    return row_length + (encoder_row_length or row_length)


def sizes(shape: Shape, train: TrainConfig) -> dict[str, Any]:
    """Keywords of `flops.train_flops` for a training step; the head sees all tokens."""
    num_tokens = train.batch_size * train.row_length
    found = {"num_tokens": num_tokens, "num_head_tokens": num_tokens}
    found["row_length"] = train.row_length
    if isinstance(shape, T5Config):
        length = train.encoder_row_length or train.row_length
        found["encoder_row_length"] = length
        found["num_encoder_tokens"] = train.batch_size * length
    return found


def make_plan(
    config: Config, shape: Shape, segments: list[Segment]
) -> loader.BatchPlan:
    """The order of the training batches of a student."""
    train = config.train
    return loader.BatchPlan(
        segments,
        batch_size=train.batch_size,
        num_microbatches=train.num_microbatches,
        seed=config.seed,
        **layout(shape, train.row_length, train.encoder_row_length),
    )


def teacher_folder(config: Config, workdir: pathlib.Path) -> str:
    """Where the teacher is, or will be once it is trained."""
    return config.teacher.path or str(workdir / "teacher")


def teacher_config(config: Config) -> Config:
    """The run that trains the built-in task's teacher: hard labels, more examples."""
    teacher, train, method = config.teacher, config.train, config.method
    if config.student.init == "random" and config.student.architecture == "t5":
        rows = train.row_length, train.encoder_row_length
        length = whole_length(config.student.t5, *rows)
        train = dataclasses.replace(train, row_length=length)
    return dataclasses.replace(
        config,
        name=f"{config.name}-teacher",
        seed=config.teacher_seed,
        data=dataclasses.replace(
            config.data,
            num_train=teacher.num_train,
            kinship=dataclasses.replace(
                config.data.kinship, label_noise=teacher.label_noise
            ),
        ),
        student=StudentConfig(init="random", decoder=teacher.decoder),
        method=MethodConfig(
            name=method.name,
            label_weight=method.label_weight,
            counterfactual_weight=method.counterfactual_weight,
            multitask_weight=method.multitask_weight,
            hard_weight=1.0,
            soft_weight=0.0,
        ),
        optim=dataclasses.replace(
            config.optim,
            learning_rate=teacher.learning_rate,
            freeze=(),
            ema_decay=0.0,
        ),
        train=dataclasses.replace(train, steps=teacher.steps, eval_every=0),
    )

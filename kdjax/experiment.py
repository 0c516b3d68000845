"""What several verbs make of one config: tokenizer, data, models, teacher folder."""

import dataclasses
import pathlib
import sys
from collections.abc import Callable
from typing import Any

import flax.nnx as nnx
import jax
from jax.sharding import Mesh

from kdjax import methods, sharding
from kdjax.checkpoint import Checkpoints
from kdjax.config import Config, DecoderConfig, LoraConfig, StudentConfig
from kdjax.data import loader, sources, views
from kdjax.data import tokenizer as tokenizers
from kdjax.data.views import Segment
from kdjax.models import attention, decoder, hf, lora
from kdjax.models.shape import kept_layers


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Model:
    """A model as (graphdef, params), with its shape and where its parameters lie."""

    shape: DecoderConfig
    graphdef: nnx.GraphDef
    abstract: Any  # nested dict of ShapeDtypeStruct with shardings
    shardings: Any  # nested dict of NamedSharding


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Data:
    """Examples of a run, as text and as tokens."""

    tokenizer: Any
    views: tuple[str, ...]
    train: list[Segment]
    evaluation: list[Segment]
    eval_examples: list[sources.Example]


def load_tokenizer(config: Config) -> Any:
    """The tokenizer of the data: its own, the teacher's, or the built-in task's."""
    if config.data.tokenizer:
        return tokenizers.load(hf.resolve(config.data.tokenizer))
    if config.teacher.path:
        return tokenizers.load(hf.resolve(config.teacher.path))
    return tokenizers.kinship()


def load_data(config: Config, *, splits: tuple[str, ...] = ("train", "eval")) -> Data:
    """Reads the examples and makes their segments; every data error surfaces here."""
    tokenizer = load_tokenizer(config)
    names = methods.views(config.method)
    examples = {
        split: sources.load_examples(config.data, split, seed=config.data.kinship.seed)
        for split in splits
    }
    segments = {}
    for split, found in examples.items():
        segments[split], counts = views.make_segments(
            found, names, tokenizer, config.data
        )
        if counts.truncated or counts.dropped:
            print(
                f"{split}: {counts.truncated} segments truncated, {counts.dropped} "
                f"dropped, {counts.segments} kept (data.on_long={config.data.on_long})",
                file=sys.stderr,
            )
    return Data(
        tokenizer=tokenizer,
        views=names,
        train=segments.get("train", []),
        evaluation=segments.get("eval", []),
        eval_examples=examples.get("eval", []),
    )


def make_model(
    shape: DecoderConfig,
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
    chosen = attention.choose(shape, mesh, dtype=dtype, name=kernel)
    graphdef, shapes = decoder.create(
        shape, dtype=dtype, remat=remat, kernel=chosen, adapters=adapters
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


def teacher_shape(config: Config, tokenizer: Any) -> DecoderConfig:
    """The teacher's shape: its folder's, or that of the one to be trained."""
    if config.teacher.path:
        return hf.read_config(config.teacher.path)
    return _sized(config.teacher.decoder, tokenizer)


def _sized(shape: DecoderConfig, tokenizer: Any) -> DecoderConfig:
    vocab_size = shape.vocab_size or len(tokenizer)
    return dataclasses.replace(shape, vocab_size=vocab_size)


def student_shape(config: Config, tokenizer: Any) -> DecoderConfig:
    """The student's shape: its own, its folder's, or the teacher's with fewer layers.

    Raises:
      ValueError: a layer the teacher lacks, or ids that the student's vocabulary lacks.
    """
    student = config.student
    if student.init == "folder":
        shape = hf.read_config(student.path)
    elif student.init == "teacher_layers":
        shape = teacher_shape(config, tokenizer)
        if not set(student.keep_layers) <= set(range(shape.num_layers)):
            raise ValueError(
                f"student.keep_layers={student.keep_layers}: the teacher has layers 0 "
                f"to {shape.num_layers - 1}"
            )
        shape = kept_layers(shape, student.keep_layers)
    else:
        shape = _sized(student.decoder, tokenizer)
    if shape.vocab_size < len(tokenizer):
        raise ValueError(
            f"student vocab_size={shape.vocab_size} is below the tokenizer's "
            f"{len(tokenizer)}: use student.decoder.vocab_size=0 or the student's own "
            "tokenizer"
        )
    return shape


def student_params(config: Config, model: Model, teacher: str) -> Callable[[], Any]:
    """How to make the student's initial parameters, sharded."""
    student, shardings = config.student, lora.without(model.shardings)
    folder = student.path if student.init == "folder" else teacher
    layers = student.keep_layers if student.init == "teacher_layers" else None
    init = jax.jit(
        lambda key: decoder.init_params(model.shape, key), out_shardings=shardings
    )

    def make() -> Any:
        if student.init == "random":
            return init(jax.random.key(config.seed))
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


def num_valid(shape: DecoderConfig, teacher: Any) -> int | None:
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


def make_plan(config: Config, segments: list[Segment]) -> loader.BatchPlan:
    """The order of the training batches."""
    return loader.BatchPlan(
        segments,
        batch_size=config.train.batch_size,
        row_length=config.train.row_length,
        num_microbatches=config.train.num_microbatches,
        seed=config.seed,
    )


def teacher_folder(config: Config, workdir: pathlib.Path) -> str:
    """Where the teacher is, or will be once it is trained."""
    return config.teacher.path or str(workdir / "teacher")


def teacher_config(config: Config) -> Config:
    """The run that trains the built-in task's teacher: hard labels, more examples."""
    teacher = config.teacher
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
        method=dataclasses.replace(
            config.method,
            hard_weight=1.0,
            soft_weight=0.0,
            hidden_weight=0.0,
            attention_weight=0.0,
            weight_schedule="constant",
            label_smoothing=0.0,
        ),
        optim=dataclasses.replace(
            config.optim,
            learning_rate=teacher.learning_rate,
            freeze=(),
            ema_decay=0.0,
        ),
        train=dataclasses.replace(config.train, steps=teacher.steps, eval_every=0),
    )

"""What a benchmark runs: the training step of a config, on real or synthetic data."""

import dataclasses
import pathlib
import time
from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import Mesh

from kdjax.config import Config, T5Config, TrainConfig
from kdjax.data import loader
from kdjax.experiment import methods
from kdjax.experiment.data import load_data, load_tokenizer
from kdjax.experiment.models import (
    Model,
    make_model,
    shared_vocab_size,
    student_params,
    student_shape,
)
from kdjax.experiment.rows import make_plan
from kdjax.models.lm import Shape
from kdjax.parallel import sharding
from kdjax.teacher import build as build_lib
from kdjax.teacher import label, synthetic
from kdjax.teacher.cache import TeacherCache
from kdjax.training import program
from kdjax.training.state import TrainState

_BATCHES = 16  # of synthetic data: an epoch


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Workload:
    """A config with its devices, student, batches and cache."""

    config: Config
    mesh: Mesh
    model: Model
    plan: loader.BatchPlan
    cache: TeacherCache | None  # None without soft terms
    source: str  # "real" or "synthetic": where tokens and cache come from


@dataclasses.dataclass(slots=True)
class Carry:
    """The one training state, which every variant of the step takes and leaves."""

    state: TrainState


def real(config: Config, workdir: pathlib.Path, mesh: Mesh) -> Workload | None:
    """The config's own data and cache; None where the cache was never made."""
    _check(config)
    soft = methods.has_soft_terms(config.method)
    if soft and label.missing(build_lib.folder(config, workdir, "train")):
        return None
    data = load_data(config, splits=("train",))
    cache = build_lib.open_split(config, data, workdir, "train") if soft else None
    shape = student_shape(config, data.tokenizer)
    return Workload(
        config=config,
        mesh=mesh,
        model=_student(config, shape, mesh),
        plan=make_plan(config, shape, data.train),
        cache=cache,
        source="real",
    )


def make_synthetic(config: Config, folder: pathlib.Path, mesh: Mesh) -> Workload:
    """Random tokens in rows without padding, and a cache of random rows in `folder`.

    Raises:
      ValueError: a cache that does not hold the top k.
    """
    _check(config)
    if methods.has_soft_terms(config.method) and config.cache.kind != "top_k":
        raise ValueError(
            f"cache.kind={config.cache.kind!r}: a synthetic cache holds the top k; use "
            "--config.cache.kind=top_k, or label the data first"
        )
    # Only a vocabulary of the tokenizer's size needs the tokenizer.
    student = config.student
    own = student.t5 if student.architecture == "t5" else student.decoder
    named = student.init == "random" and not own.vocab_size
    tokenizer = load_tokenizer(config) if named else ()
    shape = student_shape(config, tokenizer)
    segments = synthetic.make_segments(
        _BATCHES * config.train.batch_size,
        row_length=config.train.row_length,
        prompt_length=_prompt_length(shape, config.train),
        vocab_size=shape.vocab_size,
        num_views=len(methods.views(config.method)),
        seed=config.seed,
    )
    cache = None
    if methods.has_soft_terms(config.method):
        cache = synthetic.write_cache(
            folder,
            segments,
            vocab_size=shape.vocab_size,
            k=config.cache.k,
            temperatures=tuple(map(float, config.cache.temperatures)),
            seed=config.seed,
        )
    return Workload(
        config=config,
        mesh=mesh,
        model=_student(config, shape, mesh),
        plan=make_plan(config, shape, segments),
        cache=cache,
        source="synthetic",
    )


def _prompt_length(shape: Shape, train: TrainConfig) -> int:
    """Tokens of a prompt that fills an encoder's row; 1 without one."""
    if not isinstance(shape, T5Config):
        return 1
    return (train.encoder_row_length or train.row_length) - 1  # the end token follows


def _check(config: Config) -> None:
    if methods.has_layer_terms(config.method):
        raise ValueError(
            f"method.hidden_weight={config.method.hidden_weight}, "
            f"method.attention_weight={config.method.attention_weight}: a benchmark "
            "compares stored with live teachers, and layers are not stored: use 0"
        )


def hard_alone(load: Workload) -> Workload:
    """The same student and batches with the soft terms' weight on the hard ones."""
    method = load.config.method
    method = dataclasses.replace(
        method,
        hard_weight=method.hard_weight + method.soft_weight,
        soft_weight=0.0,
        weight_schedule="constant",
    )
    config = dataclasses.replace(load.config, method=method)
    return dataclasses.replace(load, config=config, cache=None)


class Step:
    """The step that `kdjax.train` runs, on one prepared batch or on those of a loader.

    Attributes:
      compiled: for its memory and work.
      compile_seconds: tracing, lowering and compiling.
      batch: the prepared batch on the devices.
      host_batch: the same, this process's rows.
    """

    def __init__(
        self,
        load: Workload,
        carry: Carry | None = None,
        *,
        make_params: Callable[[], Any] | None = None,
        teacher: tuple[Model, Any] | None = None,
    ) -> None:
        """Compiles the step and makes the state.

        Args:
          load: what is trained.
          carry: a state to share; None makes one.
          make_params: makes its parameters, sharded; None draws them at random.
          teacher: a model and its parameters that run in the step, in place of the
            cache's records; None = the records.
        """
        self._load = load
        model, params = teacher or (None, None)
        self._beside = () if model is None else (params,)
        told_by = load.cache if model is None else model.shape
        self.program = program.Program(
            load.config,
            load.model,
            load.mesh,
            num_valid=shared_vocab_size(load.model.shape, told_by),
            teacher=model,
        )
        self._rows = sharding.local_rows(load.mesh, self.program.num_rows)
        self._terms = methods.terms(load.config.method)
        self.host_batch = self.make_batch(0)
        self.batch = self._place(self.host_batch)
        start = time.perf_counter()
        self.compiled = self.program.step.lower(
            self.program.abstract, self.batch, *self._beside
        ).compile()
        self.compile_seconds = time.perf_counter() - start
        self.carry = carry or Carry(self._init(make_params))
        self.waits: list[float] = []  # seconds for the batch, each step of the loop
        self.tokens = self.targets = 0  # of the loop's batches

    def make_batch(self, index: int) -> loader.Batch:
        """This process's rows of a batch."""
        batch = loader.make_batch(
            self._load.plan,
            index,
            terms=self._terms,
            cache=self._load.cache,
            temperature=self._load.config.method.temperature,
            rows=self._rows,
            dropout=self.program.dropout,
        )
        return batch.without_teacher() if self._beside else batch

    def prepared(self) -> Any:
        """Starts a step on the prepared batch."""
        return self.run(self.batch)

    def run(self, batch: Any) -> Any:
        """Starts a step on a batch that is on the devices."""
        self.carry.state, found = self.program.step(
            self.carry.state, batch, *self._beside
        )
        return found

    def loop(self, num_steps: int) -> Callable[[], Any]:
        """As `prepared`, in training's own loop: read ahead, place, run, read back."""
        train = self._load.config.train
        batches = loader.iterate(
            self.make_batch,
            0,
            num_steps,
            num_threads=train.num_threads,
            prefetch=train.prefetch,
        )
        pending: list[Any] = []

        def start_step() -> Any:
            since = time.perf_counter()
            _, batch = next(batches)
            self.waits.append(time.perf_counter() - since)
            self.tokens += int((batch.segments > 0).sum())
            self.targets += batch.num_target_tokens
            found = self.run(self._place(batch))
            if pending:
                jax.device_get(pending.pop())
            pending.append(found)
            return found

        return start_step

    def reset(self) -> None:
        """Forgets what the loop counted so far."""
        self.waits.clear()
        self.tokens = self.targets = 0

    def _place(self, batch: loader.Batch) -> Any:
        return sharding.global_batch(batch, self._load.mesh, self.program.num_rows)

    def _init(self, make_params: Callable[[], Any] | None) -> TrainState:
        if make_params is None:
            config = self._load.config
            student = dataclasses.replace(config.student, init="random")
            config = dataclasses.replace(config, student=student)
            make_params = student_params(config, self._load.model, "")
        return self.program.init(make_params)


def batch_bytes(batch: loader.Batch) -> dict[str, int]:
    """Return the bytes of a batch on the host, and of the teacher's part of it."""

    def size(tree: Any) -> int:
        return sum(x.nbytes for x in jax.tree.leaves(tree))

    return {"batch_bytes": size(batch), "teacher_bytes": size(batch.teacher)}


def cache_bytes(cache: TeacherCache) -> int:
    """Bytes of the shards on disk."""
    names = [shard.name for shard in cache.manifest.shards]
    return sum((cache.folder / name).stat().st_size for name in names)


def _student(config: Config, shape: Shape, mesh: Mesh) -> Model:
    return make_model(
        shape,
        mesh,
        dtype=config.train.dtype,
        remat=config.train.remat,
        adapters=config.student.lora,
    )

"""Workloads of the benchmark: a config's training step on real or synthetic data."""

import dataclasses
import pathlib
import time
from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import Mesh

from kdjax.config import Config, T5Config, TrainConfig
from kdjax.data import loader
from kdjax.experiment import methods, mixture
from kdjax.experiment.data import load_tokenizer
from kdjax.experiment.models import (
    Model,
    make_model,
    shared_vocab_size,
    student_params,
    student_shape,
)
from kdjax.experiment.rows import make_plan
from kdjax.experiment.run import open_run
from kdjax.models.lm import Shape
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
    cache: Any  # the teacher's records; None without soft terms
    source: str  # "real" or "synthetic": where tokens and cache come from


@dataclasses.dataclass(slots=True)
class SharedState:
    """The training state that all variants of the step update in turn."""

    state: TrainState


def open_real(config: Config, workdir: pathlib.Path) -> Workload | None:
    """Open the config's own data and cache; None where the cache does not exist."""
    _check(config)
    soft = methods.has_soft_terms(config.method)
    if soft and label.missing(build_lib.folder(config, workdir, "train")):
        return None
    run = open_run(config, workdir, splits=("train",))
    return Workload(
        config=config,
        mesh=run.mesh,
        model=run.student,
        plan=make_plan(config, run.student.shape, run.data.train),
        cache=build_lib.open_split(run, "train") if soft else None,
        source="real",
    )


def make_synthetic(config: Config, folder: pathlib.Path, mesh: Mesh) -> Workload:
    """Make random tokens in rows without padding, and a random cache in `folder`.

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
        num_views=len(mixture.views(config)),
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
    """Return the tokens of a prompt that fills an encoder's row; 1 without one."""
    if not isinstance(shape, T5Config):
        return 1
    return (train.encoder_row_length or train.row_length) - 1  # the end token follows


def _check(config: Config) -> None:
    if methods.has_layer_terms(config.method):
        raise ValueError(
            f"method.hidden_weight={config.method.hidden_weight}, "
            f"method.attention_weight={config.method.attention_weight}: a benchmark "
            "compares stored with online teachers, and layers are not stored: use 0"
        )


def hard_labels_only(workload: Workload) -> Workload:
    """Return the same workload with the soft terms' weight on the hard ones."""
    method = workload.config.method
    method = dataclasses.replace(
        method,
        hard_weight=method.hard_weight + method.soft_weight,
        soft_weight=0.0,
        weight_schedule="constant",
    )
    config = dataclasses.replace(workload.config, method=method)
    return dataclasses.replace(workload, config=config, cache=None)


class Step:
    """The step that `kdjax.train` runs, on one prepared batch or on those of a loader.

    Attributes:
      compiled: for its memory and work.
      compile_seconds: tracing, lowering and compiling.
      batch: the prepared batch on the devices.
      host_batch: the same, this process's rows.
      wait_seconds: for the batch, of each step of the loop.
      num_tokens, num_targets: of the loop's batches.
    """

    def __init__(
        self,
        workload: Workload,
        shared: SharedState | None = None,
        *,
        init_params: Callable[[], Any] | None = None,
        teacher: tuple[Model, Any] | None = None,
    ) -> None:
        """Compile the step and make the state.

        Args:
          workload: the config, its student and its batches.
          shared: a state to share with other steps; None makes one.
          init_params: makes its parameters, sharded; None draws them at random.
          teacher: an online teacher and its parameters, in place of the cache's
            records; None = the records.
        """
        self._workload = workload
        model = teacher[0] if teacher else None
        self._teacher_params = teacher[1:] if teacher else ()
        source = workload.cache if model is None else model.shape
        self.program = program.Program(
            workload.config,
            workload.model,
            workload.mesh,
            num_valid=shared_vocab_size(workload.model.shape, source),
            teacher=model,
        )
        self.host_batch = self.program.make_batch(workload.plan, 0, workload.cache)
        self.batch = self.program.place(self.host_batch)
        start = time.perf_counter()
        self.compiled = self.program.step.lower(
            self.program.abstract, self.batch, *self._teacher_params
        ).compile()
        self.compile_seconds = time.perf_counter() - start
        self.shared = shared or SharedState(self._init(init_params))
        self.wait_seconds: list[float] = []
        self.num_tokens = self.num_targets = 0

    def prepared(self) -> Any:
        """Dispatch a step on the prepared batch."""
        self.shared.state, metrics = self.program.step(
            self.shared.state, self.batch, *self._teacher_params
        )
        return metrics

    def loop(self, num_steps: int) -> Callable[[], Any]:
        """Return a function that dispatches the next step as training's loop does.

        It fetches a batch that was made ahead, places it, dispatches the step and reads
        the metrics of the step before.
        """
        workload = self._workload
        batches = self.program.batches(
            workload.plan, 0, num_steps, cache=workload.cache
        )
        pending: list[Any] = []

        def next_step() -> Any:
            start = time.perf_counter()
            index, batch = next(batches)
            self.wait_seconds.append(time.perf_counter() - start)
            self.num_tokens += int((batch.segments > 0).sum())
            self.num_targets += batch.num_target_tokens
            self.shared.state, metrics = self.program.run(
                self.shared.state, index, batch, *self._teacher_params
            )
            if pending:
                jax.device_get(pending.pop())
            pending.append(metrics)
            return metrics

        return next_step

    def reset(self) -> None:
        """Reset the counts of the loop."""
        self.wait_seconds.clear()
        self.num_tokens = self.num_targets = 0

    def _init(self, init_params: Callable[[], Any] | None) -> TrainState:
        if init_params is None:
            config = self._workload.config
            student = dataclasses.replace(config.student, init="random")
            config = dataclasses.replace(config, student=student)
            init_params = student_params(config, self._workload.model, "")
        return self.program.init(init_params)


def batch_bytes(batch: loader.Batch) -> dict[str, int]:
    """Return the bytes of a batch on the host, and of the teacher's part of it."""

    def size(tree: Any) -> int:
        return sum(x.nbytes for x in jax.tree.leaves(tree))

    return {"batch_bytes": size(batch), "teacher_bytes": size(batch.teacher)}


def cache_bytes(cache: TeacherCache) -> int:
    """Return the bytes of the shards on disk."""
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

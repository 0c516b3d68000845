"""The compiled training step of a config, its batches and its state."""

import functools
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
from flax.traverse_util import flatten_dict
from jax.sharding import Mesh, NamedSharding

from kdjax import losses
from kdjax.config import CacheConfig, Config, T5Config
from kdjax.data import loader
from kdjax.data.batch import Batch, BatchSpec
from kdjax.experiment import methods, mixture
from kdjax.experiment.models import Model
from kdjax.models import lm
from kdjax.models.lm import Shape
from kdjax.parallel import sharding
from kdjax.runtime import chips
from kdjax.training import online_teacher, optimizer, state, step, trainable
from kdjax.training.state import TrainState

_CPU_BYTES = 32 * 2**20  # for a chunk of logits
TrainStep = Any  # what jax.jit returns: callable, and it can be lowered


class Program:
    """The training step of a config; nothing is compiled before it is called.

    Attributes:
      abstract: shapes and shardings of the state.
      optimizer: of the state.
      frozen_paths: of the model's parameters that are not trained.
      num_rows: rows of a microbatch, over all hosts.
      dropout: True if batches bring keys for it.
    """

    def __init__(
        self,
        config: Config,
        model: Model,
        mesh: Mesh,
        *,
        num_valid: int | None = None,
        teacher: Model | None = None,
    ) -> None:
        """See the class.

        Args:
          config: the run.
          model: the student's structure and shardings.
          mesh: devices, real or described.
          num_valid: vocabulary rows of the student from here on are padding; None =
            none.
          teacher: one that runs in the step (teacher.online); else None.

        Raises:
          ValueError: what `trainable.frozen_paths` and `layer_matching` refuse.
        """
        self._config, self._model, self._mesh = config, model, mesh
        self._num_valid, self._teacher = num_valid, teacher
        teacher_shape = None if teacher is None else teacher.shape
        self._matching = layer_matching(config, model.shape, teacher_shape)
        self.optimizer = optimizer.make_optimizer(
            config.optim, steps=config.train.steps
        )
        params = model.abstract | self._projection(jax.random.key(0), abstract=True)
        self.dropout = lm.dropout(model.shape) > 0
        self.frozen_paths = trainable.frozen_paths(model.abstract, config.optim.freeze)
        self.abstract = state.abstract_state(
            params,
            self.optimizer,
            mesh,
            frozen_paths=self.frozen_paths,
            averages=config.optim.ema_decay > 0,
        )
        self.num_rows = config.train.batch_size // config.train.num_microbatches
        self._steps: dict[float, TrainStep] = {}

    def init(self, init_params: Callable[[], Any]) -> TrainState:
        """Make the state at step 0; `init_params` makes the parameters, sharded."""
        key = jax.random.fold_in(jax.random.key(self._config.seed), 1)
        return state.init_state(
            self.abstract,
            self.optimizer,
            lambda: init_params() | self._projection(key),
            frozen_paths=self.frozen_paths,
        )

    def _projection(self, key: jax.Array, *, abstract: bool = False) -> dict[str, Any]:
        """Make the projection of the hidden-state loss, normal(0, D^-1/2)."""
        matching, teacher = self._matching, self._teacher
        if matching is None or teacher is None or matching.hidden is None:
            return {}
        if not self._config.method.hidden_projection:
            return {}
        width, out = self._model.shape.width, teacher.shape.width
        shape = (len(matching.student_layers), width, out)

        def make(key: jax.Array) -> Any:
            kernel_nDE = jax.random.normal(key, shape, jnp.float32) * width**-0.5
            return {state.PROJECTION: {"kernel": kernel_nDE}}

        shapes = jax.eval_shape(make, key)
        if abstract:
            return shapes
        placed = sharding.param_shardings(shapes, self._mesh)
        return jax.jit(make, out_shardings=placed)(key)

    @property
    def step(self) -> TrainStep:
        """Return the step at the first temperature of the run."""
        return self.step_at(self._config.method.temperature)

    def progress(self, index: int) -> float:
        """Return the progress of a step: 0 for the first of the run, 1 for the last."""
        return index / max(1, self._config.train.steps - 1)

    def temperature(self, index: int) -> float:
        """Return the temperature of a step of the run."""
        config = self._config
        declared = config.cache.temperatures
        return methods.temperature(config.method, declared, self.progress(index))

    def terms(self, index: int) -> tuple[methods.Term, ...]:
        """Return the terms of the loss in a step of the run."""
        return mixture.terms(self._config, self.progress(index))

    def step_at(self, temperature: float) -> TrainStep:
        """Return (state, batch, online teacher's parameters) -> (state, metrics)."""
        if temperature not in self._steps:
            self._steps[temperature] = self._make(temperature)
        return self._steps[temperature]

    def run(
        self, state: TrainState, index: int, batch: Batch, *teacher_params: Any
    ) -> tuple[TrainState, dict[str, Any]]:
        """Dispatch a step of the run.

        Args:
          state: donated.
          index: of the step, from 0.
          batch: this process's rows, from `batches`.
          *teacher_params: of an online teacher; nothing without one.

        Returns:
          The state after the step, and its metrics; both may still be computed.
        """
        step = self.step_at(self.temperature(index))
        return step(state, self.place(batch), *teacher_params)

    def place(self, batch: Batch) -> Batch:
        """Make global arrays of this process's rows."""
        return sharding.global_batch(batch, self._mesh, self.num_rows)

    def make_batch(self, plan: loader.BatchPlan, index: int, cache: Any) -> Batch:
        """Make this process's rows of a step's batch, in NumPy.

        Args:
          plan: the order of the batches.
          index: of the step, from 0.
          cache: the teacher's records; None without soft terms.
        """
        return loader.make_batch(
            plan,
            index,
            terms=self.terms(index),
            cache=cache if self._teacher is None else None,
            temperature=self.temperature(index),
            rows=self._local_rows,
            online=self._teacher is not None,
            dropout=self.dropout,
        )

    @functools.cached_property
    def _local_rows(self) -> slice:
        return sharding.local_rows(self._mesh, self.num_rows)

    def batches(
        self, plan: loader.BatchPlan, start: int, stop: int, *, cache: Any = None
    ) -> Iterator[tuple[int, Batch]]:
        """Yield (index, batch) of the steps from start to stop, made ahead."""
        train = self._config.train
        return loader.iterate(
            lambda index: self.make_batch(plan, index, cache),
            start,
            stop,
            num_threads=train.num_threads,
            prefetch=train.prefetch,
        )

    def _make(self, temperature: float) -> TrainStep:
        config, teacher = self._config, self._teacher
        in_step = None
        if teacher is not None:
            dense = config.cache.kind == "dense"
            rows = (teacher.shape.vocab_size, self._model.shape.vocab_size)
            num_valid = min(*rows, self._num_valid or rows[0])
            pairs = stored_pairs(config.cache, num_valid)
            in_step = online_teacher.OnlineTeacher(
                teacher.graphdef,
                teacher.abstract,
                None if dense else pairs,
                soft=methods.has_soft_terms(config.method),
            )
        return step.make_train_step(
            self._model.graphdef,
            self.optimizer,
            optimizer.make_schedule(config.optim, steps=config.train.steps),
            self._mesh,
            self.abstract,
            num_views=len(mixture.views(config)),
            loss_options=loss_options(
                config, self._model, temperature, self._num_valid, teacher
            ),
            teacher=in_step,
            matching=self._matching,
            frozen_paths=self.frozen_paths,
            ema_decay=config.optim.ema_decay,
        )


def check_teacher(config: Config, student: Shape, teacher: Shape) -> None:
    """Check that a teacher suits the config and the student.

    Raises:
      ValueError: it does not.
    """
    starts = [getattr(shape, "start_id", None) for shape in (student, teacher)]
    runs = config.teacher.online and methods.needs_teacher(config.method)
    if runs and starts[0] != starts[1]:
        raise ValueError(
            "teacher.online=True: student and teacher read the same rows, so both or "
            "neither have an encoder, and their decoders start alike: use "
            "teacher.online=False"
        )
    layer_matching(config, student, teacher)


def layer_matching(
    config: Config, student: Shape, teacher: Shape | None
) -> online_teacher.LayerMatching | None:
    """Return the layers that the method compares; None = none.

    Raises:
      ValueError: a map that does not fit the models, or widths that differ without a
        projection.
    """
    method = config.method
    if not methods.has_layer_terms(method):
        return None
    if teacher is None:
        raise ValueError(
            f"method.hidden_weight={method.hidden_weight}, method.attention_weight="
            f"{method.attention_weight}: layers are compared with a teacher that runs "
            "beside the student: use teacher.online=True, or weights of 0"
        )
    if isinstance(student, T5Config) or isinstance(teacher, T5Config):
        raise ValueError(
            f"method.hidden_weight={method.hidden_weight}, method.attention_weight="
            f"{method.attention_weight}: layers of encoder-decoder models are not "
            "compared: use weights of 0"
        )
    layer_map = method.layer_map
    if len(layer_map) != student.num_layers or max(layer_map) >= teacher.num_layers:
        raise ValueError(
            f"method.layer_map={layer_map} must name a layer of the teacher, 0 to "
            f"{teacher.num_layers - 1}, or -1 for each of the student's "
            f"{student.num_layers} layers"
        )
    mapped = method.hidden_projection or not method.hidden_weight
    if not mapped and student.width != teacher.width:
        raise ValueError(
            f"the student's width={student.width} is not the teacher's "
            f"{teacher.width}: use method.hidden_projection=True"
        )
    layers = tuple(i for i, layer in enumerate(layer_map) if layer >= 0)
    return online_teacher.LayerMatching(
        student_layers=layers,
        teacher_layers=tuple(layer_map[i] for i in layers),
        hidden=method.hidden_loss if method.hidden_weight else None,
        attention=method.attention_weight > 0,
    )


def frozen_params_kwargs(config: Config, params: Any) -> dict[str, Any]:
    """Return the keywords of `flops.train_flops` for parameters that are not trained.

    Args:
      config: the run.
      params: of the model, or their shapes.
    """
    frozen = trainable.frozen_paths(params, config.optim.freeze)
    frozen_params = flatten_dict(trainable.partition(params, frozen)[1], sep="/")
    kernels = {
        path: x.size for path, x in frozen_params.items() if path.endswith("/kernel")
    }
    of_encoder = sum(n for path, n in kernels.items() if lm.reads_encoder(path))
    return {
        "num_frozen": sum(kernels.values()) - of_encoder,
        "num_frozen_encoder": of_encoder,
        "trains_head": lm.head_weight(trainable.trainable_mask(params, frozen)),
    }


def loss_options(
    config: Config,
    model: Model,
    temperature: float,
    num_valid: int | None,
    teacher: Model | None = None,
) -> losses.LossOptions:
    """Return the options of the loss that a config stands for.

    Args:
      config: the run.
      model: the student.
      temperature: of the soft terms.
      num_valid: rows of the student's head from here on are padding; None = none.
      teacher: one that runs beside the student; None = none.
    """
    method = config.method
    transforms = {"logit_transform": lm.logit_transform(model.graphdef, model.abstract)}
    if teacher is not None:
        transforms["teacher_logit_transform"] = lm.logit_transform(
            teacher.graphdef, teacher.abstract
        )
    return losses.LossOptions(
        temperature=temperature,
        scale_by_t2=method.scale_by_t2,
        divergence=methods.divergence(method),
        tail=method.tail,
        label_smoothing=method.label_smoothing,
        chunk_size=chunk_size(config, model),
        num_valid=num_valid,
        **transforms,
    )


def chunk_size(config: Config, model: Model) -> int:
    """Return the tokens per chunk of the fused head.

    Each chunk adds a gradient of the head's whole weight to the sum of those before it,
    so that chunks are as large as the device allows.
    """
    train = config.train
    device = jax.tree.leaves(model.shardings)[0].mesh.devices.flat[0]
    return train.chunk_size or head_chunk_size(
        train.memory_mib, model.shape.vocab_size, device
    )


def head_chunk_size(memory_mib: int, vocab_size: int, device: jax.Device) -> int:
    """Return the tokens per chunk of the fused head on a device.

    Args:
      memory_mib: for a chunk of float32 logits; 0 = 32 MiB on a CPU, elsewhere a 64th
        of the device's memory.
      vocab_size: rows of the head.
      device: real or described.
    """
    on_cpu = device.platform == "cpu"  # where larger chunks do not fit the caches
    if not memory_mib:
        memory = _CPU_BYTES if on_cpu else chips.memory_bytes(device) / 64
        memory_mib = max(1, int(memory / 2**20))
    at_most = 1024 if on_cpu else 8192
    return losses.chunk_size(memory_mib, vocab_size, at_most=at_most)


def abstract_batch(
    config: Config, shape: Shape, mesh: Mesh, *, vocab_size: int
) -> Batch:
    """Describe the global batch of `loader.make_batch`: shapes, dtypes, shardings.

    Args:
      config: the run; without soft terms the batch has no teacher.
      shape: the student's.
      mesh: devices, real or described.
      vocab_size: of the teacher (a dense cache has so many columns).
    """
    train, cache = config.train, config.cache
    stored = methods.has_soft_terms(config.method) and not config.teacher.online
    kinds = {"hard", "soft"} | {term.kind for term in mixture.terms(config)}
    encoder_length = 0
    if isinstance(shape, T5Config):
        encoder_length = train.encoder_row_length or train.row_length
    spec = BatchSpec(
        num_microbatches=train.num_microbatches,
        num_rows=train.batch_size // train.num_microbatches,
        row_length=train.row_length,
        encoder_length=encoder_length,
        weight_kinds=tuple(sorted(kinds)),
        dropout=lm.dropout(shape) > 0,
        teacher_kind=cache.kind if stored else None,
        num_pairs=stored_pairs(cache, vocab_size) if stored else 0,
    )
    return spec.abstract(NamedSharding(mesh, sharding.BATCH_SPEC))


def stored_pairs(cache: CacheConfig, vocab_size: int) -> int:
    """Return the number of columns of the teacher's arrays in a training batch."""
    if cache.kind == "dense":
        return vocab_size
    return cache.num_draws if cache.kind == "sampled" else min(cache.k, vocab_size)

"""Small configs, a fake teacher cache, a few training steps, readers of run folders."""

import dataclasses
import json
import os
import pathlib
import shutil
from collections.abc import Callable
from typing import Any, NamedTuple

import filelock
import jax
import numpy as np
from flax.traverse_util import flatten_dict
from jax.sharding import Mesh

from kdjax import config as config_lib
from kdjax import evaluate, train
from kdjax.config import (
    CacheConfig,
    Config,
    DataConfig,
    DecoderConfig,
    EvalConfig,
    KinshipConfig,
    LoraConfig,
    MeshConfig,
    MethodConfig,
    OptimConfig,
    StudentConfig,
    T5Config,
    TeacherConfig,
    TrainConfig,
)
from kdjax.data import loader
from kdjax.data.batch import Batch, EncoderRows
from kdjax.experiment import methods
from kdjax.experiment.data import Data, load_data
from kdjax.experiment.models import Model, make_model, student_params, student_shape
from kdjax.experiment.rows import make_plan
from kdjax.experiment.run import Run, open_run
from kdjax.models import decoder
from kdjax.parallel import sharding
from kdjax.pipeline.student import export_student
from kdjax.teacher.codec import Record
from kdjax.training import checkpoint, meter, program
from tests import xla_flags

ROOT = pathlib.Path(__file__).parent.parent
# Of a command that is run as a process of its own, on 8 virtual devices.
ENVIRONMENT = {
    **os.environ,
    "PYTHONPATH": str(ROOT),
    "XLA_FLAGS": xla_flags.EIGHT_DEVICES,
}
NUM_GOLDEN = 20  # steps of shared runs, whose losses are in tests/golden
DECODER = DecoderConfig(
    width=32, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=8, mlp_width=64
)


def small_config(**changes) -> Config:
    """An experiment of a few seconds; `part=dict(field=value)` changes a part."""
    base = Config(
        name="small",
        data=DataConfig(
            num_train=24,
            num_eval=8,
            max_prompt=96,
            max_target=48,
            kinship=KinshipConfig(min_hops=2, max_hops=2, num_distractors=1),
        ),
        teacher=TeacherConfig(decoder=DECODER, num_train=32, steps=4),
        cache=CacheConfig(
            k=8, temperatures=(1.0, 2.0), shard_size=16, batch_size=8, row_length=128
        ),
        student=StudentConfig(decoder=dataclasses.replace(DECODER, num_layers=1)),
        method=MethodConfig(temperature=2.0),
        optim=OptimConfig(learning_rate=1e-2),
        train=TrainConfig(
            steps=6,
            batch_size=8,
            row_length=128,
            log_every=1,
            save_every=2,
            num_threads=1,
            prefetch=2,
        ),
        evaluation=EvalConfig(batch_size=8, num_generations=2, max_new_tokens=4),
    )
    return changed(base, **changes)


def changed(config: Config, **changes) -> Config:
    """A config with parts replaced: `part=dict(field=value)` replaces fields."""
    for part, values in changes.items():
        if isinstance(values, dict):
            values = dataclasses.replace(getattr(config, part), **values)
        changes[part] = values
    return dataclasses.replace(config, **changes)


class FakeCache:
    """Random but consistent teacher records for any segment."""

    kind, k, temperatures = "top_k", 8, (1.0, 2.0)

    def __init__(self, segments, vocab_size):
        self.vocab_size = vocab_size
        self._targets = {s.key: s.target_ids for s in segments}

    def has(self, key):
        return key in self._targets

    def read(self, key):
        rng = np.random.default_rng(int.from_bytes(key[:4], "big"))
        targets = self._targets[key]
        num = len(targets)
        logits = rng.normal(size=(num, self.vocab_size)) * 2
        logp = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
        ids = np.argsort(-logp, axis=-1)[:, : self.k]
        log_z = np.stack(
            [np.log(np.exp(logp / t).sum(-1)) for t in self.temperatures], -1
        )
        return Record(
            ids=ids.astype(np.int32),
            log_probs=np.take_along_axis(logp, ids, -1).astype(np.float32),
            target_ids=targets.astype(np.int32),
            target_log_probs=logp[:, 0].astype(np.float32),
            log_z=log_z.astype(np.float32),
            entropy=np.zeros((num, 2), np.float32),
        )


def rows_of(tokens, *, encoder=None, segments=None, weights=None) -> Batch:
    """A batch of rows that hold one segment each, every next token trained on.

    Args:
      tokens: int32 [..., T].
      encoder: the same of an encoder [..., S]; None = decoder-only.
      segments: int32 [..., T]; None = no padding.
      weights: by kind, a number for all tokens.
    """
    tokens = np.asarray(tokens)
    return Batch(
        tokens=tokens,
        targets=np.ascontiguousarray(np.roll(tokens, -1, -1)),
        positions=np.ascontiguousarray(
            np.broadcast_to(np.arange(tokens.shape[-1], dtype=np.int32), tokens.shape)
        ),
        segments=np.ones_like(tokens) if segments is None else segments,
        view=np.zeros_like(tokens),
        weights={
            kind: np.full(tokens.shape, weight, np.float32)
            for kind, weight in (weights or {}).items()
        },
        encoder=None
        if encoder is None
        else EncoderRows(
            tokens=encoder,
            positions=np.zeros_like(encoder),
            segments=np.ones_like(encoder),
        ),
    )


class Setup(NamedTuple):
    """What a step is made of, from a config."""

    mesh: Mesh
    data: Data
    model: Model
    plan: loader.BatchPlan


def set_up(
    config: Config, *, mesh: MeshConfig | None = None, devices: Any = None
) -> Setup:
    """The mesh, data, model and batch plan of a config; nothing is computed."""
    placed = sharding.make_mesh(mesh or MeshConfig(), devices=devices)
    data = load_data(config, splits=("train",))
    shape = student_shape(config, data.tokenizer)
    model = make_model(shape, placed, dtype="float32", adapters=config.student.lora)
    return Setup(placed, data, model, make_plan(config, shape, data.train))


UNTIED = dataclasses.replace(DECODER, num_layers=2, tie_embeddings=False)


def step_config(*, optim=None, lora=None, shape=UNTIED, **train):
    config = small_config(
        optim={"clip_norm": 0.0} | (optim or {}),
        train={"num_threads": 1, "batch_size": 8, "row_length": 128} | train,
    )
    config.student.decoder = dataclasses.replace(shape)
    if lora is not None:
        config.student.lora = lora
    return config


class TrainSteps:
    """The first steps of a run, with what was before, between and after them.

    Args:
      config: the run; its first steps alone are computed.
      num: of steps.
      mesh: axes, all on `data` by default.
      devices: of the mesh, all by default.
      poison: steps whose batch has weights that are not finite.
      cache: the teacher's records; random ones by default.
      teacher: a model and its parameters, where it runs in the step.
    """

    def __init__(
        self,
        config,
        *,
        num=2,
        mesh=None,
        devices=None,
        poison=(),
        cache=None,
        teacher=None,
    ):
        self.config = config
        mesh, data, self.model, self.plan = set_up(config, mesh=mesh, devices=devices)
        self.views = data.views
        model, params = teacher or (None, None)
        frozen = () if teacher is None else (params,)
        self.made = program.Program(config, self.model, mesh, teacher=model)
        soft = methods.has_soft_terms(config.method)
        if cache is None and teacher is None and soft:
            cache = FakeCache(data.train, self.model.shape.vocab_size)
        current = self.made.init(
            student_params(config, self.model, config.teacher.path)
        )
        self.states = [jax.tree.map(np.array, current)]
        self.metrics = []
        for index in range(num):
            temperature = self.made.temperature(index)
            batch = loader.make_batch(
                self.plan,
                index,
                terms=self.made.terms(index),
                cache=cache,
                temperature=temperature,
                rows=sharding.local_rows(mesh, self.made.num_rows),
                online=teacher is not None,
                dropout=self.made.dropout,
            )
            if index in poison:
                batch.weights["hard"] *= np.float32(np.nan)
            self.batch = sharding.global_batch(batch, mesh, self.made.num_rows)
            self.pointers = pointers(current.params)
            step = self.made.step_at(temperature)
            current, metrics = step(current, self.batch, *frozen)
            self.metrics.append(jax.tree.map(np.asarray, metrics))
            self.states.append(jax.tree.map(np.array, current))
        self.last = current

    def params(self, number):
        return flatten_dict(self.states[number].params, sep="/")

    @property
    def losses(self):
        return [float(metrics["loss"]) for metrics in self.metrics]

    def lines(self):
        """What the loop writes to metrics.jsonl about these steps."""
        rows = []

        class Rows:
            def write(self, step, scalars):
                rows.append({"step": step} | scalars)

        spared = program.frozen_params_kwargs(self.config, self.model.abstract)
        reporter = meter.Meter(
            self.config, self.model.shape, self.plan, self.views, Rows(), spared
        )
        for index, metrics in enumerate(self.metrics):
            reporter.report(index + 1, metrics)
        return rows


def pointers(params):
    flat = flatten_dict(params, sep="/")
    return {
        path: [part.data.unsafe_buffer_pointer() for part in x.addressable_shards]
        for path, x in flat.items()
    }


def decoder_run(folder: pathlib.Path) -> Config:
    """A decoder on soft labels of the built-in teacher, which it trains."""
    return small_config(
        name="decoder",
        teacher={"steps": 60},
        train={"steps": NUM_GOLDEN, "save_every": 10},
    )


def taught(folder: pathlib.Path, *, cache_of: str = "decoder", **changes) -> Config:
    """A small config with the built-in teacher, and the cache, of shared runs."""
    config = small_config(**changes)
    config.teacher.path = str(folder / "decoder" / "teacher")
    if cache_of:
        config.cache.path = str(folder / cache_of / "cache")
    return config


def lora_run(folder: pathlib.Path) -> Config:
    """Adapters on a layer of that teacher, and averages, with its cache."""
    return taught(
        folder,
        name="lora",
        student={
            "init": "teacher_layers",
            "keep_layers": (1,),
            "lora": LoraConfig(rank=4, alpha=32.0),
        },
        optim={"ema_decay": 0.9},
        train={"steps": NUM_GOLDEN, "save_every": 10},
    )


T5 = T5Config(
    width=32,
    num_encoder_layers=2,
    num_decoder_layers=1,
    num_heads=4,
    head_dim=8,
    mlp_width=64,
    dropout=0.1,
)


def t5_run(folder: pathlib.Path) -> Config:
    """A T5 student of that teacher, on all four views, with dropout."""
    return taught(
        folder,
        cache_of="t5",
        name="t5",
        method={"name": "multitask_counterfactual"},
        student={"architecture": "t5", "t5": T5},
        train={
            "steps": NUM_GOLDEN,
            "save_every": 10,
            "row_length": 40,
            "encoder_row_length": 96,
        },
    )


# Runs that are made once a session; tests read them (`conftest.shared_run`).
RUNS = {"decoder": decoder_run, "lora": lora_run, "t5": t5_run}


def finish_run(name: str, folder: pathlib.Path) -> tuple[Config, pathlib.Path]:
    """Makes a shared run, and those that it needs, unless that was done."""
    if name != "decoder":
        finish_run("decoder", folder)
    config, workdir = RUNS[name](folder), folder / name
    folder.mkdir(parents=True, exist_ok=True)
    with filelock.FileLock(folder / f"{name}.lock"):
        if not (workdir / "summary.json").exists():
            train.run(config, workdir)
    return config, workdir


def copy_run(workdir: pathlib.Path, copy: pathlib.Path, *, unfinished: bool = False):
    """A copy that may be changed; `unfinished` is without its last checkpoint."""
    shutil.copytree(workdir, copy)
    if unfinished:
        shutil.rmtree(copy / "checkpoints" / str(NUM_GOLDEN))
        (copy / "summary.json").unlink()
    return copy


def load_student(config: Config, workdir: pathlib.Path) -> tuple[Model, Any]:
    """The student of a run and its parameters at the newest checkpoint."""
    run = open_run(config, workdir, splits=())
    return run.student, checkpoint.load_student(run)


def open_eval(config: Config, workdir: pathlib.Path) -> Run:
    """A run with its held-out split alone."""
    return open_run(config, workdir, splits=("eval",))


def score(config: Config, workdir: pathlib.Path, name: str) -> dict[str, float]:
    """The metrics of "student", "teacher" or a Hugging Face folder."""
    return evaluate.score(config, workdir, name)[0]


def export(config: Config, workdir: pathlib.Path, out: pathlib.Path) -> None:
    """Writes the student of a run as a Hugging Face folder."""
    export_student(open_run(config, workdir, splits=()), out)


def row_logits(model: Model, params: Any) -> Callable[[np.ndarray], np.ndarray]:
    """A decoder's logits for one text: ids [T] -> logits [T, V], float64.

    Compiled once: what follows a text in its row changes none of them.
    """

    @jax.jit
    def forward(params, ids_1T):
        positions_1T = np.arange(ids_1T.shape[1], dtype=np.int32)[None]
        hidden_1TD = decoder.hidden_states(
            model.graphdef, params, ids_1T, positions_1T, np.ones_like(positions_1T)
        )
        return decoder.logits(params, hidden_1TD)[0]

    def logits(ids: np.ndarray) -> np.ndarray:
        row = np.zeros((1, 256), np.int32)
        row[0, : len(ids)] = ids
        return np.asarray(forward(params, row), np.float64)[: len(ids)]

    return logits


def summary(workdir: pathlib.Path) -> dict[str, Any]:
    """The results of a finished run."""
    return json.loads((workdir / "summary.json").read_text())


def step_rows(workdir: pathlib.Path) -> list[dict[str, float]]:
    """The lines of metrics.jsonl that are of training steps."""
    lines = (workdir / "metrics.jsonl").read_text().splitlines()
    return [row for row in map(json.loads, lines) if "loss" in row]


def losses(workdir: pathlib.Path) -> list[float]:
    return [row["loss"] for row in step_rows(workdir)]


def write_config_file(config: Config, file: pathlib.Path) -> pathlib.Path:
    """A file for --config that returns a config."""
    file.write_text(
        "from kdjax import config\n"
        "def get_config(argument=''):\n"
        f"    return config.from_json({config_lib.to_json(config)!r})\n"
    )
    return file


def check_same_run(one, other, **tolerance):
    """Two runs had the same batches and, to rounding, the same losses."""
    for key in ("step", "tokens"):
        if key in step_rows(one)[0]:
            assert [r[key] for r in step_rows(one)] == [
                r[key] for r in step_rows(other)
            ]
    np.testing.assert_allclose(losses(one), losses(other), **tolerance)
    for name, value in summary(one)["student"].items():
        if name in ("nll", "kl"):
            found = summary(other)["student"][name]
            np.testing.assert_allclose(found, value, rtol=1e-3, atol=1e-5)

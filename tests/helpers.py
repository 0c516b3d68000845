"""Small configs, a fake teacher cache, a few training steps, readers of run folders."""

import dataclasses
import json
import os
import pathlib
from typing import Any, NamedTuple

import jax
import numpy as np
from flax.traverse_util import flatten_dict
from jax.sharding import Mesh

from kdjax import config as config_lib
from kdjax.config import (
    CacheConfig,
    Config,
    DataConfig,
    DecoderConfig,
    EvalConfig,
    KinshipConfig,
    MeshConfig,
    MethodConfig,
    OptimConfig,
    StudentConfig,
    TeacherConfig,
    TrainConfig,
)
from kdjax.data import loader
from kdjax.experiment.data import Data, load_data
from kdjax.experiment.models import Model, make_model, student_params, student_shape
from kdjax.experiment.rows import make_plan
from kdjax.parallel import sharding
from kdjax.teacher.codec import Record
from kdjax.training import program
from tests import xla_flags

ROOT = pathlib.Path(__file__).parent.parent
# Of a command that is run as a process of its own, on 8 virtual devices.
ENVIRONMENT = {
    **os.environ,
    "PYTHONPATH": str(ROOT),
    "XLA_FLAGS": xla_flags.EIGHT_DEVICES,
}
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
    for part, values in changes.items():
        if isinstance(values, dict):
            values = dataclasses.replace(getattr(base, part), **values)
        setattr(base, part, values)
    return base


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


def step_config(*, optim=None, lora=None, decoder=UNTIED, **train):
    config = small_config(
        optim={"clip_norm": 0.0} | (optim or {}),
        train={"num_threads": 1, "batch_size": 8, "row_length": 128} | train,
    )
    config.student.decoder = dataclasses.replace(decoder)
    if lora is not None:
        config.student.lora = lora
    return config


class TrainSteps:
    """A few steps of a run, with what was before, between and after them."""

    def __init__(self, config, *, num=2, mesh=None, devices=None, poison=()):
        mesh, data, self.model, plan = set_up(config, mesh=mesh, devices=devices)
        self.made = program.Program(config, self.model, mesh)
        cache = FakeCache(data.train, self.model.shape.vocab_size)
        current = self.made.init(student_params(config, self.model, ""))
        self.states = [jax.tree.map(np.array, current)]
        self.metrics = []
        for index in range(num):
            batch = loader.make_batch(
                plan,
                index,
                terms=self.made.terms(index),
                cache=cache,
                temperature=2.0,
                rows=sharding.local_rows(mesh, self.made.num_rows),
            )
            if index in poison:
                batch["hard_weights"] *= np.float32(np.nan)
            self.batch = sharding.global_batch(batch, mesh, self.made.num_rows)
            self.pointers = pointers(current.params)
            current, metrics = self.made.step(current, self.batch)
            self.metrics.append(jax.tree.map(np.asarray, metrics))
            self.states.append(jax.tree.map(np.array, current))
        self.last = current

    def params(self, number):
        return flatten_dict(self.states[number].params, sep="/")


def pointers(params):
    flat = flatten_dict(params, sep="/")
    return {
        path: [part.data.unsafe_buffer_pointer() for part in x.addressable_shards]
        for path, x in flat.items()
    }


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

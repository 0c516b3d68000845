"""kdjax on a prepared case: python ours.py --folder=FOLDER --mode=MODE [--steps=10].

Modes: "loop" (training's own loop, the top k read from the cache on disk), "step" (the
top k in memory), "online" (an online teacher, its top k in every step), "dense" (whole
teacher rows in memory). Prints one line of JSON; "loss" is that of the first batch with
the initial weights; that of "dense" is the one that the other libraries compute.
"""

import dataclasses
import pathlib
import sys

import jax
import numpy as np
from absl import app, flags
from cases import peak_rss, read, report, time_steps

from kdjax.bench import components, timing
from kdjax.bench.workload import Step, Workload
from kdjax.config import (
    CacheConfig,
    Config,
    DecoderConfig,
    MeshConfig,
    MethodConfig,
    OptimConfig,
    StudentConfig,
    TeacherConfig,
    TrainConfig,
)
from kdjax.data import loader
from kdjax.data.views import Segment
from kdjax.experiment.models import load_model, make_model
from kdjax.models import flops, hf
from kdjax.parallel import sharding
from kdjax.runtime import malloc
from kdjax.teacher import cache

_MODES = ("loop", "step", "online", "dense")


def shape(case: dict, part: str) -> DecoderConfig:
    """Return the "student" or "teacher" of a case."""
    return DecoderConfig(vocab_size=case["vocab_size"], **case[part])


def config(case: dict, folder: pathlib.Path) -> Config:
    """Return the case as a run of kdjax."""
    temperatures = tuple(sorted({1.0, case["temperature"]}))
    return Config(
        name=case["name"],
        teacher=TeacherConfig(path=str(folder / "teacher")),
        student=StudentConfig(init="folder", path=str(folder / "student")),
        cache=CacheConfig(
            k=case["k"],
            temperatures=temperatures,
            batch_size=case["batch_size"],
            row_length=case["length"],
        ),
        method=MethodConfig(
            name="text",
            hard_weight=1 - case["alpha"],
            soft_weight=case["alpha"],
            temperature=case["temperature"],
        ),
        optim=OptimConfig(
            learning_rate=case["learning_rate"],
            schedule="constant",
            b2=0.999,
            clip_norm=0.0,
        ),
        train=TrainConfig(batch_size=case["batch_size"], row_length=case["length"]),
    )


def segments(folder: pathlib.Path) -> list[Segment]:
    """Read the rows of tokens.npy: one token of prompt, the rest are targets."""
    rows = np.load(folder / "tokens.npy")
    rows = rows.reshape(-1, rows.shape[-1])
    return [
        Segment(f"row-{i}", 0, row[:1], row[1:], i.to_bytes(cache.KEY_BYTES, "big"))
        for i, row in enumerate(rows)
    ]


def workload(case: dict, folder: pathlib.Path) -> Workload:
    """Return the case's rows in their order, with its cache."""
    mesh = sharding.make_mesh(MeshConfig())
    plan = loader.BatchPlan(
        segments(folder),
        batch_size=case["batch_size"],
        row_length=case["length"],
        shuffle=False,
    )
    return Workload(
        config=config(case, folder),
        mesh=mesh,
        model=make_model(shape(case, "student"), mesh, dtype="float32"),
        plan=plan,
        cache=cache.load_cache(folder / "cache"),
        source="real",
    )


def run(folder: pathlib.Path, mode: str, steps: int) -> None:
    """Time one mode and print its line."""
    before = peak_rss()
    malloc.trim_after_compile()  # as commands do
    case = read(str(folder))
    measured = workload(case, folder)
    model, shardings = measured.model, measured.model.shardings
    teacher = params = None
    if mode in ("online", "dense"):
        teacher, params = load_model(
            measured.config.teacher.path, measured.mesh, dtype="float32"
        )
    step = Step(
        measured,
        init_params=lambda: hf.load_params(
            folder / "student", model.shape, shardings=shardings
        ),
        teacher=(teacher, params) if mode == "online" else None,
    )
    compiled = step.compiled
    if mode == "dense":
        label = components.make_online_label(measured, teacher, step.batch, k=None)
        rows = jax.block_until_ready(label(params))
        step.batch = dataclasses.replace(step.batch, teacher=rows)
        del params
        compiled = step.program.step.lower(step.program.abstract, step.batch).compile()
    start_step = step.loop(3 + steps) if mode == "loop" else step.prepared
    loss = float(start_step()["loss"])
    seconds = time_steps(start_step, jax.block_until_ready, steps=steps)
    report(
        case,
        seconds=seconds,
        loss=loss,
        parameters=flops.params_count(model.shape),
        rss_before_bytes=before,
        compile_seconds=step.compile_seconds,
        temporary_bytes=timing.memory(compiled).get("temporary_bytes"),
        versions={"jax": jax.__version__},
    )


if __name__ == "__main__":
    _FOLDER = flags.DEFINE_string("folder", None, "Of prepare.py.", required=True)
    _MODE = flags.DEFINE_enum("mode", "loop", _MODES, "Where the teacher is.")
    _STEPS = flags.DEFINE_integer("steps", 10, "Timed steps.", lower_bound=1)
    app.run(
        lambda argv: run(pathlib.Path(_FOLDER.value), _MODE.value, _STEPS.value),
        argv=sys.argv,
    )

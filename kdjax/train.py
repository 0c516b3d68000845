"""Trains a student: python -m kdjax.train --config=FILE.py[:argument] --workdir=DIR.

In turn: the built-in task's teacher is trained (unless teacher.path names one), the
teacher's outputs are cached (unless they are), the student is trained on them, and both
are evaluated. Killed anywhere and started again with the same command it continues.
"""

from __future__ import annotations

import pathlib
from typing import TYPE_CHECKING

from absl import flags

from kdjax import cli
from kdjax.config import Config
from kdjax.runtime.console import print_table

if TYPE_CHECKING:
    from jax.sharding import Mesh

_UNTIL = flags.DEFINE_enum(
    "until", "end", ("teacher", "end"), "Stop when this is trained, or evaluated."
)


def train_teacher(config: Config, workdir: pathlib.Path, mesh: Mesh) -> None:
    """Trains the built-in task's teacher and exports it, unless that was done."""
    from kdjax.experiment.data import load_data
    from kdjax.experiment.models import make_model, student_params, student_shape
    from kdjax.experiment.teacher import teacher_config, teacher_folder
    from kdjax.models import hf
    from kdjax.parallel import distributed
    from kdjax.training.loop import fit

    folder = pathlib.Path(teacher_folder(config, workdir))
    if config.teacher.path or (folder / "config.json").is_file():
        return
    config = teacher_config(config)
    data = load_data(config, splits=("train",))
    shape = student_shape(config, data.tokenizer)
    model = make_model(shape, mesh, dtype=config.train.dtype, remat=config.train.remat)
    params, _, _ = fit(
        config,
        workdir=workdir / "teacher_run",
        mesh=mesh,
        data=data,
        model=model,
        make_params=student_params(config, model, ""),
    )
    hf.save(folder, shape, params, data.tokenizer)
    distributed.barrier("teacher")


def run(config: Config, workdir: pathlib.Path, *, until: str = "end") -> None:
    """The whole experiment, each stage skipped where its result is there.

    Args:
      config: the run.
      workdir: its own.
      until: "teacher" stops when the teacher is trained.
    """
    from kdjax.evaluation.scorer import Scorer, match_rates, score_teacher
    from kdjax.experiment import methods, provenance
    from kdjax.experiment.data import load_data
    from kdjax.experiment.models import (
        load_model,
        make_model,
        student_params,
        student_shape,
    )
    from kdjax.experiment.rows import make_plan
    from kdjax.experiment.teacher import has_teacher, teacher_folder, teacher_shape
    from kdjax.parallel import distributed, sharding
    from kdjax.teacher import build as build_lib
    from kdjax.training import trainable
    from kdjax.training.loop import fit
    from kdjax.training.meter import evaluation_row, report_origins, run_summary
    from kdjax.training.program import check_teacher

    cli.claim(workdir, config)
    mesh = sharding.make_mesh(config.mesh)
    data = load_data(config)
    shape = student_shape(config, data.tokenizer)
    model = make_model(
        shape,
        mesh,
        dtype=config.train.dtype,
        remat=config.train.remat,
        adapters=config.student.lora,
    )
    # What can be wrong with rows and caches is found before anything is computed.
    make_plan(config, shape, data.train)
    with_teacher = has_teacher(config)
    if with_teacher:
        check_teacher(config, shape, teacher_shape(config, data.tokenizer))
    trainable.frozen_paths(model.abstract, config.optim.freeze)
    build_lib.check(config, data, workdir)

    if with_teacher:
        train_teacher(config, workdir, mesh)
    if until == "teacher":
        return
    teacher_path = teacher_folder(config, workdir)
    caches = build_lib.ensure(config, data, workdir, teacher_path)
    dtype = config.train.dtype
    live = (
        load_model(teacher_path, mesh, dtype=dtype)
        if config.teacher.online and methods.needs_teacher(config.method)
        else None
    )
    if distributed.is_main():
        report_origins(
            workdir, config.name, provenance.find(config, model, teacher_path)
        )
    cache = caches.get("eval")
    scorer = Scorer(config, data, model, mesh, cache=cache)
    params, throughput, student = fit(
        config,
        workdir=workdir,
        mesh=mesh,
        data=data,
        model=model,
        make_params=student_params(config, model, teacher_path),
        cache=caches.get("train"),
        teacher=live,
        scorer=scorer,
    )

    student = student or scorer(params)
    generations = scorer.generations(params)
    student |= match_rates(generations)
    rows = [evaluation_row("student", student, shape)]
    teacher: dict[str, float] = {}
    scored_shape = None
    if with_teacher:
        teacher, scored_shape = score_teacher(
            config,
            data,
            build_lib.folder(config, workdir, "teacher_scores"),
            mesh,
            path=teacher_path,
            cache=cache,
            live=live,
        )
        rows.insert(0, evaluation_row("teacher", teacher, scored_shape))
    if distributed.is_main():
        run_summary(
            workdir,
            config,
            student=student,
            teacher=teacher,
            student_shape=shape,
            teacher_shape=scored_shape,
            throughput=throughput,
            generations=generations,
            bins=scorer.bins,
            labels=data.labels,
        )
        print_table(f"{config.name}: held-out results", rows)


if __name__ == "__main__":
    cli.run(lambda config, workdir: run(config, workdir, until=_UNTIL.value))

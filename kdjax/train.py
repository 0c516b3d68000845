"""Trains a student: python -m kdjax.train --config=FILE.py[:argument] --workdir=DIR.

In turn: the built-in task's teacher is trained (unless teacher.path names one), the
teacher's outputs are cached (unless they are), the student is trained on them, and both
are evaluated. Killed anywhere and started again with the same command it continues.
"""

import pathlib
from collections.abc import Callable
from typing import Any

from jax.sharding import Mesh

from kdjax import (
    cli,
    distributed,
    experiment,
    freezing,
    methods,
    origins,
    sharding,
    state,
)
from kdjax.checkpoint import Checkpoints
from kdjax.config import Config, to_json
from kdjax.data import loader
from kdjax.experiment import Data, Model
from kdjax.models import hf
from kdjax.program import Program, check_teacher, untrained
from kdjax.reporting import (
    Meter,
    evaluation_row,
    report_origins,
    run_summary,
    state_rows,
)
from kdjax.scoring import Scorer, match_rates
from kdjax.teacher import building
from kdjax.writer import Writer, print_table


def fit(
    config: Config,
    *,
    workdir: pathlib.Path,
    mesh: Mesh,
    data: Data,
    model: Model,
    make_params: Callable[[], Any],
    cache: Any = None,
    teacher: tuple[Model, Any] | None = None,
    scorer: Scorer | None = None,
) -> tuple[Any, dict[str, float], dict[str, float]]:
    """Trains a model to the last step, from its newest checkpoint if it has one.

    Args:
      config: the run.
      workdir: for checkpoints and metrics.
      mesh: devices.
      data: its training segments are used.
      model: structure and shardings.
      make_params: makes the initial parameters, sharded.
      cache: the teacher's records; None without soft terms.
      teacher: with its parameters, where it runs beside the student.
      scorer: held-out evaluation every `train.eval_every` steps.

    Returns:
      The parameters (averages where they are kept), the throughput of this process's
      steps, and the held-out metrics after the last step ({} without a scorer, or if no
      step was left to do).

    Raises:
      ValueError: a non-finite loss with train.non_finite="stop".
    """
    train = config.train
    frozen = () if teacher is None else (teacher[1],)
    source = cache if teacher is None else teacher[0].shape
    program = Program(
        config,
        model,
        mesh,
        num_valid=experiment.num_valid(model.shape, source),
        teacher=teacher[0] if teacher is not None else None,
    )
    abstract, num_rows = program.abstract, program.num_rows
    plan = experiment.make_plan(config, model.shape, data.train)
    rows = sharding.local_rows(mesh, num_rows)

    def make_batch(index: int) -> loader.Batch:
        return loader.make_batch(
            plan,
            index,
            terms=program.terms(index),
            cache=cache,
            temperature=program.temperature(index),
            rows=rows,
            online=bool(frozen),
            dropout=program.dropout,
        )

    checkpoints = Checkpoints(
        workdir / "checkpoints",
        keep_last=train.keep_last,
        keep_best=train.keep_best,
        config_json=to_json(config),
    )
    start = checkpoints.latest_step() or 0
    current = checkpoints.restore(abstract) if start else program.init(make_params)
    if distributed.is_main():
        rows_held = state_rows(abstract, program.frozen)
        print_table(f"{config.name}: what is trained", rows_held)
    preemption = distributed.Preemption()
    writer = Writer(
        workdir,
        total_steps=train.steps,
        is_main=distributed.is_main(),
        resume_step=start,
    )
    spared = untrained(config, model.abstract)
    meter = Meter(config, model.shape, plan, data.views, writer, spared)
    pending: tuple[int, Any] | None = None
    held_out: dict[str, float] = {}
    batches = loader.iterate(
        make_batch,
        start,
        train.steps,
        num_threads=train.num_threads,
        prefetch=train.prefetch,
    )
    with writer:
        for index, batch in meter.timed(batches):
            step = program.step_at(program.temperature(index))
            current, found = step(
                current, sharding.global_batch(batch, mesh, num_rows), *frozen
            )
            # The device is busy with this step while the last one is written.
            if pending is not None:
                meter.report(*pending)
            pending, done = (index + 1, found), index + 1
            stopping = preemption.requested(done)
            last = done == train.steps
            evaluate = bool(train.eval_every) and done % train.eval_every == 0
            save = bool(train.save_every) and done % train.save_every == 0
            if not (evaluate or save or last or stopping):
                continue
            # Nothing is saved before its loss is known to be finite.
            meter.report(*pending)
            pending = None
            held_out = (
                {}
                if scorer is None or not (evaluate or last)
                else meter.held_out(done, scorer(state.in_use(current)))
            )
            if save or last or stopping:
                checkpoints.save(done, current, nll=held_out.get("nll"))
            if stopping and not last:
                checkpoints.close()
                raise SystemExit(143)  # 128 + SIGTERM: saved, not finished
        checkpoints.close()
        preemption.close()
        writer.curves()
    return state.in_use(current), meter.throughput(), held_out


def train_teacher(config: Config, workdir: pathlib.Path, mesh: Mesh) -> None:
    """Trains the built-in task's teacher and exports it, unless that was done."""
    folder = pathlib.Path(experiment.teacher_folder(config, workdir))
    if config.teacher.path or (folder / "config.json").is_file():
        return
    config = experiment.teacher_config(config)
    data = experiment.load_data(config, splits=("train",))
    shape = experiment.student_shape(config, data.tokenizer)
    model = experiment.make_model(
        shape, mesh, dtype=config.train.dtype, remat=config.train.remat
    )
    params, _, _ = fit(
        config,
        workdir=workdir / "teacher_run",
        mesh=mesh,
        data=data,
        model=model,
        make_params=experiment.student_params(config, model, ""),
    )
    hf.save(folder, shape, params, data.tokenizer)
    distributed.barrier("teacher")


def run(config: Config, workdir: pathlib.Path) -> None:
    """The whole experiment, each stage skipped where its result is there."""
    cli.claim(workdir, config)
    mesh = sharding.make_mesh(config.mesh)
    data = experiment.load_data(config)
    shape = experiment.student_shape(config, data.tokenizer)
    model = experiment.make_model(
        shape,
        mesh,
        dtype=config.train.dtype,
        remat=config.train.remat,
        adapters=config.student.lora,
    )
    # What can be wrong with rows and caches is found before anything is computed.
    experiment.make_plan(config, shape, data.train)
    has_teacher = experiment.has_teacher(config)
    if has_teacher:
        check_teacher(config, shape, experiment.teacher_shape(config, data.tokenizer))
    freezing.frozen_paths(model.abstract, config.optim.freeze)
    building.check(config, data, workdir)

    if has_teacher:
        train_teacher(config, workdir, mesh)
    teacher_path = experiment.teacher_folder(config, workdir)
    caches = building.ensure(config, data, workdir, teacher_path)
    dtype = config.train.dtype
    live = (
        experiment.load_model(teacher_path, mesh, dtype=dtype)
        if config.teacher.online and methods.needs_teacher(config.method)
        else None
    )
    if distributed.is_main():
        report_origins(workdir, config.name, origins.find(config, model, teacher_path))
    cache = caches.get("eval")
    scorer = Scorer(config, data, model, mesh, cache=cache)
    params, throughput, student = fit(
        config,
        workdir=workdir,
        mesh=mesh,
        data=data,
        model=model,
        make_params=experiment.student_params(config, model, teacher_path),
        cache=caches.get("train"),
        teacher=live,
        scorer=scorer,
    )

    student = student or scorer(params)
    generations = scorer.generations(params)
    student |= match_rates(generations)
    rows, teacher, teacher_shape = [evaluation_row("student", student, shape)], {}, None
    if has_teacher:
        teacher_model, teacher_params = live or experiment.load_model(
            teacher_path, mesh, dtype=dtype
        )
        teacher_shape = teacher_model.shape
        teacher = Scorer(config, data, teacher_model, mesh, cache=cache)(teacher_params)
        rows.insert(0, evaluation_row("teacher", teacher, teacher_shape))
    if distributed.is_main():
        run_summary(
            workdir,
            config,
            student=student,
            teacher=teacher,
            student_shape=shape,
            teacher_shape=teacher_shape,
            throughput=throughput,
            generations=generations,
            labels=data.labels,
        )
        print_table(f"{config.name}: held-out results", rows)


if __name__ == "__main__":
    cli.run(run)

"""The main job: a teacher, its cache, a student trained on it, and both evaluated."""

import dataclasses
import pathlib
from typing import Any

from kdjax.config import Config
from kdjax.evaluation.scorer import (
    check_evaluation,
    check_teacher_scores,
    make_scorer,
    not_measured,
    score_records,
    score_teacher,
)
from kdjax.evaluation.summary import evaluation_row, write_summary
from kdjax.evaluation.text_match import match_rates
from kdjax.experiment import methods, provenance, validate
from kdjax.experiment import workdir as workdir_lib
from kdjax.experiment.models import Model, load_model, student_params
from kdjax.experiment.rows import make_plan
from kdjax.experiment.run import Run, open_run
from kdjax.experiment.teacher import (
    check_runs_elsewhere,
    has_teacher,
    runs_elsewhere,
    teacher_config,
    teacher_folder,
    teacher_shape,
)
from kdjax.models import hf
from kdjax.parallel import distributed, sharding
from kdjax.runtime import files
from kdjax.runtime.console import print_table
from kdjax.storage import mirror, urls
from kdjax.teacher import build
from kdjax.training import trainable
from kdjax.training.loop import train_loop
from kdjax.training.program import check_teacher


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Distilled:
    """A finished run."""

    run: Run
    params: Any  # nested dict of the student's parameters; averages where kept
    metrics: dict[str, float]  # of the student on held-out examples
    summary: dict[str, Any]  # the content of summary.json


def distill(config: Config, workdir: str | pathlib.Path = "") -> Distilled:
    """Run an experiment to its end; each stage is skipped where its result exists.

    In turn: the built-in task's teacher is trained (unless teacher.path names one), the
    teacher's outputs are cached, the student is trained on them, and both are
    evaluated. Killed anywhere and called again with the same arguments it continues.

    Args:
      config: the experiment; it is validated first.
      workdir: of the run, or its address in a store; "" = runs/<config.name>.

    Raises:
      ValueError: what is wrong with the config, the data or the directory, before the
        first compilation; or a non-finite loss.
    """
    validate.validate(config)
    if urls.is_url(workdir):
        with mirror.mirrored(str(workdir), config.storage) as folder:
            return distill(config, folder)
    folder = pathlib.Path(workdir or f"runs/{config.name}")
    with workdir_lib.hold(folder):
        run = open_experiment(config, folder)
        ensure_teacher(run)
        return _distill(run)


def train_teacher(config: Config, folder: pathlib.Path) -> None:
    """Train the built-in task's teacher alone, unless that was done."""
    validate.validate(config)
    with workdir_lib.hold(folder):
        ensure_teacher(open_experiment(config, folder))


def _distill(run: Run) -> Distilled:
    """Label, train and evaluate; the directory is this process's own."""
    config = run.config
    caches = build.ensure(run)
    teacher = _online_teacher(run)
    teacher_path = teacher_folder(config, run.workdir)
    if distributed.is_main():
        origins = provenance.initial_params(config, run.student, teacher_path)
        files.write_json(run.workdir / "init.json", origins)
        print_table(
            f"{config.name}: what the student starts from", provenance.table(origins)
        )
    scorer = make_scorer(run, cache=caches.get("eval"))
    trained = train_loop(
        run,
        student_params(config, run.student, teacher_path),
        cache=caches.get("train"),
        teacher=teacher,
        evaluate=scorer,
    )
    metrics = trained.metrics or scorer(trained.params)
    generations = scorer.generations(trained.params)
    metrics = metrics | match_rates(generations)
    rows = [evaluation_row("student", metrics, run.student.shape)]
    of_teacher: dict[str, float] = {}
    scored_shape, absent = None, {}
    if has_teacher(config) and runs_elsewhere(config):
        of_teacher = score_records(caches.get("eval"), run.data)
        absent = not_measured(config, caches.get("eval"), metrics)
        if of_teacher:
            rows.insert(0, evaluation_row("teacher", of_teacher, None))
    elif has_teacher(config):
        of_teacher, scored_shape = score_teacher(
            run,
            build.folder(config, run.workdir, "teacher_scores"),
            cache=caches.get("eval"),
            teacher=teacher,
        )
        rows.insert(0, evaluation_row("teacher", of_teacher, scored_shape))
    summary: dict[str, Any] = {}
    if distributed.is_main():
        summary = write_summary(
            run,
            student=metrics,
            teacher=of_teacher,
            teacher_shape=scored_shape,
            throughput=trained.throughput,
            generations=generations,
            choice_rows=scorer.choice_rows(),
            bins=scorer.bins,
            not_measured=absent,
        )
        print_table(f"{config.name}: held-out results", rows)
        for name, reason in absent.items():
            print(f"not measured: {name}: {reason}")
    return Distilled(run=run, params=trained.params, metrics=metrics, summary=summary)


def open_experiment(config: Config, folder: pathlib.Path) -> Run:
    """Open a run, claim its directory and check what can be checked without computing.

    Raises:
      ValueError: an error of config, data, models, caches or directory.
    """
    workdir_lib.check_owner(folder, config)
    if elsewhere := runs_elsewhere(config):
        check_runs_elsewhere(config)
    run = open_run(config, folder)
    shape = run.student.shape
    make_plan(config, shape, run.data.train)
    num_rows = config.train.batch_size // config.train.num_microbatches
    sharding.local_rows(run.mesh, num_rows)
    check_evaluation(run, shape)
    if has_teacher(config) and not elsewhere:
        teacher = teacher_shape(config, run.tokenizer)
        check_teacher(config, shape, teacher)
        check_teacher_scores(run, teacher)
    trainable.frozen_paths(run.student.abstract, config.optim.freeze)
    build.check(run)
    workdir_lib.claim(folder, config)
    return run


def ensure_teacher(run: Run) -> None:
    """Train the built-in task's teacher and export it, unless that was done."""
    folder = pathlib.Path(teacher_folder(run.config, run.workdir))
    exists = (folder / "config.json").is_file()
    if not has_teacher(run.config) or run.config.teacher.path or exists:
        return
    config = teacher_config(run.config)
    own = open_run(config, run.workdir / "teacher_run", splits=("train",))
    trained = train_loop(own, student_params(config, own.student, ""))
    hf.save(folder, own.student.shape, trained.params, own.tokenizer)
    distributed.barrier("teacher")


def _online_teacher(run: Run) -> tuple[Model, Any] | None:
    """Load the teacher where it runs in the train step."""
    config = run.config
    if not (config.teacher.online and methods.needs_teacher(config.method)):
        return None
    path = teacher_folder(config, run.workdir)
    return load_model(path, run.mesh, dtype=config.train.dtype)

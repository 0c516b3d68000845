"""Evaluation of a model on held-out examples: python -m kdjax.evaluate --workdir=DIR.

--model names it: "student" (the run's newest checkpoint, the default), "teacher", or
any Hugging Face folder with the run's tokenizer. All go through the same code.

--faithfulness measures instead how the student's rationales and answers hang together,
and writes faithfulness.json beside its generations; --simulator adds LAS, and alone
trains the simulator.
"""

from __future__ import annotations

import pathlib
from typing import TYPE_CHECKING

from absl import flags

from kdjax import cli
from kdjax.config import Config
from kdjax.runtime import files
from kdjax.runtime.console import print_table

if TYPE_CHECKING:
    from kdjax.models.lm import Shape

_MODEL = flags.DEFINE_string(
    "model", "student", '"student", "teacher", or a Hugging Face folder.'
)
_FAITHFULNESS = flags.DEFINE_bool(
    "faithfulness", False, "Measure the student's explanations, of a finished run."
)
_SIMULATOR = flags.DEFINE_string(
    "simulator", None, "Directory of a simulator, which is trained unless it is there."
)
flags.declare_key_flag("json")
flags.declare_key_flag("step")


def score(
    config: Config, workdir: pathlib.Path, name: str, *, step: int | None = None
) -> tuple[dict[str, float], Shape | None]:
    """Score "student", "teacher" or a Hugging Face folder.

    Returns:
      Held-out metrics, and the shape of the model; None of a teacher without weights,
      whose metrics are those of its records.
    """
    from kdjax.evaluation.scorer import (
        check_evaluation,
        make_scorer,
        score_records,
    )
    from kdjax.evaluation.text_match import match_rates
    from kdjax.experiment.models import load_model
    from kdjax.experiment.run import for_model, open_run
    from kdjax.experiment.teacher import runs_elsewhere, teacher_folder
    from kdjax.teacher import build
    from kdjax.training.checkpoint import load_student

    student_run = open_run(config, workdir, splits=("eval",))
    cache = build.open_split(student_run, "eval")
    if name == "teacher" and runs_elsewhere(config):
        metrics = score_records(cache, student_run.data)
        if not metrics:
            raise ValueError(
                f"teacher.path={config.teacher.path!r} has no weights, and its records "
                "do not say how probable the tokens were: there is nothing to measure"
            )
        return metrics, None
    if name == "student":
        model, params = student_run.student, load_student(student_run, step=step)
    else:
        path = teacher_folder(config, workdir) if name == "teacher" else name
        student_run = for_model(student_run, path)
        model, params = load_model(path, student_run.mesh, dtype=config.train.dtype)
    check_evaluation(student_run, model.shape)
    scorer = make_scorer(student_run, model, cache=cache)
    metrics = scorer(params) | match_rates(scorer.generations(params))
    return metrics, model.shape


def run(config: Config, workdir: pathlib.Path) -> None:
    """Evaluate one model, print a table and write the metrics where --json says."""
    from kdjax.evaluation import simulator
    from kdjax.evaluation.summary import evaluation_row
    from kdjax.parallel import distributed

    if cli.is_in_store() and (_FAITHFULNESS.value or _SIMULATOR.value):
        raise ValueError(
            "--faithfulness and --simulator write beside what they read, and --workdir "
            "is an address in a store: give a folder"
        )
    if _SIMULATOR.value:
        simulator.train_simulator(config, pathlib.Path(_SIMULATOR.value))
    if _FAITHFULNESS.value:
        _measure_faithfulness(config, workdir)
    if _SIMULATOR.value or _FAITHFULNESS.value:
        return
    metrics, shape = score(config, workdir, _MODEL.value, step=cli.STEP.value)
    if distributed.is_main():
        print_table(
            f"{config.name}: held-out results",
            [evaluation_row(_MODEL.value, metrics, shape)],
        )
        cli.write_json({"model": _MODEL.value} | metrics)


def _measure_faithfulness(config: Config, workdir: pathlib.Path) -> None:
    from kdjax.evaluation import faithfulness
    from kdjax.experiment.run import open_run
    from kdjax.parallel import distributed

    folder = pathlib.Path(_SIMULATOR.value) if _SIMULATOR.value else None
    finished = open_run(config, workdir, splits=("eval",))
    measures = faithfulness.measure(finished, simulator=folder)
    if distributed.is_main():
        rows = [{"measure": k, "value": f"{v:.4f}"} for k, v in measures.items()]
        print_table(f"{config.name}: its explanations", rows)
        files.write_json(workdir / "faithfulness.json", measures)
        cli.write_json(measures)


if __name__ == "__main__":
    cli.run(run, store="read")

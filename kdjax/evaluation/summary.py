"""Results of a finished run: summary.json, its rows of examples, and a table."""

import importlib.metadata
import json
import platform
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import jax
import numpy as np

import kdjax
from kdjax.evaluation import calibration
from kdjax.experiment import workdir
from kdjax.experiment.run import Run
from kdjax.models import flops
from kdjax.models.lm import Shape
from kdjax.runtime import files

_LIBRARIES = ("jax", "flax", "optax", "orbax-checkpoint", "transformers", "numpy")


def evaluation_row(
    name: str, metrics: dict[str, float], shape: Shape | None
) -> dict[str, Any]:
    """Return one line of the table of held-out results; shape None is not known."""
    params = "" if shape is None else f"{flops.params_count(shape):,}"
    row = {"model": name, "params": params}
    names = ("accuracy", "nll", "kl", "agreement", "ece")
    return row | {key: f"{metrics[key]:.4f}" for key in names if key in metrics}


def write_summary(
    run: Run,
    *,
    student: dict[str, float],
    teacher: dict[str, float],
    teacher_shape: Shape | None,
    throughput: dict[str, float],
    generations: list[dict[str, Any]],
    choice_rows: list[dict[str, Any]],
    bins: calibration.Bins | None,
    not_measured: Mapping[str, str] = MappingProxyType({}),
) -> dict[str, Any]:
    """Write summary.json, generations.jsonl and choices.jsonl.

    Args:
      run: a finished one.
      student: its held-out metrics.
      teacher: the teacher's; {} without one.
      teacher_shape: None without one.
      throughput: of the training; {} if every step had been done before.
      generations: rows of generations.jsonl.
      choice_rows: rows of choices.jsonl; [] writes no such file.
      bins: of the student's calibration.
      not_measured: metrics that could not be had, as model/metric, and why.

    Returns:
      The summary.
    """
    config, labels = run.config, run.data.labels
    file = run.workdir / workdir.SUMMARY
    if not throughput and file.is_file():
        # Everything was done already: keep the speed that was measured then.
        earlier = files.read_json(file, remedy="remove it; it is written anew")
        throughput = earlier.get("throughput", {})
    summary = {
        "name": config.name,
        "seed": config.seed,
        "steps": config.train.steps,
        "student": student,
        "teacher": teacher,
        "parameters": {
            "student": flops.params_count(run.student.shape),
            "teacher": teacher_shape and flops.params_count(teacher_shape),
        },
        "examples": run.data.counts,
        "scored": {
            "examples": len(run.data.eval_examples),
            "segments": len(run.data.evaluation),
            "choices": len(choice_rows),
            "generations": len(generations),
        },
        **({"labels": labels} if labels else {}),
        **({"not_measured": dict(not_measured)} if not_measured else {}),
        "tokens_per_second": throughput.get("tokens_per_second"),
        "throughput": throughput,
        "device": f"{jax.device_count()} x {jax.devices()[0].device_kind}",
        "processes": jax.process_count(),
        "versions": {
            "kdjax": kdjax.__version__,
            "python": platform.python_version(),
        }
        | {name: importlib.metadata.version(name) for name in _LIBRARIES},
    }
    if bins is not None:
        names = ("counts", "confidences", "corrects")
        numbers = (np.asarray(x).tolist() for x in bins)
        summary["reliability"] = dict(zip(names, numbers, strict=True))
    files.write_json(file, summary)
    files.write_atomically(run.workdir / workdir.GENERATIONS, _lines(generations))
    if choice_rows:
        files.write_atomically(run.workdir / workdir.CHOICES, _lines(choice_rows))
    return summary


def _lines(rows: list[dict[str, Any]]) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)

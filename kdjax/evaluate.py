"""Scores a model on held-out examples: python -m kdjax.evaluate --workdir=DIR.

--model says which: "student" (the run's newest checkpoint, the default), "teacher", or
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
) -> dict[str, float]:
    """The metrics of "student", "teacher" or a Hugging Face folder."""
    return _score(config, workdir, name, step)[0]


def _score(
    config: Config, workdir: pathlib.Path, name: str, step: int | None
) -> tuple[dict[str, float], Shape]:
    from kdjax.evaluation.scorer import Scorer, match_rates
    from kdjax.experiment.data import load_data
    from kdjax.experiment.models import load_model
    from kdjax.experiment.teacher import teacher_folder
    from kdjax.parallel import sharding
    from kdjax.teacher import build as build_lib
    from kdjax.training.checkpoint import load_student

    mesh = sharding.make_mesh(config.mesh)
    data = load_data(config, splits=("eval",))
    cache = build_lib.open_split(config, data, workdir, "eval")
    if name == "student":
        model, params = load_student(config, workdir, mesh, data.tokenizer, step=step)
    else:
        teacher = teacher_folder(config, workdir)
        model, params = load_model(
            teacher if name == "teacher" else name, mesh, dtype=config.train.dtype
        )
    scorer = Scorer(config, data, model, mesh, cache=cache)
    metrics = scorer(params)
    return metrics | match_rates(scorer.generations(params)), model.shape


def run(config: Config, workdir: pathlib.Path) -> None:
    """Evaluates one model, prints a table and writes the metrics where asked."""
    from kdjax.evaluation import simulator
    from kdjax.parallel import distributed
    from kdjax.training.meter import evaluation_row

    if _SIMULATOR.value:
        simulator.train_simulator(config, pathlib.Path(_SIMULATOR.value))
    if _FAITHFULNESS.value:
        _explain(config, workdir)
    if _SIMULATOR.value or _FAITHFULNESS.value:
        return
    metrics, shape = _score(config, workdir, _MODEL.value, cli.STEP.value)
    if distributed.is_main():
        print_table(
            f"{config.name}: held-out results",
            [evaluation_row(_MODEL.value, metrics, shape)],
        )
        cli.write_json({"model": _MODEL.value} | metrics)


def _explain(config: Config, workdir: pathlib.Path) -> None:
    from kdjax.evaluation import faithfulness
    from kdjax.parallel import distributed

    folder = pathlib.Path(_SIMULATOR.value) if _SIMULATOR.value else None
    found = faithfulness.measure(config, workdir, simulator=folder)
    if distributed.is_main():
        rows = [{"measure": k, "value": f"{v:.4f}"} for k, v in found.items()]
        print_table(f"{config.name}: its explanations", rows)
        files.write_json(workdir / "faithfulness.json", found)
        cli.write_json(found)


if __name__ == "__main__":
    cli.run(run)

"""Scores a model on held-out examples: python -m kdjax.evaluate --workdir=DIR.

--model says which: "student" (the run's newest checkpoint, the default), "teacher", or
any Hugging Face folder with the run's tokenizer. All go through the same code.
"""

import json
import pathlib

from absl import flags

from kdjax import cli, distributed, experiment, sharding
from kdjax.config import Config
from kdjax.reporting import evaluation_row
from kdjax.scoring import Scorer, exact_match
from kdjax.teacher import building
from kdjax.writer import print_table

_MODEL = flags.DEFINE_string(
    "model", "student", '"student", "teacher", or a Hugging Face folder.'
)
_JSON = flags.DEFINE_string("json", None, "Also write the metrics to this file.")
_STEP = flags.DEFINE_integer(
    "step", None, "Checkpoint of the student; the newest by default.", lower_bound=1
)


def run(config: Config, workdir: pathlib.Path) -> None:
    """Evaluates one model, prints a table and writes the metrics where asked."""
    mesh = sharding.make_mesh(config.mesh)
    data = experiment.load_data(config, splits=("eval",))
    teacher_path = experiment.teacher_folder(config, workdir)
    cache = building.open_split(config, data, workdir, "eval")
    if _MODEL.value == "student":
        model, params = experiment.load_student(
            config, workdir, mesh, data.tokenizer, step=_STEP.value
        )
    else:
        path = teacher_path if _MODEL.value == "teacher" else _MODEL.value
        model, params = experiment.load_model(path, mesh, dtype=config.train.dtype)
    scorer = Scorer(config, data, model, mesh, cache=cache)
    metrics = scorer(params)
    metrics |= exact_match(scorer.generations(params))
    if distributed.is_main():
        print_table(
            f"{config.name}: held-out results",
            [evaluation_row(_MODEL.value, metrics, model.shape)],
        )
        if _JSON.value:
            text = json.dumps({"model": _MODEL.value} | metrics, indent=2) + "\n"
            cli.write_atomically(pathlib.Path(_JSON.value), text)


if __name__ == "__main__":
    cli.run(run)

"""The first losses of small runs, which a change that is not meant to move them keeps.

Writes tests/golden/losses.json again:

    python -m tests.golden.make_losses

When one may: a change is meant to change the numbers of training (a default, the order
of examples, a formula, what random numbers are drawn), and CHANGELOG.md says so. Never
to let a refactoring pass: it leaves every loss as it is, up to rounding. The commit
that rewrites the file says which losses changed and why.

The losses of runs on real data are made again where KDJAX_REAL_DATA is set, and left as
they are elsewhere.
"""

import json
import os
import pathlib
import tempfile

from tests import conftest  # noqa: F401 - XLA's flags, before JAX starts

FILE = pathlib.Path(__file__).parent / "losses.json"
REAL = (  # of configs/paper/csqa_t5_base.py
    "multitask,smoke",
    "rationale_then_label,smoke",
    "multitask_counterfactual,smoke",
)


def read() -> dict[str, list[float]]:
    """The losses of each run, by its name."""
    return json.loads(FILE.read_text())


def built_in(folder: pathlib.Path) -> dict[str, list[float]]:
    """Losses of runs on the built-in task.

    Args:
      folder: of the shared runs, which are made unless they are there.
    """
    from tests import helpers

    runs = {name: helpers.finish_run(name, folder)[1] for name in helpers.RUNS}
    hard = helpers.small_config(
        method={"hard_weight": 1.0, "soft_weight": 0.0},
        train={"steps": helpers.NUM_GOLDEN},
    )
    steps = helpers.TrainSteps(hard, num=helpers.NUM_GOLDEN)
    return {name: helpers.losses(run) for name, run in runs.items()} | {
        "hard": steps.losses
    }


def real(data: pathlib.Path, folder: pathlib.Path) -> dict[str, list[float]]:
    """Losses of runs on CommonsenseQA."""
    from tests import helpers, test_real

    return {
        argument: helpers.losses(
            test_real.run_paper("csqa_t5_base", argument, data, None, folder / argument)
        )
        for argument in REAL
    }


def main() -> None:
    """Rewrites the file."""
    losses = read() if FILE.exists() else {}
    with tempfile.TemporaryDirectory() as scratch:
        folder = pathlib.Path(scratch)
        losses |= built_in(folder / "shared")
        if data := os.environ.get("KDJAX_REAL_DATA"):
            losses |= real(pathlib.Path(data), folder)
    rows = (f"{json.dumps(name)}: {json.dumps(losses[name])}" for name in losses)
    FILE.write_text("{\n" + ",\n".join(rows) + "\n}\n")


if __name__ == "__main__":
    main()

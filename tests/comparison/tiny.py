"""A comparison of seconds: with and without soft labels, and a run that must fail."""

from kdjax.comparison import Comparison
from tests import helpers


def get_config(argument: str = "") -> Comparison:
    """See above; "sound" leaves out the run that fails."""
    found = Comparison(
        name="tiny",
        base=helpers.small_config(method=dict(name="finetune")),
        factors={
            "labels": {
                "hard": {"method.hard_weight": 1.0, "method.soft_weight": 0.0},
                "soft": {},
                "broken": {"optim.learning_rate": 1e30},
            }
        },
        seeds=(0, 1),
        exclude=({"labels": "broken"},) if argument == "sound" else (),
        compare=("labels",),
        metrics=("answer_accuracy", "nll"),
    )
    if argument != "sound":
        found.seeds = (0,)
    return found

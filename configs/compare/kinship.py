"""Five training methods with and without soft labels, on the built-in task.

    python -m kdjax.compare --config=configs/compare/kinship.py --jobs=2

The data and models of configs/quickstart.py, three seeds: 30 runs after five teachers,
one a method, each trained by that method on hard labels, so that it has seen the views
it labels. Some 40 minutes on two cores; docs/methods.md has what came of it.
The argument "smoke" makes everything tiny.
"""

import dataclasses

from kdjax.comparison import Comparison
from kdjax.config import (
    CacheConfig,
    Config,
    DataConfig,
    DecoderConfig,
    EvalConfig,
    KinshipConfig,
    MethodConfig,
    OptimConfig,
    StudentConfig,
    TeacherConfig,
    TrainConfig,
)

METHODS = (
    "finetune",
    "rationale_then_label",
    "multitask",
    "counterfactual",
    "multitask_counterfactual",
)


def base() -> Config:
    """Return the config that all runs have in common."""
    decoder = DecoderConfig(
        width=64, num_layers=2, num_heads=4, num_kv_heads=4, head_dim=16, mlp_width=192
    )
    return Config(
        data=DataConfig(
            source="kinship",
            num_train=400,
            num_eval=500,
            max_prompt=96,
            max_target=48,
            kinship=KinshipConfig(min_hops=2, max_hops=2, num_distractors=1),
        ),
        teacher=TeacherConfig(
            decoder=dataclasses.replace(
                decoder, width=96, num_layers=3, head_dim=24, mlp_width=288
            ),
            num_train=20000,
            steps=3000,
            learning_rate=4e-3,
        ),
        # Two explained answers fill a row; of 128 tokens they would not fit.
        cache=CacheConfig(k=16, temperatures=(1.0, 2.0), batch_size=16, row_length=136),
        student=StudentConfig(init="random", decoder=decoder),
        method=MethodConfig(temperature=2.0),
        optim=OptimConfig(learning_rate=4e-3, warmup_steps=100, weight_decay=0.1),
        train=TrainConfig(
            steps=1000, batch_size=8, row_length=136, log_every=50, save_every=500
        ),
        evaluation=EvalConfig(num_generations=300, max_new_tokens=48),
    )


def get_config(argument: str = "") -> Comparison:
    """Return the comparison."""
    if argument not in ("", "smoke"):
        raise ValueError(f"argument {argument!r} is unknown: use smoke")
    comparison = Comparison(
        name="compare_kinship",
        base=base(),
        factors={
            "method": {name: {"method.name": name} for name in METHODS},
            "labels": {
                "hard": {"method.hard_weight": 1.0, "method.soft_weight": 0.0},
                "soft": {"method.hard_weight": 0.1, "method.soft_weight": 0.9},
            },
        },
        metrics=(
            "answer_accuracy",
            "faithfulness/las",
            "faithfulness/names_gold",
            "faithfulness/names_distractor",
            "faithfulness/words",
        ),
        compare=("method",),
        within=("labels",),
        chance={"answer_accuracy": 0.2},
        cost="",
        faithfulness=True,
    )
    if argument:
        shrink(comparison)
    return comparison


def shrink(comparison: Comparison) -> None:
    """Make a comparison on the built-in task tiny."""
    comparison.name += "_smoke"
    comparison.seeds = (0,)
    comparison.metrics, comparison.faithfulness = ("answer_accuracy",), False
    config = comparison.base
    config.data.num_train, config.data.num_eval = 32, 16
    config.teacher.num_train, config.teacher.steps = 32, 5
    config.train.steps, config.optim.warmup_steps = 5, 2
    config.evaluation.num_generations = 8

"""What makes distillation succeed: temperature, soft weight, student, teacher.

    python -m kdjax.compare --config=configs/compare/factors.py --jobs=2

Every combination on the built-in task, with two seeds: students learn labels alone (400
questions) from teachers that saw 20,000 right answers, or as many with three in ten
wrong. Weight 0 is hard labels alone, and run once: it has no temperature, and asks no
teacher. Decoding is timed, and its memory counted, for both sizes. Some 40 minutes on
two cores. The argument "smoke" makes all tiny.
"""

from typing import Any

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

TEMPERATURES = (1.0, 2.0, 4.0, 8.0)
SHAPES = {
    "tiny": DecoderConfig(
        width=32, num_layers=2, num_heads=4, num_kv_heads=4, head_dim=8, mlp_width=96
    ),
    "small": DecoderConfig(
        width=64, num_layers=2, num_heads=4, num_kv_heads=4, head_dim=16, mlp_width=192
    ),
    "teacher": DecoderConfig(
        width=96, num_layers=3, num_heads=4, num_kv_heads=4, head_dim=24, mlp_width=288
    ),
}


def get_config(argument: str = "") -> Comparison:
    """Return the comparison."""
    if argument not in ("", "smoke"):
        raise ValueError(f"argument {argument!r} is unknown: use smoke")
    base = Config(
        data=DataConfig(
            source="kinship",
            num_train=400,
            num_eval=500,
            max_prompt=96,
            max_target=16,
            kinship=KinshipConfig(min_hops=2, max_hops=2, num_distractors=1),
        ),
        teacher=TeacherConfig(
            decoder=SHAPES["teacher"], num_train=20000, steps=1500, learning_rate=4e-3
        ),
        cache=CacheConfig(
            k=16, temperatures=TEMPERATURES, batch_size=16, row_length=128
        ),
        student=StudentConfig(init="random"),
        method=MethodConfig(name="finetune"),
        optim=OptimConfig(learning_rate=4e-3, warmup_steps=25, weight_decay=0.1),
        train=TrainConfig(
            steps=600, batch_size=8, row_length=128, log_every=50, save_every=600
        ),
        evaluation=EvalConfig(num_generations=0, max_new_tokens=8),
    )
    comparison = Comparison(
        name="compare_factors",
        base=base,
        factors={
            "temperature": {f"T{t:g}": {"method.temperature": t} for t in TEMPERATURES},
            "soft_weight": {f"w{w:g}": _weight(w) for w in (0.0, 0.5, 0.9)},
            "student": {
                name: {"student.decoder": SHAPES[name]} for name in ("tiny", "small")
            },
            "teacher": {
                "clean": {},
                "noisy": {"teacher.label_noise": 0.3},
            },
        },
        exclude=(
            *(
                {"temperature": f"T{t:g}", "soft_weight": "w0"}
                for t in TEMPERATURES[1:]
            ),
            {"soft_weight": "w0", "teacher": "noisy"},
        ),
        seeds=(0, 1),
        metrics=("accuracy", "nll", "kl", "agreement", "ece", "retention"),
        compare=("temperature", "soft_weight"),
        within=("student", "teacher"),
        chance={"accuracy": 0.2},
        cost="latency/1",
        latency=True,
    )
    if argument:
        _shrink(comparison)
    return comparison


def _weight(weight: float) -> dict[str, Any]:
    return {"method.hard_weight": 1 - weight, "method.soft_weight": weight}


def _shrink(comparison: Comparison) -> None:
    comparison.name += "_smoke"
    comparison.seeds = (0,)
    comparison.factors["temperature"].pop("T4")
    comparison.factors["temperature"].pop("T8")
    comparison.exclude = (*comparison.exclude[:1], *comparison.exclude[-1:])
    config = comparison.base
    config.data.num_train, config.data.num_eval = 32, 16
    config.teacher.num_train, config.teacher.steps = 32, 5
    config.train.steps, config.optim.warmup_steps = 5, 2

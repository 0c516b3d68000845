"""Distils a small student on the built-in kinship task, from nothing, on two CPU cores.

    python -m kdjax.train --config=configs/quickstart.py

A teacher (370k parameters) is trained on 20,000 generated questions; the student (114k)
sees 400 of them, with the teacher's soft labels. Arguments: "hard" trains the same
student on the same batches with hard labels alone; "smoke" takes some seconds.
"""

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


def get_config(argument: str = "") -> Config:
    """Return the experiment; several arguments are joined by commas."""
    config = Config(
        name="quickstart",
        data=DataConfig(
            source="kinship",
            num_train=400,
            num_eval=500,
            max_prompt=96,
            max_target=40,
            kinship=KinshipConfig(min_hops=2, max_hops=2, num_distractors=1),
        ),
        teacher=TeacherConfig(
            decoder=DecoderConfig(
                width=96,
                num_layers=3,
                num_heads=4,
                num_kv_heads=4,
                head_dim=24,
                mlp_width=288,
            ),
            num_train=20000,
            steps=1500,
            learning_rate=4e-3,
        ),
        cache=CacheConfig(k=16, temperatures=(1.0, 2.0), batch_size=16, row_length=128),
        student=StudentConfig(
            init="random",
            decoder=DecoderConfig(
                width=64,
                num_layers=2,
                num_heads=4,
                num_kv_heads=4,
                head_dim=16,
                mlp_width=192,
            ),
        ),
        method=MethodConfig(
            name="multitask", hard_weight=0.1, soft_weight=0.9, temperature=2.0
        ),
        optim=OptimConfig(learning_rate=4e-3, warmup_steps=100, weight_decay=0.1),
        train=TrainConfig(
            steps=1000, batch_size=16, row_length=128, log_every=50, save_every=250
        ),
        evaluation=EvalConfig(num_generations=32, max_new_tokens=40),
    )
    arguments = set(filter(None, argument.split(",")))
    if unknown := arguments - {"hard", "smoke"}:
        raise ValueError(f"argument {sorted(unknown)} is unknown: use hard, smoke")
    if "hard" in arguments:
        config.name += "_hard"
        config.method.hard_weight, config.method.soft_weight = 1.0, 0.0
    if "smoke" in arguments:
        config.name += "_smoke"
        config.data.num_train, config.data.num_eval = 32, 16
        config.teacher.num_train, config.teacher.steps = 32, 5
        config.train.steps, config.optim.warmup_steps = 5, 2
        config.evaluation.num_generations = 2
    return config

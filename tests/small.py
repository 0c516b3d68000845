"""Experiments small enough for tests, made once."""

import dataclasses

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

SHAPE = DecoderConfig(
    width=32, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=8, mlp_width=64
)


def config(**changes) -> Config:
    """A whole experiment of a few seconds; `part=dict(field=value)` changes parts."""
    base = Config(
        name="small",
        data=DataConfig(
            num_train=24,
            num_eval=8,
            max_prompt=96,
            max_target=48,
            kinship=KinshipConfig(min_hops=2, max_hops=2, num_distractors=1),
        ),
        teacher=TeacherConfig(decoder=SHAPE, num_train=32, steps=4),
        cache=CacheConfig(
            k=8, temperatures=(1.0, 2.0), shard_size=16, batch_size=8, row_length=128
        ),
        student=StudentConfig(decoder=dataclasses.replace(SHAPE, num_layers=1)),
        method=MethodConfig(temperature=2.0),
        optim=OptimConfig(learning_rate=1e-2),
        train=TrainConfig(
            steps=6,
            batch_size=8,
            row_length=128,
            log_every=1,
            save_every=2,
            num_threads=1,
            prefetch=2,
        ),
        evaluation=EvalConfig(batch_size=8, num_generations=2, max_new_tokens=4),
    )
    for part, values in changes.items():
        if isinstance(values, dict):
            values = dataclasses.replace(getattr(base, part), **values)
        setattr(base, part, values)
    return base

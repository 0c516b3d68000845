"""Distils a small student on the built-in kinship task, from nothing, on a laptop."""

from kdjax.config import (
    CacheConfig,
    Config,
    DataConfig,
    DecoderConfig,
    EvalConfig,
    MethodConfig,
    OptimConfig,
    StudentConfig,
    TeacherConfig,
    TrainConfig,
)


def get_config(argument: str = "") -> Config:
    """The experiment; argument "hard" trains on hard labels alone, "smoke" is tiny."""
    config = Config(
        name="quickstart",
        data=DataConfig(num_train=1000, num_eval=500, max_prompt=128, max_target=64),
        teacher=TeacherConfig(
            decoder=DecoderConfig(
                width=128,
                num_layers=4,
                num_heads=4,
                num_kv_heads=4,
                head_dim=32,
                mlp_width=384,
            ),
            num_train=30000,
            steps=2000,
            learning_rate=2e-3,
        ),
        cache=CacheConfig(k=16, temperatures=(1.0, 2.0), row_length=256),
        student=StudentConfig(
            decoder=DecoderConfig(
                width=64,
                num_layers=2,
                num_heads=4,
                num_kv_heads=4,
                head_dim=16,
                mlp_width=192,
            )
        ),
        method=MethodConfig(name="multitask", temperature=1.0),
        optim=OptimConfig(learning_rate=2e-3, warmup_steps=50, weight_decay=0.1),
        train=TrainConfig(steps=500, batch_size=16, row_length=256, log_every=50),
        evaluation=EvalConfig(num_generations=8, max_new_tokens=40),
    )
    return config

"""A step large enough for a CPU's matmul rate: 32M parameters, rows without padding.

    python -m kdjax.benchmark --config=configs/bench_30m.py --synthetic

2,048 tokens per step, 64 pairs per token from a cache on disk, float32; 0.41 TFLOP,
so about 3 s at 150 GFLOP/s (2 cores). Expected: 0.70 or more of the matmul rate, and
at most 1.05 of the time of hard labels alone. The data are those of --synthetic: the
built-in task only stands here because a config names some source. Arguments: "hard" has
no teacher; "smoke" takes some seconds.
"""

from kdjax.config import (
    CacheConfig,
    Config,
    DataConfig,
    DecoderConfig,
    MethodConfig,
    StudentConfig,
    TeacherConfig,
    TrainConfig,
)


def get_config(argument: str = "") -> Config:
    """Return the experiment; several arguments are joined by commas."""
    config = Config(
        name="bench_30m",
        data=DataConfig(num_train=1, num_eval=1),
        teacher=TeacherConfig(
            decoder=DecoderConfig(
                vocab_size=32000,
                width=768,
                num_layers=12,
                num_heads=12,
                num_kv_heads=12,
                head_dim=64,
                mlp_width=2048,
            )
        ),
        cache=CacheConfig(k=64, temperatures=(1.0, 2.0)),
        student=StudentConfig(
            init="random",
            decoder=DecoderConfig(
                vocab_size=32000,
                width=512,
                num_layers=5,
                num_heads=8,
                num_kv_heads=8,
                head_dim=64,
                mlp_width=1408,
            ),
        ),
        method=MethodConfig(name="finetune", temperature=2.0),
        train=TrainConfig(batch_size=8, row_length=256),
    )
    arguments = set(filter(None, argument.split(",")))
    if unknown := arguments - {"hard", "smoke"}:
        raise ValueError(f"argument {sorted(unknown)} is unknown: use hard, smoke")
    if "hard" in arguments:
        config.name += "_hard"
        config.method.hard_weight, config.method.soft_weight = 1.0, 0.0
    if "smoke" in arguments:
        config.name += "_smoke"
        config.train.batch_size, config.train.row_length = 2, 32
        for shape in (config.student.decoder, config.teacher.decoder):
            shape.vocab_size, shape.width, shape.num_layers = 512, 32, 1
            shape.mlp_width = 64
    return config

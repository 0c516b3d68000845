"""A student of the shape of Llama-3.2-1B in bfloat16, for one GPU of 80 GB or more.

    python -m kdjax.benchmark --config=configs/bench_1b.py --synthetic

1.24 billion parameters, 16,384 tokens per step in rows of 2,048, 64 pairs per token
from a cache on disk; the online teacher compared has the shape of Llama-3.2-3B
(--noonline leaves it out: it takes 13 GB). 0.135 PFLOP per step: 0.27 s at half of the
989 TFLOP/s of an H200. The data are those of --synthetic: the built-in task only stands
here because a config names some source. Arguments: "hard" has no teacher; "smoke" takes
some seconds on a CPU.
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
        name="bench_1b",
        data=DataConfig(num_train=1, num_eval=1),
        teacher=TeacherConfig(
            decoder=DecoderConfig(
                vocab_size=128256,
                width=3072,
                num_layers=28,
                num_heads=24,
                num_kv_heads=8,
                head_dim=128,
                mlp_width=8192,
                rope_theta=500000.0,
            )
        ),
        cache=CacheConfig(k=64, temperatures=(1.0,), memory_mib=512),
        student=StudentConfig(
            init="random",
            decoder=DecoderConfig(
                vocab_size=128256,
                width=2048,
                num_layers=16,
                num_heads=32,
                num_kv_heads=8,
                head_dim=64,
                mlp_width=8192,
                rope_theta=500000.0,
            ),
        ),
        method=MethodConfig(name="finetune", temperature=1.0),
        train=TrainConfig(
            batch_size=8,
            row_length=2048,
            dtype="bfloat16",
            remat="dots",
            num_threads=4,
        ),
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
            shape.vocab_size, shape.width, shape.num_layers = 512, 64, 1
            shape.mlp_width = 128
    return config

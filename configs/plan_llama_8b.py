"""Distils into a student of Llama 3.1 8B's shape; made to be planned.

    python -m kdjax.plan --config=configs/plan_llama_8b.py --topology=v5p:4x4x4

Two minutes on two CPU cores; expect that it fits (peak 13 of 95.7 GiB a chip), no
logits in any collective, at least 1.21 s a step (435 thousand tokens/s) and room for
some 3,300 rows.

To train it, give `--config.data.path`, `--config.teacher.path` and, if the teacher's
folder has none, a tokenizer. Arguments: "hard" has no teacher; "smoke" is a shape of
seconds, for `--topology=cpu:8`.
"""

from kdjax.config import (
    CacheConfig,
    Config,
    DataConfig,
    DecoderConfig,
    MeshConfig,
    MethodConfig,
    OptimConfig,
    StudentConfig,
    TeacherConfig,
    TrainConfig,
)


def get_config(argument: str = "") -> Config:
    """Return the experiment; several arguments are joined by commas."""
    config = Config(
        name="plan_llama_8b",
        data=DataConfig(source="text", path="corpus.jsonl"),
        teacher=TeacherConfig(path="teacher"),
        cache=CacheConfig(k=64, temperatures=(1.0,)),
        student=StudentConfig(
            init="random",
            decoder=DecoderConfig(
                vocab_size=128256,
                width=4096,
                num_layers=32,
                num_heads=32,
                num_kv_heads=8,
                head_dim=128,
                mlp_width=14336,
                rope_theta=500000.0,
                tie_embeddings=False,
                max_length=131072,
            ),
        ),
        method=MethodConfig(name="text", hard_weight=0.1, soft_weight=0.9),
        optim=OptimConfig(name="adamw", learning_rate=3e-4, weight_decay=0.1),
        train=TrainConfig(
            batch_size=128,
            row_length=4096,
            dtype="bfloat16",
            remat="full",
            memory_mib=256,
        ),
        mesh=MeshConfig(data=-1, fsdp=16),
    )
    arguments = set(filter(None, argument.split(",")))
    if unknown := arguments - {"hard", "smoke"}:
        raise ValueError(f"argument {sorted(unknown)} is unknown: use hard, smoke")
    if "hard" in arguments:
        config.name += "_hard"
        config.method.hard_weight, config.method.soft_weight = 1.0, 0.0
    if "smoke" in arguments:
        config.name += "_smoke"
        config.student.decoder = DecoderConfig(
            vocab_size=512, num_heads=4, num_kv_heads=2, num_layers=2
        )
        config.train.batch_size, config.train.row_length = 16, 128
        config.mesh.fsdp = 4
    return config

"""Cuts a 6-layer student from SmolLM2-135M and distils it on CommonsenseQA.

    python -m kdjax.train --config=configs/smollm2_csqa.py \
        --config.data.path=CSQA/train.jsonl --config.data.eval_path=CSQA/dev.jsonl \
        --config.data.rationales=CSQA/palm_train.jsonl \
        --config.data.eval_rationales=CSQA/palm_dev.jsonl \
        --config.teacher.path=SMOLLM2_FOLDER

Label and rationale views (multitask), the rationales written by PaLM-540B; about a
quarter of those argue for another choice than the gold one, and are kept as they are.
Arguments: "hard" trains the same student, on the same batches, on hard labels alone;
"smoke" takes a few rows and steps. Where there is a network, hub names work:
--config.data.source=datasets --config.data.path=tau/commonsense_qa with the label view
(--config.method.name=finetune), which needs no rationales, and the default teacher.
"""

from kdjax.config import (
    CacheConfig,
    Config,
    DataConfig,
    EvalConfig,
    MethodConfig,
    OptimConfig,
    StudentConfig,
    TeacherConfig,
    TrainConfig,
)


def get_config(argument: str = "") -> Config:
    """See the module; several arguments are joined by commas."""
    config = Config(
        name="smollm2_csqa",
        data=DataConfig(
            source="jsonl",
            schema="commonsense_qa",
            path="commonsense_qa/train.jsonl",
            eval_path="commonsense_qa/dev.jsonl",
            rationales="commonsense_qa/palm_train.jsonl",
            eval_rationales="commonsense_qa/palm_dev.jsonl",
            eval_split="validation",
            num_train=2000,
            num_eval=200,
            max_prompt=160,
            max_target=160,
            on_long="drop",
        ),
        teacher=TeacherConfig(path="HuggingFaceTB/SmolLM2-135M-Instruct"),
        cache=CacheConfig(k=64, temperatures=(1.0, 2.0), batch_size=4, row_length=512),
        student=StudentConfig(
            init="teacher_layers", keep_layers=(0, 1, 10, 19, 28, 29)
        ),
        method=MethodConfig(
            name="multitask",
            label_weight=0.5,
            hard_weight=0.5,
            soft_weight=0.5,
            temperature=1.0,
        ),
        optim=OptimConfig(learning_rate=5e-4, warmup_steps=30),
        train=TrainConfig(
            steps=300,
            batch_size=2,
            row_length=512,
            log_every=10,
            eval_every=100,
            save_every=100,
            memory_mib=64,
        ),
        evaluation=EvalConfig(batch_size=4, num_generations=8),
    )
    arguments = set(filter(None, argument.split(",")))
    if unknown := arguments - {"hard", "smoke"}:
        raise ValueError(f"argument {sorted(unknown)} is unknown: use hard, smoke")
    if "hard" in arguments:
        config.name += "_hard"
        config.method.hard_weight, config.method.soft_weight = 1.0, 0.0
    if "smoke" in arguments:
        config.name += "_smoke"
        config.data.num_train, config.data.num_eval = 16, 8
        config.train.steps, config.train.eval_every = 2, 0
        config.optim.warmup_steps = 0
        config.evaluation.num_generations = 2
    return config

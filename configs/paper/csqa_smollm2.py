"""SmolLM2-135M as the student on CommonsenseQA with rationales, by any of the methods.

    python -m kdjax.train --config=configs/paper/csqa_smollm2.py:METHOD \
        --config.data.path=CSQA/train.jsonl --config.data.eval_path=CSQA/dev.jsonl \
        --config.data.rationales=CSQA/palm_train.jsonl \
        --config.data.eval_rationales=CSQA/palm_dev.jsonl \
        --config.student.path=SMOLLM2_FOLDER

The decoder-only form of csqa_t5_base.py: METHOD is as there, and so are wrong
rationales. A pretrained student reads a suffix ("Answer:", "Explain:") better than a
prefix it has never seen, so views are told apart by suffixes. Further arguments:

    soft    half of the weight on a teacher's distributions, with
            --config.teacher.path=FOLDER of a model with the same vocabulary
    cpu     100 steps of about seven examples, 200 held-out rows: half an hour on two
            cores
    smoke   a few rows and steps

Before training: python -m kdjax.evaluate --config=... --workdir=DIR --model=FOLDER.
Three epochs of 8,766 rows, learning rate 5e-5; accuracy is by likelihood of the
choices (views with a label), and answer_match/<view> by the generated answer.
"""

from kdjax.config import (
    Config,
    DataConfig,
    EvalConfig,
    MethodConfig,
    OptimConfig,
    StudentConfig,
    TrainConfig,
)

# Packed rows of 512 tokens that hold about 48 examples.
ROWS = {
    "finetune": 6,
    "rationale_then_label": 10,
    "multitask": 15,
    "counterfactual": 20,
    "multitask_counterfactual": 34,
}
FURTHER = {"soft", "cpu", "smoke"}


def get_config(argument: str = "") -> Config:
    """See the module."""
    arguments = set(filter(None, argument.split(",")))
    method = next(iter(arguments & ROWS.keys()), "multitask")
    if unknown := arguments - FURTHER - {method}:
        raise ValueError(
            f"argument {sorted(unknown)}: use one of {[*ROWS]} and any of "
            f"{sorted(FURTHER)}"
        )
    config = Config(
        name="_".join(["csqa_smollm2", method, *sorted(arguments & FURTHER)]),
        data=DataConfig(
            source="jsonl",
            schema="commonsense_qa",
            path="commonsense_qa/train.jsonl",
            eval_path="commonsense_qa/dev.jsonl",
            num_train=8766,
            holdout_seed=0,  # the published 8,766 of 9,741 rows
            max_prompt=300,
            max_target=256,
        ),
        student=StudentConfig(init="folder", path="HuggingFaceTB/SmolLM2-135M"),
        method=MethodConfig(name=method, hard_weight=1.0, soft_weight=0.0),
        optim=OptimConfig(
            learning_rate=5e-5, schedule="linear", warmup_steps=10, b2=0.999
        ),
        train=TrainConfig(
            steps=550,
            batch_size=ROWS[method],
            row_length=512,
            remat="dots",
            log_every=10,
            eval_every=0,
            save_every=200,
        ),
        evaluation=EvalConfig(num_generations=1221, max_new_tokens=300),
    )
    if method != "finetune":
        config.data.rationales = "commonsense_qa/palm_train.jsonl"
        config.data.eval_rationales = "commonsense_qa/palm_dev.jsonl"
    if "soft" in arguments:
        config.method.hard_weight = config.method.soft_weight = 0.5
    if arguments & {"cpu", "smoke"}:
        config.data.num_eval = 200
        config.train.steps = 100
        config.train.batch_size = max(2, ROWS[method] // 8)
        config.train.remat = "none"
        config.evaluation.batch_size = 4
        config.evaluation.num_generations = 8
        config.evaluation.max_new_tokens = 64
    if "smoke" in arguments:
        config.data.num_train, config.data.num_eval = 64, 8
        config.data.holdout_seed = -1
        config.train.steps, config.optim.warmup_steps = 2, 0
        config.train.batch_size = 2
        config.evaluation.num_generations = 2
    return config

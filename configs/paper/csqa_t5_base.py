"""T5 v1.1 base on CommonsenseQA with rationales, with the settings of arXiv 2504.16056.

    python -m kdjax.train --config=configs/paper/csqa_t5_base.py:METHOD \
        --config.data.path=CSQA/train.jsonl --config.data.eval_path=CSQA/dev.jsonl \
        --config.data.rationales=CSQA/palm_train.jsonl \
        --config.data.eval_rationales=CSQA/palm_dev.jsonl \
        --config.student.path=T5_FOLDER

METHOD is finetune, rationale_then_label, multitask (without an argument),
counterfactual or multitask_counterfactual; the last two also want
--config.data.counterfactuals=FILE, wrong rationales by {id, choice, text}. Further
arguments, joined by commas:

    large   T5 v1.1 large
    soft    half of the weight on a teacher's distributions, with
            --config.teacher.path=FOLDER of a model with T5's vocabulary
    cpu     a small random T5 with T5's tokenizer, --config.data.tokenizer=FOLDER: ten
            minutes on two cores
    smoke   a few rows and steps of it

As there: AdamW, learning rate 5e-5 falling to 0, 5,000 steps of 48 examples, clipping
at 1, dropout 0.1, prompts of at most 300 tokens, the 8,766 rows of the training split
that seed 0 draws (975 are held out), greedy decoding of at most 300 tokens, exact match
on the 1,221 rows of the public dev split.
Rows are packed here, so a step has about 48 examples, not exactly. To expect: the means
over seeds that were published for base are 62.1 (multitask), 53.2 (counterfactual) and
59.8 (both); see exact_match/label and answer_match/factual of summary.json. A GPU of 40
GiB trains base in about an hour (not measured here).
"""

from kdjax.config import (
    Config,
    DataConfig,
    EvalConfig,
    MethodConfig,
    OptimConfig,
    PrefixConfig,
    StudentConfig,
    T5Config,
    TeacherConfig,
    TrainConfig,
)

# Packed rows of a step that hold about 48 examples, and the decoder's tokens in one;
# prompts are of 45 tokens, rationales of 41 and answers of 3.
ROWS = {
    "finetune": (5, 64),
    "rationale_then_label": (5, 512),
    "multitask": (10, 256),
    "counterfactual": (10, 512),
    "multitask_counterfactual": (20, 384),
}
FURTHER = {"large", "soft", "cpu", "smoke"}


def get_config(argument: str = "") -> Config:
    """See the module."""
    arguments = set(filter(None, argument.split(",")))
    method = next(iter(arguments & ROWS.keys()), "multitask")
    if unknown := arguments - FURTHER - {method}:
        raise ValueError(
            f"argument {sorted(unknown)}: use one of {[*ROWS]} and any of "
            f"{sorted(FURTHER)}"
        )
    batch_size, row_length = ROWS[method]
    size = "large" if "large" in arguments else "base"
    config = Config(
        name="_".join(["csqa_t5", size, method, *sorted(arguments & FURTHER)]),
        data=DataConfig(
            source="jsonl",
            schema="commonsense_qa",
            path="commonsense_qa/train.jsonl",
            eval_path="commonsense_qa/dev.jsonl",
            num_train=8766,
            holdout_seed=0,  # the published 8,766 of 9,741 rows
            max_prompt=299,
            max_target=256,
            prompt_suffix=False,
            prefixes=PrefixConfig(
                label="[predict]",
                rationale="[explain]",
                rationale_then_label="[factual]",
                factual="[factual]",
                counterfactual="[counterfactual]",
            ),
        ),
        teacher=TeacherConfig(),
        student=StudentConfig(
            init="folder", path=f"google/t5-v1_1-{size}", dropout=0.1
        ),
        method=MethodConfig(name=method, hard_weight=1.0, soft_weight=0.0),
        optim=OptimConfig(learning_rate=5e-5, schedule="linear", b2=0.999),
        train=TrainConfig(
            steps=5000,
            batch_size=batch_size,
            row_length=row_length,
            encoder_row_length=512,
            log_every=50,
            eval_every=1000,
            save_every=1000,
        ),
        evaluation=EvalConfig(num_generations=1221, max_new_tokens=300),
    )
    if method != "finetune":
        config.data.rationales = "commonsense_qa/palm_train.jsonl"
        config.data.eval_rationales = "commonsense_qa/palm_dev.jsonl"
    if "soft" in arguments:
        config.method.hard_weight = config.method.soft_weight = 0.5
        config.cache.row_length, config.cache.encoder_row_length = 256, 512
    if arguments & {"cpu", "smoke"}:
        small(config)
    if "smoke" in arguments:
        config.data.num_train, config.data.num_eval = 64, 8
        config.data.holdout_seed = -1
        config.train.steps, config.train.eval_every = 2, 0
        config.optim.warmup_steps = 0
        config.evaluation.num_generations = 2
    return config


def small(config: Config) -> None:
    """Describe a random T5 that two cores train in minutes."""
    config.student.init, config.student.path = "random", ""
    config.student.architecture = "t5"
    config.student.t5 = T5Config(
        vocab_size=32128,
        width=128,
        num_encoder_layers=3,
        num_decoder_layers=3,
        num_heads=4,
        head_dim=32,
        mlp_width=256,
    )
    config.data.tokenizer = "google/t5-v1_1-base"
    config.data.num_eval = 200
    config.optim.learning_rate, config.optim.warmup_steps = 2e-3, 50
    config.train.steps, config.train.log_every = 400, 20
    config.train.batch_size = max(2, 2 * config.train.batch_size // 5)
    config.train.eval_every, config.train.save_every = 200, 200
    config.evaluation.num_generations = 16
    config.evaluation.max_new_tokens = 64

"""Five training methods on CommonsenseQA with rationales, and students of two kinds.

    python -m kdjax.compare --config=configs/compare/csqa.py --jobs=NUM_GPUS \
        --config.base.data.path=CSQA/train.jsonl \
        --config.base.data.eval_path=CSQA/dev.jsonl \
        --config.base.data.rationales=CSQA/palm_train.jsonl \
        --config.base.data.eval_rationales=CSQA/palm_dev.jsonl \
        --config.base.teacher.path=SMOLLM2_FOLDER \
        --config.base.annotate.model=SMOLLM2_FOLDER \
        --config.base.student.path=T5_FOLDER

Students are SmolLM2 itself and a T5, the settings those of configs/paper/, six seeds:
60 runs. Wrong rationales, which two methods need, are written by `annotate.model`.
Arguments, joined by commas:

    smollm2, t5   only these students
    cpu           60 training and 40 held-out rows, two seeds, 30 steps: a random T5
                  (--config.base.data.tokenizer=FOLDER with T5's) and three layers of
                  SmolLM2; wrong rationales by one demonstration; explanations are not
                  measured. Some 35 minutes on two cores
    smoke         a few rows and steps of it
"""

from typing import Any

from kdjax.comparison import Comparison
from kdjax.config import (
    AnnotateConfig,
    Config,
    DataConfig,
    EvalConfig,
    MethodConfig,
    OptimConfig,
    PrefixConfig,
    T5Config,
    TrainConfig,
)

# Packed rows of a step that hold about 48 examples: of SmolLM2 with 512 tokens, of T5
# with 512 of its encoder and so many of its decoder.
SMOLLM2_ROWS = {
    "finetune": 6,
    "rationale_then_label": 10,
    "multitask": 15,
    "counterfactual": 20,
    "multitask_counterfactual": 34,
}
T5_ROWS = {
    "finetune": (5, 64),
    "rationale_then_label": (5, 512),
    "multitask": (10, 256),
    "counterfactual": (10, 512),
    "multitask_counterfactual": (20, 384),
}
MEASURES = ("faithfulness/las", "faithfulness/names_gold", "faithfulness/words")
LAYERS = tuple(range(30))  # of SmolLM2-135M
STUDENTS, SIZES = {"smollm2", "t5"}, {"cpu", "smoke"}


def get_config(argument: str = "") -> Comparison:
    """Return the comparison."""
    arguments = set(filter(None, argument.split(",")))
    if unknown := arguments - STUDENTS - SIZES:
        raise ValueError(
            f"argument {sorted(unknown)}: use any of {sorted(STUDENTS | SIZES)}"
        )
    small = bool(arguments & SIZES)
    students = sorted(arguments & STUDENTS or STUDENTS)
    base = Config(
        data=DataConfig(
            source="jsonl",
            schema="commonsense_qa",
            path="commonsense_qa/train.jsonl",
            eval_path="commonsense_qa/dev.jsonl",
            rationales="commonsense_qa/palm_train.jsonl",
            eval_rationales="commonsense_qa/palm_dev.jsonl",
            num_train=8766,
            holdout_seed=0,  # the published 8,766 of 9,741 rows
            max_prompt=300,
            max_target=256,
        ),
        method=MethodConfig(hard_weight=1.0, soft_weight=0.0),
        optim=OptimConfig(
            learning_rate=5e-5, schedule="linear", warmup_steps=10, b2=0.999
        ),
        train=TrainConfig(log_every=10, save_every=500),
        evaluation=EvalConfig(num_generations=1221, max_new_tokens=300),
        annotate=AnnotateConfig(max_new_tokens=300),
    )
    base.teacher.path = base.annotate.model = "HuggingFaceTB/SmolLM2-135M-Instruct"
    base.student.path = "google/t5-v1_1-base"
    if small:
        _shrink(base, "smoke" in arguments)
    return Comparison(
        name="_".join(["compare_csqa", *sorted(arguments)]),
        base=base,
        factors={
            "student": {name: _student(name, small) for name in students},
            "method": {name: {"method.name": name} for name in T5_ROWS},
        },
        overrides=tuple(
            ({"student": student, "method": method}, _rows(student, method, small))
            for student in students
            for method in T5_ROWS
        ),
        seeds=((0,) if "smoke" in arguments else (0, 1) if small else tuple(range(6))),
        metrics=("answer_accuracy", "nll", *(() if small else MEASURES)),
        compare=("method",),
        within=("student",),
        chance={"answer_accuracy": 0.2},
        cost="parameters",
        annotate=True,
        faithfulness=not small,
    )


def _student(name: str, small: bool) -> dict[str, Any]:
    """Return the changes that make a run's student one of the two."""
    if name == "smollm2":
        # Pretrained, it reads a suffix ("Explain:") better than a prefix it never saw.
        kept = {
            "student.init": "teacher_layers",
            "student.keep_layers": (0, 1, 29),
            "optim.learning_rate": 1e-3,  # they have to find together first
        }
        whole = {"student.init": "teacher_layers", "student.keep_layers": LAYERS}
        return {"data.tokenizer": ""} | (kept if small else whole)
    prefixes = PrefixConfig(
        label="[predict]",
        rationale="[explain]",
        rationale_then_label="[factual]",
        factual="[factual]",
        counterfactual="[counterfactual]",
    )
    found: dict[str, Any] = {
        "data.prompt_suffix": False,
        "data.prefixes": prefixes,
        "teacher.path": "",
        "train.encoder_row_length": 512,
        "student.init": "folder",
    }
    if not small:
        return found
    return found | {
        "student.init": "random",
        "student.architecture": "t5",
        "student.path": "",
        "student.t5": T5Config(
            vocab_size=32128,
            width=128,
            num_encoder_layers=3,
            num_decoder_layers=3,
            num_heads=4,
            head_dim=32,
            mlp_width=256,
        ),
        "optim.learning_rate": 2e-3,
    }


def _rows(student: str, method: str, small: bool) -> dict[str, Any]:
    """Return the rows of a step of about 48 examples, or of eight."""
    batch_size, length = SMOLLM2_ROWS[method], 512
    if student == "t5":
        batch_size, length = T5_ROWS[method]
    if small:
        batch_size = max(1, batch_size // 6)
    return {"train.batch_size": batch_size, "train.row_length": length}


def _shrink(base: Config, further: bool) -> None:
    """Take a sample that two cores train on in minutes."""
    base.data.num_train, base.data.num_eval = 60, 40
    base.data.holdout_seed = -1
    base.data.tokenizer = "google/t5-v1_1-base"
    base.train.steps = 30
    base.evaluation.batch_size = 4
    base.evaluation.num_generations, base.evaluation.max_new_tokens = 40, 48
    base.annotate.num_demonstrations, base.annotate.max_new_tokens = 1, 24
    if further:
        base.data.num_train, base.data.num_eval = 24, 4
        base.train.steps, base.optim.warmup_steps = 2, 0
        base.evaluation.num_generations, base.evaluation.max_new_tokens = 2, 8
        base.annotate.max_new_tokens = 4

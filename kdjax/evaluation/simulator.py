"""Simulator: a small model that predicts a student's answers from its rationales.

It reads a question, a rationale or both. It is a run like any other, with hard labels,
whose questions hold its input.
"""

import copy
import dataclasses
import json
import pathlib
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax

from kdjax import config as config_lib
from kdjax.config import (
    Config,
    DataConfig,
    DecoderConfig,
    EvalConfig,
    MethodConfig,
    OptimConfig,
    PrefixConfig,
    StudentConfig,
    TrainConfig,
)
from kdjax.data import sources, views
from kdjax.data import tokenizer as tokenizers
from kdjax.data.example import Example
from kdjax.evaluation import choices
from kdjax.evaluation.rationale_metrics import (
    Record,
    answers_match,
    leakage_adjusted_simulatability,
)
from kdjax.experiment import validate, workdir
from kdjax.experiment.data import Data, load_tokenizer, tokenizer_path
from kdjax.experiment.models import student_params
from kdjax.experiment.run import open_run
from kdjax.models import hf
from kdjax.runtime import files
from kdjax.training.checkpoint import Checkpoints
from kdjax.training.loop import train_loop

_VIEWS = ("label",)
_RECORDS = "records.jsonl"  # the training records, if not of the data
DECODER = DecoderConfig(
    width=128, num_layers=2, num_heads=4, num_kv_heads=4, head_dim=32, mlp_width=384
)


# The simulator's input in place of the question; never an empty text.
INPUTS: dict[str, Callable[[str, str], str]] = {
    "both": lambda question, rationale: f"{question}\n{rationale}".rstrip(),
    "question": lambda question, rationale: question,
    "rationale": lambda question, rationale: rationale or " ",
}


def simulator_config(
    config: Config, *, decoder: DecoderConfig = DECODER, steps: int = 500
) -> Config:
    """Return the config of a simulator, independent of a student's method and seed.

    Args:
      config: a run on the same data with the same tokenizer.
      decoder: the simulator's shape.
      steps: of training.
    """
    data = dataclasses.replace(
        config.data,
        tokenizer=tokenizer_path(config),
        prefixes=PrefixConfig(),
        prompt_suffix=True,
        chat_template=False,
        counterfactuals="",
        max_prompt=config.data.max_prompt + config.data.max_target,
        on_long="truncate",
    )
    return Config(
        name="simulator",
        data=data,
        student=StudentConfig(decoder=decoder),
        method=MethodConfig(name="finetune", hard_weight=1.0, soft_weight=0.0),
        optim=OptimConfig(learning_rate=2e-3, warmup_steps=steps // 10),
        train=TrainConfig(
            steps=steps,
            batch_size=8,
            row_length=data.max_prompt + data.max_target,
            log_every=max(1, steps // 20),
            save_every=max(1, steps // 4),
            keep_last=1,
            keep_best=False,
        ),
        evaluation=EvalConfig(num_generations=0, max_new_tokens=1),
    )


def train_simulator(
    config: Config,
    folder: pathlib.Path,
    *,
    decoder: DecoderConfig = DECODER,
    steps: int = 500,
    records: Sequence[Record] | None = None,
) -> None:
    """Train a simulator, from its newest checkpoint if it has one.

    It answers the data's training questions from question and rationale, from the
    question alone and from the rationale alone: every epoch has each example with one
    of the three inputs, drawn anew.

    Args:
      config: a run on the data; see `simulator_config`.
      folder: the simulator's own; a finished one is left unchanged.
      decoder: the simulator's shape.
      steps: of training.
      records: a student's own questions, rationales and answers, to learn from instead
        of the data's. Only other records can be measured with it.

    Raises:
      ValueError: examples without rationales, or a folder of another simulator or of
        one with another tokenizer.
    """
    config = simulator_config(config, decoder=decoder, steps=steps)
    validate.validate(config)
    if _finished(folder, steps):  # others may read it at the same time: no lock
        _claim_records(folder, records)
        workdir.check_owner(folder, _with_own_tokenizer(config, folder))
        return
    with workdir.hold(folder, name="simulator", remedy="another folder"):
        _train(config, folder, records)


def _train(
    config: Config, folder: pathlib.Path, records: Sequence[Record] | None
) -> None:
    """Train a simulator in a folder that is this process's own."""
    _claim_records(folder, records)
    config = _with_own_tokenizer(config, folder)
    workdir.claim(folder, config)
    if _finished(folder, config.train.steps):  # by whoever held the lock before
        return
    examples = (
        sources.load_examples(config.data, "train", seed=config.data.kinship.seed)
        if records is None
        else [_as_example(record) for record in records if record.rationale]
    )
    lacking = [e.id for e in examples if not e.rationale or not e.answer]
    if lacking or not examples:
        raise ValueError(
            f"examples {lacking[:3]} lack what a simulator learns from: give all "
            "training examples an answer and a rationale (data.rationales)"
        )
    tokenizer = load_tokenizer(config)
    data = Data(
        tokenizer=tokenizer,
        views=_VIEWS,
        eval_views=_VIEWS,
        train=_segments(examples, tokenizer, config.data),
        evaluation=[],
        eval_examples=[],
        labels={},
    )
    run = open_run(config, folder, data=data, devices=_devices())
    train_loop(run, student_params(config, run.student, ""))


def las(records: Sequence[Record], simulator: pathlib.Path) -> dict[str, float]:
    """Compute the leakage-adjusted simulatability of a student's answers.

    Records whose answer is none of their choices are left out: no simulator that
    chooses among these can predict it.

    Args:
      records: of one student.
      simulator: folder of `train_simulator`.

    Returns:
      As `leakage_adjusted_simulatability`; {} without a usable record.

    Raises:
      ValueError: no simulator, an unfinished one, or one trained on these records.
    """
    usable = [
        record
        for record in records
        if any(answers_match(record.answer, choice) for choice in record.choices)
    ]
    answers = [record.answer for record in usable]
    correct = {
        inputs: [
            answers_match(answer, choice)
            for answer, choice in zip(answers, predictions, strict=True)
        ]
        for inputs, predictions in predict(usable, simulator).items()
    }
    return leakage_adjusted_simulatability(**correct)


def predict(records: Sequence[Record], simulator: pathlib.Path) -> dict[str, list[str]]:
    """Predict the answer of each record, from each of the simulator's inputs.

    Arguments and errors as `las`; all records have choices.

    Returns:
      A list for each key of `INPUTS`.
    """
    file = simulator / "config.json"
    if not file.is_file():
        raise ValueError(f"simulator={str(simulator)!r} has no config.json: train it")
    config = config_lib.from_json(file.read_text())
    if not _finished(simulator, config.train.steps):
        raise ValueError(f"simulator={str(simulator)!r} is not finished: train it on")
    trained = {row["id"] for row in _read_records(simulator)}
    if overlap := sorted(trained & {r.id for r in records}):
        raise ValueError(
            f"simulator={str(simulator)!r} has learnt from records {overlap[:3]}: "
            "measure others"
        )
    if not records:
        return {inputs: [] for inputs in INPUTS}
    examples = [_as_example(record) for record in records]
    tokenizer = load_tokenizer(config)
    segments, _ = views.make_segments(examples, _VIEWS, tokenizer, config.data)
    data = Data(
        tokenizer=tokenizer,
        views=_VIEWS,
        eval_views=_VIEWS,
        train=[],
        evaluation=segments,
        eval_examples=examples,
        labels={},
    )
    run = open_run(config, simulator, data=data, devices=_devices())
    chooser = choices.load_chooser(run)
    return {
        inputs: choices.choose(chooser, _with_inputs(examples, inputs))
        for inputs in INPUTS
    }


def _segments(
    examples: Sequence[Example], tokenizer: Any, config: DataConfig
) -> list[views.Segment]:
    """Make three segments per example, alternatives of which an epoch takes one."""
    alternatives = [
        example for inputs in INPUTS for example in _with_inputs(examples, inputs)
    ]
    return views.make_segments(alternatives, _VIEWS, tokenizer, config)[0]


def _with_inputs(examples: Iterable[Example], inputs: str) -> list[Example]:
    """Return the examples with these inputs as the question; the choices stay."""
    return [
        dataclasses.replace(e, question=INPUTS[inputs](e.question, e.rationale))
        for e in examples
    ]


def _as_example(record: Record) -> Example:
    return Example(
        id=record.id,
        question=record.question,
        choices=record.choices,
        answer=record.answer,
        rationale=record.rationale,
    )


def _devices() -> list[jax.Device]:
    """Return one device: a simulator is small."""
    return jax.local_devices()[:1]


def _finished(folder: pathlib.Path, steps: int) -> bool:
    return Checkpoints(folder / "checkpoints").latest_step() == steps


def _with_own_tokenizer(config: Config, folder: pathlib.Path) -> Config:
    """Return the config with the tokenizer's copy in the simulator's folder."""
    if not config.data.tokenizer:
        return config
    config = copy.deepcopy(config)
    config.data.tokenizer = str(_copy_tokenizer(folder, config.data.tokenizer))
    return config


def _copy_tokenizer(folder: pathlib.Path, path: str) -> pathlib.Path:
    """Copy a tokenizer, which students have in folders of their own, once."""
    original, own = tokenizers.load(hf.resolve(path)), folder / "tokenizer"
    if not own.is_dir():
        scratch = files.temporary(own)
        original.save_pretrained(scratch)
        scratch.rename(own)
    if tokenizers.fingerprint(tokenizers.load(own)) != tokenizers.fingerprint(original):
        raise ValueError(
            f"folder={str(folder)!r} holds a simulator with another tokenizer than "
            f"{path!r}: use another folder, or remove it"
        )
    return own


def _claim_records(folder: pathlib.Path, records: Sequence[Record] | None) -> None:
    """Write the training records, or check that they are the same as before."""
    rows = [dataclasses.asdict(record) for record in records or ()]
    text = "".join(json.dumps(row) + "\n" for row in rows)
    file = folder / _RECORDS
    before = file.read_text() if file.is_file() else ""
    if before != text and (before or (folder / "config.json").is_file()):
        raise ValueError(
            f"folder={str(folder)!r} holds a simulator of other records: use another "
            "folder, or remove it"
        )
    if text != before:
        files.write_atomically(file, text)


def _read_records(folder: pathlib.Path) -> list[dict]:
    file = folder / _RECORDS
    lines = file.read_text().splitlines() if file.is_file() else []
    return [json.loads(line) for line in lines]

"""A simulator: a small model that reads a question, a rationale or both, and answers.

It stands for somebody who is told of a student's rationales and foretells its answers.
It is a run like any other, of hard labels, whose questions hold what it is shown.
"""

import dataclasses
import json
import os
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
from kdjax.evaluation import choices, rationale_metrics
from kdjax.evaluation.rationale_metrics import Record
from kdjax.experiment import validate, workdir
from kdjax.experiment.data import Data, load_tokenizer, tokenizer_path
from kdjax.experiment.models import student_params
from kdjax.experiment.run import open_run
from kdjax.models import hf
from kdjax.runtime import files
from kdjax.training.checkpoint import Checkpoints
from kdjax.training.loop import train_loop

_VIEWS = ("label",)
_RECORDS = "records.jsonl"  # what a simulator was trained on, if not on the data
DECODER = DecoderConfig(
    width=128, num_layers=2, num_heads=4, num_kv_heads=4, head_dim=32, mlp_width=384
)


# What a simulator is shown in place of the question; never an empty text.
SHOWN: dict[str, Callable[[str, str], str]] = {
    "both": lambda question, rationale: f"{question}\n{rationale}".rstrip(),
    "question": lambda question, rationale: question,
    "rationale": lambda question, rationale: rationale or " ",
}


def simulator_config(
    config: Config, *, decoder: DecoderConfig = DECODER, steps: int = 500
) -> Config:
    """The run that a simulator is: nothing of it hangs on a student's method or seed.

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
    """Trains a simulator, from its newest checkpoint if it has one.

    It answers the data's training questions from question and rationale, from the
    question alone and from the rationale alone: in every epoch each example is shown in
    one of the three ways, drawn anew.

    Args:
      config: a run on the data; see `simulator_config`.
      folder: the simulator's own. One that is finished is left as it is.
      decoder: the simulator's shape.
      steps: of training.
      records: a student's own questions, rationales and answers, to learn from instead
        of the data's. Others than these have to be measured.

    Raises:
      ValueError: examples without rationales, or a folder of another simulator or of
        one with another tokenizer.
    """
    config = simulator_config(config, decoder=decoder, steps=steps)
    validate.validate(config)
    _claim_records(folder, records)
    if config.data.tokenizer:
        config.data.tokenizer = str(_own_tokenizer(folder, config.data.tokenizer))
    workdir.claim(folder, config)
    if _finished(folder, steps):
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
    """Leakage-adjusted simulatability of a student's answers by its rationales.

    Records whose answer is none of their choices are left out: nobody who chooses among
    these could foretell it.

    Args:
      records: of one student.
      simulator: folder of `train_simulator`.

    Returns:
      What `rationale_metrics.leakage_adjusted` returns; {} without a usable record.

    Raises:
      ValueError: no simulator, one that is not finished, or one that has learnt from
        these records.
    """
    usable = [r for r in records if any(_same(r, choice) for choice in r.choices)]
    predicted = predict(usable, simulator)
    correct = {
        show: [_same(r, choice) for r, choice in zip(usable, found, strict=True)]
        for show, found in predicted.items()
    }
    return rationale_metrics.leakage_adjusted(**correct)


def predict(records: Sequence[Record], simulator: pathlib.Path) -> dict[str, list[str]]:
    """The choice that a simulator takes for each record, by what it is shown.

    Arguments and errors as `las`; all records have choices.

    Returns:
      A list for each key of `SHOWN`.
    """
    file = simulator / "config.json"
    if not file.is_file():
        raise ValueError(f"simulator={str(simulator)!r} has no config.json: train it")
    config = config_lib.from_json(file.read_text())
    if not _finished(simulator, config.train.steps):
        raise ValueError(f"simulator={str(simulator)!r} is not finished: train it on")
    learnt = {row["id"] for row in _read_records(simulator)}
    if again := sorted(learnt & {r.id for r in records}):
        raise ValueError(
            f"simulator={str(simulator)!r} has learnt from records {again[:3]}: "
            "measure others"
        )
    if not records:
        return {show: [] for show in SHOWN}
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
    chooser = choices.load(open_run(config, simulator, data=data, devices=_devices()))
    return {show: choices.choose(chooser, _shown(examples, show)) for show in SHOWN}


def _segments(
    examples: Sequence[Example], tokenizer: Any, config: DataConfig
) -> list[views.Segment]:
    """Each example in three ways: alternatives, of which an epoch takes one."""
    shown = [example for show in SHOWN for example in _shown(examples, show)]
    return views.make_segments(shown, _VIEWS, tokenizer, config)[0]


def _shown(examples: Iterable[Example], show: str) -> list[Example]:
    """The examples with what is shown as the question; the choices always are."""
    return [
        dataclasses.replace(e, question=SHOWN[show](e.question, e.rationale))
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


def _same(record: Record, choice: str) -> bool:
    return rationale_metrics.same(record.answer, choice)


def _devices() -> list[jax.Device]:
    """Return one device: a simulator is small."""
    return jax.local_devices()[:1]


def _finished(folder: pathlib.Path, steps: int) -> bool:
    if not (folder / "checkpoints").is_dir():
        return False
    checkpoints = Checkpoints(folder / "checkpoints")
    found = checkpoints.latest_step()
    checkpoints.close()
    return found == steps


def _own_tokenizer(folder: pathlib.Path, path: str) -> pathlib.Path:
    """The simulator's copy of a tokenizer: students have it in folders of their own."""
    given, own = tokenizers.load(hf.resolve(path)), folder / "tokenizer"
    if not own.is_dir():
        scratch = folder / f".tokenizer.{os.getpid()}"
        given.save_pretrained(scratch)
        scratch.rename(own)
    if tokenizers.fingerprint(tokenizers.load(own)) != tokenizers.fingerprint(given):
        raise ValueError(
            f"folder={str(folder)!r} holds a simulator with another tokenizer than "
            f"{path!r}: use another folder, or remove it"
        )
    return own


def _claim_records(folder: pathlib.Path, records: Sequence[Record] | None) -> None:
    """Writes down what is learnt from, or checks that it is the same as before."""
    rows = [dataclasses.asdict(record) for record in records or ()]
    text = "".join(json.dumps(row) + "\n" for row in rows)
    file = folder / _RECORDS
    before = file.read_text() if file.is_file() else ""
    if before != text and (before or (folder / "config.json").is_file()):
        raise ValueError(
            f"folder={str(folder)!r} holds a simulator of other records: use another "
            "folder, or remove it"
        )
    if text:
        files.write_atomically(file, text)


def _read_records(folder: pathlib.Path) -> list[dict]:
    file = folder / _RECORDS
    lines = file.read_text().splitlines() if file.is_file() else []
    return [json.loads(line) for line in lines]

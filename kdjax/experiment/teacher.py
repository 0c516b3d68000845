"""The teacher of a Config: its folder, its shape, and the run that trains it."""

import dataclasses
import pathlib
from typing import Any

from kdjax.config import Config, DecoderConfig, MethodConfig, StudentConfig
from kdjax.data import tokenizer as tokenizers
from kdjax.experiment import methods
from kdjax.experiment.rows import joint_row_length
from kdjax.models import hf
from kdjax.models.lm import Shape


def has_teacher(config: Config) -> bool:
    """Return True if a teacher is named, or will be trained."""
    return bool(config.teacher.path) or config.data.is_built_in


def runs_elsewhere(config: Config) -> bool:
    """Return True if the teacher is only known by what it said elsewhere.

    `teacher.path` then has its tokenizer, perhaps its config, and no weights.
    """
    return bool(config.teacher.path) and not hf.has_weights(config.teacher.path)


def check_runs_elsewhere(config: Config) -> None:
    """Check that a config needs no weights of its teacher.

    Raises:
      ValueError: it does.
    """
    reasons = {
        "student.init='teacher_layers'": config.student.init == "teacher_layers",
        "teacher.online=True": config.teacher.online
        and methods.needs_teacher(config.method),
    }
    for setting, needs_weights in reasons.items():
        if needs_weights:
            raise ValueError(
                f"{setting} needs the teacher's weights, and teacher.path="
                f"{config.teacher.path!r} has no *.safetensors: download them, or "
                "change this setting"
            )


def teacher_shape(config: Config, tokenizer: Any) -> Shape:
    """Return the teacher's shape: its folder's, or that of the one to be trained."""
    if config.teacher.path:
        return hf.read_config(config.teacher.path)
    return with_vocabulary(config.teacher.decoder, tokenizer)


def with_vocabulary(shape: Shape, tokenizer: Any) -> Shape:
    """Return a shape with the tokenizer's vocabulary size and, for T5, special ids."""
    vocab_size = shape.vocab_size or len(tokenizer)
    shape = dataclasses.replace(shape, vocab_size=vocab_size)
    if isinstance(shape, DecoderConfig) or not hasattr(tokenizer, "eos_token_id"):
        return shape
    eos_id, pad_id = tokenizer.eos_token_id, tokenizers.pad_id(tokenizer)
    return dataclasses.replace(shape, eos_id=eos_id, pad_id=pad_id, start_id=pad_id)


def teacher_folder(config: Config, workdir: pathlib.Path) -> str:
    """Return the folder of the teacher, also before it is trained."""
    return config.teacher.path or str(workdir / "teacher")


def teacher_config(config: Config) -> Config:
    """Make the config that trains the built-in task's teacher, by hard labels."""
    teacher, train, method = config.teacher, config.train, config.method
    if config.student.init == "random" and config.student.architecture == "t5":
        rows = train.row_length, train.encoder_row_length
        length = joint_row_length(config.student.t5, *rows)
        train = dataclasses.replace(train, row_length=length)
    return dataclasses.replace(
        config,
        name=f"{config.name}-teacher",
        seed=config.teacher_seed,
        data=dataclasses.replace(
            config.data,
            num_train=teacher.num_train,
            kinship=dataclasses.replace(
                config.data.kinship, label_noise=teacher.label_noise
            ),
        ),
        student=StudentConfig(init="random", decoder=teacher.decoder),
        method=MethodConfig(
            name=method.name,
            label_weight=method.label_weight,
            counterfactual_weight=method.counterfactual_weight,
            multitask_weight=method.multitask_weight,
            hard_weight=1.0,
            soft_weight=0.0,
        ),
        optim=dataclasses.replace(
            config.optim,
            learning_rate=teacher.learning_rate,
            freeze=(),
            ema_decay=0.0,
        ),
        train=dataclasses.replace(train, steps=teacher.steps, eval_every=0),
    )

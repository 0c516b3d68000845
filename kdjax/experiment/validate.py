"""What can be checked of a config before a file is read or a step compiled."""

import dataclasses
import math
import re
import types
import typing
from typing import Any

from kdjax.config import (
    ARCHITECTURES,
    CACHE_KINDS,
    COUNTERFACTUAL_PLACES,
    DTYPES,
    HIDDEN_LOSSES,
    LONG_POLICIES,
    MISSING_POLICIES,
    NON_FINITE,
    OPTIMIZERS,
    REMATS,
    SCHEDULES,
    SCHEMAS,
    SOURCES,
    STUDENT_INITS,
    TAILS,
    WRONG_LABELS,
    Config,
    DecoderConfig,
    StudentConfig,
    T5Config,
)
from kdjax.experiment import methods, validate_annotate
from kdjax.models import t5
from kdjax.models.decoder_shape import check_shape
from kdjax.models.hf import families


def _one_of(value: str, name: str, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise ValueError(f"{name}={value!r} is unknown: use one of {list(allowed)}")


def _types(config: Config) -> None:
    """Command-line overrides and files may hold any type: check each field's."""

    def check(part: Any, prefix: str) -> None:
        hints = typing.get_type_hints(type(part))
        for f in dataclasses.fields(part):
            value, hint, name = getattr(part, f.name), hints[f.name], prefix + f.name
            if isinstance(hint, type) and dataclasses.is_dataclass(hint):
                if not isinstance(value, hint):
                    raise ValueError(f"{name}={value!r} is not a {hint.__name__}")
                check(value, f"{name}.")
                continue
            if typing.get_origin(hint) is tuple:
                item = typing.get_args(hint)[0]
                wanted = isinstance(value, tuple) and all(_is(v, item) for v in value)
            else:
                wanted = _is(value, hint)
            if not wanted:
                raise ValueError(f"{name}={value!r} is not of type {hint}")

    check(config, "")


def _is(value: Any, hint: Any) -> bool:
    if isinstance(hint, types.UnionType):
        return any(_is(value, h) for h in typing.get_args(hint))
    if hint is float:
        return isinstance(value, int | float) and not isinstance(value, bool)
    if hint is int:
        return isinstance(value, int) and not isinstance(value, bool)
    return isinstance(value, hint)


def validate(config: Config) -> None:
    """Checks all that can be checked before a file is read or a step compiled.

    Raises:
      ValueError: name=value, the limit and the remedy, in one line.
    """
    _types(config)
    data, train, method, cache = config.data, config.train, config.method, config.cache
    student, evaluation = config.student, config.evaluation
    for word, name, allowed in (
        (data.source, "data.source", SOURCES),
        (data.schema, "data.schema", SCHEMAS),
        (data.on_long, "data.on_long", LONG_POLICIES),
        (data.on_missing, "data.on_missing", MISSING_POLICIES),
        (data.wrong_labels, "data.wrong_labels", WRONG_LABELS),
        (data.counterfactual_place, "data.counterfactual_place", COUNTERFACTUAL_PLACES),
        (cache.kind, "cache.kind", CACHE_KINDS),
        (student.init, "student.init", STUDENT_INITS),
        (student.architecture, "student.architecture", ARCHITECTURES),
        (method.tail, "method.tail", TAILS),
        (config.optim.name, "optim.name", OPTIMIZERS),
        (config.optim.schedule, "optim.schedule", SCHEDULES),
        (method.weight_schedule, "method.weight_schedule", SCHEDULES),
        (method.temperature_schedule, "method.temperature_schedule", SCHEDULES),
        (method.hidden_loss, "method.hidden_loss", HIDDEN_LOSSES),
        (train.dtype, "train.dtype", DTYPES),
        (train.remat, "train.remat", REMATS),
        (train.non_finite, "train.non_finite", NON_FINITE),
    ):
        _one_of(word, name, allowed)
    for count, name in (
        (train.steps, "train.steps"),
        (train.batch_size, "train.batch_size"),
        (train.num_microbatches, "train.num_microbatches"),
        (train.log_every, "train.log_every"),
        (train.keep_last, "train.keep_last"),
        (train.num_threads, "train.num_threads"),
        (train.prefetch, "train.prefetch"),
        (train.memory_mib, "train.memory_mib"),
        (cache.k, "cache.k"),
        (cache.num_draws, "cache.num_draws"),
        (cache.num_rounds, "cache.num_rounds"),
        (cache.shard_size, "cache.shard_size"),
        (cache.batch_size, "cache.batch_size"),
        (cache.memory_mib, "cache.memory_mib"),
        (data.max_prompt, "data.max_prompt"),
        (data.max_target, "data.max_target"),
        (evaluation.batch_size, "evaluation.batch_size"),
        (evaluation.num_bins, "evaluation.num_bins"),
    ):
        if count < 1:
            raise ValueError(f"{name}={count} is below 1: use 1 or more")
    for amount, name in (
        (data.num_train, "data.num_train"),
        (data.num_eval, "data.num_eval"),
        (method.hard_weight, "method.hard_weight"),
        (method.soft_weight, "method.soft_weight"),
        (method.final_hard_weight, "method.final_hard_weight"),
        (method.final_soft_weight, "method.final_soft_weight"),
        (method.hidden_weight, "method.hidden_weight"),
        (method.attention_weight, "method.attention_weight"),
        (train.eval_every, "train.eval_every"),
        (train.save_every, "train.save_every"),
        (evaluation.num_generations, "evaluation.num_generations"),
        (config.optim.weight_decay, "optim.weight_decay"),
        (config.optim.clip_norm, "optim.clip_norm"),
    ):
        if not amount >= 0 or math.isinf(amount):
            raise ValueError(f"{name}={amount} is not a number of 0 or more")
    if train.batch_size % train.num_microbatches:
        raise ValueError(
            f"train.batch_size={train.batch_size} does not divide by "
            f"train.num_microbatches={train.num_microbatches}: use a multiple of it"
        )
    for share, name in (
        (method.label_weight, "method.label_weight"),
        (method.counterfactual_weight, "method.counterfactual_weight"),
        (method.multitask_weight, "method.multitask_weight"),
        (data.wrong_label_weight, "data.wrong_label_weight"),
    ):
        if not 0 <= share <= 1:
            raise ValueError(f"{name}={share} is a share: use 0 to 1")
    if not methods.terms(method):
        raise ValueError(
            "method.hard_weight=0 and method.soft_weight=0 leave nothing to train on: "
            "raise one of them"
        )
    if not config.optim.learning_rate > 0:
        raise ValueError(
            f"optim.learning_rate={config.optim.learning_rate} must be positive"
        )
    if not 0 <= config.optim.ema_decay < 1:
        raise ValueError(
            f"optim.ema_decay={config.optim.ema_decay} is a share: use 0 (no averages) "
            "to below 1, for example 0.999"
        )
    _check_patterns(config.optim.freeze, "optim.freeze")
    _check_lora(student)
    methods.divergence(method)
    if cache.kind == "sampled" and method.divergence != "forward_kl":
        raise ValueError(
            f"method.divergence={method.divergence!r} with cache.kind='sampled': draws "
            "estimate 'forward_kl' alone; use it, or cache.kind='top_k'"
        )
    if config.optim.warmup_steps > train.steps:
        raise ValueError(
            f"optim.warmup_steps={config.optim.warmup_steps} exceeds "
            f"train.steps={train.steps}: lower it"
        )
    if cache.num_draws > 0xFFFF:
        raise ValueError(
            f"cache.num_draws={cache.num_draws} exceeds 65535: use several num_rounds"
        )
    used = methods.temperatures(method)
    if any(not 0 < t < math.inf for t in (*cache.temperatures, *used)):
        raise ValueError(
            f"cache.temperatures={cache.temperatures}, method.temperature="
            f"{method.temperature}, method.final_temperature="
            f"{method.final_temperature}: temperatures are positive and finite"
        )
    if methods.has_soft_terms(method):
        for t in used:
            if t not in cache.temperatures:
                name = "temperature" if t == used[0] else "final_temperature"
                raise ValueError(
                    f"method.{name}={t} is not declared in "
                    f"cache.temperatures={cache.temperatures}: add it there and label "
                    "again, or train at a declared one"
                )
    if not 0 <= method.label_smoothing < 1:
        raise ValueError(
            f"method.label_smoothing={method.label_smoothing} is a share: use 0 to "
            "below 1"
        )
    if methods.has_layer_terms(method):
        _check_layer_map(config)
    if config.teacher.online and cache.kind == "sampled":
        raise ValueError(
            "teacher.online=True with cache.kind='sampled': an online teacher gives "
            "its top k or whole rows; use cache.kind='top_k' or 'dense'"
        )
    if 1.0 not in cache.temperatures:
        raise ValueError(
            f"cache.temperatures={cache.temperatures} lacks 1.0, at which KL is "
            "reported: add it"
        )
    if data.source == "kinship" and not (data.num_train and data.num_eval):
        raise ValueError(
            f"data.num_train={data.num_train}, data.num_eval={data.num_eval}: the "
            "kinship task is endless, say how many examples to make"
        )
    _check_texts(config)
    if data.source != "kinship" and not data.path:
        raise ValueError(
            f"data.path='' with data.source={data.source!r}: give "
            "--config.data.path=FILE, FOLDER or hub name"
        )
    if data.source != "kinship" and not config.teacher.path:
        _check_no_teacher(config)
    if student.init == "folder" and not student.path:
        raise ValueError(
            "student.path='' with student.init='folder': give --config.student.path"
        )
    if student.init == "teacher_layers" and not student.keep_layers:
        raise ValueError(
            "student.keep_layers=() with student.init='teacher_layers': give the "
            "teacher layers to keep, for example (0, 5, 11)"
        )
    validate_annotate.check(config.annotate)
    _check_t5(student.t5)
    for part, name in (
        (student.decoder, "student"),
        (config.teacher.decoder, "teacher"),
    ):
        _check_decoder(part, f"{name}.decoder")


def _check_no_teacher(config: Config) -> None:
    """Only kinship trains a teacher of its own: the others name one, or need none."""
    student = config.student
    if methods.needs_teacher(config.method) or student.init == "teacher_layers":
        raise ValueError(
            f"teacher.path='' with data.source={config.data.source!r}: give "
            "--config.teacher.path=FOLDER or hub name (only kinship trains its own), "
            "or train without one: method.soft_weight=0, student.init='random' or "
            "'folder'"
        )
    if not config.data.tokenizer and student.init != "folder":
        raise ValueError(
            "data.tokenizer='' without a teacher or a student's folder: give "
            "--config.data.tokenizer=FOLDER or hub name"
        )


def _check_texts(config: Config) -> None:
    """Views differ in their prompts, and what is joined to the data is not ignored."""
    data, views = config.data, methods.views(config.method)
    prefixes = [getattr(data.prefixes, view, "") for view in views]
    if not data.prompt_suffix and len(set(prefixes)) < len(prefixes):
        raise ValueError(
            f"data.prompt_suffix=False with data.prefixes {prefixes} of views "
            f"{list(views)}: nothing tells their prompts apart: give each view its own "
            "prefix, or use data.prompt_suffix=True"
        )
    for name in ("rationales", "eval_rationales", "counterfactuals", "labels"):
        if data.source == "kinship" and getattr(data, name):
            raise ValueError(
                f"data.{name}={getattr(data, name)!r} with data.source='kinship': it "
                "writes its own: use '', or another source"
            )
    if data.wrong_labels != "keep" and not data.labels:
        raise ValueError(
            f"data.wrong_labels={data.wrong_labels!r} with data.labels='': gold "
            "answers are not wrong: name a file of a teacher's, or use "
            "data.wrong_labels='keep'"
        )


def _check_patterns(patterns: tuple[str, ...], name: str) -> None:
    for pattern in patterns:
        try:
            re.compile(pattern)
        except re.error as error:
            raise ValueError(
                f"{name}={pattern!r} is no regular expression: {error}"
            ) from None


def _check_lora(student: StudentConfig) -> None:
    lora = student.lora
    if lora.rank < 0:
        raise ValueError(
            f"student.lora.rank={lora.rank} is below 0: use 0 for no adapters"
        )
    _check_patterns(lora.targets, "student.lora.targets")
    if not lora.rank:
        return
    if student.init == "random":
        raise ValueError(
            f"student.lora.rank={lora.rank} with student.init='random': adapters leave "
            "the weights as they are, here random: use student.init='folder' or "
            "'teacher_layers', or a rank of 0"
        )
    if not 0 < lora.alpha < math.inf:
        raise ValueError(
            f"student.lora.alpha={lora.alpha} must be positive and finite: use 16.0"
        )
    if not lora.targets:
        raise ValueError(
            "student.lora.targets=() names no layer: use for example ('.*',)"
        )


def _check_layer_map(config: Config) -> None:
    method = config.method
    if not config.teacher.online:
        raise ValueError(
            f"method.hidden_weight={method.hidden_weight}, method.attention_weight="
            f"{method.attention_weight}: layers are compared with a teacher that runs "
            "beside the student: use teacher.online=True, or weights of 0"
        )
    if min(method.layer_map, default=-2) < -1 or max(method.layer_map) < 0:
        raise ValueError(
            f"method.layer_map={method.layer_map} must name a layer of the teacher, or "
            "-1, for each layer of the student: for example (1, 3) compares the "
            "student's layers 0 and 1 with the teacher's 1 and 3"
        )


def _check_t5(shape: T5Config) -> None:
    try:
        t5.check_shape(dataclasses.replace(shape, vocab_size=shape.vocab_size or 1))
    except ValueError as error:
        raise ValueError(f"student.t5.{error}") from None


def _check_decoder(shape: DecoderConfig, name: str) -> None:
    """The shape is one that the decoder runs and that its family can export."""
    known = dataclasses.replace(shape, vocab_size=shape.vocab_size or 1)
    try:
        check_shape(known)
        families.write(known)
    except ValueError as error:
        raise ValueError(f"{name}.{error}") from None

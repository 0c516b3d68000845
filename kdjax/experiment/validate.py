"""Checks of a config before a file is read or a step compiled.

Limits of single fields stand beside them in `kdjax.config`; here is what spans several.
"""

import dataclasses

from kdjax import config as config_lib
from kdjax.config import AnnotateConfig, Config, DecoderConfig, StudentConfig, T5Config
from kdjax.data import columns, templates
from kdjax.experiment import methods, mixture
from kdjax.models import t5
from kdjax.models.decoder_shape import check_shape
from kdjax.models.hf import families
from kdjax.runtime import limits
from kdjax.storage import urls


def validate(config: Config) -> None:
    """Check all that can be checked before a file is read or a step compiled.

    Raises:
      ValueError: name=value, the limit and the remedy, in one line.
    """
    config_lib.check(config)
    for source in mixture.sources(config):
        try:
            validate(source.config)
        except ValueError as error:
            raise ValueError(f"mixture source {source.name!r}: {error}") from error
    _check_training(config)
    _check_method(config)
    _check_temperatures(config)
    if not mixture.is_mixture(config):
        _check_data(config)
    templates.check_variables(config.data)
    _check_texts(config)
    _check_student(config.student)
    _check_evaluation(config)
    _check_annotate(config.annotate)
    _check_stores(config)
    _check_shapes(config)


def _check_training(config: Config) -> None:
    train, optim = config.train, config.optim
    if train.batch_size % train.num_microbatches:
        raise ValueError(
            f"train.batch_size={train.batch_size} does not divide by "
            f"train.num_microbatches={train.num_microbatches}: use a multiple of it"
        )
    if optim.warmup_steps > train.steps:
        raise ValueError(
            f"optim.warmup_steps={optim.warmup_steps} exceeds "
            f"train.steps={train.steps}: lower it"
        )


def _check_method(config: Config) -> None:
    """Check that there is something to train on, and that the teacher gives it."""
    method, cache = config.method, config.cache
    if not methods.terms(method):
        raise ValueError(
            "method.hard_weight=0 and method.soft_weight=0 leave nothing to train on: "
            "raise one of them"
        )
    methods.divergence(method)
    if cache.kind == "sampled" and method.divergence != "forward_kl":
        raise ValueError(
            f"method.divergence={method.divergence!r} with cache.kind='sampled': draws "
            "estimate 'forward_kl' alone; use it, or cache.kind='top_k'"
        )
    if config.teacher.online and cache.kind == "sampled":
        raise ValueError(
            "teacher.online=True with cache.kind='sampled': an online teacher gives "
            "its top k or whole rows; use cache.kind='top_k' or 'dense'"
        )
    if methods.has_layer_terms(method):
        _check_layer_map(config)


def _check_layer_map(config: Config) -> None:
    """Check what terms of hidden states and attention need."""
    method = config.method
    if not config.teacher.online:
        raise ValueError(
            f"method.hidden_weight={method.hidden_weight}, method.attention_weight="
            f"{method.attention_weight}: layers are compared with a teacher that runs "
            "beside the student: use teacher.online=True, or weights of 0"
        )
    if max(method.layer_map, default=-1) < 0:
        raise ValueError(
            f"method.layer_map={method.layer_map} must name a layer of the teacher, or "
            "-1, for each layer of the student: for example (1, 3) compares the "
            "student's layers 0 and 1 with the teacher's 1 and 3"
        )


def _check_temperatures(config: Config) -> None:
    """Check that the cache declares those of training, and 1.0, each once."""
    declared = config.cache.temperatures
    if len(set(declared)) < len(declared) or len(declared) > limits.MAX_TEMPERATURES:
        raise ValueError(
            f"cache.temperatures={declared} are {len(declared)} values, "
            f"{len(set(declared))} of them different: give at most "
            f"{limits.MAX_TEMPERATURES}, each once"
        )
    temperatures = methods.temperatures(config.method)
    for t in temperatures if methods.has_soft_terms(config.method) else ():
        if t not in declared:
            name = "temperature" if t == temperatures[0] else "final_temperature"
            raise ValueError(
                f"method.{name}={t} is not declared in "
                f"cache.temperatures={declared}: add it there and label "
                "again, or train at a declared one"
            )
    if 1.0 not in declared:
        raise ValueError(
            f"cache.temperatures={declared} lacks 1.0, at which KL is reported: add it"
        )


def _check_data(config: Config) -> None:
    """Check that the source has what it needs."""
    data = config.data
    columns.parse_mapping(data.columns)
    if data.is_built_in:
        if not (data.num_train and data.num_eval):
            raise ValueError(
                f"data.num_train={data.num_train}, data.num_eval={data.num_eval}: the "
                "kinship task is endless, say how many examples to make; for your "
                "own data give data.path"
            )
        if data.path:
            raise ValueError(
                f"data.path={data.path!r} with data.source='kinship': the built-in "
                "task reads no file: use data.source='auto'"
            )
        return
    if not data.path:
        raise ValueError(
            f"data.path='' with data.source={data.source!r}: give "
            "--config.data.path=FILE, FOLDER or hub name"
        )
    if not config.teacher.path:
        _check_no_teacher(config)


def _check_no_teacher(config: Config) -> None:
    """Check a run without a teacher: only kinship trains one of its own."""
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
    """Check that prompts of views differ, and that no file of texts is ignored."""
    data, views = config.data, methods.views(config.method)
    if data.long_text != "whole" and views != ("text",):
        raise ValueError(
            f"data.long_text={data.long_text!r} with method.name="
            f"{config.method.name!r}: texts alone are cut: use method.name='text', or "
            "data.long_text='whole'"
        )
    prefixes = [getattr(data.prefixes, view, "") for view in views]
    if not data.prompt_suffix and len(set(prefixes)) < len(prefixes):
        raise ValueError(
            f"data.prompt_suffix=False with data.prefixes {prefixes} of views "
            f"{list(views)}: nothing tells their prompts apart: give each view its own "
            "prefix, or use data.prompt_suffix=True"
        )
    names = ("rationales", "eval_rationales", "counterfactuals", "labels")
    for name in (*names, "eval_path", "columns"):
        if data.is_built_in and getattr(data, name):
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


def _check_student(student: StudentConfig) -> None:
    """Check where the student starts, and its adapters."""
    if student.init == "folder" and not student.path:
        raise ValueError(
            "student.path='' with student.init='folder': give --config.student.path"
        )
    if student.init == "teacher_layers" and not student.keep_layers:
        raise ValueError(
            "student.keep_layers=() with student.init='teacher_layers': give the "
            "teacher layers to keep, for example (0, 5, 11)"
        )
    if student.lora.rank and student.init == "random":
        raise ValueError(
            f"student.lora.rank={student.lora.rank} with student.init='random': "
            "adapters leave the weights as they are, here random: use "
            "student.init='folder' or 'teacher_layers', or a rank of 0"
        )
    if student.lora.rank and not student.lora.targets:
        raise ValueError(
            "student.lora.targets=() names no layer: use for example ('.*',)"
        )


def _check_evaluation(config: Config) -> None:
    student, cache_dtype = config.student, config.evaluation.cache_dtype
    is_t5 = student.init == "random" and student.architecture == "t5"
    if cache_dtype != "compute" and is_t5:
        raise ValueError(
            f"evaluation.cache_dtype={cache_dtype!r} with student.architecture='t5': "
            "encoder-decoder models have a cache of the compute dtype: use "
            "evaluation.cache_dtype='compute'"
        )


def _check_annotate(annotate: AnnotateConfig) -> None:
    if "" in annotate.stop:
        raise ValueError(
            f"annotate.stop={annotate.stop}: every text ends before '': leave it out"
        )
    _check_url(annotate.url)
    is_contrastive = annotate.method.startswith("contrastive")
    if annotate.cache_dtype != "compute" and (
        is_contrastive or annotate.backend != "local"
    ):
        raise ValueError(
            f"annotate.cache_dtype={annotate.cache_dtype!r} with annotate.method="
            f"{annotate.method!r} and annotate.backend={annotate.backend!r}: it is for "
            "local decoding without contrasts: use annotate.cache_dtype='compute'"
        )
    if annotate.backend == "local":
        return
    if is_contrastive:
        raise ValueError(
            f"annotate.method={annotate.method!r} with annotate.backend='server': it "
            "needs the probabilities of every token: use annotate.backend='local'"
        )
    if not annotate.url.startswith(("http://", "https://")):
        raise ValueError(
            f"annotate.url={annotate.url!r} with annotate.backend='server': give the "
            "server's, for example http://localhost:8000/v1"
        )
    if not annotate.model:
        raise ValueError(
            "annotate.model='' with annotate.backend='server': give the name that the "
            "server knows the model by"
        )


def _check_stores(config: Config) -> None:
    """Check the addresses of caches in stores."""
    named = [("cache.path", config.cache.path)]
    named += [("mixture.caches", path) for path in config.mixture.caches]
    for name, path in named:
        if urls.is_url(path):
            urls.check(path, name)


def _check_url(url: str) -> None:
    """Check that the address of a server has no secrets: it is stored and printed."""
    if "@" in url or "?" in url or "#" in url:
        raise ValueError(
            "annotate.url has a user, a password, or a part after '?' or '#' (it is "
            "not repeated here): give the address alone, up to /v1, and the key in the "
            "environment variable that annotate.key_variable names"
        )
    if not (url.isascii() and url.isprintable()) or " " in url:
        raise ValueError(
            f"annotate.url={url!r} has characters that no address has: give for "
            "example http://localhost:8000/v1"
        )


def _check_shapes(config: Config) -> None:
    """Check that models run as described, and that decoders can be exported."""
    shapes: tuple[tuple[DecoderConfig | T5Config, str], ...] = (
        (config.student.t5, "student.t5"),
        (config.student.decoder, "student.decoder"),
        (config.teacher.decoder, "teacher.decoder"),
    )
    for shape, name in shapes:
        shape = dataclasses.replace(shape, vocab_size=shape.vocab_size or 1)
        try:
            if isinstance(shape, T5Config):
                t5.check_shape(shape)
            else:
                check_shape(shape)
                families.write(shape)
        except ValueError as error:
            raise ValueError(f"{name}.{error}") from None

"""Model card of an exported student: its origin, training and held-out results.

Local folders appear by their last component only.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from huggingface_hub import ModelCardData

from kdjax.config import CacheConfig, Config, DataConfig, DecoderConfig
from kdjax.data import splits
from kdjax.experiment import methods, provenance
from kdjax.models import flops
from kdjax.models.lm import Shape


def write(
    config: Config,
    shape: Shape,
    origins: Mapping[str, str],
    *,
    step: int,
    summary: Mapping[str, Any] | None = None,
) -> str:
    """Return the text of README.md, as the Hugging Face hub reads it.

    Args:
      config: the run.
      shape: the student's.
      origins: of its parameters, from `provenance.initial_params`.
      step: optimizer steps done.
      summary: content of the run's summary.json, where that is of this step.
    """
    sections = [
        f"---\n{_front(config, shape)}\n---",
        f"# {config.name}",
        f"A student of {flops.params_count(shape):,} parameters, made with kdjax.",
        _table(("", ""), _facts(config, origins, step, summary or {})),
        "## Loss",
        "Of each term the mean over its view's target tokens times its weight.",
        _terms(config),
    ]
    if summary:
        student, teacher = summary["student"], summary["teacher"]
        rows = [
            (name, *(_cell(x.get(name)) for x in (student, teacher)))
            for name in dict.fromkeys((*student, *teacher))
        ]
        sections += [
            "## Held-out results",
            "NLL and KL to the teacher in nats per target token.",
            _table(("metric", "student", "teacher"), rows),
        ]
    return "\n\n".join(sections) + "\n"


def _front(config: Config, shape: Shape) -> str:
    """Return the metadata for the hub: the models and data this one is made of."""
    student, data = config.student, config.data
    bases = {"folder": student.path, "teacher_layers": config.teacher.path}
    named: dict[str, Any] = {
        "base_model": bases.get(student.init, ""),
        "teacher": config.teacher.path if _uses_teacher(config) else "",
        "datasets": data.path if splits.is_hub_name(data.path) else "",
    }
    named = {name: path for name, path in named.items() if provenance.is_hub_name(path)}
    decodes = isinstance(shape, DecoderConfig)
    return ModelCardData(
        library_name="transformers",
        pipeline_tag="text-generation" if decodes else "text2text-generation",
        tags=["distillation", "kdjax"],
        **named,
    ).to_yaml()


def _uses_teacher(config: Config) -> bool:
    return (
        methods.needs_teacher(config.method) or config.student.init == "teacher_layers"
    )


def _facts(
    config: Config, origins: Mapping[str, str], step: int, summary: Mapping[str, Any]
) -> list[tuple[str, str]]:
    method, optim, train = config.method, config.optim, config.train
    teacher, path = "none", config.teacher.path
    if _uses_teacher(config):
        teacher = provenance.name_of(path) if path else "trained for this run"
    starts = [
        f"{row['parameters']}: {row['from']}" for row in provenance.table(origins)
    ]
    facts = [
        ("teacher", teacher),
        ("starts from", "; ".join(starts)),
        ("data", _data(config.data, summary.get("examples", {}).get("train"))),
        ("method", f"{method.name}, views {', '.join(methods.views(method))}"),
    ]
    if methods.has_soft_terms(config.method):
        facts += [
            ("soft labels", _soft_labels(config.cache, config.teacher.online)),
            ("divergence", f"{method.divergence}, tail {method.tail}"),
            ("temperature", _temperature(config)),
        ]
    facts += [
        ("steps", f"{step:,} of {train.steps:,}, {train.batch_size} packed rows each"),
        ("optimizer", f"{optim.name}, learning rate {optim.learning_rate:g}"),
        ("seed", str(config.seed)),
    ]
    if config.student.lora.rank:
        facts.append(("adapters", f"rank {config.student.lora.rank}, added in"))
    if optim.ema_decay:
        facts.append(("parameters", f"averages, decay {optim.ema_decay:g}"))
    return facts


def _data(data: DataConfig, counts: Mapping[str, int] | None) -> str:
    """Describe the training data; the counts are those of the run's summary."""
    count = f"{data.num_train:,} examples" if data.num_train else "all examples"
    if counts:
        count = f"{counts['used']:,} examples"
        if counts["read"] > counts["used"]:
            count += f" of {counts['read']:,}"
    if data.is_built_in:
        return f"the built-in task kinship, {count}"
    parts = [f"{provenance.name_of(data.path)} ({data.source}, schema {data.schema})"]
    for name in ("rationales", "counterfactuals", "labels"):
        if getattr(data, name):
            parts.append(f"{name} {provenance.name_of(getattr(data, name))}")
    if data.wrong_labels != "keep":
        weight = data.wrong_label_weight if data.wrong_labels == "weight" else 0.0
        parts.append(f"wrong labels weigh {weight:g}")
    return ", ".join([*parts, count])


def _soft_labels(cache: CacheConfig, online: bool) -> str:
    contents = {
        "top_k": f"the teacher's top {cache.k} probabilities",
        "dense": "all of the teacher's probabilities",
        "sampled": f"{cache.num_draws} draws from the teacher",
    }
    return f"{contents[cache.kind]}, {'computed online' if online else 'stored'}"


def _temperature(config: Config) -> str:
    method = config.method
    text = f"{method.temperature:g}"
    if method.temperature_schedule != "constant":
        text += f" to {method.final_temperature:g}, {method.temperature_schedule}"
    return text + (", terms times its square" if method.scale_by_t2 else "")


def _terms(config: Config) -> str:
    """Tabulate the weight of each term at the first and, if it moves, the last step."""
    ends = [0.0] if config.method.weight_schedule == "constant" else [0.0, 1.0]
    columns = [methods.terms(config.method, progress) for progress in ends]
    rows = [
        (terms[0].name, *(f"{term.weight:g}" for term in terms))
        for terms in zip(*columns, strict=True)
    ]
    heads = (
        ("term", "weight") if len(ends) == 1 else ("term", "first step", "last step")
    )
    return _table(heads, rows)


def _cell(value: float | None) -> str:
    return "" if value is None else f"{value:.4g}"


def _table(heads: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> str:
    lines = [heads, ("---",) * len(heads), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)

"""Distillation methods as data: which views are trained, and with which terms.

A method is a tuple of views and a share for each; a term is (view, kind, weight). The
step knows no method, only the weights that the loader has put on each token.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from kdjax.config import MethodConfig
from kdjax.losses.divergence import Divergence
from kdjax.losses.sparse import check_tail

# name -> views, in the order in which batches number them; "counterfactual" comes last
METHODS: dict[str, tuple[str, ...]] = {
    "finetune": ("label",),
    "rationale_then_label": ("rationale_then_label",),
    "multitask": ("label", "rationale"),  # distilling step-by-step, arXiv 2305.02301
    "counterfactual": ("factual", "counterfactual"),  # SCOTT, arXiv 2305.01879
    "multitask_counterfactual": ("label", "rationale", "factual", "counterfactual"),
    "text": ("text",),
    "chat": ("chat",),
}

# kind of a term -> the step's metric that sums it over target tokens
SUMS = {"hard": "nll", "soft": "kl", "hidden": "hidden", "attention": "attention"}


@dataclass(frozen=True, kw_only=True, slots=True)
class Term:
    """One summand of the loss: `weight` times the mean over one view's target tokens.

    kind "hard" is cross-entropy with the data, "soft" the divergence from the teacher;
    "hidden" and "attention" compare mapped layers with those of an online teacher.
    """

    name: str  # "<view>/<kind>", the key under which its value is reported
    view: int  # index into METHODS[method]
    kind: str  # key of SUMS
    weight: float


def views(config: MethodConfig) -> tuple[str, ...]:
    """Return the views that a method trains.

    Raises:
      ValueError: unknown method.
    """
    if config.name not in METHODS:
        raise ValueError(
            f"method.name={config.name!r} is not a method: use one of {list(METHODS)}"
        )
    return METHODS[config.name]


def held_out_views(config: MethodConfig) -> tuple[str, ...]:
    """Return the views that are evaluated, numbered as in training.

    The counterfactual view asks for a wrong answer to a wrong rationale, which makes
    the student's answers hang on its rationales: nothing to do well at by itself.
    """
    return tuple(view for view in views(config) if view != "counterfactual")


def explains(config: MethodConfig) -> bool:
    """Return True if a student of the method writes rationales."""
    return any(view not in ("label", "text", "chat") for view in held_out_views(config))


def shares(config: MethodConfig) -> tuple[float, ...]:
    """Return the share of each view in the loss; they sum to 1.

    With a = `label_weight`, b = `counterfactual_weight`, g = `multitask_weight`:
    multitask has (a, 1 - a), counterfactual (1 - b, b), multitask_counterfactual
    g times the first and 1 - g times the second; a single view has 1.
    """
    a, b, g = (
        config.label_weight,
        config.counterfactual_weight,
        config.multitask_weight,
    )
    of_method = {
        "multitask": (a, 1 - a),
        "counterfactual": (1 - b, b),
        "multitask_counterfactual": (
            g * a,
            g * (1 - a),
            (1 - g) * (1 - b),
            (1 - g) * b,
        ),
    }
    return of_method.get(config.name, (1.0,))


def terms(config: MethodConfig, progress: float = 0.0) -> tuple[Term, ...]:
    """Return the terms of a method, without those whose weight is always zero.

    Views have their `shares` of the loss; within a view hard and soft terms have
    `hard_weight` and `soft_weight`, or what their schedule says; hidden and attention
    terms have a constant weight.

    Args:
      config: the method.
      progress: 0 at the first step, 1 at the last.
    """
    names = views(config)
    kind = config.weight_schedule
    weights = {
        "hard": (config.hard_weight, config.final_hard_weight),
        "soft": (config.soft_weight, config.final_soft_weight),
        "hidden": (config.hidden_weight, config.hidden_weight),
        "attention": (config.attention_weight, config.attention_weight),
    }
    return tuple(
        Term(
            name=f"{view}/{term}",
            view=index,
            kind=term,
            weight=share * scheduled(kind, *ends, progress),
        )
        for index, (view, share) in enumerate(zip(names, shares(config), strict=True))
        for term, ends in weights.items()
        if share * max(ends[:1] if kind == "constant" else ends) > 0
    )


def scheduled(kind: str, start: float, end: float, progress: float) -> float:
    """Interpolate a schedule: start at progress 0, end at 1; a constant has no end."""
    if kind == "constant":
        return start
    if kind == "cosine":
        progress = (1 - math.cos(math.pi * progress)) / 2
    return start + (end - start) * progress


def temperature(
    config: MethodConfig, declared: Sequence[float], progress: float
) -> float:
    """Return the temperature of a step: the declared one nearest to the schedule.

    Probabilities are exact at declared temperatures alone, so a schedule moves among
    them, in steps.
    """
    if config.temperature_schedule == "constant":
        return config.temperature
    ends = (config.temperature, config.final_temperature)
    exact = scheduled(config.temperature_schedule, *ends, progress)
    return min(declared, key=lambda t: abs(math.log(t / exact)))


def temperatures(config: MethodConfig) -> tuple[float, ...]:
    """Return the temperatures that must be declared."""
    if config.temperature_schedule == "constant":
        return (config.temperature,)
    return config.temperature, config.final_temperature


def has_soft_terms(config: MethodConfig) -> bool:
    """Return True if training needs the teacher's distributions."""
    return any(term.kind == "soft" for term in terms(config))


def needs_teacher(config: MethodConfig) -> bool:
    """Return True if training needs the teacher at all."""
    return has_soft_terms(config) or has_layer_terms(config)


def has_layer_terms(config: MethodConfig) -> bool:
    """Return True if training needs the layers of an online teacher."""
    return any(term.kind in ("hidden", "attention") for term in terms(config))


def divergence(config: MethodConfig) -> Divergence:
    """Return the divergence of the soft terms.

    Raises:
      ValueError: unknown, or with a parameter or tail policy that it cannot have.
    """
    soft = Divergence(name=config.divergence, alpha=config.alpha, beta=config.beta)
    check_tail(config.tail, soft)
    return soft

"""Distillation methods as data: which views are trained, and with which terms.

A method is a tuple of views and a share for each; a term is (view, kind, weight). The
step knows no method, only the weights that the loader has put on each token.
"""

from dataclasses import dataclass

from kdjax.config import MethodConfig
from kdjax.losses.divergence import Divergence
from kdjax.losses.sparse import check_tail

# name -> views, in the order in which batches number them
METHODS: dict[str, tuple[str, ...]] = {
    "finetune": ("label",),
    "rationale_then_label": ("rationale_then_label",),
    "multitask": ("label", "rationale"),  # distilling step-by-step, arXiv 2305.02301
    "text": ("text",),
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Term:
    """One summand of the loss: `weight` times the mean over one view's target tokens.

    kind "hard" is cross-entropy with the data, "soft" the divergence from the teacher.
    """

    name: str  # "<view>/<kind>", the key under which its value is reported
    view: int  # index into METHODS[method]
    kind: str  # "hard" or "soft"
    weight: float


def views(config: MethodConfig) -> tuple[str, ...]:
    """The views a method trains.

    Raises:
      ValueError: unknown method.
    """
    if config.name not in METHODS:
        raise ValueError(
            f"method.name={config.name!r} is not a method: use one of {list(METHODS)}"
        )
    return METHODS[config.name]


def terms(config: MethodConfig) -> tuple[Term, ...]:
    """The terms of a method; those of weight zero are left out.

    Two views share the loss as a * label + (1 - a) * rationale, a = `label_weight`;
    within a view hard and soft terms have `hard_weight` and `soft_weight`.
    """
    names = views(config)
    shares = (
        (1.0,) if len(names) == 1 else (config.label_weight, 1 - config.label_weight)
    )
    return tuple(
        Term(name=f"{name}/{kind}", view=index, kind=kind, weight=share * weight)
        for index, (name, share) in enumerate(zip(names, shares, strict=True))
        for kind, weight in (("hard", config.hard_weight), ("soft", config.soft_weight))
        if share * weight > 0
    )


def divergence(config: MethodConfig) -> Divergence:
    """The divergence of the soft terms.

    Raises:
      ValueError: unknown, or with a parameter or tail policy that it cannot have.
    """
    found = Divergence(name=config.divergence, alpha=config.alpha, beta=config.beta)
    check_tail(config.tail, found)
    return found

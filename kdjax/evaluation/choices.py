"""Multiple choice by likelihood, after any prompt and prefix."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float64

from kdjax.config import DataConfig, T5Config
from kdjax.data import views
from kdjax.data.example import Example
from kdjax.data.templates import Text
from kdjax.data.views import Segment
from kdjax.evaluation.scorer import Scorer
from kdjax.experiment.run import Run
from kdjax.training.checkpoint import load_student

_MULTIPLE = 128  # rows are made longer by multiples of this


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Chooser:
    """A model that scores and continues texts, and its tokenizer."""

    tokenizer: Any
    data: DataConfig  # form of the prompts, limits of the segments
    log_probs: Callable[[Sequence[Segment]], Float64[np.ndarray, " N"]]  # of targets
    generate: Callable[[Sequence[str]], list[str]]  # greedy continuations of prompts
    # the same, of a segment's prompt and prefix
    complete: Callable[[Sequence[Segment]], list[str]]


def load_chooser(run: Run) -> Chooser:
    """Load the student of a finished run at its newest checkpoint.

    A target may be longer than `data.max_target` by what the student generates; what is
    longer still loses its beginning, whatever `data.on_long` says.

    Args:
      run: with its held-out segments.
    """
    config, shape = run.config, run.student.shape
    if run.data.parts:
        raise ValueError(
            "data.source='mixture': explanations are measured on one source: use "
            "--config.data.source=auto and --config.data.path of one of them"
        )
    limits = dataclasses.replace(
        config.data,
        max_target=config.data.max_target + config.evaluation.max_new_tokens,
        on_long="truncate",
    )
    rows = config.evaluation.row_length or config.train.row_length
    prompt_rows = (
        config.evaluation.encoder_row_length or config.train.encoder_row_length or rows
    )
    if isinstance(shape, T5Config):
        minimum, prompt_minimum = limits.max_target, limits.max_prompt + 1
    else:
        minimum, prompt_minimum = limits.max_prompt + limits.max_target, 0
    evaluation = dataclasses.replace(
        config.evaluation,
        row_length=_row_length(rows, minimum),
        encoder_row_length=_row_length(prompt_rows, prompt_minimum),
    )
    config = dataclasses.replace(config, evaluation=evaluation)
    scorer = Scorer(dataclasses.replace(run, config=config))
    params = load_student(run)
    return Chooser(
        tokenizer=run.tokenizer,
        data=limits,
        log_probs=lambda segments: scorer.log_probs(params, segments),
        generate=lambda prompts: scorer.generate(params, prompts),
        complete=lambda segments: scorer.complete(params, segments),
    )


def _row_length(length: int, minimum: int) -> int:
    return length if length >= minimum else -(-minimum // _MULTIPLE) * _MULTIPLE


def choose(
    chooser: Chooser,
    examples: Sequence[Example],
    texts: Sequence[Text] | None = None,
    *,
    transform: Callable[[Segment], Segment] = lambda segment: segment,
) -> list[str]:
    """Return the most probable choice of each example; the first one on ties.

    A choice's probability is that of all its tokens and the end token, as in
    `Scorer`'s accuracy.

    Args:
      chooser: the model.
      examples: with choices.
      texts: prompt and prefix of each; None = those of the label view.
      transform: applied to each segment before it is scored.
    """
    if not examples:
        return []
    choices = views.choice_segments(
        examples, chooser.tokenizer, chooser.data, texts=texts
    )
    log_probs_N = chooser.log_probs(
        [transform(segment) for segment in choices.segments]
    )
    best = []
    for index, example in enumerate(examples):
        (members,) = np.nonzero(choices.example == index)
        highest = members[log_probs_N[members].argmax()]
        best.append(example.choices[choices.choice[highest]])
    return best

"""What the settings of an annotation may be."""

import math

from kdjax.config import (
    ANNOTATIONS,
    BACKENDS,
    CONTRASTS,
    GATES,
    QUALITIES,
    AnnotateConfig,
)


def check(annotate: AnnotateConfig) -> None:
    """Checks all that can be checked before a file is read.

    Raises:
      ValueError: name=value, the limit and the remedy, in one line.
    """
    for word, name, allowed in (
        (annotate.method, "method", ANNOTATIONS),
        (annotate.split, "split", ("train", "eval")),
        (annotate.backend, "backend", BACKENDS),
        (annotate.quality, "quality", QUALITIES),
        (annotate.contrast, "contrast", CONTRASTS),
        *((gate, "drop", GATES) for gate in annotate.drop),
    ):
        if word not in allowed:
            raise ValueError(
                f"annotate.{name}={word!r} is unknown: use one of {list(allowed)}"
            )
    for count, name in (
        (annotate.max_new_tokens, "max_new_tokens"),
        (annotate.batch_size, "batch_size"),
        (annotate.concurrency, "concurrency"),
    ):
        if count < 1:
            raise ValueError(f"annotate.{name}={count} is below 1: use 1 or more")
    for amount, name in (
        (annotate.num_demonstrations, "num_demonstrations"),
        (annotate.contrast_weight, "contrast_weight"),
        (annotate.temperature, "temperature"),
        (annotate.num_retries, "num_retries"),
        (annotate.token_budget, "token_budget"),
    ):
        if not amount >= 0 or math.isinf(amount):
            raise ValueError(f"annotate.{name}={amount} is not a number of 0 or more")
    if not 0 < annotate.timeout < math.inf:
        raise ValueError(
            f"annotate.timeout={annotate.timeout} is not a positive number of seconds"
        )
    if not 0 < annotate.top_p <= 1:
        raise ValueError(f"annotate.top_p={annotate.top_p}: use above 0, to 1")
    if "" in annotate.stop:
        raise ValueError(
            f"annotate.stop={annotate.stop}: every text ends before '': leave it out"
        )
    if annotate.backend == "server":
        _check_server(annotate)


def _check_server(annotate: AnnotateConfig) -> None:
    if annotate.method == "contrastive":
        raise ValueError(
            "annotate.method='contrastive' with annotate.backend='server': it needs "
            "the probabilities of every token: use annotate.backend='local'"
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

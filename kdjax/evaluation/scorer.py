"""Measures of a model on held-out examples; teacher and student by the same code."""

import hashlib
import json
import math
import pathlib
import re
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Float64

from kdjax.config import Config, DecoderConfig, T5Config
from kdjax.data import loader, templates, views
from kdjax.data.example import Example
from kdjax.data.templates import Text
from kdjax.evaluation import calibration
from kdjax.experiment import methods
from kdjax.experiment.data import Data
from kdjax.experiment.models import (
    Model,
    load_model,
    make_model,
    shared_vocab_size,
    student_shape,
)
from kdjax.experiment.rows import joint_row_length, row_kwargs
from kdjax.models import hf
from kdjax.models.generate import Decoding, Generator
from kdjax.models.lm import Shape
from kdjax.parallel import distributed, sharding
from kdjax.runtime import files
from kdjax.training import step
from kdjax.training.program import chunk_size

MATCHES = (
    "exact_match",
    "exact_match_strict",
    "answer_match",
    "answer_match_strict",
)


class Scorer:
    """Scores the parameters of one model: compiled once, called as often as wanted.

    Args:
      config: evaluation settings, and the data's limits.
      data: held-out examples and segments.
      model: structure and shardings.
      mesh: devices.
      cache: the teacher's records of the held-out segments; None leaves out KL and
        agreement.
    """

    def __init__(
        self, config: Config, data: Data, model: Model, mesh: Mesh, *, cache: Any = None
    ) -> None:
        self._config, self._data, self._model = config, data, model
        self._mesh, self._cache = mesh, cache
        self._student = student_shape(config, data.tokenizer)
        self._tokens = self._plan(data.evaluation)
        self._choices = None
        if "label" in data.eval_views and any(e.choices for e in data.eval_examples):
            self._choices = views.choice_segments(
                data.eval_examples, data.tokenizer, config.data
            )
            self._choice_plan = self._plan(self._choices.segments)
        self._score = step.make_score_step(
            model.graphdef,
            mesh,
            model.abstract,
            tail=config.method.tail,
            chunk_size=chunk_size(config, model),
            num_valid=shared_vocab_size(model.shape, cache),
        )
        self._generate = Generator(
            model.shape,
            model.graphdef,
            Decoding(
                max_new_tokens=config.evaluation.max_new_tokens,
                eos_id=data.tokenizer.eos_token_id,
                pad_id=data.tokenizer.pad_token_id,
            ),
        )
        self.bins: calibration.Bins | None = None  # of the last call's ece
        # Every view's records are read, whatever the training terms are.
        self._soft = tuple(
            methods.Term(name=name, view=index, kind="soft", weight=1.0)
            for index, name in enumerate(data.eval_views)
        )

    def __call__(self, params: Any) -> dict[str, float]:
        """Metrics of the model with these parameters.

        Returns:
          nll (nats per target token of the data's labels, all views), perplexity,
          nll/<view>; with a cache kl (nats, temperature 1) and agreement (share of
          target tokens whose most probable token is the teacher's); with choices
          accuracy (the right choice is the most probable one) and ece.
        """
        return self._token_metrics(params) | self._choice_metrics(params)

    def digest(self) -> str:
        """A name for what is measured: all that decides it but for the model."""
        settings = (
            self._config.method.tail,
            self._config.train.dtype,
            (self._config.cache.kind, self._config.cache.k),
            self._config.evaluation.num_bins,
            self._data.eval_views,
            self._cache is not None,
        )
        found = hashlib.blake2b(repr(settings).encode(), digest_size=16)
        choices = self._choices
        measured = [*self._data.evaluation, *(choices.segments if choices else ())]
        for segment in measured:
            found.update(segment.key + bytes([segment.view]))
        if choices:
            found.update(np.asarray(choices.example).tobytes())
            found.update(np.asarray(choices.correct).tobytes())
        return found.hexdigest()

    def log_probs(
        self, params: Any, segments: Sequence[views.Segment]
    ) -> Float64[np.ndarray, " N"]:
        """Log-probability of the target of each segment, nats."""
        return -self._per_segment(params, self._plan(segments), None)["nll"]

    def _plan(self, segments: Sequence[views.Segment]) -> loader.BatchPlan:
        evaluation, train = self._config.evaluation, self._config.train
        lengths = (
            evaluation.row_length or train.row_length,
            evaluation.encoder_row_length or train.encoder_row_length,
        )
        shape, student = self._model.shape, self._student
        if isinstance(shape, DecoderConfig):
            lengths = joint_row_length(student, *lengths), 0
        rows = row_kwargs(shape, *lengths)
        return loader.BatchPlan(
            segments, batch_size=evaluation.batch_size, shuffle=False, **rows
        )

    def _per_segment(
        self, params: Any, plan: loader.BatchPlan, cache: Any
    ) -> dict[str, np.ndarray]:
        """Sums over the target tokens of every segment, float64 [num_segments]."""
        num_rows = plan.batch_size
        terms = () if cache is None else self._soft
        rows = sharding.local_rows(self._mesh, num_rows)
        sums: dict[str, np.ndarray] = {}
        for number in range(plan.steps_per_epoch(0)):
            batch = loader.make_batch(plan, number, terms=terms, cache=cache, rows=rows)
            scores = self._score(
                params, sharding.global_batch(batch, self._mesh, num_rows)
            )
            host = {k: np.asarray(v, np.float64) for k, v in scores.items()}
            for row, items in enumerate(plan.batch(number)):
                for place in loader.placements(plan, items):
                    for name, values in host.items():
                        total = sums.setdefault(name, np.zeros(len(plan.segments)))
                        total[place.item] = values[row, place.target].sum()
        return sums

    def _token_metrics(self, params: Any) -> dict[str, float]:
        segments = self._data.evaluation
        sums = self._per_segment(params, self._tokens, self._cache)
        counts = np.array([len(s.target_ids) for s in segments])
        view = np.array([s.view for s in segments])
        nll = float(sums["nll"].sum() / counts.sum())
        found = {"nll": nll, "perplexity": math.exp(min(nll, 700.0))}
        for index, name in enumerate(self._data.eval_views):
            of_view = view == index
            found[f"nll/{name}"] = float(
                sums["nll"][of_view].sum() / max(1, counts[of_view].sum())
            )
        if self._cache is not None:
            found["kl"] = float(sums["kl"].sum() / counts.sum())
            found["agreement"] = float(sums["agrees"].sum() / counts.sum())
        return found

    def _choice_metrics(self, params: Any) -> dict[str, float]:
        if self._choices is None:
            return {}
        choices = self._choices
        log_probs = -self._per_segment(params, self._choice_plan, None)["nll"]
        confidence, correct = [], []
        for example in np.unique(choices.example):
            of_example = choices.example == example
            scores = log_probs[of_example]
            shares = np.exp(scores - scores.max())
            confidence.append(shares.max() / shares.sum())
            correct.append(choices.correct[of_example][scores.argmax()])
        self.bins = calibration.ece(
            jnp.asarray(confidence, jnp.float32),
            jnp.asarray(correct, jnp.float32),
            num_bins=self._config.evaluation.num_bins,
        )
        return {
            "accuracy": float(np.mean(correct)),
            "ece": float(calibration.finalize_ece(self.bins)),
        }

    def generations(self, params: Any) -> list[dict[str, Any]]:
        """Greedy answers to the first held-out examples, one object a view.

        Returns:
          Objects with id, view, and what `judge` says.
        """
        config, data = self._config, self._data
        examples = data.eval_examples[: config.evaluation.num_generations]
        wanted = [
            (example, view, text)
            for example in examples
            for view in data.eval_views
            for text in templates.render(example, view, config.data)
            if text.prompt
        ]
        if not wanted:
            return []
        texts = self.texts(params, [text.prompt for _, _, text in wanted])
        return [
            {"id": example.id, "view": view} | judge(generated, example, view, text)
            for (example, view, text), generated in zip(wanted, texts, strict=True)
        ]

    def texts(self, params: Any, asked: Sequence[str]) -> list[str]:
        """What follows each of some prompts, by greedy decoding."""
        config, data = self._config, self._data
        prompts = views.prompt_ids(
            asked, data.tokenizer, chat_template=config.data.chat_template
        )
        prompts = [ids[-config.data.max_prompt :] for ids in prompts]
        if isinstance(self._model.shape, T5Config):
            end = self._model.shape.eos_id
            prompts = [loader.ended(ids, end) for ids in prompts]
        tokens = self._generate(params, prompts)
        return data.tokenizer.batch_decode(tokens, skip_special_tokens=True)


def score_teacher(
    config: Config,
    data: Data,
    folder: pathlib.Path,
    mesh: Mesh,
    *,
    path: str,
    cache: Any = None,
    live: tuple[Model, Any] | None = None,
) -> tuple[dict[str, float], Shape]:
    """Held-out metrics of a teacher, and its shape: computed once for all runs.

    Args:
      config: of one of them.
      data: held-out examples and segments.
      folder: keeps the metrics, under a name that says of what they are.
      mesh: devices.
      path: of the teacher.
      cache: the teacher's own records of the held-out segments.
      live: the teacher, where it is loaded already.
    """
    shape = hf.read_config(path)
    dtype = config.train.dtype
    model = live[0] if live else make_model(shape, mesh, dtype=dtype)
    scorer = Scorer(config, data, model, mesh, cache=cache)
    file = folder / f"{hf.fingerprint(path)}-{scorer.digest()}.json"
    found = _read_metrics(file) if file.is_file() else None
    # Every process looks before one of them writes.
    distributed.barrier("look at the teacher's scores")
    if found is None:
        params = live[1] if live else load_model(path, mesh, dtype=dtype)[1]
        found = scorer(params)
        if distributed.is_main():
            files.write_json(file, found)
    return found, shape


def _read_metrics(file: pathlib.Path) -> dict[str, float]:
    """Read metrics; null stands for what is not finite."""
    values = json.loads(file.read_text())
    return {name: math.nan if x is None else x for name, x in values.items()}


def judge(generated: str, example: Example, view: str, text: Text) -> dict[str, Any]:
    """How a generated text compares with the data's.

    Returns:
      prompt, target, generated; exact_match: whether the last two are equal up to case,
      white space and a final full stop; exact_match_strict: up to white space at their
      ends. For a view that explains, then answers, also answer (what is generated after
      the last "Answer:", all of it without one), answer_match and answer_match_strict:
      the same of the answers alone.
    """
    row: dict[str, Any] = {"prompt": text.prompt, "target": text.target}
    row["generated"] = generated.strip()
    row |= _matches("exact_match", generated, text.target)
    if view in templates.EXPLAINED:
        row["answer"] = templates.final_answer(generated)
        row |= _matches("answer_match", row["answer"], example.answer)
    return row


def _matches(name: str, found: str, wanted: str) -> dict[str, bool]:
    return {
        name: normalise(found) == normalise(wanted),
        f"{name}_strict": found.strip() == wanted.strip(),
    }


def match_rates(rows: Sequence[dict[str, Any]]) -> dict[str, float]:
    """Shares of generations that match, a view: exact_match/<view> and the others."""
    found: dict[str, list[bool]] = {}
    for row in rows:
        for name in MATCHES:
            if name in row:
                found.setdefault(f"{name}/{row['view']}", []).append(row[name])
    return {name: float(np.mean(values)) for name, values in found.items()}


def normalise(text: str) -> str:
    """Lower case, single spaces, no final full stop."""
    return re.sub(r"\s+", " ", text.lower()).strip().rstrip(".").rstrip()

"""Scores of a model on held-out examples, for teacher and student alike."""

import dataclasses
import hashlib
import math
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Float64

from kdjax.config import Config, DecoderConfig, T5Config
from kdjax.data import loader, views
from kdjax.data import tokenizer as tokenizers
from kdjax.data.segments import as_segments
from kdjax.evaluation import calibration, text_match
from kdjax.evaluation import prompts as prompts_lib
from kdjax.experiment import methods, mixture
from kdjax.experiment.data import Data
from kdjax.experiment.models import (
    Model,
    load_model,
    make_model,
    shared_vocab_size,
)
from kdjax.experiment.rows import joint_row_length, row_kwargs
from kdjax.experiment.run import Run
from kdjax.experiment.teacher import teacher_folder
from kdjax.models import hf
from kdjax.models.generate import Decoding, Generator
from kdjax.models.lm import Shape, max_prompt_length
from kdjax.parallel import distributed, sharding
from kdjax.runtime import files
from kdjax.training import step
from kdjax.training.program import chunk_size

_BATCH_SIZE = 16  # texts decoded together


class Scorer:
    """Scorer of the parameters of one model, compiled once for all calls.

    Args:
      run: evaluation settings, held-out examples and segments, devices.
      model: structure and shardings; None = the student of the run.
      cache: the teacher's records of the held-out segments; None leaves out KL and
        agreement.
    """

    def __init__(
        self, run: Run, model: Model | None = None, *, cache: Any = None
    ) -> None:
        config, data, mesh = run.config, run.data, run.mesh
        model = run.student if model is None else model
        self._config, self._data, self._model = config, data, model
        self._mesh, self._cache = mesh, cache
        self._student = run.student.shape
        # A run without held-out examples can still generate.
        self._tokens = self._plan(data.evaluation) if data.evaluation else None
        self._choices = None
        if _has_choices(data):
            self._choices = _choice_segments(config, data)
            self._choice_plan = self._plan(self._choices.segments)
        self._score = step.make_score_step(
            model.graphdef,
            mesh,
            model.abstract,
            tail=config.method.tail,
            chunk_size=chunk_size(config, model),
            num_valid=shared_vocab_size(model.shape, cache),
        )
        self._decoding = Decoding(
            max_new_tokens=config.evaluation.max_new_tokens,
            eos_ids=data.eos_ids or (data.tokenizer.eos_token_id,),
            pad_id=tokenizers.pad_id(data.tokenizer),
        )
        self._generator = self._make_generator(self._decoding)
        self.bins: calibration.Bins | None = None  # of the last call's accuracy
        self._choice_rows: list[dict[str, Any]] = []
        # Every view's records are read, whatever the training terms are.
        self._soft = tuple(
            methods.Term(name=name, view=index, kind="soft", weight=1.0)
            for index, name in enumerate(data.eval_views)
        )

    def __call__(self, params: Any) -> dict[str, float]:
        """Compute the metrics of the model with these parameters.

        Returns:
          nll (nats per target token of the data's labels, all views), perplexity,
          nll/<view>; with a cache kl (nats, temperature 1) and agreement (share of
          target tokens whose most probable token is the teacher's); with choices
          accuracy (the right choice with its end token is the most probable one) and
          ece, and as lm-evaluation-harness has them, without the end token: acc (sum of
          log-probabilities), acc_norm (sum / characters of the choice) and acc_bytes
          (sum / bytes of it).
        """
        return self._token_metrics(params) | self._choice_metrics(params)

    def digest(self) -> str:
        """Return a hash of all that determines the metrics, but for the model."""
        settings = (
            self._config.method.tail,
            self._config.train.dtype,
            (self._config.cache.kind, self._config.cache.k),
            self._config.evaluation.num_bins,
            self._data.eval_views,
            self._cache is not None,
        )
        digest = hashlib.blake2b(repr(settings).encode(), digest_size=16)
        choices = self._choices
        for segments in (self._data.evaluation, choices.segments if choices else []):
            table = as_segments(segments)
            views_N1 = table.views.astype(np.uint8)[:, None]
            digest.update(np.concatenate([table.keys, views_N1], axis=1).tobytes())
        if choices:
            digest.update(np.asarray(choices.example).tobytes())
            digest.update(np.asarray(choices.correct).tobytes())
        return digest.hexdigest()

    def log_probs(
        self, params: Any, segments: Sequence[views.Segment]
    ) -> Float64[np.ndarray, " N"]:
        """Compute the log-probability of the target of each segment, nats."""
        return -self._per_segment(params, self._plan(segments), None)["nll"]

    def _plan(self, segments: Sequence[views.Segment]) -> loader.BatchPlan:
        return _make_plan(
            self._config, segments, (self._model.shape, self._student), self._mesh
        )

    def _per_segment(
        self, params: Any, plan: loader.BatchPlan, cache: Any
    ) -> dict[str, np.ndarray]:
        """Sum scores over the target tokens of each segment, float64 [num_segments].

        Beside the sum, "<name>_end" is the score of the last target token.
        """
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
                for span in loader.segment_spans(plan, items):
                    for name, values in host.items():
                        total = sums.setdefault(name, np.zeros(len(plan.segments)))
                        of_target = values[row, span.loss]
                        total[span.item] = of_target.sum()
                        end = sums.setdefault(f"{name}_end", np.zeros(len(total)))
                        end[span.item] = of_target[-1]
        return sums

    def _token_metrics(self, params: Any) -> dict[str, float]:
        if self._tokens is None:
            raise ValueError(
                "splits=() has no held-out examples: open the run with some"
            )
        segments = self._tokens.segments
        sums = self._per_segment(params, self._tokens, self._cache)
        counts, view = segments.loss_lengths, segments.views
        nll = float(sums["nll"].sum() / counts.sum())
        metrics = {"nll": nll, "perplexity": math.exp(min(nll, 700.0))}
        for index, name in enumerate(self._data.eval_views):
            of_view = view == index
            metrics[f"nll/{name}"] = float(
                sums["nll"][of_view].sum() / max(1, counts[of_view].sum())
            )
        if self._cache is not None:
            metrics["kl"] = float(sums["kl"].sum() / counts.sum())
            metrics["agreement"] = float(sums["agrees"].sum() / counts.sum())
        return metrics

    def _choice_metrics(self, params: Any) -> dict[str, float]:
        if self._choices is None:
            return {}
        rows = self._choice_rows = self._score_choices(params)
        confidence, correct = [], []
        for row in rows:
            scores = np.asarray(row["log_probs_with_end"])
            shares = np.exp(scores - scores.max())
            confidence.append(shares.max() / shares.sum())
            correct.append(row["accuracy"])
        self.bins = calibration.reliability_bins(
            jnp.asarray(confidence, jnp.float32),
            jnp.asarray(correct, jnp.float32),
            num_bins=self._config.evaluation.num_bins,
        )
        return {
            "accuracy": float(np.mean(correct)),
            "ece": calibration.expected_calibration_error(self.bins),
        } | {
            name: float(np.mean([row[name] for row in rows]))
            for name in ("acc", "acc_norm", "acc_bytes")
        }

    def choice_rows(self) -> list[dict[str, Any]]:
        """Return one object per example with choices, of the last call.

        id; choices; log_probs (nats, of each choice without its end token);
        log_probs_with_end; accuracy, acc, acc_norm and acc_bytes: whether the highest
        one is right.
        """
        return self._choice_rows

    def _score_choices(self, params: Any) -> list[dict[str, Any]]:
        assert self._choices is not None
        choices = self._choices
        sums = self._per_segment(params, self._choice_plan, None)
        with_end, without = -sums["nll"], sums["nll_end"] - sums["nll"]
        rows = []
        for index in np.unique(choices.example):
            example = self._data.eval_examples[index]
            (members,) = np.nonzero(choices.example == index)
            texts = [example.choices[number] for number in choices.choice[members]]
            scores = {
                "accuracy": with_end[members],
                "acc": without[members],
                "acc_norm": without[members] / [max(1, len(t)) for t in texts],
                "acc_bytes": without[members]
                / [max(1, len(t.encode())) for t in texts],
            }
            row: dict[str, Any] = {"id": example.id, "choices": texts}
            row["log_probs"] = without[members].tolist()
            row["log_probs_with_end"] = with_end[members].tolist()
            for name, values in scores.items():
                row[name] = bool(choices.correct[members][values.argmax()])
            rows.append(row)
        return rows

    def generations(self, params: Any) -> list[dict[str, Any]]:
        """Answer the first held-out examples by greedy decoding.

        Returns:
          One object per example and view: id, view, and `text_match.compare`'s.
        """
        data = self._data
        prompts = prompts_lib.held_out_prompts(self._config, data)
        if not prompts:
            return []
        texts = self._continue(params, [prompt.ids for prompt in prompts])
        rows = []
        for prompt, generated in zip(prompts, texts, strict=True):
            example, view = prompt.example, prompt.view
            row = {"id": example.id, "view": view}
            if view == "chat":
                row["prompt"] = data.tokenizer.decode(prompt.ids)
                row["target"] = prompts_lib.last_turn_text(example, self._config.data)
                row["generated"] = generated.strip()
            else:
                row |= text_match.compare(generated, example, view, prompt.text)
            rows.append(row)
        return rows

    def generate(self, params: Any, prompts: Sequence[str]) -> list[str]:
        """Continue each prompt by greedy decoding.

        Prompts are a user's messages where the run has chats. Special tokens in them
        are text, unless `data.parse_special`.
        """
        data = self._config.data
        encoder = tokenizers.TextEncoder(
            self._data.tokenizer, parse_special=data.parse_special
        )
        return self._generate(params, [encoder.escape(prompt) for prompt in prompts])

    def _generate(self, params: Any, prompts: Sequence[str]) -> list[str]:
        """Continue prompts, whose special tokens are tokens but for marked ones."""
        prompt_ids = prompts_lib.encode_prompts(self._config, self._data, prompts)
        return self._continue(params, prompt_ids)

    def _continue(self, params: Any, prompt_ids: Sequence[Sequence[int]]) -> list[str]:
        """Continue prompts of ids, whose beginnings are cut to `data.max_prompt`."""
        limit = prompts_lib.max_prompt_length(self._config, self._data)
        cut = [list(ids[-limit:]) for ids in prompt_ids]
        tokens = self._generator(params, self._with_end(cut))
        return self._data.tokenizer.batch_decode(tokens, skip_special_tokens=True)

    def complete(self, params: Any, segments: Sequence[views.Segment]) -> list[str]:
        """Continue the prompt and prefix of each segment by greedy decoding."""
        longest = max((len(segment.prefix_ids) for segment in segments), default=0)
        decoding = dataclasses.replace(
            self._decoding, max_new_tokens=longest + self._decoding.max_new_tokens
        )
        tokens = self._make_generator(decoding)(
            params,
            self._with_end([segment.prompt_ids.tolist() for segment in segments]),
            forced=[segment.prefix_ids.tolist() for segment in segments],
        )
        return self._data.tokenizer.batch_decode(tokens, skip_special_tokens=True)

    def _make_generator(self, decoding: Decoding) -> Generator:
        """Make a generator of the model's texts."""
        model, cache_dtype = self._model, self._config.evaluation.cache_dtype
        if isinstance(model.shape, T5Config):  # a teacher beside a decoder
            cache_dtype = "compute"
        return Generator(
            model.shape,
            model.graphdef,
            decoding,
            batch_size=sharding.divisible_rows(_BATCH_SIZE, self._mesh),
            mesh=self._mesh,
            cache_dtype=cache_dtype,
        )

    def _with_end(self, prompt_ids: Sequence[list[int]]) -> Sequence[list[int]]:
        """End prompts as an encoder reads them."""
        if not isinstance(self._model.shape, T5Config):
            return prompt_ids
        end = self._model.shape.eos_id
        return [loader.with_end(ids, end) for ids in prompt_ids]


def _make_plan(
    config: Config,
    segments: Sequence[views.Segment],
    shapes: tuple[Shape, Shape],
    mesh: Mesh,
) -> loader.BatchPlan:
    """Make the batches of segments that are scored.

    Args:
      config: of the run.
      segments: to score.
      shapes: of the model, and of the run's student.
      mesh: over which rows are divided.
    """
    evaluation, train = config.evaluation, config.train
    shape, student = shapes
    lengths = (
        evaluation.row_length or train.row_length,
        evaluation.encoder_row_length or train.encoder_row_length,
    )
    if isinstance(shape, DecoderConfig):
        lengths = joint_row_length(student, *lengths), 0
    return loader.BatchPlan(
        segments,
        batch_size=sharding.divisible_rows(evaluation.batch_size, mesh),
        shuffle=False,
        **row_kwargs(shape, *lengths),
    )


def _has_choices(data: Data) -> bool:
    """Return True if the choices of held-out examples are scored."""
    return "label" in data.eval_views and any(e.choices for e in data.eval_examples)


def _choice_segments(config: Config, data: Data) -> views.ChoiceSegments:
    """Make the segments of the choices of held-out examples."""
    choices = views.choice_segments(data.eval_examples, data.tokenizer, config.data)
    if not choices.segments:
        raise ValueError(
            f"data.on_long={config.data.on_long!r} leaves no held-out example with all "
            f"its choices within data.max_target={config.data.max_target}: raise it"
        )
    return choices


def _parts(run: Run) -> list[tuple[Config, Data]]:
    """Return config and data of each source of a run."""
    return [
        (source.config, data)
        for source, (_, data) in zip(
            mixture.sources(run.config), run.data.parts, strict=True
        )
    ] or [(run.config, run.data)]


def check_scores(run: Run, shape: Shape) -> None:
    """Check that held-out examples, and all their choices, fit into rows.

    Args:
      run: evaluation settings, held-out examples and segments, devices.
      shape: of the model that scores them.

    Raises:
      ValueError: they do not.
    """
    shapes = shape, run.student.shape
    for config, data in _parts(run):
        if data.evaluation:
            _make_plan(config, data.evaluation, shapes, run.mesh)
        if _has_choices(data):
            choices = _choice_segments(config, data).segments
            _make_plan(config, choices, shapes, run.mesh)


def check_teacher_scores(run: Run, shape: Shape) -> None:
    """Check that a run's teacher can be scored when the student is trained.

    Args:
      run: as in `check_scores`.
      shape: of the teacher.

    Raises:
      ValueError: its parameters do not divide over the mesh, or examples do not fit.
    """
    try:
        make_model(shape, run.mesh, dtype=run.config.train.dtype)
        if isinstance(shape, T5Config) != isinstance(run.student.shape, T5Config):
            check_scores(run, shape)  # in rows of another kind
    except ValueError as error:
        raise ValueError(f"the teacher, which is evaluated too: {error}") from None


def check_evaluation(run: Run, shape: Shape) -> None:
    """Check that held-out examples fit, and that their prompts leave room for answers.

    Args:
      run: as in `check_scores`.
      shape: of the model that answers.

    Raises:
      ValueError: they do not.
    """
    cache_dtype = run.config.evaluation.cache_dtype
    if cache_dtype != "compute" and isinstance(run.student.shape, T5Config):
        raise ValueError(
            f"evaluation.cache_dtype={cache_dtype!r}: the student is an "
            "encoder-decoder model, which has a cache of the compute dtype: use "
            "evaluation.cache_dtype='compute'"
        )
    check_scores(run, shape)
    for config, data in _parts(run):
        num_new = config.evaluation.max_new_tokens
        limit = max_prompt_length(shape, num_new)
        most = prompts_lib.max_prompt_length(config, data)
        lengths = [
            min(len(p.ids), most) for p in prompts_lib.held_out_prompts(config, data)
        ]
        if lengths and max(lengths) > limit:
            raise ValueError(
                f"evaluation.max_new_tokens={num_new}: a held-out prompt of "
                f"{max(lengths)} tokens leaves room for "
                f"{max(0, limit + num_new - max(lengths))} in the model's "
                f"{limit + num_new}: use fewer, a smaller data.max_prompt, or "
                "evaluation.num_generations=0"
            )


class MixtureScorer:
    """Scorer of the parameters of one model on each source of a mixture.

    Args:
      run: of a mixture.
      model: as in `Scorer`.
      cache: the teacher's records of the held-out segments of all sources.
    """

    def __init__(
        self, run: Run, model: Model | None = None, *, cache: Any = None
    ) -> None:
        self._scorers: dict[str, Scorer] = {}
        self._shares: dict[str, float] = {}
        for source, (name, data) in zip(
            mixture.sources(run.config), run.data.parts, strict=True
        ):
            part = dataclasses.replace(run, config=source.config, data=data)
            self._scorers[name] = Scorer(part, model, cache=cache)
            self._shares[name] = source.share
        self.bins: calibration.Bins | None = None  # a source's own are its ece

    def __call__(self, params: Any) -> dict[str, float]:
        """Compute the metrics of the model with these parameters.

        Returns:
          <metric>/<source> for each source, see `Scorer`; and those that all sources
          have, but for ece, as means weighted by the sources' shares.
        """
        by_source = {name: scorer(params) for name, scorer in self._scorers.items()}
        means = {
            metric: sum(
                share * by_source[name][metric] for name, share in self._shares.items()
            )
            for metric in next(iter(by_source.values()))
            if metric not in ("ece", "perplexity")
            and all(metric in metrics for metrics in by_source.values())
        }
        means["perplexity"] = math.exp(min(means["nll"], 700.0))
        return means | {
            f"{metric}/{name}": value
            for name, metrics in by_source.items()
            for metric, value in metrics.items()
        }

    def digest(self) -> str:
        """Return a hash of all that determines the metrics, but for the model."""
        digests = [
            (name, self._shares[name], scorer.digest())
            for name, scorer in self._scorers.items()
        ]
        return hashlib.blake2b(repr(digests).encode(), digest_size=16).hexdigest()

    def choice_rows(self) -> list[dict[str, Any]]:
        """Return the scores of all choices, of the last call."""
        return [
            {"source": name} | row
            for name, scorer in self._scorers.items()
            for row in scorer.choice_rows()
        ]

    def generations(self, params: Any) -> list[dict[str, Any]]:
        """Answer the first held-out examples of each source by greedy decoding."""
        return [
            {"source": name} | row
            for name, scorer in self._scorers.items()
            for row in scorer.generations(params)
        ]


def make_scorer(
    run: Run, model: Model | None = None, *, cache: Any = None
) -> Scorer | MixtureScorer:
    """Make the scorer of a run, see `Scorer`."""
    if run.data.parts:
        return MixtureScorer(run, model, cache=cache)
    return Scorer(run, model, cache=cache)


def score_teacher(
    run: Run,
    folder: pathlib.Path,
    *,
    cache: Any = None,
    teacher: tuple[Model, Any] | None = None,
) -> tuple[dict[str, float], Shape]:
    """Compute the held-out metrics of a run's teacher, once for all runs.

    Args:
      run: held-out examples and segments, devices.
      folder: keeps the metrics, in a file named by a hash of what decides them.
      cache: the teacher's own records of the held-out segments.
      teacher: model and parameters, where they are loaded already.

    Returns:
      The metrics, and the teacher's shape.
    """
    path = teacher_folder(run.config, run.workdir)
    shape = hf.read_config(path)
    dtype = run.config.train.dtype
    model = teacher[0] if teacher else make_model(shape, run.mesh, dtype=dtype)
    scorer = make_scorer(run, model, cache=cache)
    file = folder / f"{hf.fingerprint(path)}-{scorer.digest()}.json"
    metrics = _read_metrics(file) if file.is_file() else None
    # Every process looks before one of them writes.
    distributed.barrier("look at the teacher's scores")
    if metrics is None:
        params = teacher[1] if teacher else load_model(path, run.mesh, dtype=dtype)[1]
        metrics = scorer(params)
        if distributed.is_main():
            files.write_json(file, metrics)
    return metrics, shape


def score_records(cache: Any, data: Data) -> dict[str, float]:
    """Compute what a cache's records say about the teacher itself.

    Args:
      cache: the teacher's records of the held-out segments; None = there are none.
      data: of the run, with the held-out segments.

    Returns:
      nll, perplexity and nll/<view>, as `Scorer` has them; {} where the records have
      no log-probabilities of the tokens that came.
    """
    if cache is None or "target_log_probs" in cache.manifest.missing:
        return {}
    sums, counts = np.zeros((2, len(data.eval_views)))
    for segment in data.evaluation:
        record = cache.read(segment.key)
        sums[segment.view] -= record.target_log_probs.sum(dtype=np.float64)
        counts[segment.view] += record.num_tokens
    nll = float(sums.sum() / counts.sum())
    metrics = {"nll": nll, "perplexity": math.exp(min(nll, 700.0))}
    for name, total, count in zip(data.eval_views, sums, counts, strict=True):
        metrics[f"nll/{name}"] = float(total / max(1, count))
    return metrics


def not_measured(
    config: Config, cache: Any, student: Mapping[str, float]
) -> dict[str, str]:
    """Return the held-out metrics that a teacher without weights leaves out, and why.

    Args:
      config: of a run whose teacher runs elsewhere.
      cache: the teacher's records of the held-out segments; None = there are none.
      student: metrics of the student, by name.
    """
    reasons: dict[str, str] = {}
    if cache is None:
        absent = "no records of the held-out examples: import them, --split=eval"
        reasons |= dict.fromkeys(("student/kl", "student/agreement"), absent)
        reasons["teacher/nll"] = absent
    elif "target_log_probs" in cache.manifest.missing:
        reasons["teacher/nll"] = (
            f"its records ({cache.manifest.teacher_fingerprint}) have no "
            "log-probabilities of the tokens that came"
        )
    absent = f"teacher.path={config.teacher.path!r} has no weights"
    return reasons | {
        f"teacher/{name}": absent for name in ("accuracy", "ece") if name in student
    }


def _read_metrics(file: pathlib.Path) -> dict[str, float]:
    """Read metrics; null stands for what is not finite."""
    values = files.read_json(file, remedy="remove it; it is computed anew")
    return {name: math.nan if x is None else x for name, x in values.items()}

"""Faithfulness of a finished run's rationales to its answers: docs/faithfulness.md."""

import dataclasses
import hashlib
import pathlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Int32

from kdjax.data import templates, views
from kdjax.data.example import Example, wrong_choices
from kdjax.data.templates import Text
from kdjax.data.views import Segment
from kdjax.evaluation import choices, rationale_metrics
from kdjax.evaluation import simulator as simulators
from kdjax.evaluation.choices import Chooser
from kdjax.evaluation.rationale_metrics import Record, answers_match
from kdjax.experiment import methods
from kdjax.experiment.run import Run
from kdjax.runtime import files

Row = Mapping[str, Any]


def measure(run: Run, *, simulator: pathlib.Path | None = None) -> dict[str, float]:
    """Measure how a student's rationales and answers depend on each other.

    A pure function of the run's files; a measure that the method, the data or the lack
    of a simulator rules out has no key. The examples are those that the run has
    generated for (`evaluation.num_generations`).

    Args:
      run: a finished one, with its held-out split.
      simulator: folder of `simulator.train_simulator`; None leaves out LAS.

    Returns:
      "faithfulness/<name>" for the names of `rationale_metrics.describe_rationales`,
      `accuracy_after_rationale`, `prefix_swap` and `simulator.las`.

    Raises:
      ValueError: a run that is not finished, or generations of other examples.
    """
    config, data = run.config, run.data
    rows = read_generations(run.workdir)
    records = make_records(rows, data.eval_examples)
    measures = rationale_metrics.describe_rationales(records)
    explained = [row for row in rows if row["view"] in templates.EXPLAINED]
    one_text = [r for r in make_records(explained, data.eval_examples) if r.choices]
    if one_text:
        student = choices.load_chooser(run)
        by_id = {example.id: example for example in data.eval_examples}
        examples = [by_id[record.id] for record in one_text]
        view = explained[0]["view"]
        measures |= accuracy_after_rationale(
            student, one_text, examples, view, seed=config.seed
        )
        if "counterfactual" in methods.views(config.method):
            measures |= prefix_swap(student, one_text, examples)
    if simulator is not None:
        measures |= simulators.las(records, simulator)
    return {f"faithfulness/{name}": value for name, value in measures.items()}


def read_generations(workdir: pathlib.Path) -> list[dict[str, Any]]:
    """Read the generations of a finished run.

    Raises:
      ValueError: the run is not finished.
    """
    file = workdir / "generations.jsonl"
    if not file.is_file():
        raise ValueError(
            f"workdir={str(workdir)!r} has no generations.jsonl: let the run finish"
        )
    remedy = "start the run's command again, which writes it anew"
    return files.read_jsonl(file, remedy=remedy)


def make_records(rows: Iterable[Row], examples: Sequence[Example]) -> list[Record]:
    """Make one record of the generations of each example, in the order of the rows.

    With views label and rationale, answer and rationale come from these, and `stated`
    is the answer of a view that explains, then answers, or else the choice that the
    rationale names last. Without a label view, both come from the text of the view that
    explains, then answers: the rationale stands before the last "Answer:" (without one
    it is all of the text). Without a rationale there is no record.

    Args:
      rows: of generations.jsonl.
      examples: the held-out ones, those of the rows among them.

    Raises:
      ValueError: a row of no example.
    """
    by_id = {example.id: example for example in examples}
    texts_by_id: dict[str, dict[str, str]] = {}
    for row in rows:
        texts_by_id.setdefault(row["id"], {})[row["view"]] = row["generated"]
    if unknown := [key for key in texts_by_id if key not in by_id]:
        raise ValueError(
            f"generations of {unknown[:3]}, which are no held-out examples of this "
            "config: use the run's own config.json and data"
        )
    records = []
    for key, texts in texts_by_id.items():
        example = by_id[key]
        explained = next((texts[v] for v in templates.EXPLAINED if v in texts), None)
        if "label" in texts and "rationale" in texts:
            rationale, answer = texts["rationale"], texts["label"]
            stated = (
                rationale_metrics.last_mention(rationale, example.choices)
                if explained is None
                else templates.final_answer(explained)
            )
        elif explained is not None:
            before, cue, _ = explained.rpartition(templates.ANSWER)
            rationale, stated = before if cue else explained, None
            answer = templates.final_answer(explained)
        else:
            continue
        records.append(
            Record(
                id=key,
                question=example.question,
                choices=example.choices,
                gold=example.answer,
                rationale=rationale.strip(),
                answer=answer.strip(),
                stated=stated,
            )
        )
    return records


def accuracy_after_rationale(
    student: Chooser,
    records: Sequence[Record],
    examples: Sequence[Example],
    view: str,
    *,
    seed: int,
) -> dict[str, float]:
    """Compute the accuracy of a student after a prefilled rationale.

    The rationale and "Answer:" stand where the student would have written them. Then
    the choices are ranked by their likelihood, or, in perturbed_accuracy, the student
    writes the answer.

    Args:
      student: whose `view` explains, then answers.
      records: its rationales and answers to the examples.
      examples: with choices and rationales.
      view: one of `templates.EXPLAINED`.
      seed: of the token replacements.

    Returns:
      Ranked: plain_accuracy, after its own rationale; oracle_accuracy, after the
      data's; perturbed_oracle_accuracy, after the data's with half of its tokens
      (rounded up) replaced. Written: generated_accuracy, of the records' own answers;
      perturbed_accuracy, after its own rationale with half of its tokens (rounded down)
      replaced.

    Source: Wang et al., 2023, SCOTT, arXiv 2305.01879, section 4 (perturbed_accuracy).
    """
    num_cue_tokens = _num_cue_tokens(student)

    def perturb(segment: Segment, *, round_up: bool = True) -> Segment:
        rationale_ids, cue_ids = np.split(
            segment.prefix_ids, [max(0, len(segment.prefix_ids) - num_cue_tokens)]
        )
        replaced = replace_half(
            rationale_ids,
            student.tokenizer,
            seed=seed,
            key=segment.example_id,
            round_up=round_up,
        )
        return dataclasses.replace(
            segment, prefix_ids=np.concatenate([replaced, cue_ids])
        )

    own = [
        _prefill(student, example, view, record.rationale)
        for example, record in zip(examples, records, strict=True)
    ]
    gold = [_prefill(student, e, view, e.rationale) for e in examples]
    answers = [example.answer for example in examples]
    predictions = {
        "plain_accuracy": choices.choose(student, examples, own),
        "oracle_accuracy": choices.choose(student, examples, gold),
        "perturbed_oracle_accuracy": choices.choose(
            student, examples, gold, transform=perturb
        ),
        "generated_accuracy": [record.answer for record in records],
        "perturbed_accuracy": [
            templates.final_answer(text)
            for text in student.complete(
                [
                    perturb(segment, round_up=False)
                    for segment in _first_segments(student, examples, own)
                ]
            )
        ],
    }
    return {name: _match_rate(p, answers) for name, p in predictions.items()}


def _first_segments(
    student: Chooser, examples: Sequence[Example], texts: Sequence[Text]
) -> list[Segment]:
    """Return a segment of each example: its prompt, prefix and first choice."""
    segments = views.choice_segments(
        examples, student.tokenizer, student.data, texts=texts
    )
    is_first = segments.choice == 0
    return [s for s, first in zip(segments.segments, is_first, strict=True) if first]


def replace_half(
    ids: Int32[np.ndarray, " p"],
    tokenizer: Any,
    *,
    seed: int,
    key: str,
    round_up: bool = True,
) -> Int32[np.ndarray, " p"]:
    """Replace half of the tokens by others.

    Positions and tokens are drawn uniformly, the tokens from the vocabulary without
    special ones and without the replaced token; the draws follow from (seed, key).
    """
    digest = hashlib.blake2b(key.encode(), digest_size=8).digest()
    draws = np.random.default_rng([seed, int.from_bytes(digest, "big")])
    vocab = np.setdiff1d(np.arange(len(tokenizer)), tokenizer.all_special_ids)
    replaced = np.array(ids, np.int32)
    size = (len(ids) + round_up) // 2
    for position in draws.choice(len(ids), size=size, replace=False):
        replaced[position] = draws.choice(vocab[vocab != ids[position]])
    return replaced


def prefix_swap(
    student: Chooser, records: Sequence[Record], examples: Sequence[Example]
) -> dict[str, float]:
    """Compute the effect of swapping factual and counterfactual prefixes alone.

    Prefix and cue of the counterfactual view take the place of the factual view's, and
    vice versa; what follows them stays.

    Args:
      student: with factual and counterfactual views.
      records: its factual view's rationales and answers to the examples.
      examples: with choices.

    Returns:
      Of free generations: prefix_changes_answer, share of examples whose final answer
      differs between the two; factual_prefix_accuracy and
      counterfactual_prefix_accuracy. Of choices after prefilled wrong rationales, where
      the examples have some: prefix_changes_choice, share of (example, wrong rationale)
      whose choice differs; factual_prefix_follows and counterfactual_prefix_follows,
      shares that take the choice that the rationale argues for.
    """
    views = ("factual", "counterfactual")
    prompts = [
        templates.make_prompt(e, "counterfactual", student.data) for e in examples
    ]
    factual = [record.answer for record in records]
    swapped = [templates.final_answer(text) for text in student.generate(prompts)]
    answers = [example.answer for example in examples]
    measures = {
        "prefix_changes_answer": 1 - _match_rate(factual, swapped),
        "factual_prefix_accuracy": _match_rate(factual, answers),
        "counterfactual_prefix_accuracy": _match_rate(swapped, answers),
    }
    wrong = [
        (example, choice, rationale)
        for example in examples
        if example.counterfactuals
        for choice, rationale in zip(
            wrong_choices(example), example.counterfactuals, strict=True
        )
        if rationale and choice != example.answer
    ]
    if not wrong:
        return measures
    predictions = {
        view: choices.choose(
            student,
            [example for example, _, _ in wrong],
            [_prefill_wrong(student, e, view, text) for e, _, text in wrong],
        )
        for view in views
    }
    targets = [choice for _, choice, _ in wrong]
    measures["prefix_changes_choice"] = 1 - _match_rate(*predictions.values())
    for view in views:
        measures[f"{view}_prefix_follows"] = _match_rate(predictions[view], targets)
    return measures


def _prefill(student: Chooser, example: Example, view: str, rationale: str) -> Text:
    """Return a view's prompt with a rationale prefilled, up to the answer."""
    prefix = f"{rationale}\n{templates.ANSWER}".strip()
    return Text(templates.make_prompt(example, view, student.data), "", prefix)


def _prefill_wrong(
    student: Chooser, example: Example, view: str, rationale: str
) -> Text:
    """Return a view's prompt with a wrong rationale as in the counterfactual view."""
    if student.data.counterfactual_place == "prompt":
        return Text(templates.make_prompt(example, view, student.data, rationale), "")
    return _prefill(student, example, view, rationale)


def _num_cue_tokens(student: Chooser) -> int:
    """Return the number of tokens of the cue at the end of a prefilled rationale."""
    lengths = [
        len(student.tokenizer(text, add_special_tokens=False)["input_ids"])
        for text in ("So", f"So\n{templates.ANSWER}")
    ]
    return lengths[1] - lengths[0]


def _match_rate(first: Sequence[str], second: Sequence[str]) -> float:
    pairs = zip(first, second, strict=True)
    return float(np.mean([answers_match(*pair) for pair in pairs]))

"""Whether a finished run's student explains its answers: docs/faithfulness.md."""

import dataclasses
import hashlib
import json
import pathlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Int32

from kdjax.data import templates
from kdjax.data.example import Example, wrong_choices
from kdjax.data.templates import Text
from kdjax.data.views import Segment
from kdjax.evaluation import choices, rationale_metrics
from kdjax.evaluation import simulator as simulators
from kdjax.evaluation.choices import Chooser
from kdjax.evaluation.rationale_metrics import Record, same
from kdjax.experiment import methods
from kdjax.experiment.run import Run

Row = Mapping[str, Any]


def measure(run: Run, *, simulator: pathlib.Path | None = None) -> dict[str, float]:
    """Measure how a student's rationales and answers depend on each other.

    A pure function of what the run has left; a measure that the method, the data or the
    lack of a simulator rules out has no key. The examples are those that the run has
    generated for (`evaluation.num_generations`).

    Args:
      run: a finished one, with its held-out split.
      simulator: folder of `simulator.train_simulator`; None leaves out LAS.

    Returns:
      "faithfulness/<name>": what `rationale_metrics.describe`, `forced`, `swapped` and
      `simulator.las` return.

    Raises:
      ValueError: a run that is not finished, or generations of other examples.
    """
    config, data = run.config, run.data
    rows = read_rows(run.workdir)
    found = records(rows, data.eval_examples)
    measures = rationale_metrics.describe(found)
    explained = [row for row in rows if row["view"] in templates.EXPLAINED]
    one_text = [r for r in records(explained, data.eval_examples) if r.choices]
    if one_text:
        student = choices.load(run)
        examples = _examples(one_text, data.eval_examples)
        view = explained[0]["view"]
        measures |= forced(student, one_text, examples, view, seed=config.seed)
        if "counterfactual" in methods.views(config.method):
            measures |= swapped(student, one_text, examples)
    if simulator is not None:
        measures |= simulators.las(found, simulator)
    return {f"faithfulness/{name}": value for name, value in measures.items()}


def read_rows(workdir: pathlib.Path) -> list[dict[str, Any]]:
    """The generations of a finished run.

    Raises:
      ValueError: there are none yet.
    """
    file = workdir / "generations.jsonl"
    if not file.is_file():
        raise ValueError(
            f"workdir={str(workdir)!r} has no generations.jsonl: let the run finish"
        )
    return [json.loads(line) for line in file.read_text().splitlines()]


def records(rows: Iterable[Row], examples: Sequence[Example]) -> list[Record]:
    """What a student said of each example, in the order of the rows.

    With views label and rationale, answer and rationale come from these, and `stated`
    is the answer of a view that explains, then answers, or else the choice that the
    rationale names last. Without a label view, both come from the text of the view that
    explains, then answers: the rationale stands before the last "Answer:" (without one
    it is the whole text). Without a rationale there is no record.

    Args:
      rows: of generations.jsonl.
      examples: the held-out ones, among them all that the rows are of.

    Raises:
      ValueError: a row of no example.
    """
    known = {example.id: example for example in examples}
    said: dict[str, dict[str, str]] = {}
    for row in rows:
        said.setdefault(row["id"], {})[row["view"]] = row["generated"]
    if unknown := [key for key in said if key not in known]:
        raise ValueError(
            f"generations of {unknown[:3]}, which are no held-out examples of this "
            "config: use the run's own config.json and data"
        )
    found = []
    for key, texts in said.items():
        example = known[key]
        whole = next((texts[v] for v in templates.EXPLAINED if v in texts), None)
        if "label" in texts and "rationale" in texts:
            rationale, answer = texts["rationale"], texts["label"]
            stated = (
                rationale_metrics.last_named(rationale, example.choices)
                if whole is None
                else templates.final_answer(whole)
            )
        elif whole is not None:
            before, cue, _ = whole.rpartition(templates.ANSWER)
            rationale, stated = before if cue else whole, None
            answer = templates.final_answer(whole)
        else:
            continue
        found.append(
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
    return found


def forced(
    student: Chooser,
    found: Sequence[Record],
    examples: Sequence[Example],
    view: str,
    *,
    seed: int,
) -> dict[str, float]:
    """Accuracy of the choice that a student takes after a rationale it has to read.

    The rationale and "Answer:" stand where the student would have written them; the
    choices are ranked by their likelihood after that.

    Args:
      student: whose `view` explains, then answers.
      found: what it has said of the examples.
      examples: with choices and rationales.
      view: one of `templates.EXPLAINED`.
      seed: of the replaced tokens.

    Returns:
      plain_accuracy, after its own rationale; oracle_accuracy, after the data's;
      perturbed_accuracy, after the data's with half of its tokens replaced.
    """
    num_cue = _num_cue(student)

    def change(segment: Segment) -> Segment:
        stop = max(0, len(segment.prefix_ids) - num_cue)
        changed = np.concatenate(
            [
                perturbed(
                    segment.prefix_ids[:stop],
                    student.tokenizer,
                    seed=seed,
                    key=segment.example_id,
                ),
                segment.prefix_ids[stop:],
            ]
        )
        return dataclasses.replace(segment, prefix_ids=changed)

    own = [_after(student, e, view, r.rationale) for e, r in _pairs(examples, found)]
    gold = [_after(student, e, view, e.rationale) for e in examples]
    chosen = {
        "plain_accuracy": choices.choose(student, examples, own),
        "oracle_accuracy": choices.choose(student, examples, gold),
        "perturbed_accuracy": choices.choose(student, examples, gold, change=change),
    }
    answers = [example.answer for example in examples]
    return {name: _share(found, answers) for name, found in chosen.items()}


def perturbed(
    ids: Int32[np.ndarray, " p"], tokenizer: Any, *, seed: int, key: str
) -> Int32[np.ndarray, " p"]:
    """The tokens with half of them (rounded up) replaced by others.

    Places and tokens are drawn evenly, the tokens from the vocabulary without special
    ones and without the token itself; the draws follow from (seed, key).
    """
    digest = hashlib.blake2b(key.encode(), digest_size=8).digest()
    draws = np.random.default_rng([seed, int.from_bytes(digest, "big")])
    usable = np.setdiff1d(np.arange(len(tokenizer)), tokenizer.all_special_ids)
    changed = np.array(ids, np.int32)
    for place in draws.choice(len(ids), size=-(-len(ids) // 2), replace=False):
        changed[place] = draws.choice(usable[usable != ids[place]])
    return changed


def swapped(
    student: Chooser, found: Sequence[Record], examples: Sequence[Example]
) -> dict[str, float]:
    """Whether the words that ask for another answer change it by themselves.

    Prefix and cue of the counterfactual view take the place of the factual view's, and
    the other way round; what follows them stays.

    Args:
      student: with factual and counterfactual views.
      found: what its factual view has said of the examples.
      examples: with choices.

    Returns:
      Of what it writes by itself: prefix_changes_answer, share of examples whose final
      answer differs between the two; factual_prefix_accuracy and
      counterfactual_prefix_accuracy. Of the choices it takes after wrong rationales,
      where the examples have some: prefix_changes_choice, share of (example, wrong
      rationale) whose choice differs; factual_prefix_follows and
      counterfactual_prefix_follows, shares that take the choice it argues for.
    """
    views = ("factual", "counterfactual")
    asked = [templates.make_prompt(e, "counterfactual", student.data) for e in examples]
    otherwise = [templates.final_answer(text) for text in student.texts(asked)]
    own, answers = [r.answer for r in found], [e.answer for e in examples]
    measures = {
        "prefix_changes_answer": 1 - _share(own, otherwise),
        "factual_prefix_accuracy": _share(own, answers),
        "counterfactual_prefix_accuracy": _share(otherwise, answers),
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
    several = [example for example, _, _ in wrong]
    chosen = {
        view: choices.choose(
            student, several, [_given(student, e, view, text) for e, _, text in wrong]
        )
        for view in views
    }
    argued = [choice for _, choice, _ in wrong]
    measures["prefix_changes_choice"] = 1 - _share(*chosen.values())
    for view in views:
        measures[f"{view}_prefix_follows"] = _share(chosen[view], argued)
    return measures


def _after(student: Chooser, example: Example, view: str, rationale: str) -> Text:
    """A view's prompt, and a rationale that the answer follows."""
    prefix = f"{rationale}\n{templates.ANSWER}".strip()
    return Text(templates.make_prompt(example, view, student.data), "", prefix)


def _given(student: Chooser, example: Example, view: str, rationale: str) -> Text:
    """A wrong rationale where the counterfactual view has it, asked by another view."""
    if student.data.counterfactual_place == "prompt":
        return Text(templates.make_prompt(example, view, student.data, rationale), "")
    return _after(student, example, view, rationale)


def _num_cue(student: Chooser) -> int:
    """Tokens of a prefix that are not its rationale's, at its end."""
    lengths = [
        len(student.tokenizer(text, add_special_tokens=False)["input_ids"])
        for text in ("So", f"So\n{templates.ANSWER}")
    ]
    return lengths[1] - lengths[0]


def _examples(found: Iterable[Record], examples: Iterable[Example]) -> list[Example]:
    known = {example.id: example for example in examples}
    return [known[record.id] for record in found]


def _pairs(
    examples: Sequence[Example], found: Sequence[Record]
) -> list[tuple[Example, Record]]:
    return list(zip(examples, found, strict=True))


def _share(first: Sequence[str], second: Sequence[str]) -> float:
    pairs = zip(first, second, strict=True)
    return float(np.mean([same(one, other) for one, other in pairs]))

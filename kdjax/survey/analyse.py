"""Statistics of a study's ratings: statistics.csv and one page, report.html."""

import csv
import io
import json
import math
import pathlib
from collections.abc import Sequence
from typing import Any

import jinja2
import numpy as np

from kdjax.analysis import report
from kdjax.analysis.study_means import QUALITY, REPORT, STATISTICS
from kdjax.runtime import files
from kdjax.runtime.console import progress
from kdjax.survey import answer_tables, independent_tables, model_tables
from kdjax.survey import ratings as ratings_lib
from kdjax.survey import tables as tables_lib
from kdjax.survey.answer_tables import PREFERENCES, Preference
from kdjax.survey.ratings import Ratings
from kdjax.survey.tables import ALPHA, Options, Table

RATINGS = "ratings.csv"
_TEMPLATE = "report.html.jinja"
_DESIGN = "design.json"


def run(
    workdir: pathlib.Path,
    *,
    ratings: pathlib.Path | None = None,
    columns: str = "",
    reference: str = "",
) -> None:
    """Analyse the ratings of a study.

    Args:
      workdir: of the study; results are written there.
      ratings: a csv of ratings; None is that of the study.
      columns: its columns under kdjax's names: "participant=rater,item=id".
      reference: condition that others are compared with; "" is the first.
    """
    file = ratings or workdir / RATINGS
    if ratings is None and not file.is_file():
        raise ValueError(
            f"{file} is not there: write it by kdjax.study export, or name a table, "
            "--ratings=FILE"
        )
    table = ratings_lib.read(file, ratings_lib.parse_columns(columns))
    design = _read_design(workdir) if ratings is None else {}
    seconds = float(design.get("exclude_seconds", 0.0))
    compared = workdir / PREFERENCES
    preferences = (
        answer_tables.read_preferences(compared)
        if ratings is None and compared.is_file()
        else []
    )
    results = analyse(
        table,
        reference=reference,
        points=int(design.get("points", 0)),
        min_seconds=seconds,
        preferences=preferences,
    )
    workdir.mkdir(parents=True, exist_ok=True)
    files.write_atomically(workdir / STATISTICS, as_csv(results))
    title = str(design.get("name", f"Ratings of {file.stem}"))
    files.write_atomically(workdir / REPORT, render(results, title=title))
    for line in conclude(results):
        print(line)
    print(workdir / REPORT)


def analyse(
    table: Ratings,
    *,
    reference: str = "",
    points: int = 0,
    min_seconds: float = 0.0,
    preferences: Sequence[Preference] = (),
    **settings: Any,
) -> list[Table]:
    """Compute all tables of an analysis.

    Args:
      table: ratings, those to be excluded among them.
      reference: condition that others are compared with; "" is the first.
      points: of the scale; 0 is the highest rating, at least 5.
      min_seconds: median seconds per rating below which a person is excluded.
      preferences: pairs of explanations that the participants compared.
      **settings: of `tables.Options`.

    Raises:
      ValueError: nothing is left, or the reference is no condition.
    """
    reasons = ratings_lib.exclusions(table, min_seconds=min_seconds)
    remaining = table
    if reasons:
        remaining = table.select(~np.any(list(reasons.values()), axis=0))
    if not len(remaining):
        counts = ", ".join(f"{mask.sum()} {name}" for name, mask in reasons.items())
        raise ValueError(
            f"all {len(table)} ratings are excluded ({counts}): nothing is left to "
            "analyse; the limits are the design's (exclude_failed, exclude_seconds)"
        )
    levels = remaining.levels
    if reference and reference not in levels:
        raise ValueError(
            f"reference={reference!r} is no condition: use one of {levels}"
        )
    highest = int(np.nanmax(remaining.values_NC, initial=1))
    options = Options(
        reference=reference or levels[0], points=points or max(highest, 5), **settings
    )
    models = 3 + model_tables.repeats_conditions(remaining)
    num = models * len(remaining.outcomes) + 3
    with progress(num, "analyse") as advance:
        results = [
            tables_lib.overview(remaining),
            tables_lib.excluded(table, reasons),
            tables_lib.descriptives(remaining, options),
            tables_lib.reliability(remaining, options),
        ]
        advance(1, "permutation tests")
        results += tables_lib.within_participants(remaining, options)
        results += answer_tables.by_answer(remaining, options)
        results += answer_tables.predictions(remaining, options)
        gone = set(table.participants) - set(remaining.participants)
        compared = answer_tables.preferences(preferences, gone, options)
        results += [compared] if compared else []
        step = lambda: advance(1, "mixed models")  # noqa: E731
        results += model_tables.linear_models(remaining, options, step)
        results += model_tables.cumulative_models(remaining, options, step)
        advance(1, "tests of independent ratings")
        results += independent_tables.independent_tests(remaining, options)
        results.append(independent_tables.regressions(remaining, options))
    measures = independent_tables.measures(remaining, options)
    return results if measures is None else [*results, measures]


def conclude(results: Sequence[Table]) -> list[str]:
    """Return what the tests say, in sentences."""
    named = {table.name: table for table in results}
    lines = []
    rows = {row["outcome"]: row for row in named["permutation"].rows}
    for outcome in ("all constructs together", QUALITY):
        row = rows.get(outcome)
        if row is not None:
            verdict = _verdict(row["p"], row.get("remark", ""))
            lines.append(f"{outcome}: {verdict} (within participants, by permutation).")
    for row in named["linear_mixed"].rows:
        key = (row["outcome"], row["model"], row.get("effect"))
        if key == (QUALITY, "condition", "condition"):
            verdict = _verdict(row["p"], "")
            lines.append(f"{QUALITY}: {verdict} (mixed model: for further items too).")
    differing = [
        row["outcome"]
        for row in named["permutation"].rows
        if row.get("p, Holm") is not None and row["p, Holm"] < ALPHA
    ]
    if differing:
        lines.append(f"By construct, after Holm's correction: {', '.join(differing)}.")
    pairs = [
        f"{row['pair']} {report.number(row['difference'], 2)}"
        for row in named["permutation_pairs"].rows
        if row["outcome"] == QUALITY
        and row["p, Holm"] is not None
        and row["p, Holm"] < ALPHA
    ]
    if pairs:
        lines.append(f"Pairs that differ in {QUALITY}, in points: {'; '.join(pairs)}.")
    lines += _of_choices(named)
    lines += _differences(named)
    failed = [
        f"{row['outcome']} ({row.get('model', '')})"
        for name in ("variances", "ordinal_mixed")
        for row in named[name].rows
        if row.get("converged") == "NO"
    ]
    if failed:
        lines.append(f"Mixed models that did not converge: {', '.join(failed)}.")
    if all(row["value"] is None for row in named["agreement"].rows):
        lines.append(f"Agreement: {named['agreement'].rows[0]['remark']}.")
    return lines


def _of_choices(named: dict[str, Table]) -> list[str]:
    """Return what answers apart, predictions and preferences say."""
    lines = []
    for row in named["by_answer_tests"].rows if "by_answer_tests" in named else ():
        if row["comparison"] != "right - wrong":
            verdict = _verdict(row["p"], row["remark"])
            lines.append(f"{row['comparison']}: {verdict}.")
    if "predictions_pairs" in named:
        row = named["predictions_pairs"].rows[0]
        verdict = _verdict(row["p"], row["remark"])
        lines.append(f"predictions of the student's answer: {verdict}.")
    rows = named["preferences"].rows if "preferences" in named else ()
    preferred = "; ".join(
        f"{row['pair']} {report.number(row['share of first'], 2)}"
        for row in rows
        if row["p, Holm"] < ALPHA
    )
    if preferred:
        lines.append(f"Preferences that differ, share of the first: {preferred}.")
    return lines


def _verdict(p: float | None, remark: str) -> str:
    if p is None:
        return remark
    equals = "" if p < 0.0001 else "= "
    verdict = "conditions differ" if p < ALPHA else "no difference is seen"
    return f"{verdict}, p {equals}{report.p_value(p)}"


def _differences(named: dict[str, Table]) -> list[str]:
    """Return on which constructs sound and simple tests disagree."""
    simple = {row["outcome"]: row["p"] for row in named["kruskal_wallis"].rows}
    lines = []
    for row in named["permutation"].rows:
        other = simple.get(row["outcome"])
        if row["p"] is None or other is None or (row["p"] < ALPHA) == (other < ALPHA):
            continue
        lines.append(
            f"{row['outcome']}: within participants p = {report.p_value(row['p'])}, "
            f"by Kruskal-Wallis, which ignores them, p = {report.p_value(other)}."
        )
    return lines


def as_csv(results: Sequence[Table]) -> str:
    """Return all rows of all tables, a number-set per line."""
    rows = [{"table": table.name, **row} for table in results for row in table.rows]
    first = ("table", "outcome", "condition", "pair", "model", "data", "effect", "term")
    keys = dict.fromkeys(key for row in rows for key in row)
    columns = [*(key for key in first if key in keys), *(keys.keys() - set(first))]
    columns.sort(key=lambda key: (key not in first, list(keys).index(key)))
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, restval="", lineterminator="\n")
    writer.writeheader()
    writer.writerows({k: "" if v is None else v for k, v in r.items()} for r in rows)
    return text.getvalue()


def render(results: Sequence[Table], *, title: str) -> str:
    """Return the page, complete in itself."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(pathlib.Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"cell": cell}
    return environment.get_template(_TEMPLATE).render(
        title=title,
        tables=results,
        conclusions=conclude(results),
        alpha=ALPHA,
        significant=lambda key, value: (
            key.startswith("p") and isinstance(value, float) and value < ALPHA
        ),
    )


def cell(value: Any, key: str = "") -> str:
    """Format a value of a table."""
    if isinstance(value, str):
        return value
    if value is None or math.isnan(value):
        return report.number(None)
    if key == "p" or key.startswith("p,"):
        return report.p_value(value)
    if math.isinf(value):
        return "∞"
    if isinstance(value, int) or (key.endswith("df") and value > 1000):
        return report.number(value, 0)
    if key in ("df", "residual df"):
        return report.number(value, 0 if value == round(value) else 1)
    return report.number(value, 3)


def _read_design(workdir: pathlib.Path) -> dict[str, Any]:
    """Return the fields of a study's design that its analysis follows."""
    file = workdir / _DESIGN
    if not file.is_file():
        return {}
    design = json.loads(file.read_text())
    return {**design, **design.get("config", {})}

"""One page about a comparison: report.html, complete in itself.

No script, nothing fetched, every number with a link to the runs behind it. Whatever
comes from data is escaped by the template engine, figures by the XML writer.
"""

import math
import os
import pathlib
import urllib.parse
from collections.abc import Mapping, Sequence
from typing import Any

import jinja2

from kdjax.analysis import factor_effects, group_tests, plots, runs, study_means
from kdjax.runtime import files

_TEMPLATE = "report.html.jinja"
_NONE = "\N{EN DASH}"
_DIGITS = 4  # of the largest number of a column
_MEANINGS = {
    "accuracy": "share of questions whose right choice is the most probable one",
    "answer_accuracy": "share of written answers that are the right one",
    "answer_accuracy_lenient": "the same up to case, white space and a full stop",
    "nll": "negative log-likelihood of the held-out targets, nats per token",
    "kl": "divergence of the student from its teacher, nats per token",
    "agreement": "share of tokens whose most probable one is the teacher's too",
    "ece": "expected calibration error: mean distance of confidence from accuracy",
    "retention": "the student's accuracy over its teacher's",
    "perplexity": "exp(nll)",
    "faithfulness": "how explanations and answers depend on each other",
    "latency": "milliseconds per decoded token of a row",
}
Bins = Mapping[str, tuple[Sequence[float], Sequence[float], Sequence[float]]]


def write(
    path: str | os.PathLike,
    table: Sequence[runs.Run],
    design: runs.Design,
    *,
    title: str = "Comparison",
    folder: str = ".",
    reliability: Bins | None = None,
    facts: Mapping[str, str] | None = None,
    study: study_means.Study | None = None,
) -> None:
    """Write the page atomically.

    Args:
      path: of the HTML file.
      table: all runs, failed ones too.
      design: what is compared.
      title: of the page.
      folder: where the runs' directories are, seen from the page.
      reliability: title -> bins, as of `plots.reliability`; None has no diagram.
      facts: what was run, name -> words; None says nothing of it.
      study: ratings by people of the students; None has no table of them.
    """
    text = render(
        table,
        design,
        title=title,
        folder=folder,
        reliability=reliability,
        facts=facts,
        study=study,
    )
    files.write_atomically(path, text)


def render(
    table: Sequence[runs.Run],
    design: runs.Design,
    *,
    title: str = "Comparison",
    folder: str = ".",
    reliability: Bins | None = None,
    facts: Mapping[str, str] | None = None,
    study: study_means.Study | None = None,
) -> str:
    """Return the page as text; `write` has the arguments.

    The same runs give the same text.
    """
    comparisons = [
        group_tests.compare(table, metric, design) for metric in design.metrics
    ]
    points, pareto = _pareto(table, design, comparisons[0])
    references = {m: _references(table, m, design) for m in design.metrics}
    return _template().render(
        title=title,
        design=design,
        runs=table,
        counts=_counts(table),
        failed=[run for run in table if run.status != "done"],
        collapsed=[run for run in table if run.collapsed],
        columns=tuple(dict.fromkeys((*design.factors, design.seed))),
        link=lambda run: _link(run, folder),
        digits={m: _decimals(_values(table, m)) for m in design.numbers},
        alpha=group_tests.ALPHA,
        versions=_versions,
        facts=facts or {},
        study=study,
        meanings={m: _MEANINGS.get(m.partition("/")[0], "") for m in design.metrics},
        references=references,
        conclusions=[
            line
            for comparison in comparisons
            for line in conclude(comparison, design, references[comparison.metric])
        ],
        **_groups_context(comparisons, design, references),
        **_factors_context(table, design),
        sentence=sentence,
        points=points,
        frontier=plots.frontier(points, lowest=_falls(design)),
        pareto=pareto,
        reliability=plots.reliability(reliability or {}, name="reliability"),
    )


def _template() -> jinja2.Template:
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(pathlib.Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"number": number, "p": p_value}
    return environment.get_template(_TEMPLATE)


def _groups_context(
    comparisons: Sequence[group_tests.Comparison],
    design: runs.Design,
    references: Mapping[str, Mapping[str, float]],
) -> dict[str, Any]:
    """Return what the template shows of groups."""
    return {
        "comparisons": comparisons,
        "best": {c.metric: _best(c, design) for c in comparisons},
        "overview": _overview(comparisons),
        "places": {
            (group.level, group.within): place
            for place, group in enumerate(comparisons[0].all_runs.groups, start=1)
        },
        "figures": {
            index: plots.dots(
                comparison.all_runs.groups,
                comparison.metric,
                references=references[comparison.metric],
                name=f"metric-{index}",
            )
            for index, comparison in enumerate(comparisons, start=1)
        },
    }


def _factors_context(table: Sequence[runs.Run], design: runs.Design) -> dict[str, Any]:
    """Return what the template shows of factors: nothing unless several vary."""
    several = len(factor_effects.levels(table, design)) > 1
    by_factor = {
        index: factor_effects.compare(table, metric, design)
        for index, metric in enumerate(design.metrics if several else (), start=1)
    }
    panels = {
        index: plots.levels(
            effects.all_runs.factors,
            effects.metric,
            anchor=f"factor-{index}",
            name=f"factors-{index}",
        )
        for index, effects in by_factor.items()
    }
    return {"by_factor": by_factor, "panels": panels}


def conclude(
    comparison: group_tests.Comparison,
    design: runs.Design,
    references: Mapping[str, float],
) -> list[str]:
    """Return what the tests say of a metric, a sentence for each second level.

    Args:
      comparison: of the metric, all runs.
      design: what is compared.
      references: name -> value that the best mean is held against.
    """
    lines = []
    metric, decimals = comparison.metric, _DIGITS - 1
    down = metric in design.lower_is_better
    for effects in comparison.all_runs.simple_effects:
        groups = [
            group
            for group in comparison.all_runs.groups
            if group.within == effects.within and group.mean is not None
        ]
        if not groups:
            continue
        groups.sort(key=lambda group: group.mean or 0.0, reverse=not down)
        best = groups[0]
        where = f"{metric}, {effects.within}" if effects.within else metric
        mean = f"{best.level} has the {'lowest' if down else 'highest'} mean"
        text = f"{where}: {mean}, {number(best.mean, decimals)}"
        known = {
            frozenset((pair.first, pair.second)): pair.tukey_p for pair in effects.pairs
        }
        worse: list[str] = []
        same: list[str] = []
        untested: list[str] = []
        for group in groups[1:]:
            p = known.get(frozenset((best.level, group.level)))
            listed = untested if p is None else worse if p < group_tests.ALPHA else same
            listed.append(group.level)
        if worse:
            text += f"; {_listed(worse)} differ{'s' * (len(worse) == 1)} from it"
        if same:
            text += f"; no difference is seen from {_listed(same)}"
        if untested:
            text += f"; nothing can be tested against {_listed(untested)}"
        for name, value in references.items():
            text += f"; {name}: {number(value, decimals)}"
        lines.append(f"{text}.")
    return lines


def _listed(names: Sequence[str]) -> str:
    *first, last = names
    return f"{', '.join(first)} and {last}" if first else last


def _references(
    table: Sequence[runs.Run], metric: str, design: runs.Design
) -> dict[str, float]:
    """Return name -> value that a metric is held against: chance, the teacher."""
    references = {}
    if metric in design.chance:
        references["chance"] = design.chance[metric]
    values = _values(table, design.references.get(metric, ""))
    if values:
        references["teacher"] = math.fsum(values) / len(values)
    return references


def number(value: float | None, decimals: int | None = None) -> str:
    """Format a number: with decimals, or with four digits; a dash for None."""
    if value is None:
        return _NONE
    if not math.isfinite(value):
        raise AssertionError(f"value={value} has no place in a report")
    if decimals is None:
        decimals = _decimals([value])
    text = f"{value:,.{decimals}f}"
    return text.replace("-", "\N{MINUS SIGN}")


def p_value(value: float | None) -> str:
    """Format a probability with four decimals."""
    if value is None:
        return _NONE
    return "< 0.0001" if value < 0.0001 else number(value, 4)


def sentence(factor: factor_effects.Factor, confidence: float, decimals: int) -> str:
    """Return what the model says of a factor, in plain words.

    Args:
      factor: of a model.
      confidence: of its intervals.
      decimals: of its numbers.
    """
    first, *rest = factor.levels
    words, seen, confidence_named = [], False, False
    for level in rest:
        difference = level.difference
        assert difference is not None  # the first level alone has none
        name = f"{level.name} against {first.name}"
        if difference.value is None:
            words.append(f"{name}: not estimable")
            continue
        value = _signed(difference.value, decimals)
        if difference.low is None or difference.high is None:
            words.append(f"{name}: {value}, without an interval")
            continue
        low, high = number(difference.low, decimals), number(difference.high, decimals)
        interval = f"{low} to {high}"
        if not confidence_named:
            interval = f"{100 * confidence:g}% interval {interval}"
            confidence_named = True
        if difference.low <= 0 <= difference.high:
            words.append(f"{name}: no difference seen ({value}, {interval})")
        else:
            seen = True
            words.append(f"{name}: {value} ({interval})")
    text = f"{factor.name}: {'; '.join(words)}"
    if factor.p is not None and seen != (factor.p < group_tests.ALPHA):
        verdict = "no difference is seen" if seen else "they differ"
        equals = "" if factor.p < 0.0001 else "= "
        text += f"; all levels together: {verdict} (p {equals}{p_value(factor.p)})"
    reasons = [level.difference.statement for level in rest if level.difference]
    known = "; ".join(dict.fromkeys(filter(None, reasons)))
    return f"{text} ({known})." if known else f"{text}."


def _signed(value: float, decimals: int) -> str:
    """Format a difference; what is rounded to zero has no sign."""
    text = number(abs(value), decimals)
    if not text.strip("0."):
        return text
    return ("+" if value > 0 else "\N{MINUS SIGN}") + text


def _link(run: runs.Run, folder: str) -> str:
    """Return a link to the directory of a run: relative, whatever its name."""
    path = run.name if folder in ("", ".") else f"{folder}/{run.name}"
    return f"./{urllib.parse.quote(path)}/"


def _decimals(values: Sequence[float]) -> int:
    """Return the decimals with which the largest number has four digits."""
    largest = max((abs(value) for value in values), default=0.0)
    if not largest:
        return _DIGITS
    return min(max(_DIGITS - 1 - math.floor(math.log10(largest)), 0), 12)


def _values(table: Sequence[runs.Run], column: str) -> list[float]:
    values = (run.value(column) for run in table)
    return [value for value in values if value is not None]


def _counts(table: Sequence[runs.Run]) -> dict[str, int]:
    """Return the number of runs of each status, in order of appearance."""
    counts: dict[str, int] = {}
    for run in table:
        status = run.status or "no status"
        counts[status] = counts.get(status, 0) + 1
    return counts


def _best(
    comparison: group_tests.Comparison, design: runs.Design
) -> set[tuple[str, str]]:
    """Return the groups with the best mean at their level of the second factor.

    Where several share it there is no best one.
    """
    sign = -1 if comparison.metric in design.lower_is_better else 1
    best: dict[str, float] = {}
    for group in comparison.all_runs.groups:
        if group.mean is not None:
            best[group.within] = max(
                best.get(group.within, -math.inf), sign * group.mean
            )
    tied: dict[str, list[runs.Group]] = {}
    for group in comparison.all_runs.groups:
        if group.mean is not None and sign * group.mean == best[group.within]:
            tied.setdefault(group.within, []).append(group)
    return {
        (group.level, group.within)
        for members in tied.values()
        for group in members
        if len(members) == 1
    }


def _overview(comparisons: Sequence[group_tests.Comparison]) -> list[list[runs.Group]]:
    """Return a line per group: itself, once per metric."""
    columns = [comparison.all_runs.groups for comparison in comparisons]
    return [list(line) for line in zip(*columns, strict=True)]


def _versions(
    comparison: runs.Analysis,
) -> list[tuple[str, Any]]:
    """Return the analysis of all runs and, if it differs, of those without outliers."""
    versions: list[tuple[str, Any]] = [("all runs", comparison.all_runs)]
    if comparison.without_outliers is not None:
        versions.append(("without outliers", comparison.without_outliers))
    return versions


def _falls(design: runs.Design) -> bool:
    return design.metrics[0] in design.lower_is_better


def _pareto(
    table: Sequence[runs.Run], design: runs.Design, first: group_tests.Comparison
) -> tuple[list[plots.Point], str]:
    """Return mean quality (the first metric) and cost of each group, and a figure.

    There is no figure where all cost the same.
    """
    if not design.cost:
        return [], ""
    costs = runs.groups(table, design.cost, design)
    points = [
        plots.Point(
            name=group.name,
            within=group.within,
            cost=cost.mean,
            quality=group.mean,
            link=f"#group-1-{index}",
        )
        for index, (cost, group) in enumerate(
            zip(costs, first.all_runs.groups, strict=True), start=1
        )
        if cost.mean is not None and group.mean is not None
    ]
    if len({point.cost for point in points}) < 2:
        return points, ""
    figure = plots.pareto(
        points, design.cost, first.metric, lowest=_falls(design), name="pareto"
    )
    return points, figure

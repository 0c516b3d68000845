"""Figures of a comparison as SVG text that stands inside a page.

The same numbers give the same text. Ink takes the page's colour, so that a figure reads
on light, dark and paper; words stay words.
"""

import dataclasses
import io
import math
import xml.etree.ElementTree as ET
from collections.abc import Mapping, Sequence
from typing import Any

from kdjax.analysis import factor_effects, runs

_INK = "#010203"  # becomes currentColor
_COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#b8860b", "#56b4e9")
_MARKERS = ("o", "s", "D", "^", "v", "P", "X")
_LONGEST = 48  # characters of a name beside an axis
_PANELS = 4  # beside each other
_NAMED = 12  # points of a figure that all have their names beside them
_STYLE: Any = {
    "svg.fonttype": "none",
    "svg.hashsalt": "kdjax",
    "text.parse_math": False,
    "axes.formatter.useoffset": False,
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "figure.facecolor": "none",
    "axes.facecolor": "none",
    "legend.frameon": False,
} | dict.fromkeys(
    (
        "text.color",
        "axes.edgecolor",
        "axes.labelcolor",
        "xtick.color",
        "ytick.color",
        "grid.color",
    ),
    _INK,
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Point:
    """A group of runs by what it costs and how good it is."""

    name: str
    within: str
    cost: float
    quality: float
    link: str = ""  # to where its numbers are


def dots(
    groups: Sequence[runs.Group],
    label: str,
    *,
    references: Mapping[str, float] | None = None,
    name: str = "figure",
) -> str:
    """Every run as a dot, and every group's mean with its interval.

    Args:
      groups: of runs; a row for each level of the first factor, a colour for each of
        the second. Collapsed runs are crosses.
      label: of the axis.
      references: name -> value of a vertical line, such as chance.
      name: unique in the page; stands before all ids.

    Returns:
      SVG; "" where no run has a number.
    """
    filled = [group for group in groups if group.values]
    if not filled:
        return ""
    names = list(dict.fromkeys(group.level for group in groups))
    strata = list(dict.fromkeys(group.within for group in groups))
    with _style():
        figure = _figure(7.2, 1.1 + 0.22 * len(names) * (len(strata) + 0.6))
        axes = figure.subplots()
        shown = {}
        for group in filled:
            place = strata.index(group.within)
            lift = (place + 0.5) / len(strata) - 0.5
            height = names.index(group.level) + 0.7 * lift
            colour, marker = _look(place)
            _runs(axes, group, height, colour)
            if group.low is not None:
                axes.hlines(height, group.low, group.high, color=colour, linewidth=1.6)
            shown[group.within] = axes.scatter(
                group.mean, height, s=34, marker=marker, color=colour, zorder=3
            )
        axes.set_yticks(range(len(names)), [_short(level) for level in names])
        axes.set_ylim(len(names) - 0.4, -0.6)
        for title, value in (references or {}).items():
            axes.axvline(value, color=_INK, linewidth=0.9, linestyle=":")
            axes.annotate(
                _short(title),
                (value, 1),
                xycoords=("data", "axes fraction"),
                xytext=(2, -2),
                textcoords="offset points",
                va="top",
                fontsize=8,
            )
        axes.set_xlabel(label)
        axes.grid(axis="x", alpha=0.2)
        _legend(figure, shown)
        return _svg(figure, name, f"{label}: runs, means and intervals")


def pareto(
    points: Sequence[Point],
    cost: str,
    quality: str,
    *,
    lowest: bool = False,
    name: str = "figure",
) -> str:
    """Quality against cost, with a line through the points that nothing beats.

    Of many points only these have their names beside them.

    Args:
      points: at least one.
      cost: label of its axis.
      quality: label of its axis.
      lowest: less quality is better (NLL).
      name: unique in the page; stands before all ids.
    """
    if not points:
        return ""
    strata = list(dict.fromkeys(point.within for point in points))
    best = frontier(points, lowest=lowest)
    with _style():
        figure = _figure(7.2, 4.2)
        axes = figure.subplots()
        shown = {}
        for point in points:
            colour, marker = _look(strata.index(point.within))
            drawn = axes.scatter(
                point.cost,
                point.quality,
                s=42,
                marker=marker,
                color=colour,
                alpha=1.0 if point in best else 0.45,
            )
            drawn.set_urls([point.link or None])
            shown[point.within] = drawn
            if point not in best and len(points) > _NAMED:
                continue
            axes.annotate(
                _short(point.name),
                (point.cost, point.quality),
                xytext=(5, 4),
                textcoords="offset points",
                fontsize=8,
            )
        axes.step(
            [point.cost for point in best],
            [point.quality for point in best],
            where="post",
            color=_INK,
            linewidth=0.9,
            linestyle="--",
        )
        costs = [point.cost for point in points]
        if min(costs) > 0 and max(costs) > 20 * min(costs):
            axes.set_xscale("log")
            axes.xaxis.set_minor_formatter("")
        axes.xaxis.set_major_formatter(_tick)
        axes.set_xlabel(_short(cost))
        axes.set_ylabel(_short(quality))
        axes.margins(0.12)
        axes.grid(alpha=0.2)
        _legend(figure, shown)
        return _svg(figure, name, f"{quality} against {cost}")


def levels(
    factors: Sequence[factor_effects.Factor],
    label: str,
    *,
    anchor: str,
    name: str = "figure",
) -> str:
    """Means of the levels with their intervals, one panel a factor.

    Args:
      factors: factors.
      label: of the axis that all panels share.
      anchor: begins the ids of levels: "<anchor>-<factor>-<level>", each from 1.
      name: unique in the page; stands before all ids.

    Returns:
      SVG; "" where no level has a mean.
    """
    if not any(
        level.mean.value is not None for factor in factors for level in factor.levels
    ):
        return ""
    columns = min(_PANELS, len(factors))
    lines = math.ceil(len(factors) / columns)
    with _style():
        figure = _figure(7.2, 2.5 * lines)
        grid = figure.subplots(lines, columns, squeeze=False, sharey=True)
        for axes in grid.ravel()[len(factors) :]:
            axes.set_visible(False)
        pairs = zip(grid.ravel(), factors, strict=False)
        for order, (axes, factor) in enumerate(pairs, start=1):
            _levels(axes, factor, f"#{anchor}-{order}")
        for line in grid:
            line[0].set_ylabel(_short(label))
        return _svg(figure, name, f"{label}: means of the levels of each factor")


def likert(
    counts: Mapping[str, Mapping[str, Sequence[int]]],
    values: Sequence[str],
    *,
    name: str = "figure",
) -> str:
    """Shares of ratings as stacked bars, one panel per outcome.

    Args:
      counts: outcome -> condition -> ratings of each value.
      values: names of the values, lowest first.
      name: unique in the page; stands before all ids.

    Returns:
      SVG; "" where there is no rating.
    """
    if not any(sum(row) for rows in counts.values() for row in rows.values()):
        return ""
    conditions = list(dict.fromkeys(c for rows in counts.values() for c in rows))
    columns = min(2, len(counts))
    lines = math.ceil(len(counts) / columns)
    colours = _diverging(len(values))
    with _style():
        figure = _figure(7.2, 0.5 + lines * (0.6 + 0.24 * len(conditions)))
        grid = figure.subplots(lines, columns, squeeze=False, sharey=True, sharex=True)
        for axes in grid.ravel()[len(counts) :]:
            axes.set_visible(False)
        shown: dict[str, Any] = {}
        for axes, (title, rows) in zip(grid.ravel(), counts.items(), strict=False):
            for height, condition in enumerate(conditions):
                row, left = rows.get(condition, ()), 0.0
                for value, count, colour in zip(values, row, colours, strict=False):
                    width = count / (sum(row) or 1)
                    bar = axes.barh(height, width, left=left, color=colour, height=0.8)
                    shown.setdefault(value, bar)
                    left += width
            names = [_short(condition, 28) for condition in conditions]
            axes.set_yticks(range(len(conditions)), names)
            axes.set(xlim=(0, 1), ylim=(len(conditions) - 0.4, -0.6))
            axes.set_title(_short(title, 28), fontsize=9)
        figure.legend(
            list(shown.values()),
            [_short(value) for value in shown],
            loc="outside lower center",
            ncols=len(shown),
        )
        return _svg(figure, name, "shares of ratings by condition")


def _diverging(num: int) -> list[Any]:
    """Return colours from low to high that print in grey and for the colour-blind."""
    from matplotlib.colors import LinearSegmentedColormap

    ends = ("#b35806", "#e6a452", "#b8b8b8", "#7aa6cf", "#1f4e85")
    scale = LinearSegmentedColormap.from_list("likert", ends)
    return [scale(place / max(num - 1, 1)) for place in range(num)]


def frontier(points: Sequence[Point], *, lowest: bool = False) -> list[Point]:
    """Points that no other beats in one of cost and quality and equals in the other.

    Returns:
      by rising cost; of points with the same numbers, all.
    """
    sign = -1 if lowest else 1

    def beaten(point: Point) -> bool:
        return any(
            other.cost <= point.cost
            and sign * other.quality >= sign * point.quality
            and (other.cost, other.quality) != (point.cost, point.quality)
            for other in points
        )

    best = [point for point in points if not beaten(point)]
    return sorted(best, key=lambda point: point.cost)


def curves(
    series: Mapping[str, tuple[Sequence[float], Sequence[float]]],
    x_label: str,
    y_label: str,
    *,
    references: Mapping[str, float] | None = None,
    name: str = "figure",
) -> str:
    """Lines with markers over a common axis.

    Args:
      series: name -> x and y of its points.
      x_label: of the axis.
      y_label: of the axis.
      references: name -> value of a horizontal line.
      name: unique in the page; stands before all ids.

    Returns:
      SVG.
    """
    with _style():
        figure = _figure(6.4, 3.4)
        axes = figure.subplots()
        shown = {}
        for place, (title, (x, y)) in enumerate(series.items()):
            colour, marker = _look(place)
            (shown[title],) = axes.plot(x, y, color=colour, marker=marker, markersize=4)
        for title, value in (references or {}).items():
            axes.axhline(value, color=_INK, linewidth=0.9, linestyle=":")
            axes.annotate(
                _short(title),
                (1, value),
                xycoords=("axes fraction", "data"),
                xytext=(-2, 2),
                textcoords="offset points",
                ha="right",
                fontsize=8,
            )
        axes.set_xlabel(x_label)
        axes.set_ylabel(y_label)
        axes.grid(alpha=0.2)
        _legend(figure, shown)
        return _svg(figure, name, f"{y_label} over {x_label}")


def reliability(
    bins: Mapping[str, tuple[Sequence[float], Sequence[float], Sequence[float]]],
    *,
    name: str = "figure",
) -> str:
    """Accuracy against confidence, one panel a model.

    Args:
      bins: title -> for each bin of equal width on (0, 1]: predictions, the sum of
        their confidences, how many were right.
      name: unique in the page; stands before all ids.

    Source: Guo et al., 2017, arXiv 1706.04599, section 2.
    """
    if not bins:
        return ""
    columns = min(3, len(bins))
    lines = math.ceil(len(bins) / columns)
    with _style():
        figure = _figure(2.4 * columns, 2.5 * lines)
        grid = figure.subplots(lines, columns, squeeze=False, sharex=True, sharey=True)
        for axes in grid.ravel()[len(bins) :]:
            axes.set_visible(False)
        for axes, (title, counted) in zip(grid.ravel(), bins.items(), strict=False):
            _panel(axes, title, *counted)
        return _svg(figure, name, "accuracy against confidence")


def _panel(
    axes: Any,
    title: str,
    counts_B: Sequence[float],
    confidences_B: Sequence[float],
    corrects_B: Sequence[float],
) -> None:
    axes.plot((0, 1), (0, 1), color=_INK, linewidth=0.8, linestyle="--")
    total = sum(counts_B)
    triples = zip(counts_B, confidences_B, corrects_B, strict=True)
    for place, (count, confidence, correct) in enumerate(triples):
        if not count:
            continue
        middle = (place + 0.5) / len(counts_B)
        axes.bar(
            middle,
            correct / count,
            width=0.92 / len(counts_B),
            color=_COLOURS[0],
            alpha=0.25 + 0.75 * count / total,
        )
        axes.plot(confidence / count, correct / count, ".", color=_COLOURS[1])
    gaps = zip(corrects_B, confidences_B, strict=True)
    error = sum(abs(right - sure) for right, sure in gaps) / total if total else 0.0
    words = f"ECE {error:.3f}" if total else "no prediction"
    axes.set_title(f"{_short(title, 28)}\n{words}", fontsize=9)
    axes.set(xlim=(0, 1), ylim=(0, 1), xlabel="confidence", ylabel="accuracy")
    axes.label_outer()


def _levels(axes: Any, factor: factor_effects.Factor, anchor: str) -> None:
    for place, level in enumerate(factor.levels):
        mean = level.mean
        if mean.value is None:
            continue
        if mean.low is not None:
            axes.vlines(place, mean.low, mean.high, color=_COLOURS[0], linewidth=1.6)
        drawn = axes.scatter(place, mean.value, s=34, color=_COLOURS[0], zorder=3)
        drawn.set_urls([f"{anchor}-{place + 1}"])
    names = [_short(level.name, 18) for level in factor.levels]
    crowded = sum(map(len, names)) > 16
    turned = {"rotation": 40, "ha": "right", "rotation_mode": "anchor"}
    axes.set_xticks(range(len(names)), names, **(turned if crowded else {}))
    axes.set_xlim(-0.6, len(names) - 0.4)
    axes.set_title(_short(factor.name, 28), fontsize=9)
    axes.grid(axis="y", alpha=0.2)


def _runs(axes: Any, group: runs.Group, height: float, colour: str) -> None:
    for run, value in zip(group.runs, group.values, strict=True):
        drawn = axes.scatter(
            value,
            height,
            s=16,
            marker="x" if run.collapsed else "o",
            color=colour,
            alpha=0.55,
            linewidths=0.8,
        )
        drawn.set_urls([f"#run-{run.row}"])


def _style() -> Any:
    import matplotlib

    return matplotlib.rc_context(_STYLE)


def _figure(width: float, height: float) -> Any:
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def _look(place: int) -> tuple[str, str]:
    """Colour and marker of a level: print without colour tells markers apart."""
    return _COLOURS[place % len(_COLOURS)], _MARKERS[place % len(_MARKERS)]


def _legend(figure: Any, shown: Mapping[str, Any]) -> None:
    """Add a legend of the levels of the second factor, where there are several."""
    if len(shown) < 2:
        return
    # A zero-width space keeps a name that starts with "_" from being left out.
    names = [f"\u200b{_short(level)}" for level in shown]
    figure.legend(list(shown.values()), names, loc="outside upper right", ncols=3)


def _tick(value: float, position: int | None = None) -> str:
    """Format a number beside an axis, without a power of ten."""
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:g}"


def _short(text: str, longest: int = _LONGEST) -> str:
    line = "".join(c if c.isprintable() else "\ufffd" for c in " ".join(text.split()))
    return line if len(line) <= longest else line[: longest - 1] + "…"


def _svg(figure: Any, name: str, description: str) -> str:
    """Return a figure as an element of an HTML page, with ids and styles of its own."""
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None})
    root = ET.fromstring(buffer.getvalue())
    for parent in list(root.iter()):
        for child in list(parent):
            if child.tag.endswith(("}metadata", "}style")):
                parent.remove(child)
    for element in root.iter():
        element.tag = element.tag.rpartition("}")[2]
        old = dict(element.attrib)
        element.attrib.clear()
        for key, value in old.items():
            plain = key.rpartition("}")[2]
            if plain == "target":
                continue
            if plain == "id":
                value = f"{name}-{value}"
            elif plain == "href" and element.tag == "use":
                value = f"#{name}-{value.removeprefix('#')}"
            value = value.replace("url(#", f"url(#{name}-")
            element.set(plain, value.replace(_INK, "currentColor"))
    box = root.get("viewBox", "")
    root.attrib.clear()
    root.attrib |= {
        "viewBox": box,
        "role": "img",
        "aria-label": description,
        "style": f"stroke-linejoin: round; max-width: {_width(box)}pt",
    }
    return ET.tostring(root, encoding="unicode")


def _width(box: str) -> str:
    return box.split()[2]

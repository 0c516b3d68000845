"""Metrics of a training run: `metrics.jsonl`, TensorBoard events and `curves.png`."""

import contextlib
import json
import math
import os
import pathlib
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from kdjax.runtime import files
from kdjax.runtime.console import progress

if TYPE_CHECKING:  # it takes a while, and only the end of a run draws
    from matplotlib.figure import Figure

METRICS = "metrics.jsonl"
_PANELS = {  # title -> the metric, or every metric below it (loss/hard, ...)
    "loss (nats)": "loss",
    "KL to the teacher (nats)": "kl",
    "held-out NLL (nats)": "eval/nll",
    "learning rate": "learning_rate",
}


class MetricsWriter:
    """Writer of `metrics.jsonl`, TensorBoard events, a progress bar and `curves.png`.

    Only the main process writes and shows anything. Use as a context manager.
    """

    def __init__(
        self,
        workdir: str | os.PathLike,
        *,
        total_steps: int,
        is_main: bool = True,
        resume_step: int = 0,
        config_json: str = "",
    ) -> None:
        """Open the files of a run.

        Args:
          workdir: folder of the run; made if it does not exist.
          total_steps: steps of the whole run, for the progress bar.
          is_main: False writes nothing (process index > 0).
          resume_step: metrics after this step are dropped; 0 starts afresh.
          config_json: of the run, shown as a text in TensorBoard; "" = none.
        """
        self.workdir = pathlib.Path(workdir)
        self._is_main = is_main
        self._closers = contextlib.ExitStack()
        if not is_main:
            return
        self.workdir.mkdir(parents=True, exist_ok=True)
        _truncate(self.workdir / METRICS, resume_step)
        self._metrics = self._closers.enter_context(
            (self.workdir / METRICS).open("a", encoding="utf-8")
        )
        # Imported here: it is slow, and processes that write nothing need none of it.
        from tensorboardX import SummaryWriter

        self._events = SummaryWriter(str(self.workdir), purge_step=resume_step + 1)
        self._closers.callback(self._events.close)
        if config_json and not resume_step:
            indented = config_json.replace("\n", "\n    ")  # a block of Markdown
            self._events.add_text("config", f"    {indented}", 0)
        self._advance = self._closers.enter_context(
            progress(total_steps, "train", start=resume_step)
        )
        self._step = resume_step

    def __enter__(self) -> "MetricsWriter":
        """Return self."""
        return self

    def __exit__(self, *exception: object) -> None:
        """Close."""
        self.close()

    def write(self, step: int, scalars: Mapping[str, float]) -> None:
        """Append one line to `metrics.jsonl` and show it.

        Values that are not finite are written as strings ("nan", "inf"), which keeps
        every line valid JSON.

        Args:
          step: optimizer steps done.
          scalars: name -> value; anything `float` takes.
        """
        if not self._is_main:
            return
        values = {name: float(value) for name, value in scalars.items()}
        line = {
            name: value if math.isfinite(value) else str(value)
            for name, value in values.items()
        }
        json.dump({"step": step} | line, self._metrics, allow_nan=False)
        self._metrics.write("\n")
        self._metrics.flush()
        for name, value in values.items():
            self._events.add_scalar(name, value, step)
        self._events.flush()
        shown = [name for name in ("loss", "kl", "tokens_per_second") if name in values]
        note = "  ".join(f"{name} {values[name]:.5g}" for name in shown)
        self._advance(step - self._step, note)
        self._step = step

    @contextlib.contextmanager
    def compiling(self, description: str, first: bool = True) -> Iterator[None]:
        """Say that something is being compiled, and how long that took.

        Args:
          description: of what is compiled, "the step".
          first: False says nothing: it was compiled before.
        """
        if not (first and self._is_main):
            yield
            return
        self._advance(0, f"compiling {description} ...")
        start = time.monotonic()
        yield
        seconds = time.monotonic() - start
        self._advance(0, f"compiled {description} in {seconds:.1f} s")

    def write_curves(self) -> None:
        """Draw the metrics against the step into `curves.png`."""
        if self._is_main:
            figure = curves(read_metrics(self.workdir / METRICS))
            figure.savefig(self.workdir / "curves.png", dpi=120)

    def close(self) -> None:
        """Close the files and the progress bar; may be called twice."""
        self._closers.close()


def read_metrics(path: str | os.PathLike) -> list[dict[str, Any]]:
    """Read the lines of a `metrics.jsonl`, "nan" and "inf" as floats again."""
    return [
        {name: float(v) if isinstance(v, str) else v for name, v in row.items()}
        for row in files.read_jsonl(path, remedy="remove the line")
    ]


def curves(rows: Sequence[Mapping[str, Any]]) -> "Figure":
    """Plot loss and its terms, KL, held-out NLL and learning rate against the step.

    Args:
      rows: of `metrics.jsonl`.

    Returns:
      A figure with a panel per quantity that has a finite value. Points have markers,
      since one point alone is no line.
    """
    from matplotlib.figure import Figure

    panels: dict[str, dict[str, list[tuple[int, float]]]] = {}
    names = sorted({name for row in rows for name in row})
    for title, key in _PANELS.items():
        for name in names:
            points = [(row["step"], row[name]) for row in rows if name in row]
            of_panel = name == key or name.startswith(f"{key}/")
            if of_panel and any(math.isfinite(value) for _, value in points):
                panels.setdefault(title, {})[name] = points
    figure = Figure(figsize=(8, 2.5 * max(len(panels), 1)), layout="constrained")
    for position, (title, lines) in enumerate(panels.items(), start=1):
        axes = figure.add_subplot(len(panels), 1, position, ylabel=title)
        for name, points in lines.items():
            axes.plot(*zip(*points, strict=True), marker=".", markersize=4, label=name)
        axes.legend(loc="best")
        axes.grid(alpha=0.3)
        axes.set_xlabel("step")
    return figure


def _truncate(path: pathlib.Path, step: int) -> None:
    """Drop the lines after `step`, and a last line that a kill cut short."""
    if not path.exists():
        return
    lines = path.read_bytes().splitlines(keepends=True) if step else []
    lines = [line for line in lines if line.endswith(b"\n")]
    rows = files.parse_jsonl(lines, path, "remove the line")
    pairs = zip(lines, rows, strict=True)
    remaining = [line for line, row in pairs if row.get("step", 0) <= step]
    files.write_atomically(path, b"".join(remaining))

"""What a run leaves in its workdir, and what it shows while it runs."""

import contextlib
import json
import math
import os
import pathlib
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import rich.console
import rich.progress
import rich.table

METRICS = "metrics.jsonl"
SUMMARY = "summary.json"
_SECONDS_BETWEEN_LINES = 5.0  # where there is no terminal to draw a bar on
_CURVES = {  # panel -> the metric, or every metric below it (loss/hard, ...)
    "loss (nats)": "loss",
    "KL to the teacher (nats)": "kl",
    "held-out NLL (nats)": "eval/nll",
    "learning rate": "learning_rate",
}


class Writer:
    """Writes `calibration.jsonl`, TensorBoard events, `summary.json`, `curves.png`.

    Only the main process writes and shows anything. Use as a context manager.
    """

    def __init__(
        self,
        workdir: str | os.PathLike,
        *,
        total_steps: int,
        is_main: bool = True,
        resume_step: int = 0,
        wandb_project: str = "",
    ) -> None:
        """Open the files of a run.

        Args:
            workdir: folder of the run; made if it does not exist.
            total_steps: steps of the whole run, for the progress bar.
            is_main: False writes nothing (process index > 0).
            resume_step: metrics after this step are dropped; 0 starts afresh.
            wandb_project: also report to this Weights & Biases project; "" does not.

        Raises:
            ValueError: `wandb_project` is set and wandb is not installed.
        """
        self.workdir = pathlib.Path(workdir)
        self._is_main = is_main
        self._closers = contextlib.ExitStack()
        if not is_main:
            return
        self.workdir.mkdir(parents=True, exist_ok=True)
        self._wandb = _start_wandb(wandb_project, self.workdir)
        if self._wandb:
            self._closers.callback(self._wandb.finish)
        _truncate(self.workdir / METRICS, resume_step)
        self._metrics = self._closers.enter_context(
            (self.workdir / METRICS).open("a", encoding="utf-8")
        )
        # Imported here: it is slow, and processes that write nothing need none of it.
        from tensorboardX import SummaryWriter

        self._events = SummaryWriter(str(self.workdir), purge_step=resume_step + 1)
        self._closers.callback(self._events.close)
        self._advance = self._closers.enter_context(
            progress(total_steps, "train", start=resume_step)
        )
        self._step = resume_step

    def __enter__(self) -> "Writer":
        """Return self."""
        return self

    def __exit__(self, *exception: object) -> None:
        """Close."""
        self.close()

    def write(self, step: int, scalars: Mapping[str, float]) -> None:
        """Append one line to `calibration.jsonl` and show it.

        Values that are not finite are written as strings ("nan", "inf"), which keeps
        every line valid JSON.

        Args:
            step: optimizer steps done.
            scalars: name -> value; anything `float` takes.
        """
        if not self._is_main:
            return
        values = {name: float(value) for name, value in scalars.items()}
        json.dump({"step": step} | _finite(values), self._metrics)
        self._metrics.write("\n")
        self._metrics.flush()
        for name, value in values.items():
            self._events.add_scalar(name, value, step)
        self._events.flush()
        if self._wandb:
            self._wandb.log(values, step=step)
        shown = [name for name in ("loss", "kl", "tokens_per_second") if name in values]
        note = "  ".join(f"{name} {values[name]:.5g}" for name in shown)
        self._advance(step - self._step, note)
        self._step = step

    def summary(self, values: Mapping[str, Any]) -> None:
        """Write `summary.json` whole or not at all."""
        if not self._is_main:
            return
        path = self.workdir / SUMMARY
        temporary = path.with_suffix(".tmp")
        with temporary.open("w", encoding="utf-8") as file:
            json.dump(_finite(values), file, indent=2)
            file.write("\n")
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)

    def curves(self, path: str | os.PathLike | None = None) -> None:
        """Draw the metrics against the step; the default is `curves.png`."""
        if self._is_main:
            draw_curves(
                read_metrics(self.workdir / METRICS),
                path or self.workdir / "curves.png",
            )

    def table(self, title: str, rows: Sequence[Mapping[str, Any]]) -> None:
        """Print a table: one mapping of column -> value a row."""
        if self._is_main:
            print_table(title, rows)

    def close(self) -> None:
        """Close the files and the progress bar; may be called twice."""
        self._closers.close()


def read_metrics(path: str | os.PathLike) -> list[dict[str, Any]]:
    """Return the lines of a `calibration.jsonl`, "nan" and "inf" as floats again."""
    lines = pathlib.Path(path).read_text(encoding="utf-8").splitlines()
    return [
        {name: float(v) if isinstance(v, str) else v for name, v in row.items()}
        for row in map(json.loads, lines)
    ]


def draw_curves(rows: Sequence[Mapping[str, Any]], path: str | os.PathLike) -> None:
    """Draw loss and its terms, KL, held-out NLL and learning rate against the step.

    Args:
        rows: of `calibration.jsonl`; a panel without any value is left out.
        path: image file to write.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    names = sorted({name for row in rows for name in row})
    panels = {
        title: [name for name in names if name == key or name.startswith(f"{key}/")]
        for title, key in _CURVES.items()
    }
    panels = {title: metrics for title, metrics in panels.items() if metrics}
    figure = Figure(figsize=(8, 2.5 * max(len(panels), 1)), layout="constrained")
    FigureCanvasAgg(figure)
    for position, (title, metrics) in enumerate(panels.items(), start=1):
        axes = figure.add_subplot(len(panels), 1, position, ylabel=title)
        for name in metrics:
            points = [(row["step"], row[name]) for row in rows if name in row]
            axes.plot(*zip(*points, strict=True), label=name)
        axes.legend(loc="best")
        axes.grid(alpha=0.3)
        axes.set_xlabel("step")
    figure.savefig(path, dpi=120, format="png")


def print_table(title: str, rows: Sequence[Mapping[str, Any]]) -> None:
    """Print a table; columns in order of first appearance, "" where there is none."""
    columns = list(dict.fromkeys(name for row in rows for name in row))
    table = rich.table.Table(title=title)
    for name in columns:
        numeric = all(isinstance(row.get(name, 0), int | float) for row in rows)
        table.add_column(name, justify="right" if numeric else "left")
    for row in rows:
        table.add_row(*(_cell(row.get(name, "")) for name in columns))
    rich.console.Console().print(table)


@contextlib.contextmanager
def progress(
    total: int, description: str, *, start: int = 0, is_main: bool = True
) -> Iterator[Callable[..., None]]:
    """Show progress: a bar on a terminal, else a line every few seconds on stderr.

    Yields `advance(amount=1, note="")`, to call when work is done.

    Args:
        total: amount of work, any unit.
        description: what is being done, one or two words.
        start: work that was done before.
        is_main: False shows nothing.
    """
    if not is_main:
        yield lambda amount=1, note="": None
    elif sys.stderr.isatty():
        with rich.progress.Progress(
            rich.progress.TextColumn("{task.description}"),
            rich.progress.BarColumn(),
            rich.progress.MofNCompleteColumn(),
            rich.progress.TimeElapsedColumn(),
            rich.progress.TimeRemainingColumn(),
            rich.progress.TextColumn("{task.fields[note]}"),
            console=rich.console.Console(stderr=True),
        ) as bar:
            task = bar.add_task(description, total=total, completed=start, note="")

            def advance(amount: int = 1, note: str = "") -> None:
                fields: dict[str, Any] = {"note": note} if note else {}
                bar.update(task, advance=amount, **fields)

            yield advance
    else:
        yield _Lines(total, description, start)


class _Lines:
    """Progress as plain lines, for logs."""

    def __init__(self, total: int, description: str, start: int) -> None:
        self._total, self._description = total, description
        self._start = self._done = start
        self._began = time.monotonic()
        self._shown = -math.inf

    def __call__(self, amount: int = 1, note: str = "") -> None:
        self._done += amount
        now = time.monotonic()
        if now - self._shown < _SECONDS_BETWEEN_LINES and self._done < self._total:
            return
        self._shown = now
        rate = (now - self._began) / max(self._done - self._start, 1)
        line = (
            f"{self._description} {self._done}/{self._total}  "
            f"{rate * (self._total - self._done):.0f} s left  {note}"
        )
        print(line.rstrip(), file=sys.stderr, flush=True)


def _truncate(path: pathlib.Path, step: int) -> None:
    """Drop the lines after `step`, and a last line that a kill cut short."""
    if not path.exists():
        return
    kept = []
    for line in path.read_text(encoding="utf-8").splitlines(keepends=True):
        if step and line.endswith("\n") and json.loads(line)["step"] <= step:
            kept.append(line)
    temporary = path.with_suffix(".tmp")
    temporary.write_text("".join(kept), encoding="utf-8")
    temporary.replace(path)


def _finite(value: Any) -> Any:
    """Replace floats that JSON has no word for by their names."""
    if isinstance(value, Mapping):
        return {str(name): _finite(inner) for name, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(inner) for inner in value]
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value


def _cell(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _start_wandb(project: str, workdir: pathlib.Path) -> Any | None:
    if not project:
        return None
    try:
        import wandb
    except ImportError as error:
        raise ValueError(
            f"wandb_project={project!r} needs the package wandb: pip install wandb, "
            "or leave it empty"
        ) from error
    return wandb.init(project=project, dir=str(workdir), resume="allow")

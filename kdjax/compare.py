"""Runs a grid of methods and factors: python -m kdjax.compare --config=FILE.py.

Every combination of levels is a run of its own with each seed (docs/compare.md). Killed
anywhere and started again it goes on; then results.csv and report.html are written.
"""

from __future__ import annotations

import json
import pathlib
from typing import TYPE_CHECKING, Any

from absl import flags

from kdjax import cli
from kdjax.runtime import files
from kdjax.runtime.console import print_table, progress

if TYPE_CHECKING:
    from kdjax.comparison.grid import Comparison, Item

_JOBS = flags.DEFINE_integer(
    "jobs", 1, "Processes side by side on this machine.", lower_bound=1
)
_STAGE = flags.DEFINE_enum(
    "stage",
    "all",
    ("all", "prepare", "run", "report"),
    "What to do: prepare what runs share, run them, or report what there is.",
)
_INDEX = flags.DEFINE_integer(
    "index", None, "With --stage=run: this run alone, from 0.", lower_bound=0
)
flags.declare_key_flag("json")


def run(comparison: Comparison, workdir: pathlib.Path) -> None:
    """Does what the flags say; exit code 1 if a run of it failed."""
    from kdjax.comparison import grid, results, runner

    workdir = workdir.resolve()
    items = grid.items(comparison, workdir)
    # What is shared is named after all that decides its content.
    for item in (item for item in items if item.is_run):
        cli.check_owner(workdir / item.name, item.config)
    stage = _STAGE.value
    runner.places(_JOBS.value)
    _write_list(items, workdir)
    chosen = _chosen(items, stage, workdir)
    failed = _run(chosen, workdir)
    if stage in ("all", "report"):
        rows = results.write(comparison, items, workdir)
        title = f"{comparison.name}: mean ± standard deviation"
        print_table(title, results.means(comparison, rows))
        print(workdir / results.REPORT)
        cli.write_json(rows)
    if failed:
        error = runner.error(workdir / failed[0].name)
        raise ValueError(
            f"{len(failed)} of {len(chosen)} failed, first {failed[0].name}: {error} "
            f"(see {runner.LOG} there); started again, what failed is tried again"
        )


def _chosen(items: list[Item], stage: str, workdir: pathlib.Path) -> list[Item]:
    """The items that a stage runs.

    Raises:
      ValueError: an index without a run, or a run before what it needs.
    """
    from kdjax.comparison import runner

    runs = [item for item in items if item.is_run]
    if _INDEX.value is not None:
        if stage != "run" or _INDEX.value >= len(runs):
            raise ValueError(
                f"--index={_INDEX.value}: with --stage=run, 0 to {len(runs) - 1}"
            )
        runs = [runs[_INDEX.value]]
    if stage == "run":
        needed = {name for item in runs for name in item.needs}
        missing = [
            item.name
            for item in items
            if item.name in needed and not runner.finished(item, workdir)
        ]
        if missing:
            raise ValueError(f"{missing} not there: --stage=prepare makes them")
        return runs
    chosen = {"all": items, "report": []}
    return chosen.get(stage, [item for item in items if not item.is_run])


def _run(items: list[Item], workdir: pathlib.Path) -> list[Item]:
    """Runs items; those that failed."""
    from kdjax.comparison import runner

    todo = [item for item in items if not runner.finished(item, workdir)]
    failed: list[Item] = []
    for item in todo:
        folder = workdir / item.name
        if not (folder / cli.CONFIG).exists():
            cli.write_config(folder, item.config)
    with progress(len(items), "compare", start=len(items) - len(todo)) as advance:

        def report(item: Item, error: str) -> None:
            if error:
                failed.append(item)
            advance(1, f"{item.name} {'failed: ' + error if error else 'done'}")

        if todo:
            runner.run(items, workdir, jobs=_JOBS.value, report=report)
    return failed


def _write_list(items: list[Item], workdir: pathlib.Path) -> None:
    """runs.jsonl: a line a run, by index, for schedulers and readers."""

    def line(index: int, item: Item) -> dict[str, Any]:
        return {"index": index, "run": item.name, **item.levels}

    runs = [item for item in items if item.is_run]
    lines = [json.dumps(line(index, item)) for index, item in enumerate(runs)]
    files.write_atomically(workdir / "runs.jsonl", "\n".join(lines) + "\n")


def _validate(comparison: Comparison) -> None:
    from kdjax.comparison import grid

    cli.check_type(comparison, grid.Comparison)
    grid.runs(comparison)


if __name__ == "__main__":
    cli.run(run, validate=_validate)

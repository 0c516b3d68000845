"""Grids of methods and factors: python -m kdjax.compare --config=FILE.py.

Every combination of levels is a run of its own with each seed (docs/compare.md). Killed
anywhere and started again it goes on; then results.csv and report.html are written.
"""

from __future__ import annotations

import contextlib
import json
import pathlib
from typing import TYPE_CHECKING, Any

from absl import flags

from kdjax import cli
from kdjax.runtime import files, locks
from kdjax.runtime.console import print_table, progress

if TYPE_CHECKING:
    from kdjax.comparison.grid import Comparison, Task

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
    """Run the stage that the flags name; exit code 1 if a run of it failed."""
    from kdjax.comparison import grid, results, runner
    from kdjax.experiment import workdir as workdir_lib

    workdir = workdir.resolve()
    tasks = grid.tasks(comparison, workdir)
    # What is shared is named after all that decides its content.
    for task in (task for task in tasks if task.is_run):
        workdir_lib.check_owner(workdir / task.name, task.config)
    stage = _STAGE.value
    runner.slots(_JOBS.value)
    with contextlib.ExitStack() as stack:
        # Runs by index go side by side, on several machines; each locks its own folder.
        if stage != "report" and _INDEX.value is None:
            stack.enter_context(locks.hold(workdir))
        _write_list(tasks, workdir)
        selected = _select(tasks, stage, workdir)
        failed = _run(selected, workdir)
    if stage in ("all", "report"):
        rows = results.write(comparison, tasks, workdir)
        title = f"{comparison.name}: mean ± standard deviation"
        print_table(title, results.means(comparison, rows))
        print(workdir / results.REPORT)
        cli.write_json(rows)
    if failed:
        error = runner.error(workdir / failed[0].name)
        raise ValueError(
            f"{len(failed)} of {len(selected)} failed, first {failed[0].name}: {error} "
            f"(see {runner.LOG} there); started again, what failed is tried again"
        )


def _select(tasks: list[Task], stage: str, workdir: pathlib.Path) -> list[Task]:
    """Return the tasks that a stage runs.

    Raises:
      ValueError: an index without a run, or a run before what it depends on.
    """
    from kdjax.comparison import runner

    runs = [task for task in tasks if task.is_run]
    if _INDEX.value is not None:
        if stage != "run" or _INDEX.value >= len(runs):
            raise ValueError(
                f"--index={_INDEX.value}: with --stage=run, 0 to {len(runs) - 1}"
            )
        runs = [runs[_INDEX.value]]
    if stage == "run":
        shared = {name for task in runs for name in task.depends_on}
        missing = [
            task.name
            for task in tasks
            if task.name in shared and not runner.finished(task, workdir)
        ]
        if missing:
            raise ValueError(f"{missing} not there: --stage=prepare makes them")
        return runs
    if stage == "prepare":
        return [task for task in tasks if not task.is_run]
    return tasks if stage == "all" else []


def _run(tasks: list[Task], workdir: pathlib.Path) -> list[Task]:
    """Run tasks; return those that failed."""
    from kdjax.comparison import runner
    from kdjax.experiment import workdir as workdir_lib

    todo = [task for task in tasks if not runner.finished(task, workdir)]
    failed: list[Task] = []
    for task in todo:
        folder = workdir / task.name
        if not (folder / workdir_lib.CONFIG).exists():
            workdir_lib.write_config(folder, task.config)
    num_runs = sum(task.is_run for task in tasks)
    with progress(len(tasks), "compare", start=len(tasks) - len(todo)) as advance:
        advance(
            0,
            f"{num_runs} runs, {len(tasks) - num_runs} tasks that they share; "
            f"{len(tasks) - len(todo)} done before",
        )

        def started(names: list[str]) -> None:
            advance(0, f"running {', '.join(names)}")

        def report(task: Task, error: str) -> None:
            if error:
                failed.append(task)
            advance(1, f"{task.name} {'failed: ' + error if error else 'done'}")

        if todo:
            runner.run(tasks, workdir, jobs=_JOBS.value, report=report, started=started)
    return failed


def _write_list(tasks: list[Task], workdir: pathlib.Path) -> None:
    """Write runs.jsonl: a line per run, by index, for schedulers and readers."""

    def line(index: int, task: Task) -> dict[str, Any]:
        return {"index": index, "run": task.name, **task.levels}

    runs = [task for task in tasks if task.is_run]
    lines = [json.dumps(line(index, task)) for index, task in enumerate(runs)]
    files.write_atomically(workdir / "runs.jsonl", "\n".join(lines) + "\n")


def _validate(comparison: Comparison) -> None:
    from kdjax.comparison import grid

    cli.check_type(comparison, grid.Comparison)
    grid.runs(comparison)


if __name__ == "__main__":
    cli.run(run, validate=_validate, resumes=True)

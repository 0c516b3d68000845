"""Rationales by a prompted teacher: python -m kdjax.annotate --config=FILE.py.

Settings are in `config.annotate` (docs/annotate.md). Killed anywhere and started again
it writes the missing rows; with none missing it does nothing.
"""

import pathlib

from absl import flags

from kdjax import cli
from kdjax.config import Config
from kdjax.runtime.console import print_table

flags.declare_key_flag("json")


def run(config: Config, workdir: pathlib.Path) -> None:
    """Annotate, print the counts, and write the report to --json."""
    from kdjax.annotation import annotate
    from kdjax.parallel import distributed

    report = annotate.annotate(config, workdir)
    if distributed.is_main():
        counts = {name: report[name] for name in ("rows", "kept", "dropped")}
        print_table(
            f"{config.name}: annotations",
            [{"": name, "rows": n} for name, n in (counts | report["gates"]).items()],
        )
        print(report["file"])
        cli.write_json(report)


if __name__ == "__main__":
    cli.run(run, resumes=True)

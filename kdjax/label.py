"""Teacher caches of a config, filled: python -m kdjax.label --config=FILE.py.

Every target token of the training and held-out examples is scored by the teacher and
stored; `python -m kdjax.train` does the same when a cache is missing. Killed anywhere
and started again it continues with the next shard.
"""

import pathlib

from kdjax import cli
from kdjax.config import Config
from kdjax.runtime.console import print_table


def run(config: Config, workdir: pathlib.Path) -> None:
    """Label what is missing and print what the caches hold."""
    from kdjax.experiment.run import open_run
    from kdjax.experiment.teacher import teacher_folder
    from kdjax.parallel import distributed
    from kdjax.teacher import build

    teacher_path = teacher_folder(config, workdir)
    if not (config.teacher.path or pathlib.Path(teacher_path).is_dir()):
        raise ValueError(
            f"teacher.path='' and {teacher_path} does not exist: give "
            "--config.teacher.path, or run kdjax.train, which trains a teacher first"
        )
    labelled = open_run(config, workdir)
    build.check(labelled)
    build.check_can_label(labelled)
    caches = build.ensure(labelled)
    if distributed.is_main():
        print_table(
            f"{config.name}: teacher caches",
            [
                build.describe(part.config, workdir, name)
                for part in build.part_runs(labelled)
                for name in caches
            ],
        )


if __name__ == "__main__":
    cli.run(run, resumes=True, store="write")

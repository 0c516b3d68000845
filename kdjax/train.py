"""Training of a student: python -m kdjax.train --config=FILE.py[:argument].

In turn: the built-in task's teacher is trained (unless teacher.path names one), the
teacher's outputs are cached (unless they are), the student is trained on them, and both
are evaluated. Killed anywhere and started again with the same command it continues.
"""

import pathlib

from absl import flags

from kdjax import cli
from kdjax.config import Config

_UNTIL = flags.DEFINE_enum(
    "until", "end", ("teacher", "end"), "Stop when this is trained, or evaluated."
)


def run(config: Config, workdir: pathlib.Path, *, until: str = "end") -> None:
    """Run an experiment; "teacher" stops when the teacher is trained."""
    from kdjax.pipeline import distill

    if until == "teacher":
        distill.train_teacher(config, workdir)
    else:
        distill.distill(config, workdir)


if __name__ == "__main__":
    cli.run(
        lambda config, workdir: run(config, workdir, until=_UNTIL.value),
        resumes=True,
        store="write",
    )

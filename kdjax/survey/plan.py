"""Planning of a study: what is rated, by whom, and the files that say so."""

import pathlib

from kdjax.survey.config import StudyConfig


def run(config: StudyConfig, workdir: pathlib.Path, *, power: bool = False) -> None:
    """Write the design of a study."""
    raise NotImplementedError

"""Answers of a study as tables."""

import pathlib


def run(workdir: pathlib.Path) -> list[pathlib.Path]:
    """Write the tables; return their files."""
    raise NotImplementedError

"""The survey as a web application."""

import pathlib


def run(workdir: pathlib.Path, *, host: str, port: int, is_https: bool) -> None:
    """Serve a planned study."""
    raise NotImplementedError

"""The working directory of a run: its config, its owner and its files."""

import pathlib

from kdjax import config as config_lib
from kdjax.config import Config
from kdjax.experiment import resume
from kdjax.parallel import distributed
from kdjax.runtime import files

CONFIG = "config.json"
SUMMARY = "summary.json"
GENERATIONS = "generations.jsonl"
CHOICES = "choices.jsonl"


def read_config(folder: pathlib.Path) -> Config:
    """Read the config that a directory belongs to.

    Raises:
      ValueError: there is none, or a field is unknown.
    """
    file = folder / CONFIG
    if not file.is_file():
        raise ValueError(
            f"workdir={str(folder)!r} has no {CONFIG}: give the directory of a run"
        )
    return config_lib.from_json(file.read_text())


def claim(folder: pathlib.Path, config: Config) -> None:
    """Make a working directory this config's own, or check that it is.

    Raises:
      ValueError: another config has run there; the fields that differ are named.
    """
    check_owner(folder, config)
    distributed.barrier("claim")
    if distributed.is_main():
        write_config(folder, config)


def check_owner(folder: pathlib.Path, config: Config) -> None:
    """Check that no other config has run in a directory.

    Raises:
      ValueError: one has; the fields that differ are named.
    """
    if not (folder / CONFIG).exists():
        return
    if changed := resume.differences(read_config(folder), config):
        raise ValueError(
            f"workdir={str(folder)!r} holds a run of another config "
            f"({'; '.join(changed)}): use another --workdir, or remove it"
        )


def write_config(folder: pathlib.Path, config: Config) -> None:
    """Write the config that a directory belongs to."""
    files.write_atomically(folder / CONFIG, config_lib.to_json(config))

"""Studies of explanations with people: python -m kdjax.study ACTION --workdir=DIR ...

plan --config=FILE.py [--power]   a frozen design of finished runs: design.json
serve [--host=...] [--port=...]   the survey, and the page of its administrator
export                            answers as tables: ratings.csv and others
analyse [--ratings=FILE]          statistics of the ratings, and a page of them
"""

import pathlib
import sys
from typing import TYPE_CHECKING

from absl import flags

from kdjax import cli

if TYPE_CHECKING:
    from kdjax.survey.config import StudyConfig

for _name in ("config", "workdir"):
    flags.declare_key_flag(_name)
_POWER = flags.DEFINE_bool(
    "power", False, "plan: also simulate the smallest difference that will be seen."
)
_HOST = flags.DEFINE_string(
    "host", "127.0.0.1", "serve: address to listen on; 0.0.0.0 is all of them."
)
_PORT = flags.DEFINE_integer(
    "port", 8000, "serve: port to listen on; 0 takes a free one.", 0, 65535
)
_HTTPS = flags.DEFINE_bool(
    "https", False, "serve: a proxy on this machine adds TLS; cookies demand it."
)
_RATINGS = flags.DEFINE_string(
    "ratings", None, "analyse: a csv of ratings; that of the workdir by default."
)
_COLUMNS = flags.DEFINE_string(
    "columns",
    "",
    "analyse: columns of --ratings under kdjax's names: participant=rater,item=id.",
)
_REFERENCE = flags.DEFINE_string(
    "reference",
    "",
    "analyse: condition that others are compared with; the first by default.",
)


def plan() -> None:
    """Write a study's design, and its preregistration sheet."""
    from kdjax.survey import plan as plan_lib

    config: StudyConfig = cli.given_config(_validate)
    plan_lib.run(config, _workdir(), power=_POWER.value)


def serve() -> None:
    """Serve a planned study until the process is ended."""
    from kdjax.survey import server

    server.run(_workdir(), host=_HOST.value, port=_PORT.value, is_https=_HTTPS.value)


def export() -> None:
    """Write the answers as csv files."""
    from kdjax.survey import export as export_lib

    for file in export_lib.run(_workdir()):
        print(file)


def analyse() -> None:
    """Write the statistics of a study's ratings."""
    from kdjax.survey import analyse as analyse_lib

    ratings = pathlib.Path(_RATINGS.value) if _RATINGS.value else None
    workdir = flags.FLAGS.workdir
    if ratings and not workdir:  # beside the table
        workdir = ratings.with_name(f"{ratings.stem}_analysis")
    analyse_lib.run(
        pathlib.Path(workdir) if workdir else _workdir(),
        ratings=ratings,
        columns=_COLUMNS.value,
        reference=_REFERENCE.value,
    )


def _validate(config: "StudyConfig") -> None:
    from kdjax.survey import config as config_lib

    cli.check_type(config, config_lib.StudyConfig)
    config_lib.validate(config)


def _workdir() -> pathlib.Path:
    if not flags.FLAGS.workdir:
        raise ValueError("--workdir is missing: name the study's directory")
    return pathlib.Path(flags.FLAGS.workdir)


ACTIONS = {"plan": plan, "serve": serve, "export": export, "analyse": analyse}


def run(arguments: list[str]) -> None:
    """Run the action that the argument names."""
    if len(arguments) != 1 or arguments[0] not in ACTIONS:
        raise ValueError(
            f"action={' '.join(arguments)!r} is unknown: use one of {list(ACTIONS)}"
        )
    ACTIONS[arguments[0]]()
    sys.stdout.flush()


if __name__ == "__main__":
    cli.run_actions(run)

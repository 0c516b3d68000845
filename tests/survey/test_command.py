"""The command line of kdjax.study: errors in one line, fields that it lists."""

import os
import subprocess
import sys

import pytest

ENVIRONMENT = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"}


def run(*arguments):
    return subprocess.run(
        [sys.executable, "-m", "kdjax.study", *arguments],
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["launch"], "action='launch' is unknown: use one of ['plan', 'serve'"),
        (["serve"], "--workdir is missing"),
        (["export", "--workdir=nowhere"], "has no design.json: plan the study first"),
        (
            ["plan", "--config=study/kinship", "--config.partecipants=3"],
            "did you mean participants",
        ),
    ],
)
def test_errors_are_one_line(arguments, message):
    process = run(*arguments)
    assert process.returncode == 1 and message in process.stderr
    assert len(process.stderr.strip().splitlines()) == 1


def test_the_fields_are_those_of_a_study():
    printed = run("--helpconfig").stdout
    assert "--config.items_per_participant=12  (1 or more)" in printed
    assert "train.steps" not in printed

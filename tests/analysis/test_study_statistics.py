"""Error rates and coverage on constructed studies, as the benchmark measures them."""

import os
import pathlib
import re
import subprocess
import sys

import pytest

SCRIPT = pathlib.Path(__file__).parents[2] / "benchmarks" / "study_statistics.py"


@pytest.mark.slow
def test_headline_tests_hold_their_level():
    command = [sys.executable, str(SCRIPT), "--studies=60"]
    text = subprocess.run(
        command,
        check=True,
        capture_output=True,
        text=True,
        # Threads for matrices of some 200 rows cost more than they give.
        env=os.environ | {"OPENBLAS_NUM_THREADS": "1"},
    ).stdout
    # Each share with its verdict: within its own interval of simulation, or not. Where
    # explanations differ, only the model that knows of it holds.
    people, explanations, effects = (
        dict(re.findall(r"^\| (.*?) \| [\d.]+ \| .*? \| (.*?) \|$", table, re.M))
        for table in re.split(r"\n\n(?=\|)", text)[1:4]
    )
    for verdicts, name in (
        (people, "permutation within participants, Quality"),
        (people, "permutation within participants, all constructs"),
        (people, "linear mixed model, Quality"),
        (people, "cumulative-logit mixed model, one construct"),
        (explanations, "linear mixed model with explanations, Quality"),
        (effects, "linear mixed model, difference of Quality"),
        (effects, "cumulative-logit mixed model, log odds"),
    ):
        assert verdicts[name].startswith("holds"), text

"""Error rates and coverage on constructed studies, as the benchmark measures them."""

import pathlib
import re
import subprocess
import sys

import pytest

SCRIPT = pathlib.Path(__file__).parents[2] / "benchmarks" / "study_statistics.py"


@pytest.mark.slow
def test_headline_tests_hold_their_level():
    command = [sys.executable, str(SCRIPT), "--studies=60"]
    text = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    # Each share with its verdict: within its own interval of simulation, or not.
    verdicts = dict(re.findall(r"^\| (.*?) \| [\d.]+ \| .*? \| (.*?) \|$", text, re.M))
    for name in (
        "permutation within participants, Quality",
        "permutation within participants, all constructs",
        "linear mixed model, Quality",
        "cumulative-logit mixed model, one construct",
        "linear mixed model, difference of Quality",
        "cumulative-logit mixed model, log odds",
    ):
        assert verdicts[name].startswith("holds"), text

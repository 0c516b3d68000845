"""What a student's decoding costs: the numbers agree with one another."""

import pytest

from kdjax.bench import decode
from kdjax.experiment.data import load_tokenizer
from kdjax.experiment.models import student_shape
from kdjax.models import flops
from tests import helpers


def test_numbers_are_consistent():
    config = helpers.small_config()
    calls = []
    found = decode.measure(config, batch_sizes=(1, 8), rounds=2, advance=calls.append)
    assert sum(calls) == 2 * (1 + 2)  # a warm call each, then the rounds
    shape = student_shape(config, load_tokenizer(config))
    num_bytes = 4 * flops.params_count(shape)
    for size in (1, 8):
        milliseconds = found[f"latency/{size}"]
        assert milliseconds > 0
        rate = found[f"decoded_per_second/{size}"]
        assert rate == pytest.approx(1000 * size / milliseconds)
        assert found[f"memory/{size}"] * 2**20 > num_bytes
    assert found["memory/8"] > found["memory/1"]

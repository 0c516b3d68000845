"""Mutated files of every format that a stranger may send: refused in one line, or read.

`python -m tests.fuzz` reads 10,000 of each.
"""

import pytest

from tests import fuzz


@pytest.mark.slow
@pytest.mark.parametrize("name", [*fuzz.FORMATS])
def test_a_mutated_file_is_read_or_refused_in_one_line(name, tmp_path):
    num = 60 if name == "weights" else 300
    outcomes = fuzz.run(name, num, tmp_path)
    assert sum(outcomes.values()) == num
    assert len(outcomes) > 1  # some are refused


def test_the_mutations_follow_from_their_seed():
    import numpy as np

    data = b'{"vocab_size": 64, "rope_theta": 10000.0}' * 20
    changed = {fuzz.mutate(data, np.random.default_rng([0, n])) for n in range(50)}
    again = {fuzz.mutate(data, np.random.default_rng([0, n])) for n in range(50)}
    assert changed == again and len(changed) > 45

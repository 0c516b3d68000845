"""Losses of a config's first steps are those that were recorded.

If this fails after a change that is meant to change them: see `make_losses`.
"""

import numpy as np
import pytest

from tests.golden import make_losses


@pytest.mark.parametrize("name", ["decoder", "hard", "lora", "t5"])
def test_losses_are_the_recorded_ones(losses, name):
    # Another CPU and another XLA round otherwise.
    np.testing.assert_allclose(losses[name], make_losses.read()[name], rtol=1e-4)


@pytest.fixture(scope="module")
def losses(shared_folder):
    return make_losses.built_in(shared_folder)

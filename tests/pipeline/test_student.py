"""Students of runs."""

import pytest

from kdjax.experiment.run import open_run
from kdjax.pipeline.student import export_student
from tests import helpers


def test_a_run_without_a_checkpoint_is_not_exported(tmp_path):
    run = open_run(helpers.small_config(), tmp_path, splits=())
    with pytest.raises(ValueError, match="train first"):
        export_student(run, tmp_path / "out")
    assert not (tmp_path / "out").exists()

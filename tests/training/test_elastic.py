"""A run goes on over other axes of the mesh: same batches, same losses to rounding."""

import pytest

from kdjax import label, train
from kdjax.parallel import distributed
from tests import helpers


@pytest.fixture
def config(tmp_path):
    """A small run with a teacher of its own, which is trained."""
    config = helpers.small_config(
        train={"steps": 8, "save_every": 0, "num_microbatches": 1},
        teacher={"steps": 2},
        cache={"shard_size": 3, "batch_size": 2},
        optim={"learning_rate": 1e-3},
    )
    train.run(config, tmp_path / "teacher", until="teacher")
    config.teacher.path = str(tmp_path / "teacher" / "teacher")
    return config


@pytest.mark.slow
def test_meshes_of_any_axes_are_one_run(config, tmp_path, monkeypatch):
    """Data 1 and fsdp 8, 8 and 1, 2 and 4, then the tensor axis, as one run."""
    config.cache.path = str(tmp_path / "cache")
    label.run(config, tmp_path / "label")
    one, several = tmp_path / "one", tmp_path / "several"
    train.run(config, one)
    meshes = [(1, 8, 1), (8, 1, 1), (2, 4, 1), (2, 2, 2)]
    for index, (data, fsdp, tensor) in enumerate(meshes):
        mesh = {"data": data, "fsdp": fsdp, "tensor": tensor}
        stop = 2 * (index + 1)
        monkeypatch.setattr(
            distributed.Preemption, "requested", lambda self, s, stop=stop: s == stop
        )
        if stop < 8:
            with pytest.raises(SystemExit):
                train.run(helpers.changed(config, mesh=mesh), several)
        else:
            monkeypatch.undo()
            train.run(helpers.changed(config, mesh=mesh), several)
    helpers.check_same_run(one, several, rtol=1e-4)

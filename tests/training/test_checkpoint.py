"""Checkpoints: read beside a writer, checked, and an older one for a damaged one."""

import json
import pathlib
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kdjax.runtime import locks
from kdjax.training.checkpoint import CHECKSUMS, Checkpoints, CheckpointWriter
from kdjax.training.state import TrainState


def state(step: int) -> TrainState:
    rng = np.random.default_rng(step)
    params = {"head": {"kernel": jnp.asarray(rng.normal(size=(16, 8)), jnp.float32)}}
    return TrainState(
        step=jnp.int32(step),
        params=params,
        opt_state={"mu": jax.tree.map(lambda x: 2 * x, params)},
    )


def abstract() -> TrainState:
    return jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state(0)
    )


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> pathlib.Path:
    """Checkpoints of steps 1 and 2; to be copied before it is changed."""
    folder = tmp_path_factory.mktemp("run") / "checkpoints"
    with CheckpointWriter(folder) as checkpoints:
        for step in (1, 2):
            checkpoints.save(step, state(step), nll=1.0)
    return folder


@pytest.fixture
def folder(saved, tmp_path) -> pathlib.Path:
    shutil.copytree(saved, tmp_path / "checkpoints")
    return tmp_path / "checkpoints"


def assert_same(one, two):
    jax.tree.map(np.testing.assert_array_equal, one, two)


def test_every_file_has_a_checksum(saved):
    for step in ("1", "2"):
        checksums = json.loads((saved / step / CHECKSUMS).read_text())["files"]
        names = {
            file.relative_to(saved / step).as_posix()
            for file in (saved / step).rglob("*")
            if file.is_file()
        }
        assert checksums.keys() == names - {CHECKSUMS}
    checkpoints = Checkpoints(saved)
    assert checkpoints.steps() == [1, 2] and checkpoints.latest_step() == 2
    assert_same(checkpoints.restore(abstract()), state(2))
    assert_same(checkpoints.restore(abstract(), step=1), state(1))


def test_reading_changes_nothing_and_sees_complete_ones_alone(folder):
    unfinished = folder / "3.orbax-checkpoint-tmp"
    (unfinished / "state").mkdir(parents=True)
    before = {path: path.stat().st_mtime_ns for path in folder.parent.rglob("*")}
    checkpoints = Checkpoints(folder)
    assert checkpoints.latest_step() == 2
    assert_same(checkpoints.restore(abstract()), state(2))
    assert_same(checkpoints.restore_params(abstract().params), state(2).params)
    after = {path: path.stat().st_mtime_ns for path in folder.parent.rglob("*")}
    assert after == before
    assert Checkpoints(folder / "nothing").latest_step() is None
    assert not (folder / "nothing").exists()


def test_every_flipped_bit_is_noticed(folder):
    """120 single flips over all files, those of the checksums too."""
    rng = np.random.default_rng(0)
    names = sorted(path for path in (folder / "2").rglob("*") if path.is_file())
    sizes = np.array([path.stat().st_size for path in names])
    checkpoints = Checkpoints(folder)
    for _ in range(120):
        file = names[rng.choice(len(names), p=sizes / sizes.sum())]
        content = bytearray(file.read_bytes())
        position = rng.integers(len(content))
        content[position] ^= 1 << rng.integers(8)
        whole = file.read_bytes()
        file.write_bytes(content)
        if checkpoints.damage(2) == "":  # white space of the checksums
            assert file.name == CHECKSUMS
            assert json.loads(content) == json.loads(whole)
        file.write_bytes(whole)
    assert checkpoints.damage(2) == ""


def test_a_damaged_newest_one_is_named_with_the_sound_one(folder):
    (folder / "2" / "state" / "_METADATA").unlink()
    with pytest.raises(ValueError) as raised:
        Checkpoints(folder).restore(abstract())
    [line] = str(raised.value).splitlines()
    assert "checkpoint 2 in" in line and "state/_METADATA" in line
    assert "(--step: [1])" in line
    assert_same(Checkpoints(folder).restore(abstract(), step=1), state(1))


def test_training_goes_on_from_the_sound_one_and_says_so(folder, capsys):
    manifest = folder / "2" / "state" / "manifest.ocdbt"
    manifest.write_bytes(manifest.read_bytes()[:-1])
    with CheckpointWriter(folder) as checkpoints:
        step, restored = checkpoints.resume(abstract())
        assert step == 1
        assert_same(restored, state(1))
        [line] = capsys.readouterr().err.splitlines()
        assert "checkpoint 2 in" in line and "an older one is used" in line
        assert (folder.parent / "damaged_checkpoints" / "2").is_dir()
        checkpoints.save(2, state(2))
    assert_same(Checkpoints(folder).restore(abstract()), state(2))


def test_if_all_are_damaged_nothing_is_started_afresh(folder):
    for step in ("1", "2"):
        (folder / step / "_CHECKPOINT_METADATA").write_text("")
    with pytest.raises(ValueError, match=r"checkpoint 1 .*damaged.*no sound one"):
        CheckpointWriter(folder).resume(abstract())


def test_one_of_an_earlier_version_opens_and_is_named_if_it_does_not(folder):
    (folder / "2" / CHECKSUMS).unlink()
    assert_same(Checkpoints(folder).restore(abstract()), state(2))
    (folder / "2" / "state" / "_METADATA").write_text("{")
    with pytest.raises(ValueError) as raised:
        Checkpoints(folder).restore(abstract())
    [line] = str(raised.value).splitlines()
    assert "checkpoint 2 in" in line and "cannot be read" in line


def test_a_step_without_a_checkpoint_is_refused(folder, tmp_path):
    with pytest.raises(ValueError, match=r"step=7: .* use one of \[1, 2\]"):
        Checkpoints(folder).restore(abstract(), step=7)
    with pytest.raises(ValueError, match="has no checkpoint: train first"):
        Checkpoints(tmp_path / "nothing").restore(abstract())


def test_one_that_is_replaced_while_it_is_read_gives_the_newer(folder, monkeypatch):
    """keep_last=1: training removes what is being read."""
    load = Checkpoints._load

    def load_late(self, step, target):
        if step == 2:
            (folder / "2").rename(folder / "3")
        return load(self, step, target)

    monkeypatch.setattr(Checkpoints, "_load", load_late)
    assert_same(Checkpoints(folder).restore(abstract()), state(2))


def test_one_that_training_removes_meanwhile_is_read_to_its_end(folder, monkeypatch):
    """Beside a living owner of the directory, by hard links."""
    load, seen = Checkpoints._load, []

    def load_late(self, step, target):
        seen.append(self._folder)
        shutil.rmtree(folder / "2")
        return load(self, step, target)

    monkeypatch.setattr(Checkpoints, "_load", load_late)
    owner = locks.Owner(
        host="h", pid=1, start=0, machine="m", command="train", since="", token=""
    )
    monkeypatch.setattr(locks, "holder", lambda folder: owner)
    assert_same(Checkpoints(folder).restore(abstract()), state(2))
    assert seen[0].parent == folder.parent and seen[0] != folder
    assert [path.name for path in folder.parent.iterdir()] == ["checkpoints"]


def test_what_fails_in_the_background_is_raised(folder, monkeypatch):
    from kdjax.training import checkpoint

    def fail(file):
        raise OSError(28, "No space left on device", str(file))

    monkeypatch.setattr(checkpoint, "_checksum", fail)
    checkpoints = CheckpointWriter(folder)
    checkpoints.save(5, state(5))
    with pytest.raises(OSError, match="No space left"):
        checkpoints.close()

"""Terms that compare layers with an online teacher: the step, and whole runs."""

import dataclasses
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kdjax import train
from kdjax.config import MeshConfig
from kdjax.experiment import validate
from kdjax.experiment.data import load_tokenizer
from kdjax.experiment.models import make_model
from kdjax.experiment.teacher import teacher_shape
from kdjax.losses import layer_losses
from kdjax.models import decoder
from kdjax.parallel import sharding
from kdjax.training import program
from tests import helpers
from tests.helpers import TrainSteps, step_rows, summary

WIDE = dataclasses.replace(helpers.DECODER, width=48, num_heads=6, num_layers=3)
TERMS = {
    "hard_weight": 0.5,
    "soft_weight": 0.0,
    "hidden_weight": 0.3,
    "hidden_projection": True,
    "attention_weight": 0.2,
    "layer_map": (-1, 2),
}


def config_of(*, method=None, **train_changes):
    config = helpers.small_config(
        method=TERMS | (method or {}),
        train={"batch_size": 8, "row_length": 128, "num_threads": 1} | train_changes,
    )
    config.teacher.online, config.teacher.decoder = True, WIDE
    config.student.decoder = dataclasses.replace(helpers.DECODER, num_layers=2)
    validate.validate(config)
    return config


class First(TrainSteps):
    """The first step of a run, with a random teacher in it."""

    def __init__(self, config, *, mesh=None, devices=None):
        placed = sharding.make_mesh(mesh or MeshConfig(), devices=devices)
        shape = teacher_shape(config, load_tokenizer(config))
        self.teacher = make_model(shape, placed, dtype="float32")
        self.teacher_params = jax.jit(
            lambda key: decoder.init_params(shape, key),
            out_shardings=self.teacher.shardings,
        )(jax.random.key(7))
        teacher = self.teacher, self.teacher_params
        super().__init__(config, num=1, mesh=mesh, devices=devices, teacher=teacher)
        self.before, self.after = (state.params for state in self.states)
        shapes = program.abstract_batch(
            config, self.model.shape, placed, vocab_size=shape.vocab_size
        )
        assert jax.tree.structure(shapes) == jax.tree.structure(self.batch)


@pytest.fixture(scope="module")
def first():
    return First(config_of(), devices=jax.devices()[:1])


def test_the_terms_are_their_formulas(first):
    rows = jax.tree.map(lambda x: np.asarray(x)[0], first.batch)
    inputs = rows.tokens, rows.positions, rows.segments
    params = {n: x for n, x in first.before.items() if n != "projection"}
    kernel = jnp.asarray(first.before["projection"]["kernel"])
    assert kernel.shape == (1, 32, 48)
    (metrics,) = first.metrics
    _, ours = decoder.captured_states(
        first.model.graphdef, params, *inputs, capture=decoder.Capture((1,), True)
    )
    _, theirs = decoder.captured_states(
        first.teacher.graphdef,
        first.teacher_params,
        *inputs,
        capture=decoder.Capture((2,), True),
    )
    each = {
        "hidden": layer_losses.hidden_loss(
            ours.states_nBTD, theirs.states_nBTD, kind="mse", projection_nDE=kernel
        ),
        "attention": layer_losses.attention_loss(
            ours.attention_nBTT, theirs.attention_nBTT
        ),
    }
    total = 0.0
    for name, weight in (("hidden", 0.3), ("attention", 0.2)):
        for view in range(2):
            member = rows.view == view
            value = np.asarray(each[name], np.float64)[member].sum()
            np.testing.assert_allclose(metrics[name][view], value, rtol=1e-4)
            total += 0.5 * weight * value / member.sum()
    counts = metrics["count"]
    hard = (0.5 * 0.5 * metrics["nll"] / counts).sum()
    np.testing.assert_allclose(metrics["loss"], total + hard, rtol=1e-5)
    assert (metrics["kl"] == 0).all()


def test_the_projection_learns_and_layers_without_a_match_hear_of_it(first):
    changed = jax.tree.map(lambda a, b: np.abs(a - b).max(), first.before, first.after)
    assert changed["projection"]["kernel"] > 0
    assert changed["layers"]["attention"]["query"]["kernel"] > 0


def test_nothing_depends_on_how_it_is_cut(first):
    config = config_of(num_microbatches=2)
    other = First(config, mesh=MeshConfig(data=2, fsdp=2, tensor=2))
    for name in ("loss", "grad_norm", "nll", "hidden", "attention", "count"):
        np.testing.assert_allclose(
            first.metrics[0][name],
            other.metrics[0][name],
            rtol=1e-5,
            atol=1e-6,
            err_msg=name,
        )


def test_with_soft_terms_the_same_teacher_serves_both():
    config = config_of(method={"soft_weight": 0.5, "attention_weight": 0.0})
    (metrics,) = First(config, devices=jax.devices()[:1]).metrics
    assert (metrics["kl"] > 0).all() and (metrics["hidden"] > 0).all()
    assert "attention" not in metrics


def test_a_run_continues_and_its_student_is_a_plain_model(
    decoder_run, shared_folder, tmp_path
):
    run, again = tmp_path / "run", tmp_path / "again"
    config = helpers.taught(
        shared_folder,
        method=TERMS | {"soft_weight": 0.1, "layer_map": (-1, 1)},
        student={"decoder": dataclasses.replace(helpers.DECODER, width=24)},
        train={"steps": 3, "save_every": 2},
        evaluation={"num_generations": 0},
    )
    config.teacher.online = True
    train.run(config, run)
    last = step_rows(run)[-1]
    for name in ("hidden", "attention"):
        for view in ("label", "rationale"):
            assert last[f"loss/{view}/{name}"] > 0
    metrics = helpers.score(config, run, "student")
    assert abs(metrics["nll"] - summary(run)["student"]["nll"]) < 1e-5

    shutil.copytree(run, again)
    shutil.rmtree(again / "checkpoints" / "3")
    (again / "summary.json").unlink()
    train.run(config, again)
    assert summary(again)["student"] == summary(run)["student"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"layer_map": ()}, "layer_map=()"),
        ({"layer_map": (-1, -1)}, "layer_map=(-1, -1)"),
        ({"layer_map": (0, -2)}, "layer_map=-2 is below -1"),
        ({"hidden_loss": "l1"}, "hidden_loss='l1'"),
        ({"hidden_weight": -1.0}, "hidden_weight=-1.0"),
        ({"layer_map": (0,)}, "layer_map=(0,)"),
        ({"layer_map": (0, 3)}, "layer_map=(0, 3)"),
        ({"hidden_projection": False}, "hidden_projection=True"),
        (None, "teacher.online=True"),
    ],
)
def test_what_cannot_be_compared_is_refused_before_anything_runs(
    changes, message, tmp_path
):
    config = config_of()
    config.method = dataclasses.replace(config.method, **(changes or {}))
    config.teacher.online = changes is not None
    with pytest.raises(ValueError) as refused:
        validate.validate(config)
        train.run(config, tmp_path)
    assert message in str(refused.value)
    assert not (tmp_path / "teacher_run").exists()

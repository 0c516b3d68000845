"""Terms that compare layers with an online teacher: the step, and whole runs."""

import dataclasses
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kdjax import train
from kdjax.config import MeshConfig
from kdjax.data import loader
from kdjax.experiment import validate
from kdjax.experiment.data import load_data
from kdjax.experiment.models import make_model, student_params, student_shape
from kdjax.experiment.rows import make_plan
from kdjax.experiment.teacher import teacher_shape
from kdjax.losses import layer_losses
from kdjax.models import decoder
from kdjax.parallel import sharding
from kdjax.training import program
from tests import helpers

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


class First:
    """The first step of a run, and all that it was made of."""

    def __init__(self, config, *, mesh_config=None, devices=None):
        mesh = sharding.make_mesh(mesh_config or MeshConfig(), devices=devices)
        data = load_data(config, splits=("train",))
        self.model = make_model(
            student_shape(config, data.tokenizer), mesh, dtype="float32"
        )
        shape = teacher_shape(config, data.tokenizer)
        self.teacher = make_model(shape, mesh, dtype="float32")
        self.frozen = jax.jit(
            lambda key: decoder.init_params(shape, key),
            out_shardings=self.teacher.shardings,
        )(jax.random.key(7))
        made = program.Program(config, self.model, mesh, teacher=self.teacher)
        state = made.init(student_params(config, self.model, ""))
        self.params = jax.tree.map(np.asarray, state.params)
        self.batch = loader.make_batch(
            make_plan(config, self.model.shape, data.train),
            0,
            terms=made.terms(0),
            rows=sharding.local_rows(mesh, made.num_rows),
            online=True,
        )
        shapes = program.abstract_batch(
            config, self.model.shape, mesh, vocab_size=shape.vocab_size
        )
        assert jax.tree.structure(shapes) == jax.tree.structure(self.batch)
        placed = sharding.global_batch(self.batch, mesh, made.num_rows)
        state, metrics = made.step(state, placed, self.frozen)
        self.metrics = jax.tree.map(np.asarray, metrics)
        self.after = jax.tree.map(np.asarray, state.params)


@pytest.fixture(scope="module")
def first():
    return First(config_of(), devices=jax.devices()[:1])


def test_the_terms_are_their_formulas(first):
    rows = jax.tree.map(lambda x: x[0], first.batch)
    inputs = rows.tokens, rows.positions, rows.segments
    params = {n: x for n, x in first.params.items() if n != "projection"}
    kernel = jnp.asarray(first.params["projection"]["kernel"])
    assert kernel.shape == (1, 32, 48)
    _, ours = decoder.captured_states(
        first.model.graphdef, params, *inputs, capture=decoder.Capture((1,), True)
    )
    _, theirs = decoder.captured_states(
        first.teacher.graphdef,
        first.frozen,
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
            np.testing.assert_allclose(first.metrics[name][view], value, rtol=1e-4)
            total += 0.5 * weight * value / member.sum()
    counts = first.metrics["count"]
    hard = (0.5 * 0.5 * first.metrics["nll"] / counts).sum()
    np.testing.assert_allclose(first.metrics["loss"], total + hard, rtol=1e-5)
    assert (first.metrics["kl"] == 0).all()


def test_the_projection_learns_and_layers_without_a_match_hear_of_it(first):
    changed = jax.tree.map(lambda a, b: np.abs(a - b).max(), first.params, first.after)
    assert changed["projection"]["kernel"] > 0
    assert changed["layers"]["attention"]["query"]["kernel"] > 0


@pytest.mark.parametrize("cut", ["microbatches", "mesh"])
def test_nothing_depends_on_how_it_is_cut(first, cut):
    if cut == "mesh":
        other = First(config_of(), mesh_config=MeshConfig(data=2, fsdp=2, tensor=2))
    else:
        other = First(config_of(num_microbatches=4), devices=jax.devices()[:1])
    for name in ("loss", "grad_norm", "nll", "hidden", "attention", "count"):
        np.testing.assert_allclose(
            first.metrics[name],
            other.metrics[name],
            rtol=1e-5,
            atol=1e-6,
            err_msg=name,
        )


def test_with_soft_terms_the_same_teacher_serves_both():
    found = First(
        config_of(method={"soft_weight": 0.5, "attention_weight": 0.0}),
        devices=jax.devices()[:1],
    ).metrics
    assert (found["kl"] > 0).all() and (found["hidden"] > 0).all()
    assert "attention" not in found


def test_a_run_continues_and_its_student_is_a_plain_model(tmp_path):
    config = config_of(method={"soft_weight": 0.1})
    train.run(config, tmp_path / "run")
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    rows = [row for row in map(json.loads, lines) if "loss" in row]
    for name in ("hidden", "attention"):
        for view in ("label", "rationale"):
            assert rows[-1][f"loss/{view}/{name}"] > 0
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    found = helpers.score(config, tmp_path / "run", "student")
    assert abs(found["nll"] - summary["student"]["nll"]) < 1e-5

    shutil.copytree(tmp_path / "run", tmp_path / "again")
    shutil.rmtree(tmp_path / "again" / "checkpoints" / "6")
    (tmp_path / "again" / "summary.json").unlink()
    train.run(config, tmp_path / "again")
    again = json.loads((tmp_path / "again" / "summary.json").read_text())
    assert again["student"] == summary["student"]


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

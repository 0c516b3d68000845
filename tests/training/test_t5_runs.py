"""T5 students through whole runs: rows, dropout, teachers of either kind, export."""

import dataclasses
import json

import jax
import numpy as np
import pytest
import torch
import transformers

from kdjax import train
from kdjax.config import MeshConfig
from kdjax.data import loader
from kdjax.data import tokenizer as tokenizers
from kdjax.evaluation.scorer import Scorer
from kdjax.experiment.data import load_data, load_tokenizer
from kdjax.experiment.models import (
    load_model,
    make_model,
    student_params,
    student_shape,
)
from kdjax.experiment.rows import make_plan, row_kwargs
from kdjax.experiment.run import open_run
from kdjax.models import hf, lm, t5
from kdjax.models.generate import Decoding, Generator
from kdjax.parallel import sharding
from kdjax.teacher import build
from kdjax.training import program
from tests import helpers
from tests.helpers import T5, TrainSteps, load_student, summary

SHAPE = dataclasses.replace(T5, dropout=0.0)


def config(**changes):
    """A small config with a T5 student, whose rows are too short for its teacher."""
    student = {"architecture": "t5", "t5": SHAPE} | changes.pop("student", {})
    rows = {"row_length": 40, "encoder_row_length": 96} | changes.pop("train", {})
    return helpers.small_config(student=student, train=rows, **changes)


def test_a_run_with_a_decoder_only_teacher(t5_run):
    config, workdir = t5_run
    results = summary(workdir)
    for name in ("accuracy", "nll", "kl", "agreement", "exact_match/label"):
        assert np.isfinite(results["student"][name]), name
    model, params = load_student(config, workdir)
    num_params = sum(leaf.size for leaf in jax.tree.leaves(params))
    assert results["parameters"]["student"] == num_params
    assert (model.shape.pad_id, model.shape.eos_id, model.shape.start_id) == (0, 1, 0)
    rows = (workdir / "generations.jsonl").read_text().splitlines()
    assert len(rows) == 2 * 3 and all(json.loads(row)["prompt"] for row in rows)


def test_a_resumed_run_is_the_uninterrupted_one(t5_run, tmp_path):
    """With dropout, whose keys follow from the step."""
    config, workdir = t5_run
    again = helpers.copy_run(workdir, tmp_path / "again", unfinished=True)
    train.run(config, again)
    jax.tree.map(
        np.testing.assert_array_equal,
        load_student(config, again)[1],
        load_student(config, workdir)[1],
    )
    assert summary(again)["student"] == summary(workdir)["student"]


def test_export_is_read_by_transformers(t5_run, tmp_path):
    config, workdir = t5_run
    helpers.export(config, workdir, tmp_path / "out")
    theirs = transformers.AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "out").eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    model, params = load_student(config, workdir)
    run = helpers.open_eval(config, workdir)
    data = run.data
    segment = data.evaluation[0]
    prompt = [*segment.prompt_ids, tokenizer.eos_token_id]
    wanted = theirs.generate(
        torch.tensor([prompt]), max_new_tokens=8, do_sample=False
    ).numpy()[0, 1:]
    decoding = Decoding(
        max_new_tokens=8, eos_ids=(model.shape.eos_id,), pad_id=model.shape.pad_id
    )
    found = Generator(model.shape, model.graphdef, decoding)(params, [prompt])[0]
    assert found == [token for token in wanted.tolist() if token > 1]
    logits = theirs(
        input_ids=torch.tensor([prompt]),
        decoder_input_ids=torch.tensor([[0, *segment.target_ids[:-1]]]),
    ).logits
    nll = torch.nn.functional.cross_entropy(
        logits[0], torch.tensor(segment.target_ids.astype(np.int64)), reduction="sum"
    ).item()
    scorer = Scorer(run)
    scores = scorer._per_segment(params, scorer._tokens, None)
    np.testing.assert_allclose(scores["nll"][0], nll, rtol=1e-4)


def test_packed_rows_score_as_single_ones(t5_run):
    config, workdir = t5_run
    model, params = load_student(config, workdir)
    run = helpers.open_eval(config, workdir)
    data, scorer = run.data, Scorer(run)
    packed = scorer._per_segment(params, scorer._tokens, None)["nll"]
    assert max(len(row) for row in scorer._tokens.batch(0)) > 1
    longest = max(len(s.prompt_ids) for s in data.evaluation) + 1
    alone = []
    for segment in data.evaluation:
        rows = row_kwargs(model.shape, 64, longest)
        plan = loader.BatchPlan([segment], batch_size=8, shuffle=False, **rows)
        alone.append(scorer._per_segment(params, plan, None)["nll"][0])
    np.testing.assert_allclose(packed, alone, rtol=1e-5, atol=1e-5)


def one_step(*, dropout=0.1, devices=1, mesh=None, **changes):
    """A step on hard labels."""
    made = config(
        method={"soft_weight": 0.0, "hard_weight": 1.0},
        student={"t5": dataclasses.replace(SHAPE, dropout=dropout)},
        **changes,
    )
    return TrainSteps(made, num=1, mesh=mesh, devices=jax.devices()[:devices])


def test_dropout_does_not_depend_on_how_the_batch_is_cut():
    one, off = one_step(), one_step(dropout=0.0)
    assert abs(one.losses[0] - off.losses[0]) > 1e-3
    cut = one_step(
        train={"num_microbatches": 2},
        mesh=MeshConfig(data=2, fsdp=2, tensor=2),
        devices=8,
    )
    np.testing.assert_allclose(cut.losses, one.losses, rtol=1e-6)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=2e-4),
        cut.states[1].params,
        one.states[1].params,
    )
    mesh = sharding.make_mesh(MeshConfig(), devices=jax.devices()[:1])
    abstract = program.abstract_batch(one.config, T5, mesh, vocab_size=113)
    described = jax.tree.map(lambda x: (x.shape, x.dtype), abstract)
    assert described == jax.tree.map(lambda x: (x.shape, x.dtype), one.batch)


def test_dropout_keys_follow_from_seed_and_step():
    made = config()
    data = load_data(made, splits=("train",))
    plan = make_plan(made, SHAPE, data.train)

    def keys(plan, step, **arguments):
        batch = loader.make_batch(plan, step, terms=(), dropout=True, **arguments)
        return batch.dropout_keys

    first = keys(plan, 0)
    assert first.shape == (1, 8, 2) and len(np.unique(first[0], axis=0)) == 8
    assert not np.array_equal(first, keys(plan, 1))
    np.testing.assert_array_equal(keys(plan, 0, rows=slice(2, 5)), first[:, 2:5])
    made.seed = 1
    assert not np.array_equal(first, keys(make_plan(made, SHAPE, data.train), 0))
    assert loader.make_batch(plan, 0, terms=()).dropout_keys is None


def save_teacher(folder, **changes):
    tokenizer = tokenizers.make_word_tokenizer()
    shape = dataclasses.replace(SHAPE, vocab_size=len(tokenizer), **changes)
    params = t5.init_params(shape, jax.random.key(5))
    hf.save(folder, shape, params, tokenizer)
    return shape, params


@pytest.fixture(scope="module")
def labelled(tmp_path_factory):
    """A config with a T5 teacher, and the caches of its whole rows."""
    folder = tmp_path_factory.mktemp("t5")
    made = config(
        teacher={"path": str(folder / "teacher")},
        student={"init": "folder", "path": str(folder / "teacher")},
        cache={
            "path": str(folder / "cache"),
            "kind": "dense",
            "row_length": 64,
            "encoder_row_length": 128,
        },
    )
    save_teacher(folder / "teacher")
    return made, build.ensure(open_run(made, folder))


def test_a_t5_teacher_agrees_with_itself(labelled, tmp_path):
    """Labelled by its folder and scored as a student that starts from it."""
    config, caches = labelled
    run = helpers.open_eval(config, tmp_path)
    scorer = Scorer(run, cache=caches["eval"])
    metrics = scorer(student_params(config, run.student, config.teacher.path)())
    assert 0 <= metrics["kl"] < 1e-4 and metrics["agreement"] > 0.99


def test_a_live_t5_teacher_is_its_cache(labelled):
    config, caches = labelled
    config = helpers.changed(config, student={"init": "random"})
    stored = TrainSteps(config, cache=caches["train"])
    mesh = sharding.make_mesh(config.mesh)
    teacher = load_model(config.teacher.path, mesh, dtype="float32")
    online = helpers.changed(config, teacher={"online": True})
    live = TrainSteps(online, teacher=teacher)
    np.testing.assert_allclose(stored.losses, live.losses, rtol=1e-4)


def test_kept_layers_of_both_stacks(tmp_path):
    made = config(
        teacher={"path": str(tmp_path / "teacher")},
        student={
            "init": "teacher_layers",
            "keep_layers": (2, 0),
            "keep_encoder_layers": (1,),
            "dropout": 0.3,
        },
    )
    _, params = save_teacher(
        tmp_path / "teacher", num_decoder_layers=3, num_encoder_layers=2
    )
    mesh = sharding.make_mesh(made.mesh)
    tokenizer = load_tokenizer(made)
    shape = student_shape(made, tokenizer)
    assert (shape.num_encoder_layers, shape.num_decoder_layers) == (1, 2)
    assert lm.dropout(shape) == 0.3
    model = make_model(shape, mesh, dtype="float32")
    kept = student_params(made, model, made.teacher.path)()
    for stack, layers in (("encoder", [1]), ("decoder", [2, 0])):
        wanted = jax.tree.map(lambda x: x[np.array(layers)], params[stack]["layers"])  # noqa: B023
        jax.tree.map(np.testing.assert_array_equal, kept[stack]["layers"], wanted)
    made.student.keep_encoder_layers = (2,)
    with pytest.raises(ValueError, match=r"keep_encoder_layers=\(2,\): the"):
        student_shape(made, tokenizer)


def test_generation_equals_decoding_without_a_cache():
    shape = dataclasses.replace(SHAPE, vocab_size=50)
    graphdef, _ = t5.create(shape)
    params = jax.tree.map(lambda x: 2 * x, t5.init_params(shape, jax.random.key(0)))
    rng = np.random.default_rng(0)
    prompts = [[*rng.integers(2, 50, n).tolist(), 1] for n in (3, 17, 9)]
    decoding = Decoding(max_new_tokens=6, eos_ids=(), pad_id=0)
    found = Generator(shape, graphdef, decoding)(params, prompts)

    @jax.jit
    def best(rows):
        hidden = lm.hidden_states(graphdef, params, rows)
        return lm.logits(graphdef, params, hidden[0, -1]).argmax()

    for prompt, tokens in zip(prompts, found, strict=True):
        read = [0]
        for _ in range(6):
            encoder = np.array([prompt], np.int32)
            rows = helpers.rows_of(np.array([read], np.int32), encoder=encoder)
            read.append(int(best(rows)))
        assert read[1:] == tokens


def test_mixed_kinds_cannot_run_side_by_side():
    made = config(teacher={"online": True})
    with pytest.raises(ValueError, match=r"both or\s+neither have an encoder"):
        program.check_teacher(made, SHAPE, helpers.DECODER)


def test_layers_of_t5_are_not_compared():
    made = config(
        teacher={"online": True}, method={"hidden_weight": 1.0, "layer_map": (0,)}
    )
    with pytest.raises(ValueError, match="encoder-decoder models are not compared"):
        program.check_teacher(made, SHAPE, SHAPE)

"""Models of one tokenizer whose vocabularies are padded to different sizes.

The rows that no token has are left out of teacher and student: labels, losses and
measures are those of NumPy in float64 over the rows that have one.
"""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kdjax import losses
from kdjax.config import Config, DataConfig, EvalConfig, StudentConfig, TrainConfig
from kdjax.data import tokenizer as tokenizers
from kdjax.experiment import models
from kdjax.experiment.run import open_run
from kdjax.models import decoder, hf, lm
from kdjax.parallel import sharding
from kdjax.pipeline.distill import distill
from kdjax.teacher import build
from kdjax.teacher.importers import convert
from kdjax.teacher.manifest import read_manifest
from tests import helpers
from tests.data.chat_templates import make_tokenizer

SHAPE = dataclasses.replace(helpers.DECODER, num_layers=1, init_std=0.5)
SIZES = {"small": 264, "large": 272}
K = 8


def chats(num):
    return [
        {
            "messages": [
                {"role": "user", "content": f"{i} + 1?"},
                {"role": "assistant", "content": f"It is {i + 1}."},
                {"role": "user", "content": "Sure?"},
                {"role": "assistant", "content": "Yes"},
            ]
        }
        for i in range(num)
    ]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Two models of a tokenizer of 261 ids, and chats."""
    path = tmp_path_factory.mktemp("pair")
    tokenizer = make_tokenizer("qwen2.5")
    assert tokenizers.vocabulary_size(tokenizer) == 261
    for seed, (name, size) in enumerate(SIZES.items()):
        shape = dataclasses.replace(SHAPE, vocab_size=size)
        params = decoder.init_params(shape, jax.random.key(seed))
        # Rows without a token are not trained: their logits may be anything.
        embedding = params["embed"]["embedding"].at[261:].multiply(3.0)
        params["embed"]["embedding"] = embedding
        hf.save(path / name, shape, params, tokenizer)
    for name, num in (("train", 6), ("eval", 2)):
        lines = "".join(json.dumps(row) + "\n" for row in chats(num))
        (path / f"{name}.jsonl").write_text(lines)
    return path


def config_of(folder, teacher, *, kind="top_k", **changes):
    student = "small" if teacher == "large" else "large"
    base = Config(
        data=DataConfig(
            source="jsonl",
            schema="messages",
            path=str(folder / "train.jsonl"),
            eval_path=str(folder / "eval.jsonl"),
            max_prompt=128,
            max_target=128,
        ),
        student=StudentConfig(init="folder", path=str(folder / student)),
        train=TrainConfig(steps=1, batch_size=8, row_length=256, log_every=1),
        evaluation=EvalConfig(batch_size=8, num_generations=2, max_new_tokens=3),
    )
    return helpers.changed(
        base,
        teacher={"path": str(folder / teacher)},
        cache={
            "k": K,
            "kind": kind,
            "temperatures": (1.0, 2.0),
            "row_length": 256,
            "batch_size": 8,
        },
        method={"name": "chat", "hard_weight": 0.5, "soft_weight": 0.5},
        **changes,
    )


def log_probs(path, segments):
    """float64 log-probabilities for the tokens in the loss, over rows with tokens."""
    mesh = sharding.make_mesh(helpers.MeshConfig(), devices=jax.devices()[:1])
    model, params = models.load_model(str(path), mesh, dtype="float32")
    results = []
    for segment in segments:
        rows = helpers.rows_of(segment.ids[None, :-1].astype(np.int32))
        hidden = lm.hidden_states(model.graphdef, params, rows)
        head = np.asarray(lm.head_weight(params), np.float64)[:261]
        logits = np.asarray(hidden, np.float64)[0] @ head.T
        logits = logits[-len(segment.target_ids) :]
        if segment.loss_mask is not None:
            logits = logits[segment.loss_mask]
        peak = logits.max(-1, keepdims=True)
        results.append(
            logits - peak - np.log(np.exp(logits - peak).sum(-1, keepdims=True))
        )
    return np.concatenate(results)


def expected(folder, run, segments, *, dense):
    """The mean nll, and the mean KL of whole rows, or of the top k and the rest."""
    teacher = log_probs(run.config.teacher.path, segments)
    student = log_probs(run.config.student.path, segments)
    targets = np.concatenate([s.loss_ids for s in segments])
    nll = -student[np.arange(len(targets)), targets].mean()
    if not dense:
        ids = np.argsort(-teacher, axis=-1)[:, :K]

        def events(log_p):
            top = np.take_along_axis(log_p, ids, -1)
            rest = np.log1p(-np.exp(top).sum(-1, keepdims=True))
            return np.concatenate([top, rest], -1)

        teacher, student = events(teacher), events(student)
    return nll, (np.exp(teacher) * (teacher - student)).sum(-1).mean()


@pytest.mark.parametrize(
    ("teacher", "kind", "online"),
    [
        ("large", "top_k", True),
        pytest.param("large", "top_k", False, marks=pytest.mark.slow),
        pytest.param("small", "top_k", False, marks=pytest.mark.slow),
        pytest.param("small", "dense", True, marks=pytest.mark.slow),
        pytest.param("large", "dense", False, marks=pytest.mark.slow),
    ],
)
def test_losses_are_those_of_the_rows_with_tokens(
    folder, tmp_path, teacher, kind, online
):
    config = config_of(folder, teacher, kind=kind)
    config = helpers.changed(
        config, teacher=dataclasses.replace(config.teacher, online=online)
    )
    finished = distill(config, tmp_path)
    run = finished.run
    nll, kl = expected(folder, run, run.data.train, dense=kind == "dense")
    [row] = helpers.step_rows(tmp_path)
    np.testing.assert_allclose(row["loss/chat/hard"], nll, rtol=2e-5)
    # The stored top k are rounded.
    rtol = 1e-3 if kind == "top_k" and not online else 2e-4
    np.testing.assert_allclose(row["loss/chat/soft"], kl, rtol=rtol, atol=1e-5)
    manifest = read_manifest(build.folder(config, tmp_path, "eval"))
    assert manifest.vocab_size == 261


def test_records_are_those_of_the_rows_with_tokens(folder, tmp_path):
    run = open_run(config_of(folder, "large"), tmp_path)
    caches = build.ensure(run)
    segments = run.data.train
    oracle = log_probs(folder / "large", segments)
    records = [caches["train"].read(segment.key) for segment in segments]
    ids = np.concatenate([record.ids for record in records])
    found = np.concatenate([record.log_probs for record in records])
    assert ids.max() < 261
    np.testing.assert_allclose(found, np.take_along_axis(oracle, ids, -1), atol=0.05)
    targets = np.concatenate([s.loss_ids for s in segments])
    found = np.concatenate([record.target_log_probs for record in records])
    exact = oracle[np.arange(len(targets)), targets]
    np.testing.assert_allclose(found, exact, atol=1e-3)
    entropy = -(np.exp(oracle) * oracle).sum(-1)
    found = np.concatenate([record.entropy[:, 0] for record in records])
    np.testing.assert_allclose(found, entropy, atol=1e-3)


def test_ids_without_a_row_are_named(folder, tmp_path):
    config = config_of(folder, "large")
    config.student = StudentConfig(decoder=dataclasses.replace(SHAPE, vocab_size=200))
    with pytest.raises(ValueError, match=r"student's vocab_size=200 has no row for t"):
        open_run(config, tmp_path)
    # More ids than rows are fine while the data has none of them.
    config.student.decoder.vocab_size = 260
    assert open_run(config, tmp_path).student.shape.vocab_size == 260


def test_another_tokenizer_is_refused(folder, tmp_path):
    other = tmp_path / "other"
    shape = dataclasses.replace(SHAPE, vocab_size=264)
    params = decoder.init_params(shape, jax.random.key(0))
    hf.save(other, shape, params, make_tokenizer("phi3"))
    config = config_of(folder, "large")
    config.student.path = str(other)
    with pytest.raises(ValueError, match=r"student.path=.* of \d+ ids are other t"):
        open_run(config, tmp_path)
    # Only the ids that both have are compared.
    hf.save(tmp_path / "fewer", shape, params, make_tokenizer("chatml"))
    config.student.path = str(tmp_path / "fewer")
    with pytest.raises(ValueError, match="256 is '<"):
        open_run(config, tmp_path)


@pytest.mark.parametrize("tool", ["vllm"])
def test_rows_without_a_token_are_left_out_of_imports(tool, tmp_path):
    row = {"7": -0.5, "261": -2.0, "3": -3.0}
    pairs = {
        i: {"logprob": p, "rank": n, "decoded_token": None}
        for n, (i, p) in enumerate(row.items(), 1)
    }
    line = {"prompt_token_ids": [1, 7], "prompt_logprobs": [None, pairs]}
    (tmp_path / "a.jsonl").write_text(json.dumps(line) + "\n")
    read = convert.FORMATS[tool].read
    [rows] = read(tmp_path / "a.jsonl", k=3, vocab_size=261, num_rows=272)
    assert rows.ids[1].tolist() == [7, 3, -1]
    rest = np.log1p(-np.exp(-2.0))
    np.testing.assert_allclose(rows.log_probs[1, :2], [-0.5 - rest, -3.0 - rest])
    np.testing.assert_allclose(rows.target_log_probs[1], -0.5 - rest)
    with pytest.raises(ValueError, match="an id from 0 to 260"):
        list(read(tmp_path / "a.jsonl", k=3, vocab_size=261))


def test_whole_rows_end_with_the_last_token():
    rng = np.random.default_rng(0)
    hidden = rng.normal(size=(4, 8)).astype(np.float32)
    weight = rng.normal(size=(16, 8)).astype(np.float32)
    options = losses.LabelOptions(k=None, temperatures=(1.0,), num_valid=11)
    targets = np.arange(4, dtype=np.int32)
    arrays = map(jnp.asarray, (hidden, weight, targets))
    found = losses.label(*arrays, options)["log_probs_NK"]
    logits = (hidden @ weight[:11].T).astype(np.float64)
    exact = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    np.testing.assert_allclose(found, exact, atol=1e-5)

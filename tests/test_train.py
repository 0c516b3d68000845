"""Whole runs: files, resume, kills, errors before any step."""

import os
import pathlib
import shutil
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import pytest

from kdjax import label, train
from kdjax.config import Config
from kdjax.evaluation.scorer import Scorer, score_teacher
from kdjax.experiment.run import open_run
from kdjax.models import hf, lm
from kdjax.parallel import distributed
from kdjax.pipeline import distill
from kdjax.runtime import limits, locks
from kdjax.teacher import build
from kdjax.teacher import cache as cache_lib
from kdjax.training.checkpoint import Checkpoints
from tests import helpers
from tests.helpers import ENVIRONMENT, TrainSteps, step_rows, summary


@pytest.fixture
def taught(decoder_run, shared_folder):
    """Makes small configs with the teacher of the shared run, and its cache."""

    def make(**changes) -> Config:
        return helpers.taught(shared_folder, **changes)

    return make


def final_params(config: Config, workdir: pathlib.Path):
    return jax.tree.map(np.asarray, helpers.load_student(config, workdir)[1])


def modified(folder: pathlib.Path) -> dict[pathlib.Path, int]:
    return {file: file.stat().st_mtime_ns for file in folder.rglob("*")}


def command(config: Config, workdir: pathlib.Path, name: str = "train", *flags: str):
    """Return a command as its own process, on one device, from a config file."""
    file = workdir.parent / f"{workdir.name}_config.py"
    helpers.write_config_file(config, file)
    where = [f"--config={file}", f"--workdir={workdir}"]
    return [sys.executable, "-m", f"kdjax.{name}", *where, *flags]


@pytest.mark.parametrize(("num_bins", "num_calls"), [(10, 0), (5, 1)])
def test_a_teacher_is_scored_once_for_runs_that_share_a_cache(
    decoder_run, taught, tmp_path, monkeypatch, num_bins, num_calls
):
    _, workdir = decoder_run
    folder = tmp_path / "scores"
    shutil.copytree(workdir / "cache" / "teacher_scores", folder)
    config = taught(seed=1, evaluation={"num_bins": num_bins})
    run = helpers.open_eval(config, tmp_path)
    cache = build.open_split(run, "eval")
    calls = []
    monkeypatch.setattr(Scorer, "__call__", lambda *call: calls.append(call) or {})
    metrics, _ = score_teacher(run, folder, cache=cache)
    assert len(calls) == num_calls
    assert metrics == ({} if calls else summary(workdir)["teacher"])


def test_a_run_leaves_what_it_promises(decoder_run):
    _, workdir = decoder_run
    for name in ("config.json", "metrics.jsonl", "checkpoints", "curves.png"):
        assert (workdir / name).exists(), name
    assert list(workdir.glob("events.*"))
    results = summary(workdir)
    assert 0 <= results["teacher"]["accuracy"] <= 1
    for name in ("accuracy", "nll", "perplexity", "kl", "agreement", "ece"):
        assert np.isfinite(results["student"][name]), name
    assert results["tokens_per_second"] > 0
    assert results["parameters"]["student"] < results["parameters"]["teacher"]
    # A teacher agrees with itself, within the encoding of its cache.
    assert results["teacher"]["agreement"] > 0.99
    assert 0 <= results["teacher"]["kl"] < 1e-3
    rows = step_rows(workdir)
    assert [row["step"] for row in rows] == list(range(1, helpers.NUM_GOLDEN + 1))
    last = rows[-1]
    # Two views, a = 0.5, hard and soft 0.5 each, T = 2 with T^2.
    loss = sum(
        0.25 * last[f"loss/{view}/hard"] + 0.25 * 4 * last[f"loss/{view}/soft"]
        for view in ("label", "rationale")
    )
    np.testing.assert_allclose(last["loss"], loss, rtol=1e-5)
    assert len((workdir / "generations.jsonl").read_text().splitlines()) == 4


def test_starting_a_finished_run_again_changes_nothing(decoder_run, tmp_path):
    config, workdir = decoder_run
    again = helpers.copy_run(workdir, tmp_path / "again")
    train.run(config, again)
    assert summary(again) == summary(workdir)
    assert step_rows(again) == step_rows(workdir)


def test_the_lock_of_a_process_killed_when_its_cache_was_whole_is_cleared(
    decoder_run, tmp_path
):
    config, workdir = decoder_run
    copy = helpers.copy_run(workdir, tmp_path / "copy")
    with locks.hold(copy / "cache" / "eval"):
        own = (copy / "cache" / "eval" / locks.LOCK).read_text()
    left = copy / "cache" / "eval" / locks.LOCK
    left.write_text(own.replace(f'"pid": {os.getpid()}', '"pid": 4194305'))
    build.ensure(open_run(config, copy))
    assert not left.exists()


def test_another_batch_mesh_and_seed_share_the_cache(decoder_run, taught, tmp_path):
    _, workdir = decoder_run
    config = taught(
        train={"batch_size": 16, "row_length": 192, "steps": 1},
        mesh={"data": 2, "fsdp": 4},
        seed=7,
    )
    # Another teacher path has another tokenizer folder, of the same content.
    before = modified(workdir / "cache")
    train.run(config, tmp_path)
    assert modified(workdir / "cache") == before
    assert np.isfinite(summary(tmp_path)["student"]["kl"])
    assert summary(tmp_path)["teacher"] == summary(workdir)["teacher"]


def test_resume_is_bit_for_bit(decoder_run, taught, tmp_path, monkeypatch):
    """Stopped between saved steps and at one, and started again."""
    config, workdir = decoder_run
    same = taught(name=config.name, train={"steps": 20, "save_every": 10})
    for stop in (3, 10):
        monkeypatch.setattr(
            distributed.Preemption,
            "requested",
            lambda self, step, stop=stop: step == stop,
        )
        with pytest.raises(SystemExit):
            train.run(same, tmp_path)
    monkeypatch.undo()
    train.run(same, tmp_path)
    jax.tree.map(
        np.testing.assert_array_equal,
        final_params(config, workdir),
        final_params(config, tmp_path),
    )
    assert summary(workdir)["student"] == summary(tmp_path)["student"]


@pytest.fixture(scope="module")
def all_pairs(decoder_run, shared_folder, tmp_path_factory):
    """Caches of the whole vocabulary, as pairs and as rows: kind -> config, cache."""
    _, workdir = decoder_run
    vocab_size = hf.read_config(workdir / "teacher").vocab_size
    caches = {}
    for kind in ("top_k", "dense"):
        folder = tmp_path_factory.mktemp(kind)
        cache = {"path": str(folder), "kind": kind, "k": vocab_size}
        config = helpers.taught(shared_folder, cache_of="", data={"num_eval": 2})
        config = helpers.changed(config, cache=cache)
        label.run(config, folder)
        caches[kind] = config, cache_lib.load_cache(folder / "train")
    return caches


def test_label_fills_the_cache_and_every_pair_is_the_dense_row(all_pairs, tmp_path):
    """kdjax.label by itself; k = V and dense train to the same losses."""
    losses = {}
    for kind, (config, cache) in all_pairs.items():
        before = modified(pathlib.Path(config.cache.path))
        label.run(config, tmp_path)
        assert modified(pathlib.Path(config.cache.path)) == before
        losses[kind] = TrainSteps(config, devices=jax.devices()[:1], cache=cache).losses
    np.testing.assert_allclose(losses["top_k"], losses["dense"], rtol=1e-3)  # encoding


def test_draws_train_the_student_and_held_out_measures_stay_exact(taught, tmp_path):
    nll, held_out = {}, {}
    for kind in ("top_k", "sampled"):
        folder = tmp_path / kind
        cache = {"path": str(folder), "kind": kind, "k": 64}
        cache |= {"num_draws": 50, "num_rounds": 2}
        config = helpers.changed(taught(train={"steps": 8}), cache=cache)
        label.run(config, folder)
        labelled = cache_lib.load_cache(folder / "train")
        assert labelled.kind == kind
        assert cache_lib.verify(labelled)["tokens"] == labelled.num_tokens
        exact = cache_lib.load_cache(folder / "eval")
        assert exact.kind == "top_k"
        held_out[kind] = {key: exact.read(key) for key in exact}
        steps = TrainSteps(config, num=8, cache=labelled)
        scorer = Scorer(helpers.open_eval(config, folder), cache=exact)
        metrics = scorer(steps.last.params)
        nll[kind] = metrics["nll"]
        assert metrics["kl"] > 0
    assert nll["sampled"] == pytest.approx(nll["top_k"], rel=0.02)
    assert held_out["sampled"].keys() == held_out["top_k"].keys()
    for key, record in held_out["top_k"].items():
        for one, two in zip(record, held_out["sampled"][key], strict=True):
            np.testing.assert_equal(one, two)


def test_a_cache_of_another_teacher_is_refused(taught, tmp_path):
    config = taught()
    shape = hf.read_config(config.teacher.path)
    tokenizer = open_run(config, tmp_path, splits=()).tokenizer
    params = lm.init_params(shape, jax.random.key(1))
    hf.save(tmp_path / "other", shape, params, tokenizer)
    config.teacher.path = str(tmp_path / "other")
    with pytest.raises(ValueError, match="is not the teacher that"):
        train.run(config, tmp_path / "run")
    # Nothing is labelled before it is noticed.
    cache = shutil.copytree(config.cache.path, tmp_path / "cache")
    shutil.rmtree(cache / "train")
    config.cache.path = str(cache)
    with pytest.raises(ValueError, match="is not the teacher that"):
        train.run(config, tmp_path / "run")
    assert not (cache / "train").exists()


def test_another_divergence_trains_and_is_named():
    config = helpers.small_config(method={"divergence": "jsd", "beta": 0.3})
    rows = TrainSteps(config, devices=jax.devices()[:1]).lines()
    assert len(rows) == 2
    assert all(row["jsd"] >= 0 and "kl" not in row for row in rows)


def test_a_teacher_that_runs_beside_the_student(all_pairs, taught, tmp_path):
    """One field more, no cache of the training split, the same student."""
    online = taught(train={"steps": 2}, evaluation={"num_generations": 0})
    online.teacher.online, online.cache.kind, online.cache.path = True, "dense", ""
    train.run(online, tmp_path)
    assert not (tmp_path / "cache" / "train").exists()
    assert cache_lib.read_manifest(tmp_path / "cache" / "eval").kind == "top_k"
    config, cache = all_pairs["dense"]
    stored = TrainSteps(config, devices=jax.devices()[:1], cache=cache).lines()
    live = step_rows(tmp_path)
    assert live[0]["kl"] > 1e-3 and abs(live[0]["kl"] - stored[0]["kl"]) < 1e-4
    # The cache rounds, by less than 1e-4 nats; Adam's first step makes more of it.
    assert live[1]["loss"] == pytest.approx(stored[1]["loss"], rel=2e-3)


def test_scheduled_weights_and_temperature():
    """From soft to hard labels, and from T = 2 to 1."""
    config = helpers.small_config(
        method={
            "hard_weight": 0.0,
            "soft_weight": 1.0,
            "weight_schedule": "linear",
            "final_hard_weight": 1.0,
            "final_soft_weight": 0.0,
            "temperature": 2.0,
            "temperature_schedule": "linear",
            "final_temperature": 1.0,
        },
    )
    rows = TrainSteps(config, num=6, devices=jax.devices()[:1]).lines()
    for index, row in enumerate(rows):
        hard = index / 5
        temperature = 2.0 if 2 - hard > 2**0.5 else 1.0  # the nearest declared
        loss = sum(
            0.5 * hard * row[f"loss/{view}/hard"]
            + 0.5 * (1 - hard) * temperature**2 * row[f"loss/{view}/soft"]
            for view in ("label", "rationale")
        )
        # Where a weight is 0 its loss is not computed.
        np.testing.assert_allclose(row["loss"], loss, rtol=1e-5, err_msg=str(index))


@pytest.mark.slow
def test_killed_anywhere_it_ends_the_same(decoder_run, tmp_path):
    config, workdir = decoder_run
    rng = np.random.default_rng(0)
    for _ in range(4):
        process = subprocess.Popen(
            command(config, tmp_path / "run"), env=ENVIRONMENT, cwd=tmp_path
        )
        time.sleep(rng.uniform(8, 30))
        process.send_signal(signal.SIGKILL)
        process.wait()
    subprocess.run(
        command(config, tmp_path / "run"), env=ENVIRONMENT, cwd=tmp_path, check=True
    )
    jax.tree.map(
        np.testing.assert_array_equal,
        final_params(config, workdir),
        final_params(config, tmp_path / "run"),
    )
    assert summary(workdir)["student"] == summary(tmp_path / "run")["student"]


def test_another_config_in_the_same_workdir_is_refused(decoder_run):
    config, workdir = decoder_run
    other = helpers.changed(config, optim={"learning_rate": 0.5})
    with pytest.raises(ValueError, match=r"optim.learning_rate: 0.01 -> 0.5"):
        train.run(other, workdir)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"train": {"row_length": 32}}, "row_length=32"),
        ({"data": {"max_prompt": 8}}, "max_prompt=8"),
        ({"data": {"num_train": 25}}, "no record"),
        ({"cache": {"k": 4}}, "k=4"),
        ({"cache": {"kind": "dense"}}, "kind='dense'"),
        ({"data": {"tokenizer": "/nowhere"}}, "/nowhere"),
        ({"mesh": {"data": 3}}, "mesh.data=3"),
        ({"train": {"batch_size": 4, "num_microbatches": 1}}, "4 rows"),
        ({"data": {"source": "jsonl", "path": "/no/file.jsonl"}}, "/no/file.jsonl"),
        (
            {
                "method": {"temperature": 3.0},
                "cache": {"temperatures": (1.0, 3.0)},
            },
            r"temperature=3.0 was not declared",
        ),
    ],
)
def test_errors_come_before_any_step(taught, tmp_path, changes, message):
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        train.run(helpers.changed(taught(), **changes), tmp_path)
    assert not (tmp_path / "metrics.jsonl").exists()


@pytest.mark.parametrize(
    ("limit", "most", "cache", "message"),
    [
        ("MAX_SHARDS", 2, {"shard_size": 1}, r"a cache has at most 2: raise cache.sh"),
        ("MAX_PAIRS", 99, {"num_draws": 50, "kind": "sampled"}, r"at most 99 are st"),
        ("MAX_DENSE", 99, {"kind": "dense"}, r"use cache.kind='top_k'"),
    ],
)
def test_a_cache_that_could_not_be_read_is_not_labelled(
    limit, most, cache, message, taught, tmp_path, monkeypatch
):
    monkeypatch.setattr(limits, limit, most)
    config = helpers.changed(taught(cache_of=""), cache=cache)
    with pytest.raises(ValueError, match=message):
        distill.open_experiment(config, tmp_path)
    assert not list(tmp_path.glob("config*"))


def test_another_tokenizer_is_refused(taught, tmp_path):
    from transformers import AutoTokenizer

    config = taught(data={"tokenizer": str(tmp_path / "tokenizer")})
    tokenizer = AutoTokenizer.from_pretrained(config.teacher.path)
    tokenizer.add_tokens(["entirely-new"])
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    with pytest.raises(ValueError, match="token"):
        train.run(config, tmp_path / "run")


def test_a_non_finite_loss_stops_the_run_and_is_not_saved(taught, tmp_path):
    config = taught(optim={"learning_rate": 1e30, "clip_norm": 0.0})
    with pytest.raises(ValueError, match=r"step 2: .* is not finite; terms"):
        train.run(config, tmp_path)
    assert (Checkpoints(tmp_path / "checkpoints").latest_step() or 0) < 4


def test_export_and_evaluate(decoder_run, tmp_path):
    config, workdir = decoder_run
    out, results = tmp_path / "out", summary(workdir)
    helpers.export(config, workdir, out)
    readme = (out / "README.md").read_text()
    assert f"| nll | {results['student']['nll']:.4g} | " in readme
    assert str(workdir) not in readme and "| teacher | trained for this run |" in readme
    exported = hf.load_params(out, hf.read_config(out))
    jax.tree.map(np.testing.assert_array_equal, final_params(config, workdir), exported)
    assert helpers.score(config, workdir, "student") == results["student"]
    assert helpers.score(config, workdir, str(out)) == results["student"]
    teacher = helpers.score(config, workdir, "teacher")
    assert teacher["nll"] == results["teacher"]["nll"]

"""Whole runs: files, resume, kills, errors before any step."""

import json
import os
import pathlib
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import pytest

from kdjax import config as config_lib
from kdjax import label, train
from kdjax.config import Config
from kdjax.evaluation import scorer as scorer_lib
from kdjax.models import hf
from kdjax.parallel import distributed
from kdjax.teacher import cache as cache_lib
from kdjax.training.checkpoint import Checkpoints
from tests import helpers, xla_flags

ROOT = pathlib.Path(__file__).parent.parent


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> tuple[Config, pathlib.Path]:
    """A whole uninterrupted run."""
    workdir = tmp_path_factory.mktemp("finished")
    config = helpers.small_config()
    train.run(config, workdir)
    return config, workdir


def summary(workdir: pathlib.Path) -> dict:
    return json.loads((workdir / "summary.json").read_text())


def final_params(config: Config, workdir: pathlib.Path):
    _, params = helpers.load_student(config, workdir)
    return jax.tree.map(np.asarray, params)


def command(config: Config, workdir: pathlib.Path, name: str = "train", *flags: str):
    """Return a command as its own process, on one device, from a config file."""
    file = workdir.parent / f"{workdir.name}_config.py"
    file.write_text(
        "from kdjax import config\n"
        "def get_config(argument=''):\n"
        f"    return config.from_json({config_lib.to_json(config)!r})\n"
    )
    where = [f"--config={file}", f"--workdir={workdir}"]
    return [sys.executable, "-m", f"kdjax.{name}", *where, *flags]


ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT)}
ENVIRONMENT["XLA_FLAGS"] = xla_flags.EIGHT_DEVICES


@pytest.mark.parametrize(("num_bins", "num_scored"), [(10, 1), (5, 2)])
def test_a_teacher_is_scored_once_for_runs_that_share_a_cache(
    finished, tmp_path, monkeypatch, num_bins, num_scored
):
    _, workdir = finished
    shared = helpers.small_config(
        seed=1,
        teacher=dict(path=str(workdir / "teacher")),
        cache=dict(path=str(workdir / "cache")),
        evaluation=dict(num_bins=num_bins),
        train=dict(steps=1),
    )
    scored, score = [], scorer_lib.Scorer.__call__

    def counted(scorer, params):
        scored.append(scorer)
        return score(scorer, params)

    monkeypatch.setattr(scorer_lib.Scorer, "__call__", counted)
    train.run(shared, tmp_path)
    assert len(scored) == num_scored  # the student, and the teacher where it is new
    mine, before = summary(tmp_path)["teacher"], summary(workdir)["teacher"]
    assert mine | {"ece": 0} == before | {"ece": 0}


def test_a_run_leaves_what_it_promises(finished):
    _, workdir = finished
    for name in ("config.json", "metrics.jsonl", "checkpoints", "curves.png"):
        assert (workdir / name).exists(), name
    assert list(workdir.glob("events.*"))
    found = summary(workdir)
    assert 0 <= found["teacher"]["accuracy"] <= 1
    for name in ("accuracy", "nll", "perplexity", "kl", "agreement", "ece"):
        assert np.isfinite(found["student"][name]), name
    assert found["tokens_per_second"] > 0
    assert found["parameters"]["student"] < found["parameters"]["teacher"]
    # A teacher agrees with itself, within the encoding of its cache.
    assert found["teacher"]["agreement"] > 0.99
    assert 0 <= found["teacher"]["kl"] < 1e-3
    lines = (workdir / "metrics.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    steps = [row for row in rows if "loss" in row]
    assert [row["step"] for row in steps] == [1, 2, 3, 4, 5, 6]
    last = steps[-1]
    # Two views, a = 0.5, hard and soft 0.5 each, T = 2 with T^2.
    wanted = sum(
        0.25 * last[f"loss/{view}/hard"] + 0.25 * 4 * last[f"loss/{view}/soft"]
        for view in ("label", "rationale")
    )
    np.testing.assert_allclose(last["loss"], wanted, rtol=1e-5)
    assert len((workdir / "generations.jsonl").read_text().splitlines()) == 4


def test_starting_a_finished_run_again_changes_nothing(finished):
    config, workdir = finished
    before = summary(workdir)
    train.run(config, workdir)
    assert summary(workdir) == before


def test_another_batch_mesh_and_seed_share_the_cache(finished, tmp_path):
    _, workdir = finished
    config = helpers.small_config(
        teacher={"path": str(workdir / "teacher")},
        cache={"path": str(workdir / "cache")},
        train={"batch_size": 16, "row_length": 192, "steps": 1},
        mesh={"data": 2, "fsdp": 4},
        seed=7,
    )
    # Another teacher path has another tokenizer folder, of the same content.
    stamps = {f: f.stat().st_mtime_ns for f in (workdir / "cache").rglob("*")}
    train.run(config, tmp_path / "run")
    assert stamps == {f: f.stat().st_mtime_ns for f in (workdir / "cache").rglob("*")}
    assert np.isfinite(summary(tmp_path / "run")["student"]["kl"])


def test_resume_is_bit_for_bit(finished, tmp_path, monkeypatch):
    """Stopped after each of the saved steps and started again."""
    config, workdir = finished
    for stop in (1, 3, 4):
        monkeypatch.setattr(
            distributed.Preemption,
            "requested",
            lambda self, step, stop=stop: step == stop,
        )
        with pytest.raises(SystemExit):
            train.run(helpers.small_config(), tmp_path)
    monkeypatch.undo()
    train.run(helpers.small_config(), tmp_path)
    jax.tree.map(
        np.testing.assert_array_equal,
        final_params(config, workdir),
        final_params(config, tmp_path),
    )
    assert summary(workdir)["student"] == summary(tmp_path)["student"]


def losses(workdir: pathlib.Path) -> list[float]:
    lines = (workdir / "metrics.jsonl").read_text().splitlines()
    return [row["loss"] for row in map(json.loads, lines) if "loss" in row]


def test_label_fills_the_cache_and_every_pair_is_the_dense_row(finished, tmp_path):
    """kdjax.label by itself; k = V and dense train to the same losses."""
    _, workdir = finished
    vocab_size = hf.read_config(workdir / "teacher").vocab_size
    found = {}
    for kind in ("top_k", "dense"):
        config = helpers.small_config(
            teacher={"path": str(workdir / "teacher")},
            cache={"path": str(tmp_path / kind), "kind": kind, "k": vocab_size},
            train={"steps": 2},
            evaluation={"num_generations": 0},
        )
        label.run(config, tmp_path / "label")
        records_of = {f: f.stat().st_mtime_ns for f in (tmp_path / kind).rglob("*")}
        train.run(config, tmp_path / f"run_{kind}")
        assert records_of == {f: f.stat().st_mtime_ns for f in records_of}
        more = {f.name for f in (tmp_path / kind).iterdir()} - {"train", "eval"}
        assert more == {"teacher_scores"}
        found[kind] = losses(tmp_path / f"run_{kind}")
    np.testing.assert_allclose(found["top_k"], found["dense"], rtol=1e-3)  # encoding


def test_draws_train_the_student_and_held_out_measures_stay_exact(finished, tmp_path):
    _, workdir = finished
    found = {}
    for kind in ("top_k", "sampled"):
        config = helpers.small_config(
            teacher={"path": str(workdir / "teacher")},
            cache={"kind": kind, "k": 64, "num_draws": 50, "num_rounds": 2},
            train={"steps": 8},
            evaluation={"num_generations": 0},
        )
        train.run(config, tmp_path / kind)
        found[kind] = summary(tmp_path / kind)["student"]
        cache = cache_lib.load_cache(tmp_path / kind / "cache" / "train")
        assert cache.kind == kind
        assert cache_lib.load_cache(tmp_path / kind / "cache" / "eval").kind == "top_k"
        assert cache_lib.verify(cache)["tokens"] == cache.num_tokens
    assert found["sampled"]["nll"] == pytest.approx(found["top_k"]["nll"], rel=0.02)
    assert found["sampled"]["kl"] > 0


def test_a_cache_of_another_teacher_is_refused(finished, tmp_path):
    _, workdir = finished
    other = helpers.small_config(teacher_seed=1)
    train.run(other, tmp_path / "other")
    config = helpers.small_config(
        teacher={"path": str(tmp_path / "other" / "teacher")},
        cache={"path": str(workdir / "cache")},
    )
    with pytest.raises(ValueError, match="is not the teacher that"):
        train.run(config, tmp_path / "run")


def test_another_divergence_trains_and_is_named(finished, tmp_path):
    _, workdir = finished
    config = helpers.small_config(
        teacher={"path": str(workdir / "teacher")},
        cache={"path": str(workdir / "cache")},
        method={"divergence": "jsd", "beta": 0.3},
        train={"steps": 2},
        evaluation={"num_generations": 0},
    )
    train.run(config, tmp_path)
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    steps = [row for row in map(json.loads, lines) if "loss" in row]
    assert all(row["jsd"] >= 0 and "kl" not in row for row in steps)
    assert summary(tmp_path)["student"]["kl"] >= 0


@pytest.mark.parametrize("kind", ["top_k", "dense"])
def test_a_teacher_that_runs_beside_the_student(finished, tmp_path, kind):
    """One field more, no cache of the training split, the same student."""
    _, workdir = finished
    config = helpers.small_config()
    config.teacher.path = str(workdir / "teacher")
    config.teacher.online, config.cache.kind = True, kind
    config.cache.k = 1000  # the whole vocabulary
    train.run(config, tmp_path / "online")
    cached = helpers.small_config(cache={"k": 1000})
    cached.teacher.path = config.teacher.path
    train.run(cached, tmp_path / "cached")
    assert not (tmp_path / "online" / "cache" / "train").exists()
    assert cache_lib.read_manifest(tmp_path / "online/cache/eval").kind == "top_k"
    live, stored = summary(tmp_path / "online"), summary(tmp_path / "cached")
    # The cache rounds, by less than 1e-4 nats; Adam's first steps make more of it.
    assert abs(live["student"]["nll"] - stored["student"]["nll"]) < 2e-2
    first = json.loads((tmp_path / "online/metrics.jsonl").read_text().splitlines()[0])
    other = json.loads((tmp_path / "cached/metrics.jsonl").read_text().splitlines()[0])
    assert first["kl"] > 1e-3 and abs(first["kl"] - other["kl"]) < 1e-4


def test_scheduled_weights_and_temperature(finished, tmp_path):
    """From soft to hard labels, and from T = 2 to 1."""
    _, workdir = finished
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
        cache={"path": str(workdir / "cache")},
    )
    config.teacher.path = str(workdir / "teacher")
    train.run(config, tmp_path / "run")
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    rows = [row for row in map(json.loads, lines) if "loss" in row]
    for index, row in enumerate(rows):
        hard = index / 5
        temperature = 2.0 if 2 - hard > 2**0.5 else 1.0  # the nearest declared
        wanted = sum(
            0.5 * hard * row[f"loss/{view}/hard"]
            + 0.5 * (1 - hard) * temperature**2 * row[f"loss/{view}/soft"]
            for view in ("label", "rationale")
        )
        # Where a weight is 0 its loss is not computed.
        np.testing.assert_allclose(row["loss"], wanted, rtol=1e-5, err_msg=str(index))


@pytest.mark.slow
def test_killed_anywhere_it_ends_the_same(finished, tmp_path):
    config, workdir = finished
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


def test_another_config_in_the_same_workdir_is_refused(finished):
    _, workdir = finished
    with pytest.raises(ValueError, match=r"optim.learning_rate: 0.01 -> 0.5"):
        train.run(helpers.small_config(optim={"learning_rate": 0.5}), workdir)


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
def test_errors_come_before_any_step(finished, tmp_path, changes, message):
    _, workdir = finished
    changes = dict(changes)
    changes["teacher"] = {"path": str(workdir / "teacher")}
    changes["cache"] = {"path": str(workdir / "cache")} | changes.get("cache", {})
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        train.run(helpers.small_config(**changes), tmp_path)
    assert not (tmp_path / "metrics.jsonl").exists()


def test_another_tokenizer_is_refused(finished, tmp_path):
    from transformers import AutoTokenizer

    _, workdir = finished
    tokenizer = AutoTokenizer.from_pretrained(workdir / "teacher")
    tokenizer.add_tokens(["entirely-new"])
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    config = helpers.small_config(
        teacher={"path": str(workdir / "teacher")},
        cache={"path": str(workdir / "cache")},
        data={"tokenizer": str(tmp_path / "tokenizer")},
    )
    with pytest.raises(ValueError, match="token"):
        train.run(config, tmp_path / "run")


def test_a_non_finite_loss_stops_the_run_and_is_not_saved(finished, tmp_path):
    _, workdir = finished
    config = helpers.small_config(
        teacher={"path": str(workdir / "teacher")},
        cache={"path": str(workdir / "cache")},
        optim={"learning_rate": 1e30, "clip_norm": 0.0},
    )
    with pytest.raises(ValueError, match=r"step 2: .* is not finite; terms"):
        train.run(config, tmp_path)
    checkpoints = Checkpoints(tmp_path / "checkpoints")
    assert (checkpoints.latest_step() or 0) < 4
    checkpoints.close()


def test_export_and_evaluate(finished, tmp_path):
    config, workdir = finished
    helpers.export(config, workdir, tmp_path / "out")
    readme = (tmp_path / "out" / "README.md").read_text()
    assert f"| nll | {summary(workdir)['student']['nll']:.4g} | " in readme
    assert str(workdir) not in readme and "| teacher | trained for this run |" in readme
    exported = hf.load_params(tmp_path / "out", hf.read_config(tmp_path / "out"))
    jax.tree.map(np.testing.assert_array_equal, final_params(config, workdir), exported)
    wanted = summary(workdir)
    student = helpers.score(config, workdir, "student")
    assert student == wanted["student"]
    again = helpers.score(config, workdir, str(tmp_path / "out"))
    assert again == wanted["student"]
    teacher = helpers.score(config, workdir, "teacher")
    assert teacher["nll"] == wanted["teacher"]["nll"]

"""The benchmark measures the step of training, and says consistent things about it."""

import dataclasses
import json
import os
import pathlib
import subprocess
import sys

import jax
import numpy as np
import pytest

from kdjax.bench import report, timing, workload
from kdjax.bench.timing import Samples
from kdjax.config import MeshConfig
from kdjax.data import loader
from kdjax.experiment import methods
from kdjax.experiment.data import load_data
from kdjax.experiment.run import open_run
from kdjax.experiment.teacher import teacher_shape
from kdjax.models import decoder, flops, hf
from kdjax.parallel import sharding
from kdjax.teacher import build as build_lib
from kdjax.teacher import cache as cache_lib
from kdjax.teacher import synthetic
from tests import helpers, xla_flags

ROOT = pathlib.Path(__file__).parent.parent


def tiny(**changes):
    """A step of some milliseconds, of which all sizes are known without data."""
    shape = dataclasses.replace(helpers.DECODER, vocab_size=64, num_layers=1)
    config = helpers.small_config(
        student={"decoder": shape},
        train={"batch_size": 4, "row_length": 16, "num_threads": 1, "prefetch": 2},
        **changes,
    )
    config.teacher.decoder = dataclasses.replace(helpers.DECODER, vocab_size=64)
    return config


def mesh(num_devices=1):
    return sharding.make_mesh(MeshConfig(), devices=jax.devices()[:num_devices])


def test_rounds_take_turns_and_seconds_add_up():
    order = []
    variants = {name: lambda name=name: order.append(name) for name in "ab"}
    told = []
    found = timing.alternate(variants, rounds=2, steps=3, advance=told.append)
    assert "".join(order) == "aaabbb" + "bbbaaa"
    assert sum(told) == 12
    assert [len(part) for part in found["a"].rounds] == [3, 3]
    assert found["a"].total == pytest.approx(sum(found["a"].all))


def test_a_step_is_dispatched_before_the_last_is_waited_for(monkeypatch):
    log = []
    monkeypatch.setattr(timing.jax, "block_until_ready", lambda x: log.append(-x))
    numbers = iter(range(1, 4))

    def start_step():
        log.append(next(numbers))
        return log[-1]

    timing.alternate({"a": start_step}, rounds=1, steps=3)
    assert log == [1, 2, -1, 3, -2, -3]


def test_one_slow_step_moves_neither_median_nor_ratio():
    slow = Samples([[1.0, 1.0, 9.0], [2.0, 2.0, 2.0], [1.0, 1.0, 1.0]])
    fast = Samples([[0.5, 0.5, 0.5], [1.0, 1.0, 1.0], [0.4, 0.4, 0.4]])
    assert (slow.median, fast.median) == (1.0, 0.5)
    found = timing.compare(slow, fast)
    assert found == {"ratio": 2.0, "lowest": 2.0, "highest": 2.5}
    assert Samples([[1.0] * 9 + [11.0]]).p90 == pytest.approx(2.0)


@pytest.mark.parametrize("vocab_size", [8, 64, 5000])
def test_a_synthetic_cache_passes_for_a_real_one(tmp_path, vocab_size):
    segments = synthetic.make_segments(
        6, row_length=20, vocab_size=vocab_size, num_views=2, seed=0
    )
    cache = synthetic.write_cache(
        tmp_path,
        segments,
        vocab_size=vocab_size,
        k=8,
        temperatures=(1.0, 2.0),
        seed=0,
    )
    assert cache_lib.verify(cache)["tokens"] == 6 * 20
    assert {s.length for s in segments} == {20}
    assert [s.view for s in segments] == [0, 1] * 3
    record = cache.read(segments[3].key)
    assert np.array_equal(record.target_ids, segments[3].target_ids)
    assert all(len(set(row)) == 8 for row in record.ids.tolist())
    # A flat tail: mass, log Z and entropy at T follow from the pairs alone.
    p = np.exp(record.log_probs.astype(np.float64))
    tail = (1 - p.sum(1)) / max(1, vocab_size - 8)
    full = np.concatenate([p, np.repeat(tail[:, None], vocab_size - 8, 1)], 1)
    full = np.sqrt(np.maximum(full, 0))
    np.testing.assert_allclose(record.log_z[:, 1], np.log(full.sum(1)), atol=1e-2)
    q = full / full.sum(1, keepdims=True)
    entropy = -(q * np.log(np.maximum(q, 1e-30))).sum(1)
    np.testing.assert_allclose(record.entropy[:, 1], entropy, atol=2e-2)


def first_batch(load):
    method = load.config.method
    return loader.make_batch(
        load.plan,
        0,
        terms=methods.terms(method),
        cache=load.cache,
        temperature=method.temperature,
    )


def test_hard_alone_keeps_tokens_and_total_weight(tmp_path):
    load = workload.make_synthetic(tiny(), tmp_path, mesh())
    soft, hard = first_batch(load), first_batch(workload.hard_labels_only(load))
    np.testing.assert_array_equal(soft.tokens, hard.tokens)
    assert (soft.segments == 1).all()  # no padding
    assert hard.teacher is None and soft.teacher.ids is not None
    total = soft.weights["hard"].sum() + soft.weights["soft"].sum()
    assert hard.weights["hard"].sum() == pytest.approx(total)


def test_numbers_are_consistent(tmp_path):
    config = tiny()
    config.train.num_microbatches = 2
    load = workload.make_synthetic(config, tmp_path / "cache", mesh(2))
    found = report.measure(load, steps=4, rounds=2)
    json.dumps(found, allow_nan=False)
    seconds, rate, data = found["seconds"], found["rate"], found["data"]
    assert set(seconds) == {
        *("matmul", "step", "loop", "step_hard", "loop_hard"),
        *("student", "head", "optimizer", "label", "online"),
    }
    assert all(s["median"] > 0 and len(s["rounds"]) == 2 for s in seconds.values())
    assert all(s["p90"] >= min(s["rounds"]) for s in seconds.values())
    assert data["source"] == "synthetic"
    assert data["positions_per_step"] == data["tokens_per_step"] == 64
    assert data["targets_per_step"] == 64
    assert 0 < data["teacher_bytes"] < data["batch_bytes"]
    step = seconds["step"]["median"]
    assert rate["flops_per_step"] == flops.train_flops(
        load.model.shape, num_tokens=64, row_length=16, num_head_tokens=64
    )
    assert rate["bound_ratio"] == pytest.approx(step / rate["bound_seconds"])
    assert rate["mfu"] == pytest.approx(1 / rate["bound_ratio"])  # a CPU
    shares = dict(found["shares"])
    assert 0 <= shares.pop("data_wait") < 1
    assert sum(shares.values()) == pytest.approx(1)
    assert min(shares[name] for name in ("student", "head", "optimizer")) > 0
    ratios = found["ratios"]
    assert set(ratios) == {
        "soft_over_hard",
        "soft_over_hard_loop",
        "online_over_offline",
    }
    for ratio in ratios.values():
        assert 0 < ratio["lowest"] <= ratio["highest"]
    for name in ("step", "step_hard"):
        assert found["compile_seconds"][name] > 0
        memory = found["memory"][name]
        assert memory["peak_bytes"] >= memory["temporary_bytes"] > 0
    teacher = decoder.create(config.teacher.decoder, dtype="float32", remat="none")[1]
    assert found["model"]["teacher_parameters"] == sum(
        x.size for x in jax.tree.leaves(teacher)
    )
    report.print_report(found)


def test_without_soft_terms_there_is_no_teacher(tmp_path):
    config = tiny(method={"hard_weight": 1.0, "soft_weight": 0.0})
    load = workload.make_synthetic(config, tmp_path, mesh())
    found = report.measure(load, steps=1, rounds=1, profile=str(tmp_path / "trace"))
    assert found["ratios"] == {}
    assert "step_hard" not in found["seconds"]
    assert list((tmp_path / "trace").rglob("*.xplane.pb"))


def test_a_labelled_cache_is_what_is_measured(tmp_path):
    config = helpers.small_config(method={"temperature": 2.0})
    assert workload.open_real(config, tmp_path) is None
    data = load_data(config)
    shape = teacher_shape(config, data.tokenizer)
    params = decoder.init_params(shape, jax.random.key(0))
    hf.save(tmp_path / "teacher", shape, params, data.tokenizer)
    build_lib.ensure(open_run(config, tmp_path))
    load = workload.open_real(config, tmp_path)
    assert load is not None
    assert load.source == "real"
    assert len(load.plan.segments) == len(data.train)
    batch = first_batch(load)
    assert 0 < (batch.view >= 0).sum() < (batch.segments > 0).sum() < 8 * 128
    assert np.isfinite(batch.teacher.log_probs).any()


def run_verb(*arguments):
    return subprocess.run(
        [sys.executable, "-m", "kdjax.benchmark", *arguments],
        cwd=ROOT,
        capture_output=True,
        text=True,
        env=os.environ | {"XLA_FLAGS": xla_flags.FAST_COMPILE},
    )


def test_the_verb_says_which_data_and_writes_json(tmp_path):
    out = tmp_path / "found.json"
    done = run_verb(
        f"--config={ROOT}/configs/bench_30m.py:smoke",
        f"--workdir={tmp_path}/none",
        "--steps=1",
        "--rounds=1",
        "--noonline",
        f"--json={out}",
    )
    assert done.returncode == 0, done.stderr
    assert "is not labelled" in done.stderr
    assert "synthetic data" in " ".join(done.stdout.split())
    assert json.loads(out.read_text())["data"]["source"] == "synthetic"
    assert not (tmp_path / "none").exists()


@pytest.mark.parametrize(
    ("flag", "words"),
    [
        ("--config.cache.kind=sampled", "cache.kind='sampled'"),
        ("--steps=0", "steps"),
        ("--config.train.batch_size=0", "train.batch_size=0"),
    ],
)
def test_errors_are_one_line(flag, words):
    done = run_verb(f"--config={ROOT}/configs/bench_30m.py:smoke", "--synthetic", flag)
    assert done.returncode == 1
    assert done.stderr.count("\n") == 1
    assert words in done.stderr


@pytest.fixture
def scripts(monkeypatch):
    """The scripts of benchmarks/, which are no package."""
    for folder in ("benchmarks", "benchmarks/peers"):
        monkeypatch.syspath_prepend(ROOT / folder)


@pytest.mark.usefixtures("scripts")
def test_the_plain_head_computes_the_same_loss():
    import head

    shape = head.Shape(num_tokens=48, width=16, vocab_size=96, k=8, chunk_size=16)
    found = head.measure(shape, rounds=1, steps=1)
    json.dumps(found, allow_nan=False)
    assert found["fused"]["loss"] == pytest.approx(found["plain"]["loss"], rel=1e-5)
    inputs = head.make_inputs(shape)
    grads = [
        jax.grad(make(shape), argnums=(0, 1))(*inputs)
        for make in (head.fused_loss, head.plain_loss)
    ]
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=1e-6), *grads)
    # Plain memory grows with the tokens, fused memory does not.
    assert found["plain"]["temporary_arrays_at_2n"] > 1.5
    assert found["flops"] == 6 * 48 * 16 * 96


def line(seconds, loss, **rest):
    return {
        "median_seconds": seconds,
        "loss": loss,
        "tokens_per_step": 100,
        "parameters": 7,
        "max_rss_bytes": 10,
        "rss_before_bytes": 4,
        "temporary_bytes": None,
    } | rest


@pytest.mark.usefixtures("scripts")
def test_peers_are_compared_over_rounds_and_checked_to_do_the_same():
    import run

    found = run.summarise(
        "tiny",
        {
            "kdjax: loop, cache": [line(1.0, 3.0), line(2.0, 3.0), line(1.0, 3.0)],
            "kdjax: whole rows": [line(1.0, 3.5)] * 3,
            "x: online teacher": [line(2.0, 3.5001), line(5.0, 3.5), line(2.5, 3.5)],
            "y: online teacher": [line(1.0, 3.6)] * 3,
            "z: online teacher": [{"skipped": "not installed"}],
        },
    )
    x = found["runs"]["x: online teacher"]
    assert (x["seconds"], x["times_ours"], x["tokens_per_second"]) == (2.5, 2.5, 40)
    assert (x["times_ours_lowest"], x["times_ours_highest"]) == (2.0, 2.5)
    assert x["work_rss_bytes"] == 6
    assert found["skipped"] == {"z: online teacher": "not installed"}
    assert found["same_problem"]["x: online teacher"]["loss"]
    assert not found["same_problem"]["y: online teacher"]["loss"]
    run.print_case(found)


@pytest.mark.slow
def test_the_gpu_script_runs_small(tmp_path):
    out = tmp_path / "gpu.json"
    done = subprocess.run(
        [
            sys.executable,
            str(ROOT / "benchmarks" / "gpu.py"),
            "--small",
            "--parts=parity,head,long_rows,label,heads,decode",
            f"--out={out}",
        ],
        capture_output=True,
        text=True,
        env=os.environ | {"XLA_FLAGS": xla_flags.FAST_COMPILE},
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(out.read_text())
    assert found["head"]["fused"]["seconds"] > 0
    assert max(found["parity"]["relative"].values()) < 0.03
    assert {"step: loss", "head: d weight"} < set(found["parity"]["relative"])
    assert found["long_rows"]["per_second"]["tokens"] > 0
    assert found["label"]["of_matmul"] > 0
    assert found["heads"]["gemma"]["fused"]["seconds"] > 0
    assert found["decode"]["decoded_per_second/64"] > 0


def test_a_gpu_script_out_of_time_says_so(tmp_path):
    out = tmp_path / "gpu.json"
    done = subprocess.run(
        [
            sys.executable,
            str(ROOT / "benchmarks" / "gpu.py"),
            "--parts=student,head",
            "--minutes=0",
            f"--out={out}",
        ],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(out.read_text())
    assert set(found) == {"student", "head"}
    assert all(part == {"skipped": "--minutes=0.0 are over"} for part in found.values())


@pytest.mark.slow
def test_a_peer_is_run_on_the_same_weights(tmp_path):
    """PyTorch and transformers: the dense losses agree."""
    out = tmp_path / "peers.json"
    done = subprocess.run(
        [
            sys.executable,
            str(ROOT / "benchmarks" / "peers" / "run.py"),
            "--peers=torch",
            "--cases=tiny",
            "--rounds=1",
            "--steps=2",
            f"--out={out}",
        ],
        capture_output=True,
        text=True,
        env=os.environ | {"XLA_FLAGS": xla_flags.FAST_COMPILE},
    )
    assert done.returncode == 0, done.stderr
    (found,) = json.loads(out.read_text())["results"]
    assert found["skipped"] == {}
    for agrees in found["same_problem"].values():
        assert agrees["parameters"]
        assert agrees["tokens_per_step"]
        assert abs(agrees["loss_difference"]) < 1e-5

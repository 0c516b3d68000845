"""The cache command: looking into caches, merging, exporting, importing."""

import dataclasses
import json
import os
import pathlib
import shutil
import subprocess
import sys

import numpy as np
import pytest
from datasets import Dataset

from kdjax import evaluate, train
from kdjax.config import Config
from kdjax.experiment import workdir as workdir_lib
from kdjax.experiment.data import load_data
from kdjax.teacher import cache as cache_lib
from kdjax.teacher import describe, merge_export
from kdjax.teacher.importers import convert
from kdjax.teacher.importers.convert import ImportedSequence
from tests import helpers

ROOT = pathlib.Path(__file__).parent.parent


@pytest.fixture(scope="module")
def finished(decoder_run, tmp_path_factory) -> tuple[Config, pathlib.Path]:
    """A run whose cache holds the whole vocabulary of every token, at T = 1 alone."""
    workdir = tmp_path_factory.mktemp("finished")
    config = helpers.taught(
        decoder_run[1].parent,
        cache_of="",
        method={"temperature": 1.0, "tail": "renormalize_both"},
        evaluation={"num_generations": 0},
    )
    config.cache = dataclasses.replace(config.cache, k=113, temperatures=(1.0,))
    train.run(config, workdir)
    return config, workdir


def cache_of(workdir, split="train"):
    return cache_lib.load_cache(workdir / "cache" / split)


def command(*arguments):
    return subprocess.run(
        [sys.executable, "-m", "kdjax.cache", *map(str, arguments)],
        cwd=ROOT,
        env=os.environ | {"JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
    )


def whole_sequences(config, cache, *, shift=0):
    """The cache's rows as another tool has them: of the whole sequence, from row 1."""
    for segment in load_data(config).train:
        record = cache.read(segment.key)
        start, num = len(segment.prompt_ids), record.num_tokens
        ids = np.full((start + num, cache.k), -1, np.int32)
        log_probs = np.full((start + num, cache.k), -np.inf, np.float32)
        targets = np.full(start + num, np.nan, np.float32)
        ids[1:], log_probs[1:] = record.ids[0], record.log_probs[0]  # of the prompt
        ids[start:] = np.roll(record.ids, shift, axis=0)
        log_probs[start:] = np.roll(record.log_probs, shift, axis=0)
        tokens = segment.ids
        hits = ids == tokens[:, None]
        targets = np.where(hits, log_probs, -np.inf).max(axis=1)
        yield ImportedSequence(
            tokens.astype(np.int32), ids, log_probs, targets.astype(np.float32)
        )


def test_describe_sums_up_the_records(finished):
    _, workdir = finished
    cache = cache_of(workdir)
    found = describe.summarize(cache)
    read = [cache.read(key) for key in cache]
    nll = -np.concatenate([r.target_log_probs for r in read]).mean()
    assert found["teacher_nll"] == pytest.approx(nll, rel=1e-4)
    assert sum(found["histogram"]) == found["tokens"] == cache.num_tokens
    assert found["mass"][113] == pytest.approx(1, abs=1e-4)
    assert list(found["mass"].values()) == sorted(found["mass"].values())
    assert len(describe.histogram_lines(found)) <= 32


def test_statistics_are_plotted(finished, tmp_path):
    cache = cache_of(finished[1])
    describe.plot(describe.summarize(cache), tmp_path / "info.png")
    assert (tmp_path / "info.png").stat().st_size > 5000


@pytest.mark.slow
def test_info_and_verify_print(finished, tmp_path):
    folder = finished[1] / "cache" / "train"
    done = command("info", folder, f"--png={tmp_path}/info.png")
    assert done.returncode == 0 and "bytes_per_token" in done.stdout, done.stderr
    assert "nats" in done.stdout and (tmp_path / "info.png").stat().st_size > 5000
    assert command("verify", folder).returncode == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["verify", "{tmp}"], "has no manifest.json"),
        (["verify"], "1 wanted"),
        (["look", "{tmp}"], "action='look' is unknown"),
        (["export", "{cache}"], "--out is missing"),
        (["import", "f", "--layout=vllm"], "--layout was renamed: use --format=vllm"),
        (["import", "f", "--format=llama"], "--format=llama: use one of ['axolotl'"),
        (["ids"], "--config is missing"),
    ],
    ids=lambda value: value if isinstance(value, str) else " ".join(value),
)
def test_the_command_fails_in_one_line(decoder_run, tmp_path, arguments, message):
    cache = decoder_run[1] / "cache" / "train"
    failed = command(*(a.format(tmp=tmp_path, cache=cache) for a in arguments))
    errors = [line for line in failed.stderr.splitlines() if "error:" in line]
    assert failed.returncode != 0 and len(errors) == 1, failed.stderr
    assert message in errors[0]


def test_export_has_every_number(finished, tmp_path):
    _, workdir = finished
    cache, out = cache_of(workdir), tmp_path / "cache.parquet"
    assert merge_export.export(cache, out) == cache.num_records
    for row in Dataset.from_parquet(str(out), cache_dir=str(tmp_path)):
        record = cache.read(bytes.fromhex(row["key"]))
        np.testing.assert_array_equal(row["ids"], record.ids)
        np.testing.assert_array_equal(np.float32(row["log_probs"]), record.log_probs)
        np.testing.assert_array_equal(row["target_ids"], record.target_ids)
    with pytest.raises(ValueError, match="exists"):
        merge_export.export(cache, out)


def test_merge_copies_every_record(finished, tmp_path):
    _, workdir = finished
    parts = [cache_of(workdir), cache_of(workdir, "eval")]
    merge_export.merge(parts, tmp_path / "both")
    both = cache_lib.load_cache(tmp_path / "both")
    assert both.num_tokens == sum(part.num_tokens for part in parts)
    for part in parts:
        for key in part:
            for a, b in zip(part.read(key), both.read(key), strict=True):
                np.testing.assert_equal(a, b)
    cache_lib.verify(both)
    other = dataclasses.replace(parts[1].manifest, teacher_fingerprint="other")
    with pytest.raises(ValueError, match="teacher_fingerprint='other'"):
        merge_export.merge(
            [parts[0], cache_lib.TeacherCache(parts[1].folder, other)], tmp_path / "no"
        )
    with pytest.raises(ValueError, match="merge caches of disjoint examples"):
        merge_export.merge([parts[0], parts[0]], tmp_path / "no")


def test_a_folder_that_is_being_merged_is_refused(finished, tmp_path):
    parts = [finished[1] / "cache" / split for split in ("train", "eval")]
    with workdir_lib.hold_output(tmp_path / "both"):
        ended = command("merge", *parts, f"--out={tmp_path / 'both'}")
    assert ended.returncode == 1
    assert f"out={str(tmp_path)!r} is being written by" in ended.stderr
    assert not (tmp_path / "both").exists()


def write_axolotl(path, sequences):
    with open(path, "w") as file:
        for rows in sequences:
            used = slice(1, None)  # rows of the last tokens, the first one has none
            line = {
                "logprobs": rows.log_probs[used].tolist(),
                "target_token_ids": rows.ids[used].tolist(),
                "input_ids": rows.token_ids.tolist(),
            }
            file.write(json.dumps(line) + "\n")


@pytest.mark.parametrize(
    ("tool", "suffix", "write"),
    [
        ("vllm", "jsonl", convert.write_vllm),
        ("distillkit", "parquet", convert.write_distillkit),
        ("axolotl", "jsonl", write_axolotl),
    ],
)
def test_import_gives_the_losses_of_the_cache(finished, tmp_path, tool, suffix, write):
    config, workdir = finished
    own = cache_of(workdir)
    write(tmp_path / f"dump.{suffix}", whole_sequences(config, own))
    data = load_data(config, splits=("train",))
    merge_export.import_file(
        tmp_path / f"dump.{suffix}",
        data.train,
        tmp_path / "cache",
        config=config,
        tokenizer=data.tokenizer,
        tool=tool,
    )
    imported = cache_lib.load_cache(tmp_path / "cache")
    assert imported.manifest.teacher_fingerprint == f"{tool}:{config.teacher.path}"
    losses = [helpers.TrainSteps(config, cache=c).losses for c in (own, imported)]
    np.testing.assert_allclose(*losses, rtol=1e-3)
    if tool == "axolotl":
        with pytest.raises(ValueError, match="tail='bucket' needs the mass outside"):
            cache_lib.load_cache(tmp_path / "cache", tail="bucket")
        with pytest.raises(ValueError, match=r"temperature=2\.0 was not declared"):
            cache_lib.load_cache(tmp_path / "cache", temperatures=(2.0,))


@pytest.mark.slow
def test_a_run_reads_what_the_command_imported(finished, tmp_path):
    config, workdir = finished
    convert.write_vllm(tmp_path / "dump", whole_sequences(config, cache_of(workdir)))
    file = helpers.write_config_file(config, tmp_path / "config.py")
    folder = tmp_path / "cache"
    done = command(
        "import",
        tmp_path / "dump",
        "--format=vllm",
        f"--config={file}",
        f"--out={folder}/train",
    )
    assert done.returncode == 0 and "teacher_nll" in done.stdout, done.stderr
    (folder / "eval").symlink_to(workdir / "cache" / "eval")
    cache = dataclasses.replace(config.cache, path=str(folder))
    train.run(dataclasses.replace(config, cache=cache), tmp_path / "run")
    np.testing.assert_allclose(
        helpers.losses(tmp_path / "run"), helpers.losses(workdir), rtol=1e-3
    )


def tokenizer_alone(config, folder):
    """A folder with the files of the teacher's tokenizer, and nothing else."""
    folder.mkdir()
    for path in pathlib.Path(config.teacher.path).iterdir():
        if "token" in path.name:
            (folder / path.name).write_bytes(path.read_bytes())
    return folder


def answer_as_vllm(ids, dump, cache):
    """What vLLM writes when it is run on the token_ids, with prompt_logprobs."""
    with open(dump, "w") as file:
        for line in ids.read_text().splitlines():
            row = json.loads(line)
            record = cache.read(bytes.fromhex(row["key"]))
            tokens = row["token_ids"]
            assert tokens == row["prompt_ids"] + row["target_ids"]
            assert record.target_ids.tolist() == row["target_ids"]
            start = row["num_prompt_tokens"]
            entries = [None]
            for place in range(1, len(tokens)):
                of = max(0, place - start)  # rows of the prompt: any with its token
                ids_K, log_probs_K = record.ids[of].tolist(), record.log_probs[of]
                entries.append(
                    {
                        str(i): {"logprob": float(p), "rank": rank, "decoded_token": ""}
                        for rank, (i, p) in enumerate(
                            zip(ids_K, log_probs_K, strict=True), 1
                        )
                    }
                )
            answer = {"prompt_token_ids": tokens, "prompt_logprobs": entries}
            file.write(json.dumps(answer) + "\n")


def test_from_ids_to_a_finished_run_without_weights(finished, tmp_path, capsys):
    config, workdir = finished
    teacher = tokenizer_alone(config, tmp_path / "teacher")
    there = helpers.changed(
        config,
        teacher={"path": str(teacher)},
        cache={"path": str(tmp_path / "caches")},
        train={"steps": 2},
    )
    with pytest.raises(ValueError, match="caches/train is not labelled, and teacher"):
        train.run(there, tmp_path / "run")
    data = load_data(there)
    for split, segments in (("train", data.train), ("eval", data.evaluation)):
        ids, dump = tmp_path / f"{split}.jsonl", tmp_path / f"{split}.vllm.jsonl"
        views = data.views if split == "train" else data.eval_views
        num = merge_export.write_ids(segments, views, data.tokenizer, ids)
        assert num == len({segment.key for segment in segments})
        answer_as_vllm(ids, dump, cache_of(workdir, split))
        merge_export.import_file(
            dump,
            segments,
            tmp_path / "caches" / split,
            config=there,
            tokenizer=data.tokenizer,
            tool="vllm",
            teacher="big/model",
        )
    manifest = cache_lib.read_manifest(tmp_path / "caches" / "train")
    assert describe.provenance(manifest)["teacher"] == "big/model"
    assert describe.provenance(manifest)["origin"] == "vllm"
    assert describe.provenance(manifest)["missing"] == "entropy"
    capsys.readouterr()
    train.run(there, tmp_path / "run")
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    whole = json.loads((workdir / "summary.json").read_text())
    assert {"nll", "kl", "agreement", "accuracy"} <= summary["student"].keys()
    for name in ("nll", "perplexity"):
        assert summary["teacher"][name] == pytest.approx(
            whole["teacher"][name],
            rel=1e-3,  # the dump is of rounded rows, which are rounded again
        )
    assert summary["teacher"].keys() < whole["teacher"].keys()
    assert summary["not_measured"].keys() == {"teacher/accuracy", "teacher/ece"}
    assert "not measured: teacher/accuracy" in capsys.readouterr().out
    np.testing.assert_allclose(
        helpers.losses(tmp_path / "run"), helpers.losses(workdir)[:2], rtol=1e-3
    )
    metrics, shape = evaluate.score(there, tmp_path / "run", "teacher")
    assert metrics == summary["teacher"] and shape is None


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"student": {"init": "teacher_layers", "keep_layers": (0,)}},
            "student.init='teacher_layers' needs the teacher's weights",
        ),
        (
            {"teacher": {"online": True}},
            "teacher.online=True needs the teacher's weights",
        ),
    ],
)
def test_what_needs_weights_is_refused_before_the_first_step(
    finished, tmp_path, changes, message
):
    config, workdir = finished
    teacher = tokenizer_alone(config, tmp_path / "teacher")
    changes = {"teacher": {}} | changes
    changes["teacher"] = changes["teacher"] | {"path": str(teacher)}
    changes["cache"] = {"path": str(workdir / "cache")}
    with pytest.raises(ValueError, match=message):
        train.run(helpers.changed(config, **changes), tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_the_command_writes_ids_and_tells_what_a_cache_is(finished, tmp_path):
    config, workdir = finished
    file = helpers.write_config_file(config, tmp_path / "config.py")
    out = tmp_path / "eval.jsonl"
    done = command("ids", f"--config={file}", "--split=eval", f"--out={out}")
    assert done.returncode == 0 and "run the teacher on their token_ids" in done.stdout
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    cache = cache_of(workdir, "eval")
    assert {bytes.fromhex(row["key"]) for row in rows} == set(cache)
    assert all(row["prompt"] and row["target"] for row in rows)
    again = command("ids", f"--config={file}", "--split=eval", f"--out={out}")
    assert again.returncode != 0 and "exists" in again.stderr.splitlines()[-1]
    told = command("info", workdir / "cache" / "eval").stdout
    for name in ("teacher", "origin", "labelled by kdjax", "temperatures", "nothing"):
        assert name in told


def test_an_import_that_is_not_verified_leaves_no_cache(
    finished, tmp_path, monkeypatch
):
    """Refused by `verify`, or killed before it is done: nothing is under its name."""
    config, workdir = finished
    dump, out = tmp_path / "dump", tmp_path / "out"
    convert.write_vllm(dump, whole_sequences(config, cache_of(workdir)))
    data = load_data(config, splits=("train",))

    def import_it():
        merge_export.import_file(
            dump, data.train, out, config=config, tokenizer=data.tokenizer, tool="vllm"
        )

    def verify_in_part(cache):
        assert cache.folder != out and not out.exists()
        raise ValueError(f"record 3 of {cache.folder}/x is shifted")

    with monkeypatch.context() as patched:
        patched.setattr(cache_lib, "verify", verify_in_part)
        with pytest.raises(ValueError, match=f"record 3 of {out}/x is shifted"):
            import_it()
    assert [path.name for path in tmp_path.iterdir()] == ["dump"]
    # What a kill leaves: the folder beside, with a finished cache in it.
    partial = tmp_path / ".out.partial"
    shutil.copytree(workdir / "cache" / "train", partial)
    import_it()
    assert {path.name for path in tmp_path.iterdir()} == {"dump", "out"}
    cache_lib.verify(cache_lib.load_cache(out))


def test_an_import_finds_what_is_read_before_the_target(tmp_path):
    """Rows of the whole sequence; those of prompt and prefix are not taken."""
    config = helpers.small_config(method={"name": "counterfactual"})
    data = load_data(config, splits=("train",))
    segments, vocab_size = data.train[1:5], len(data.tokenizer)
    rng = np.random.default_rng(0)
    sequences = []
    for segment in segments:
        assert len(segment.prefix_ids)
        tokens = segment.ids
        noise = (
            rng.normal(size=(len(tokens), vocab_size)) + 4 * np.eye(vocab_size)[tokens]
        )
        log_probs = noise - np.log(np.exp(noise).sum(-1, keepdims=True))
        ids = np.argsort(-log_probs, axis=-1).astype(np.int32)
        log_probs = np.take_along_axis(log_probs, ids, -1).astype(np.float32)
        hits = np.where(ids == tokens[:, None], log_probs, -np.inf).max(axis=1)
        sequences.append(ImportedSequence(tokens, ids, log_probs, hits))
    manifest = cache_lib.Manifest(
        kind="top_k",
        k=vocab_size,
        vocab_size=vocab_size,
        temperatures=(1.0,),
        tokenizer_fingerprint="f",
        teacher_path="t",
        teacher_fingerprint="t",
        missing=("entropy",),
    )
    merge_export.import_sequences(
        sequences, segments, tmp_path / "c", manifest, shard_size=16
    )
    cache = cache_lib.load_cache(tmp_path / "c")
    for segment, rows in zip(segments, sequences, strict=True):
        record, num = cache.read(segment.key), len(segment.target_ids)
        np.testing.assert_array_equal(record.ids[:, 0], rows.ids[-num:, 0])
        np.testing.assert_allclose(
            record.target_log_probs, rows.target_log_probs[-num:], atol=0.05
        )


@pytest.mark.parametrize("shift", [1, -1])
def test_an_import_of_shifted_rows_is_refused(finished, tmp_path, shift):
    config, workdir = finished
    cache = cache_of(workdir)
    manifest = dataclasses.replace(
        cache.manifest, shards=(), missing=("tail_mass", "entropy", "target_log_probs")
    )
    out = tmp_path / "cache"
    merge_export.import_sequences(
        whole_sequences(config, cache, shift=shift),
        load_data(config).train,
        out,
        manifest,
        shard_size=16,
    )
    with pytest.raises(ValueError, match="the cache is shifted by one"):
        cache_lib.verify(cache_lib.load_cache(out))


def test_sequences_without_tokens_must_be_as_many_as_examples(finished, tmp_path):
    config, workdir = finished
    cache = cache_of(workdir)
    sequences = [
        rows._replace(token_ids=None) for rows in whole_sequences(config, cache)
    ]
    segments = load_data(config).train
    with pytest.raises(ValueError, match="matched by their place"):
        merge_export.import_sequences(
            sequences + sequences[:1],
            segments,
            tmp_path / "c",
            cache.manifest,
            shard_size=16,
        )


def test_import_names_the_example_without_a_sequence(finished, tmp_path):
    config, workdir = finished
    cache = cache_of(workdir)
    sequences = list(whole_sequences(config, cache))[1:]
    segments = load_data(config).train
    with pytest.raises(ValueError, match=r"no sequence has its tokens \(1 such of"):
        merge_export.import_sequences(
            sequences, segments, tmp_path / "c", cache.manifest, shard_size=16
        )

"""A mixture of three sources, each with its method and cache, from start to summary."""

import json
import shutil

import jax
import numpy as np
import pytest

from kdjax.config import (
    CacheConfig,
    Config,
    DataConfig,
    DecoderConfig,
    EvalConfig,
    KinshipConfig,
    MethodConfig,
    MixtureConfig,
    StudentConfig,
    TeacherConfig,
    TrainConfig,
)
from kdjax.data import kinship
from kdjax.data.tokenizer import make_word_tokenizer
from kdjax.models import decoder, hf
from kdjax.pipeline import distill
from tests import helpers

STEPS = 6


def write_sources(folder):
    """Questions with rationales, questions without choices, and texts."""
    for number, split in enumerate(("train", "eval")):
        made = kinship.generate(
            KinshipConfig(), num_examples=40, seed=number, split=split
        )
        examples = list(made)
        rows = [
            {
                "id": e.id,
                "question": e.question,
                "choices": e.choices,
                "answer": e.answer,
                "rationale": e.rationale,
            }
            for e in examples
        ]
        free = [{k: row[k] for k in ("question", "answer")} for row in rows]
        texts = [{"text": row["rationale"]} for row in rows]
        for name, content in (("qa", rows), ("free", free), ("texts", texts)):
            lines = "".join(json.dumps(row) + "\n" for row in content)
            (folder / f"{name}-{split}.jsonl").write_text(lines)


def make_config(folder) -> Config:
    tokenizer = make_word_tokenizer()
    shape = DecoderConfig(
        vocab_size=len(tokenizer),
        width=16,
        num_layers=1,
        num_heads=2,
        num_kv_heads=2,
        head_dim=8,
        mlp_width=32,
    )
    params = decoder.init_params(shape, jax.random.key(7))
    hf.save(folder / "teacher", shape, params, tokenizer)
    names = ("qa", "free", "texts")
    return Config(
        data=DataConfig(source="mixture", shard_size=16, num_workers=1),
        mixture=MixtureConfig(
            names=names,
            weights=(5.0, 3.0, 2.0),
            paths=tuple(str(folder / f"{name}-train.jsonl") for name in names),
            eval_paths=tuple(str(folder / f"{name}-eval.jsonl") for name in names),
            methods=("multitask", "finetune", "text"),
            caches=("", str(folder / "elsewhere"), ""),
        ),
        teacher=TeacherConfig(path=str(folder / "teacher")),
        cache=CacheConfig(k=8, row_length=160),
        student=StudentConfig(decoder=shape),
        method=MethodConfig(),
        train=TrainConfig(
            steps=STEPS, batch_size=8, row_length=160, log_every=1, save_every=3
        ),
        evaluation=EvalConfig(num_generations=2, max_new_tokens=4),
    )


@pytest.mark.slow
def test_a_mixture_from_its_files_to_its_summary(tmp_path):
    write_sources(tmp_path)
    config = make_config(tmp_path)
    done = distill.distill(config, tmp_path / "run")
    views = ("qa/label", "qa/rationale", "free/label", "texts/text")
    assert done.run.data.views == views
    for row in helpers.step_rows(tmp_path / "run"):
        assert all(np.isfinite(row[f"loss/{view}/hard"]) for view in views)
        assert all(np.isfinite(row[f"loss/{view}/soft"]) for view in views)
    metrics = done.summary["student"]
    for name in ("qa", "free", "texts"):
        assert {f"nll/{name}", f"kl/{name}", f"agreement/{name}"} <= metrics.keys()
    assert "accuracy/qa" in metrics and "accuracy/texts" not in metrics
    shares = {"qa": 0.5, "free": 0.3, "texts": 0.2}
    for metric in ("nll", "kl"):
        mean = sum(share * metrics[f"{metric}/{n}"] for n, share in shares.items())
        assert metrics[metric] == pytest.approx(mean)
    assert done.summary["teacher"]["nll/qa"] > 0
    # Each source has its own cache, which a run on it alone reads.
    assert (tmp_path / "run" / "cache" / "qa" / "train" / "manifest.json").is_file()
    assert (tmp_path / "elsewhere" / "train" / "manifest.json").is_file()
    assert len(list((tmp_path / "run" / "prepared").glob("train-*"))) == 3
    # Stopped half way and started again it ends with the same losses.
    shutil.copytree(tmp_path / "run", tmp_path / "copy")
    shutil.rmtree(tmp_path / "copy" / "checkpoints" / str(STEPS))
    (tmp_path / "copy" / "summary.json").unlink()
    distill.distill(config, tmp_path / "copy")
    assert helpers.losses(tmp_path / "copy") == helpers.losses(tmp_path / "run")
    scores = helpers.score(config, tmp_path / "run", "student")
    assert scores["nll/texts"] == pytest.approx(metrics["nll/texts"], rel=1e-5)

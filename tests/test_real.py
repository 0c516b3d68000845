"""Every config of real data, in its smoke form, on the real files and teacher."""

import json
import os
import pathlib
import subprocess
import sys

import numpy as np
import pytest

from kdjax.annotation import annotate
from kdjax.annotation.requests import COUNTERFACTUAL_METHODS
from kdjax.config import ANNOTATIONS, AnnotateConfig
from tests import helpers
from tests.golden import make_losses

ROOT = pathlib.Path(__file__).parent.parent


def flags(name: str, real_data: pathlib.Path, smollm2: pathlib.Path) -> list[str]:
    """Where the data and the teacher of a config are."""
    if name == "smollm2_gsm8k":
        folder = real_data / "gsm8k"
        files = {"path": "train.jsonl", "eval_path": "test.jsonl"}
    else:
        folder = real_data / "commonsense_qa"
        files = {
            "path": "train.jsonl",
            "eval_path": "dev.jsonl",
            "rationales": "palm_train.jsonl",
            "eval_rationales": "palm_dev.jsonl",
        }
    return [
        f"--config.teacher.path={smollm2}",
        *(f"--config.data.{field}={folder / file}" for field, file in files.items()),
    ]


@pytest.mark.real_data
@pytest.mark.parametrize(
    ("name", "argument"), [("smollm2_gsm8k", "smoke,hard"), ("smollm2_csqa", "smoke")]
)
def test_smoke(name, argument, real_data, smollm2, tmp_path):
    command = [
        *(sys.executable, "-m", "kdjax.train", f"--workdir={tmp_path}"),
        f"--config={ROOT}/configs/{name}.py:{argument}",
        *flags(name, real_data, smollm2),
    ]
    # One device: eight virtual ones would each hold a copy of the models.
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "XLA_FLAGS": ""}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    summary = json.loads((tmp_path / "summary.json").read_text())
    for model in ("teacher", "student"):
        assert np.isfinite(summary[model]["nll"]) and np.isfinite(summary[model]["kl"])
    assert 0 <= summary["teacher"]["kl"] < 1e-3
    assert summary["teacher"]["agreement"] > 0.99
    if name == "smollm2_csqa":
        assert 0 <= summary["teacher"]["accuracy"] <= 1


def run_paper(
    name: str,
    argument: str,
    real_data: pathlib.Path,
    smollm2: pathlib.Path | None,
    folder: pathlib.Path,
) -> pathlib.Path:
    """Trains by a config of configs/paper; wrong rationales are written here.

    T5 has as many steps as its recorded losses.
    """
    folder.mkdir(exist_ok=True)
    lines = (real_data / "commonsense_qa" / "train.jsonl").read_text().splitlines()
    wrong = folder / "wrong.jsonl"
    with open(wrong, "w") as file:
        for row in map(json.loads, lines[:64]):
            for label, choice in zip(*row["choices"].values(), strict=True):
                if label != row["answerKey"]:
                    text = f"The answer must be something like {choice}, "
                    text += "which fits what was asked."
                    rationale = {"id": row["id"], "choice": choice, "text": text}
                    file.write(json.dumps(rationale) + "\n")
    place = [f"--config.student.path={smollm2}"]
    if name == "csqa_t5_base":
        place = [
            f"--config.data.tokenizer={real_data / 't5_tokenizer'}",
            f"--config.train.steps={helpers.NUM_GOLDEN}",
            "--config.train.log_every=1",
        ]
    if "counterfactual" in argument:
        place.append(f"--config.data.counterfactuals={wrong}")
    command = [
        *(sys.executable, "-m", "kdjax.train", f"--workdir={folder / 'run'}"),
        f"--config={ROOT}/configs/paper/{name}.py:{argument}",
        *flags(name, real_data, folder)[1:],
        *place,
    ]
    # The losses are recorded with one device, compiled as for users.
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "XLA_FLAGS": ""}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return folder / "run"


@pytest.mark.real_data
@pytest.mark.parametrize(
    ("name", "argument"),
    [
        *(("csqa_t5_base", argument) for argument in make_losses.REAL),
        ("csqa_smollm2", "multitask,smoke"),
    ],
)
def test_paper_smoke(name, argument, real_data, smollm2, tmp_path):
    """Hard labels, no teacher."""
    run = run_paper(name, argument, real_data, smollm2, tmp_path)
    summary = helpers.summary(run)
    assert np.isfinite(summary["student"]["nll"]) and summary["teacher"] == {}
    if "multitask" in argument:
        assert 0 <= summary["student"]["accuracy"] <= 1
        assert 0 <= summary["student"]["exact_match/label"] <= 1
    else:
        assert 0 <= summary["student"]["answer_match/rationale_then_label"] <= 1
    if name == "csqa_t5_base":
        losses = make_losses.read()[argument]
        np.testing.assert_allclose(helpers.losses(run), losses, rtol=1e-4)


@pytest.mark.real_data
@pytest.mark.parametrize("method", ANNOTATIONS)
def test_annotate_smoke(method, real_data, smollm2, tmp_path):
    """A real model explains five real questions in each way."""
    command = [
        *(sys.executable, "-m", "kdjax.annotate", f"--workdir={tmp_path}"),
        f"--config={ROOT}/configs/smollm2_csqa.py:smoke",
        *flags("smollm2_csqa", real_data, smollm2),
        "--config.data.num_train=5",
        "--config.data.chat_template=True",
        f"--config.annotate.method={method}",
        "--config.annotate.max_new_tokens=24",
        "--config.annotate.num_demonstrations=2",
        "--config.annotate.batch_size=5",
    ]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "XLA_FLAGS": ""}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    folder = tmp_path / "annotations" / f"train-{method}"
    name = annotate.result_file(AnnotateConfig(method=method))
    rows = [json.loads(line) for line in (folder / name).read_text().splitlines()]
    assert len(rows) == (20 if method in COUNTERFACTUAL_METHODS else 5)
    if method == "answer":
        assert sum(bool(row["answer"]) for row in rows) > 2
        return
    assert all(len(row["text"].split()) > 3 for row in rows)
    assert len({row["text"] for row in rows}) > 3

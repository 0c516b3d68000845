"""Every command of docs/walkthrough.md, in an empty folder, as it stands there."""

import json
import os
import pathlib
import re
import subprocess
import sys

import pytest

PAGE = pathlib.Path(__file__).parent.parent / "docs" / "walkthrough.md"


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", PAGE.read_text(), re.DOTALL)


def test_the_page_shows_a_row_that_is_read(tmp_path):
    from kdjax.config import DataConfig
    from kdjax.data import sources

    (row,) = blocks("json")
    file = tmp_path / "questions.jsonl"
    file.write_text(row * 2)
    config = DataConfig(source="jsonl", path=str(file), num_eval=1)
    (example,) = sources.load_examples(config, "train", seed=0)
    assert example.answer == "fridge" and len(example.choices) == 3


@pytest.mark.real_data
@pytest.mark.skipif(sys.platform == "win32", reason="commands of a POSIX shell")
def test_every_command(real_data, smollm2, tmp_path):
    lines = (real_data / "commonsense_qa" / "train.jsonl").read_text().splitlines()
    with (tmp_path / "questions.jsonl").open("w") as file:
        for row in map(json.loads, lines[:24]):
            choices = row["choices"]
            answer = choices["text"][choices["label"].index(row["answerKey"])]
            mine = {"question": row["question"], "choices": choices["text"]}
            file.write(json.dumps(mine | {"answer": answer}) + "\n")
    (code,) = blocks("python")
    (tmp_path / "mine.py").write_text(code)
    commands = "".join(blocks("sh"))
    named = "TEACHER=HuggingFaceTB/SmolLM2-135M-Instruct\n"
    assert named in commands
    script = commands.replace(named, f"TEACHER={smollm2}\n")
    # A user's machine: one device, and the python of this test.
    environment = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"}
    folder = pathlib.Path(sys.executable).parent
    environment["PATH"] = f"{folder}:{environment['PATH']}"
    done = subprocess.run(
        ["bash", "-euxo", "pipefail", "-c", script],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        timeout=1500,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found = tmp_path / "runs" / "mine"
    assert (found / "results.csv").read_text().count(",done,") == 4
    assert "answer_accuracy" in (found / "report.html").read_text()
    assert (tmp_path / "student" / "model.safetensors").is_file()
    # The rationales that were shown are those that were trained on.
    assert '"text":' in done.stdout and '"kept": 16' in done.stdout

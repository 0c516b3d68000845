"""GSM8K as chats: distilled, exported, and answered by a server with the same text."""

import json
import pathlib
import subprocess
import sys
import urllib.request

import pytest

from kdjax.config import Config, DataConfig, EvalConfig, StudentConfig, TrainConfig
from kdjax.pipeline.distill import distill
from kdjax.pipeline.student import Student, export_student, generate
from tests import helpers, test_real_server

NEW = 16
QUESTIONS = ("What is 3 + 4?", "Name a colour.", "Who wrote Hamlet?")


@pytest.fixture
def chats(real_data, tmp_path):
    """Questions and answers of GSM8K as turns, and a second question after them."""
    for name, num in (("train", 16), ("test", 4)):
        lines = (real_data / "gsm8k" / f"{name}.jsonl").read_text().splitlines()[:num]
        with open(tmp_path / f"{name}.jsonl", "w") as file:
            for row in map(json.loads, lines):
                solution, _, number = row["answer"].partition("####")
                turns = [row["question"], solution, "Only the number.", number.strip()]
                messages = [
                    {"role": ("user", "assistant")[i % 2], "content": text}
                    for i, text in enumerate(turns)
                ]
                file.write(json.dumps({"messages": messages}) + "\n")
    return tmp_path


def ask(port, folder, question):
    """What the server answers, greedily."""
    body = {
        "model": str(folder),
        "messages": [{"role": "user", "content": question}],
        "max_tokens": NEW,
        "temperature": 0.0,
    }
    request = urllib.request.Request(
        f"http://127.0.0.1:{port}/v1/chat/completions",
        data=json.dumps(body).encode(),
        headers={"Content-Type": "application/json"},
    )
    with urllib.request.urlopen(request, timeout=300) as answer:
        return json.loads(answer.read())["choices"][0]["message"]["content"]


def run(smollm2, chats, out):
    """Distils, exports and asks a student: "export" and "texts.json" in `out`."""
    config = helpers.changed(
        Config(
            data=DataConfig(
                source="jsonl",
                schema="messages",
                path=str(chats / "train.jsonl"),
                eval_path=str(chats / "test.jsonl"),
                max_prompt=256,
                max_target=256,
            ),
            student=StudentConfig(init="teacher_layers", keep_layers=(0, 9, 19, 29)),
            train=TrainConfig(steps=3, batch_size=4, row_length=512, log_every=1),
            evaluation=EvalConfig(batch_size=4, num_generations=2, max_new_tokens=NEW),
        ),
        teacher={"path": str(smollm2)},
        method={"name": "chat"},
        cache={"batch_size": 4, "row_length": 512},
    )
    finished = distill(config, out / "run")
    assert {"nll", "kl", "agreement", "nll/chat"} <= finished.metrics.keys()
    export_student(finished.run, out / "export")
    student = Student(run=finished.run, params=finished.params)
    (out / "texts.json").write_text(json.dumps(generate(student, QUESTIONS)))


@pytest.mark.real_data
def test_a_distilled_chat_model_is_served_with_the_same_text(smollm2, chats, tmp_path):
    subprocess.run(  # with one device, which has the models once
        [sys.executable, "-m", "tests.test_real_chat", smollm2, chats, tmp_path],
        env={**helpers.ENVIRONMENT, "XLA_FLAGS": ""},
        check=True,
    )
    losses = helpers.losses(tmp_path / "run")
    assert len(losses) == 3 and losses[-1] < losses[0]
    texts = json.loads((tmp_path / "texts.json").read_text())
    folder = tmp_path / "export"
    assert (folder / "chat_template.jinja").is_file()
    with test_real_server.serve(folder, tmp_path / "log") as port:
        for question, text in zip(QUESTIONS, texts, strict=True):
            assert ask(port, folder, question).strip() == text.strip() != ""


if __name__ == "__main__":
    run(*map(pathlib.Path, sys.argv[1:]))

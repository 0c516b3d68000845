"""Examples of docs/data.md: read, shown, labelled, trained on and evaluated."""

import contextlib
import pathlib
import re
import shlex
import subprocess
import sys

import jax
import pytest

from kdjax import prepare
from kdjax.config import DecoderConfig, MixtureConfig, replace
from kdjax.data import preview, selection, sources, views
from kdjax.experiment import methods, validate
from kdjax.models import hf, lm
from tests import helpers
from tests.data.test_views import byte_level

PAGE_FILE = pathlib.Path(__file__).parent.parent / "docs" / "data.md"
PAGE = PAGE_FILE.read_text()
BLOCKS = {
    name: (flags, content)
    for name, flags, content in re.findall(
        r"^```\w+ (\S+)(.*)\n((?s:.*?))^```$", PAGE, re.MULTILINE
    )
}
# Paths that the page's Python makes.
PATHS = re.findall(r'"([^"]+)"', "".join(re.findall(r"^paths \+?= .*$", PAGE, re.M)))
CHATML = (
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}<eos>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
SHAPE = DecoderConfig(
    vocab_size=258,
    width=16,
    num_layers=1,
    num_heads=2,
    num_kv_heads=1,
    head_dim=8,
    mlp_width=16,
)


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    """A folder with a tokenizer of bytes and random weights."""
    folder = tmp_path_factory.mktemp("teacher")
    tokenizer = byte_level(chat_template=CHATML)
    assert len(tokenizer) == SHAPE.vocab_size
    hf.save(folder, SHAPE, lm.init_params(SHAPE, jax.random.key(0)), tokenizer)
    return folder


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """The folder in which the page's Python was run."""
    folder = tmp_path_factory.mktemp("made")
    [code] = re.findall(r"^```python\n((?s:.*?))^```$", PAGE, re.MULTILINE)
    with contextlib.chdir(folder):
        exec(compile(code, "docs/data.md", "exec"), {})
    return folder


def make_config(path, flags, teacher):
    """The config of a page's flags, for a file of three rows."""
    config = helpers.small_config(
        data={
            "path": str(path),
            "num_train": 0,
            "num_eval": 1,
            "max_prompt": 256,
            "max_target": 128,
        },
        teacher={"path": str(teacher)},
        student={"decoder": SHAPE},
        cache={"row_length": 384},
        method={"name": "finetune"},
        train={"steps": 1, "row_length": 384, "save_every": 0},
        evaluation={"row_length": 384, "num_generations": 0},
    )
    for flag in shlex.split(flags):
        name, _, value = flag.removeprefix("--config.").partition("=")
        config = replace(config, name, value)
    validate.validate(config)
    return config


def write(name, folder):
    flags, content = BLOCKS[name]
    path = folder / name
    path.write_text(content)
    return path, flags


def check(config, tokenizer, capsys):
    """Read and show both splits; return the training examples."""
    names = methods.views(config.method)
    examples = sources.load_examples(config.data, "train", seed=0)
    selected = selection.select(examples, names, "train", config.data)
    assert len(selected.examples) == len(examples) == 2
    segments, _ = views.make_segments(examples, names, tokenizer, config.data)
    assert len(segments) >= 2 * len(names)
    for segment in segments:
        spans = preview.spans(segment, tokenizer)
        assert any(span.trained for span in spans)
        assert sum(len(span.tokens) for span in spans) == len(segment.ids)
    prepare.show(config, 1)
    printed = capsys.readouterr().out
    assert (
        f"train {examples[0].id!r} ({examples[0].origin}), view {names[0]}:" in printed
    )
    assert re.search(r"^  read +\d+: ", printed, re.M)
    assert re.search(r'^  trained +\d+: "', printed, re.M)
    assert "eval: all 1 examples" in printed
    return examples


@pytest.mark.parametrize("name", BLOCKS)
def test_examples_of_the_page_are_read_and_shown(name, tmp_path, teacher, capsys):
    path, flags = write(name, tmp_path)
    config = make_config(path, flags, teacher)
    examples = check(config, byte_level(chat_template=CHATML), capsys)
    schema = path.stem.removesuffix("_nested").removesuffix("_messages")
    if f"`{schema}`" in PAGE:
        seen = sources.describe(config.data, "train")
        same = {"arc": "commonsense_qa", "text": "plain"}
        assert f"schema {same.get(schema, schema)} of the columns" in seen
        assert ("not read" in seen) == (schema in ("mmlu", "preference"))
    for example in examples:
        assert example.text or example.messages or example.answer
        assert not example.choices or example.answer in example.choices


def test_every_schema_of_the_page_has_an_example():
    table = PAGE.partition("## Forms of rows")[2].partition("\n\n```")[0]
    names = re.findall(r"`(\w+)`", "".join(re.findall(r"^\| (`.*?) \|", table, re.M)))
    stems = {name.partition(".")[0] for name in BLOCKS}
    assert {*names} - {"data", "schema"} <= stems | {"text"}
    assert all(f"`{path.partition('/')[0]}" in PAGE or path for path in PATHS)


@pytest.mark.parametrize("path", PATHS)
def test_other_formats_of_the_page_are_read_and_shown(path, made, teacher, capsys):
    config = make_config(made / path, "", teacher)
    examples = check(config, byte_level(chat_template=CHATML), capsys)
    assert [example.answer for example in examples] == ["fridge", "oven"]


def test_sources_of_a_mixture_are_shown(tmp_path, teacher, capsys):
    path, _ = write("rows.jsonl", tmp_path)
    other, _ = write("messages.jsonl", tmp_path)
    config = make_config(path, "", teacher)
    config.data.source = "mixture"
    config.mixture = MixtureConfig(
        names=("questions", "chats"),
        weights=(1, 3),
        paths=(str(path), str(other)),
        methods=("finetune", "chat"),
    )
    prepare.show(config, 1)
    printed = capsys.readouterr().out
    assert "source questions, 25% of the rows" in printed
    assert printed.index("view label:") < printed.index("source chats, 75%")
    assert "schema messages" in printed and "view chat:" in printed


def test_too_long_examples_are_shown_as_left_out(tmp_path, teacher, capsys):
    path, flags = write("rows.jsonl", tmp_path)
    config = make_config(path, flags, teacher)
    config.data.max_prompt, config.data.on_long = 30, "drop"
    prepare.show(config, 2)
    printed = capsys.readouterr().out
    assert re.search(r"train '1' \(.*rows.jsonl:1\): left out, too long", printed)
    assert re.search(r"segments dropped +│ +1 ", printed)


def test_the_command_takes_the_flags_of_the_page(tmp_path, teacher):
    path, flags = write("columns.csv", tmp_path)
    file = helpers.write_config_file(make_config(path, "", teacher), tmp_path / "c.py")
    command = [sys.executable, "-m", "kdjax.prepare", f"--config={file}", "--show=1"]
    shown = subprocess.run(
        [*command, *shlex.split(flags)],
        cwd=tmp_path,
        env=helpers.ENVIRONMENT,
        capture_output=True,
        text=True,
    )
    assert shown.returncode == 0, shown.stderr
    assert "columns.csv:2), view label:" in shown.stdout
    assert "\x1b" not in shown.stdout and "trained" in shown.stdout


def test_the_page_is_the_first_that_the_readme_names_after_its_quickstart():
    readme = (PAGE_FILE.parent.parent / "README.md").read_text()
    start = readme.partition("quickstart.py:hard")[2].partition("## Why")[0]
    assert re.findall(r"docs/(\w+\.md)", start)[-1:] == ["data.md"]


@pytest.mark.slow
@pytest.mark.parametrize("name", [*BLOCKS, *PATHS])
def test_examples_of_the_page_are_trained_on(name, tmp_path, teacher, made):
    import kdjax

    path, flags = write(name, tmp_path) if name in BLOCKS else (made / name, "")
    config = make_config(path, flags, teacher)
    kdjax.distill(config, tmp_path / "run")
    summary = helpers.summary(tmp_path / "run")
    assert summary["student"]["nll"] > 0 and summary["teacher"]["nll"] > 0
    assert (tmp_path / "run" / "cache" / "train" / "manifest.json").exists()

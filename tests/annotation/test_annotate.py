"""Annotations by a tiny random model: what is written, and that kills cost nothing."""

import collections
import dataclasses
import json
import os
import signal
import subprocess
import sys

import jax
import numpy as np
import pytest

from kdjax import annotate as command
from kdjax import cli
from kdjax import config as config_lib
from kdjax.annotation import annotate, backends, prompts, store
from kdjax.annotation import requests as requests_lib
from kdjax.config import ANNOTATIONS, AnnotateConfig
from kdjax.data import kinship, sources
from kdjax.data import tokenizer as tokenizers
from kdjax.experiment import resume, validate
from kdjax.models import decoder, hf, lm
from kdjax.models.generate import Decoding, Generator
from tests import helpers
from tests.multiprocess import launch

NUM, BATCH = 13, 8


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    """The teacher's folder, and examples as a jsonl file."""
    base = tmp_path_factory.mktemp("annotate")
    tokenizer = tokenizers.make_word_tokenizer()
    shape = dataclasses.replace(
        helpers.DECODER, vocab_size=len(tokenizer), max_length=2048, init_std=0.3
    )
    params = decoder.init_params(shape, jax.random.key(5))
    hf.save(base / "teacher", shape, params, tokenizer)
    found = kinship.generate(
        helpers.small_config().data.kinship, num_examples=NUM + 1, seed=0, split="train"
    )
    names = ("id", "question", "choices", "answer")
    with open(base / "rows.jsonl", "w") as file:
        for example in found:
            row = {name: getattr(example, name) for name in names}
            file.write(json.dumps(row) + "\n")
    return base


def config(places, data=None, **fields):
    fields = {
        "max_new_tokens": 5,
        "batch_size": BATCH,
        "num_demonstrations": 1,
    } | fields
    data = {
        "source": "jsonl",
        "path": str(places / "rows.jsonl"),
        "num_train": NUM,
        "num_eval": 1,
        **(data or {}),
    }
    made = helpers.small_config(
        data=data,
        teacher={"path": str(places / "teacher")},
        annotate=AnnotateConfig(**fields),
    )
    validate.validate(made)
    return made


def examples(made):
    return sources.load_examples(made.data, "train", seed=0)


def content(folder):
    """What a run leaves, but for the order in which it came about."""
    found = {
        file.name: file.read_text().replace(str(folder), "FOLDER")
        for file in folder.iterdir()
        if file.is_file()
    }
    keys = [store.key_of(row) for row in store.read(folder)]
    assert len(keys) == len(set(keys))
    return found | {"keys": sorted(keys)}


@pytest.fixture(scope="module")
def sampled(places, tmp_path_factory):
    """A finished run of three steps a row, sampled; its files."""
    made = config(places, method="critique_revision", temperature=1.0, seed=3)
    workdir = tmp_path_factory.mktemp("sampled")
    annotate.annotate(made, workdir)
    return made, annotate.output_folder(made, workdir)


def oracle(places, messages, contrast=None):
    """Greedy decoding of one prompt by itself."""
    tokenizer = tokenizers.load(places / "teacher")
    shape = hf.read_config(places / "teacher")
    graphdef, _ = lm.create(shape)
    params = hf.load_params(places / "teacher", shape)
    ids = tokenizer.encode(prompts.plain(messages), add_special_tokens=False)
    decoding = Decoding(
        max_new_tokens=5,
        eos_ids=(tokenizer.eos_token_id,),
        pad_id=tokenizer.pad_token_id,
    )
    [new] = Generator(shape, graphdef, decoding, batch_size=1)(params, [ids])
    return tokenizer.decode(new, skip_special_tokens=True), len(ids), new


@pytest.mark.parametrize("method", ANNOTATIONS)
def test_every_method_writes_a_row_for_each_rationale(places, tmp_path, method):
    made = config(places, method=method, contrast_weight=0.0)
    report = annotate.annotate(made, tmp_path)
    folder = tmp_path / "annotations" / f"train-{method}"
    result = folder / annotate.result_file(made.annotate)
    rows = [json.loads(line) for line in result.read_text().splitlines()]
    items = requests_lib.make_items(examples(made), made.annotate)
    assert [store.key_of(row) for row in rows] == [item.key for item in items]
    assert report == json.loads((folder / "report.json").read_text())
    assert report["rows"] == report["kept"] == len(rows) and report["dropped"] == 0
    assert sum(report["finish_reasons"].values()) == len(rows)
    files = prompts.load()
    steps = 3 if method == "critique_revision" else 1
    for item, row in zip(items[:2], rows[:2], strict=True):
        first = requests_lib.Work(item, files, made.annotate).request
        # A contrast of weight 0 is none.
        text, num_tokens, new = oracle(places, first.messages)
        call = row["calls"][0]
        assert call["text"] == text and call["new_tokens"] == len(new) + (len(new) < 5)
        assert len(row["calls"]) == steps
        if method != "contrastive":
            assert call["prompt_tokens"] == num_tokens
        assert call["finish_reason"] == ("stop" if len(new) < 5 else "length")
        assert row["settings"]["method"] == method
        assert row["settings"]["fingerprint"] == hf.fingerprint(places / "teacher")
        assert row["prompt_hash"] == call["prompt_hash"]


def test_a_contrast_changes_what_is_written(places, tmp_path):
    texts = []
    for weight in (0.0, 2.0):
        made = config(
            places, method="contrastive", contrast_weight=weight, path=f"{weight}"
        )
        made.annotate.path = str(tmp_path / made.annotate.path)
        annotate.annotate(made, tmp_path)
        rows = store.read(tmp_path / f"{weight}")
        texts.append({row["id"]: row["text"] for row in rows})
    assert texts[0] != texts[1] and texts[0].keys() == texts[1].keys()


def test_a_second_start_does_nothing(sampled, monkeypatch):
    made, folder = sampled
    files = [file for file in folder.rglob("*") if file.is_file()]
    before = {file: (file.stat().st_mtime_ns, file.read_bytes()) for file in files}
    monkeypatch.setattr(backends, "Local", None)  # calling it would fail
    annotate.annotate(made, folder.parent.parent)
    assert before == {
        file: (file.stat().st_mtime_ns, file.read_bytes()) for file in files
    }
    assert sum(1 for file in folder.rglob("*") if file.is_file()) == len(files)


@pytest.mark.parametrize("share", [0.0, 0.31, 0.62, 0.999])
def test_cut_anywhere_it_ends_the_same(sampled, tmp_path, share):
    """What a kill leaves is a beginning of the part, to the byte."""
    made, folder = sampled
    whole = (folder / "parts" / "part-00000.jsonl").read_bytes()
    other = annotate.output_folder(made, tmp_path)
    (other / "parts").mkdir(parents=True)
    cut = int(share * len(whole))
    (other / "parts" / "part-00000.jsonl").write_bytes(whole[:cut])
    annotate.annotate(made, tmp_path)
    assert content(other) == content(folder)
    kept = whole[:cut].rpartition(b"\n")[0]
    assert (other / "parts" / "part-00000.jsonl").read_bytes().startswith(kept)


def test_killed_it_goes_on(sampled, places, tmp_path):
    made, folder = sampled
    script = (
        "import os, signal, pathlib, sys\n"
        "from kdjax import config\n"
        "from kdjax.annotation import annotate, store\n"
        "append, left = store.PartWriter.append, [BATCH + 2]\n"
        "def dying(self, row):\n"
        "    left[0] -= 1\n"
        "    if not left[0]:\n"
        '        self._file.write(b\'{"id": "tor\')\n'
        "        self._file.flush()\n"
        "        os.kill(os.getpid(), signal.SIGKILL)\n"
        "    append(self, row)\n"
        "store.PartWriter.append = dying\n"
        "made = config.from_json(pathlib.Path(sys.argv[1]).read_text())\n"
        "annotate.annotate(made, pathlib.Path(sys.argv[2]))\n"
    ).replace("BATCH", str(BATCH))
    from kdjax.config import to_json

    (tmp_path / "config.json").write_text(to_json(made))
    done = subprocess.run(
        [sys.executable, "-c", script, tmp_path / "config.json", tmp_path],
        env={**os.environ, "PYTHONPATH": str(helpers.ROOT)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == -signal.SIGKILL, done.stderr
    other = annotate.output_folder(made, tmp_path)
    assert (other / "parts" / "part-00000.jsonl").read_bytes().endswith(b"tor")
    assert len(list(store.read(other))) == BATCH + 1
    annotate.annotate(made, tmp_path)
    assert content(other) == content(folder)


def test_two_processes_write_what_one_does(sampled, tmp_path):
    made, folder = sampled
    launch.run("annotate", made, tmp_path, num_processes=2, num_devices=4)
    other = annotate.output_folder(made, tmp_path)
    parts = sorted((other / "parts").iterdir())
    assert [part.name for part in parts] == ["part-00000.jsonl", "part-00001.jsonl"]
    assert all(part.read_text() for part in parts)
    assert content(other) == content(folder)


def test_seeds_differ_and_other_settings_are_refused(sampled, places):
    made, folder = sampled
    workdir = folder.parent.parent
    other = config(places, method="critique_revision", temperature=1.0, seed=4)
    with pytest.raises(ValueError, match="holds annotations of other settings"):
        annotate.annotate(other, workdir)
    other.annotate.path = str(folder.parent / "seed-4")
    annotate.annotate(other, workdir)
    texts = [
        {row["id"]: row["text"] for row in store.read(place)}
        for place in (folder, folder.parent / "seed-4")
    ]
    assert texts[0] != texts[1]
    # What changes no text may change.
    made = dataclasses.replace(made, annotate=dataclasses.replace(made.annotate))
    made.annotate.batch_size = 2 * BATCH
    annotate.annotate(made, workdir)


def test_more_examples_are_added_and_changed_ones_refused(places, tmp_path, echo):
    made = config(places, data={"num_train": 3})
    annotate.annotate(made, tmp_path)
    folder = annotate.output_folder(made, tmp_path)
    before = (folder / "parts" / "part-00000.jsonl").read_bytes()
    made.data.num_train = NUM
    assert annotate.annotate(made, tmp_path)["rows"] == NUM
    assert (folder / "parts" / "part-00000.jsonl").read_bytes().startswith(before)
    made.data.num_train = 2  # fewer: what is there stays, the result is of these
    assert annotate.annotate(made, tmp_path)["rows"] == 2
    text = (places / "rows.jsonl").read_text()
    (tmp_path / "rows.jsonl").write_text(text.replace("How is", "How was", 1))
    made.data.path = str(tmp_path / "rows.jsonl")
    with pytest.raises(ValueError, match="the data has changed"):
        annotate.annotate(made, tmp_path)


def test_one_folder_has_one_writer(tmp_path):
    with (
        store.PartWriter(tmp_path, 0),
        pytest.raises(ValueError, match="is being written by another process"),
    ):
        store.PartWriter(tmp_path, 0)


def test_filters_drop_the_rows_that_fail_them(places, tmp_path, echo):
    made = config(places)
    first = annotate.annotate(made, tmp_path)
    assert first["gates"]["cut_off"] > 0 and first["kept"] == NUM
    folder = annotate.output_folder(made, tmp_path)
    made.annotate.drop = ("cut_off",)
    report = annotate.annotate(made, tmp_path)
    assert report["gates"] == first["gates"]
    assert report["dropped"] == first["gates"]["cut_off"] == report["examples_without"]
    dropped = [
        json.loads(x) for x in (folder / "dropped.jsonl").read_text().splitlines()
    ]
    kept = [
        json.loads(x) for x in (folder / "rationales.jsonl").read_text().splitlines()
    ]
    assert all("cut_off" in row["gates"] for row in dropped)
    assert not any("cut_off" in row["gates"] for row in kept)
    texts = {row["id"]: row["text"] for row in store.read(folder)}
    assert texts == {row["id"]: row["text"] for row in [*dropped, *kept]}


def test_a_text_ends_before_a_stop_string(places, tmp_path):
    made = config(places)
    annotate.annotate(made, tmp_path)
    rows = list(store.read(annotate.output_folder(made, tmp_path)))
    words = collections.Counter(w for row in rows for w in row["text"].split()[1:])
    stop = f" {words.most_common(1)[0][0]}"
    made.annotate.stop, made.annotate.path = (
        (stop, "\nQuestion:"),
        str(tmp_path / "cut"),
    )
    made.annotate.batch_size = 4  # in slots that are refilled
    annotate.annotate(made, tmp_path)
    cut = {row["id"]: row for row in store.read(tmp_path / "cut")}
    assert any(row["calls"][0]["text"].count(stop) for row in rows)
    for row in rows:
        text, found = row["calls"][0]["text"], cut[row["id"]]
        assert found["calls"][0]["text"] == text.partition(stop)[0]
        assert found["new_tokens"] <= row["new_tokens"]  # decoding has stopped there
        if stop in text:
            assert found["finish_reason"] == "stop"


def test_the_result_is_training_data(places, tmp_path, echo):
    made = config(places, method="counterfactual")
    annotate.annotate(made, tmp_path)
    made.annotate.method = "few_shot"
    annotate.annotate(made, tmp_path)
    base = tmp_path / "annotations"
    made.data.rationales = str(base / "train-few_shot" / "rationales.jsonl")
    made.data.counterfactuals = str(
        base / "train-counterfactual" / "counterfactuals.jsonl"
    )
    wrong = {
        store.key_of(row): row["text"]
        for row in store.read(base / "train-counterfactual")
    }
    right = {row["id"]: row["text"] for row in store.read(base / "train-few_shot")}
    for example in examples(made):
        assert example.rationale == right[example.id]
        for choice, text in zip(
            (c for c in example.choices if c != example.answer),
            example.counterfactuals,
            strict=True,
        ):
            assert text == wrong[example.id, choice]


def test_the_command_prints_counts(places, tmp_path, capsys, monkeypatch, echo):
    written = []
    monkeypatch.setattr(cli, "write_json", written.append)
    command.run(config(places, method="zero_shot"), tmp_path)
    lines = capsys.readouterr().out.splitlines()
    assert any("kept" in line and f" {NUM} " in line for line in lines)
    assert any("contradicts" in line for line in lines)
    assert [report["file"] for report in written] == lines[-1:]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"method": "x"}, r"annotate.method='x' is unknown"),
        ({"drop": ("x",)}, r"annotate.drop='x' is unknown"),
        ({"top_p": 0.0}, r"annotate.top_p=0.0"),
        ({"max_new_tokens": 0}, r"annotate.max_new_tokens=0"),
        ({"temperature": -1.0}, r"annotate.temperature=-1.0"),
        ({"stop": ("",)}, r"leave it out"),
        ({"backend": "server"}, r"annotate.url=''"),
        ({"backend": "server", "url": "http://x"}, r"annotate.model=''"),
        ({"backend": "server", "method": "contrastive"}, r"backend='local'"),
        ({"cache_dtype": "int8", "method": "contrastive"}, r"cache_dtype='compute'"),
    ],
)
def test_a_wrong_setting_is_named(places, fields, message):
    with pytest.raises(ValueError, match=message):
        config(places, **fields)


def test_a_prompt_too_long_names_its_example(places, tmp_path):
    with pytest.raises(ValueError, match=r"example '.*': its rationale prompt has"):
        annotate.annotate(config(places, max_new_tokens=1990), tmp_path)
    with pytest.raises(ValueError, match="tokenizer has no chat template"):
        annotate.annotate(config(places, data={"chat_template": True}), tmp_path / "c")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"num_critiques": 8}, "num_critiques=8: the prompt files have 7"),
        ({"max_draft_tokens": 1850}, r"prompt may have up to \d+ tokens"),
        ({"max_critique_tokens": 1990}, "its critique prompt may have up to"),
        ({"max_draft_tokens": 500, "max_critique_tokens": 1300}, "its revision prompt"),
    ],
)
def test_later_steps_are_checked_before_the_first_text(
    fields, message, places, tmp_path, monkeypatch
):
    monkeypatch.setattr(backends.Local, "__call__", lambda *_: pytest.fail("a text"))
    fields = {"method": "critique_revision", "num_critiques": 1} | fields
    with pytest.raises(ValueError, match=message):
        annotate.annotate(config(places, **fields), tmp_path)


def test_no_annotation_setting_keeps_a_training_run_from_resuming(places):
    changed = config(places, method="zero_shot", seed=5)
    assert resume.differences(config(places), changed) == []


def test_hosts_share_by_id(monkeypatch, places):
    items = requests_lib.make_items(examples(config(places)), AnnotateConfig())
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    owners = [annotate._process_of(item) for item in items]
    assert set(owners) == {0, 1}
    assert owners[::-1] == [annotate._process_of(item) for item in items[::-1]]
    np.testing.assert_array_less(0, np.bincount(owners))


class Mock:
    """A model that answers each request by `complete`."""

    batch_size = BATCH
    is_continuous = False

    def __init__(self, config, path):
        pass

    def check(self, work):
        pass

    def __call__(self, requests, on_finish):
        for index, request in enumerate(requests):
            on_finish(index, self.complete(request))


class Echo(Mock):
    """A model that completes a request with its prompt's hash and its seed."""

    def complete(self, request):
        return requests_lib.Completion(
            text=f"{prompts.digest(request.messages)} {request.seed}",
            finish_reason="stop" if request.seed % 3 else "length",
            prompt_tokens=9,
            new_tokens=2,
        )


@pytest.fixture
def echo(monkeypatch):
    monkeypatch.setattr(backends, "Local", Echo)


class Reasoner(Mock):
    """A model that reasons before it answers, but for a fifth of the questions."""

    def complete(self, request):
        text = "The rest." if request.seed % 5 == 0 else REASONED
        return requests_lib.Completion(
            text=text, finish_reason="stop", prompt_tokens=9, new_tokens=9
        )


REASONED = "<think>\nPerhaps (z).\n</think>\n\nThe rest."


@pytest.mark.parametrize("policy", config_lib.THINK_POLICIES)
def test_reasoning_is_kept_stripped_or_required(places, tmp_path, monkeypatch, policy):
    monkeypatch.setattr(backends, "Local", Reasoner)
    made = config(places, data={"think": policy})
    report = annotate.annotate(made, tmp_path)
    folder = annotate.output_folder(made, tmp_path)
    lines = (folder / "rationales.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    texts = {row["text"] for row in rows}
    raw = {call["text"] for row in rows for call in row["calls"]}
    without = report["rows"] - sum(
        REASONED in json.dumps(row["calls"], ensure_ascii=False)
        or row["calls"][0]["text"] == REASONED
        for row in store.read(folder)
    )
    assert 0 < without < report["rows"] == NUM
    if policy == "strip":
        # The filters have not seen what was thought.
        assert texts == {"The rest."} and raw == {REASONED, "The rest."}
        assert report["gates"]["contradicts"] == 0
        assert all(row["settings"]["think"] == "strip" for row in rows)
    elif policy == "require":
        assert texts == {REASONED} and report["dropped"] == without
        assert report["gates"][annotate.NO_THINK] == without
    else:
        assert texts == {REASONED, "The rest."}
        assert report["gates"]["contradicts"] == NUM - without
        assert "think" not in rows[0]["settings"]


class FirstChoice(Mock):
    """A model that answers every question with its first choice, but some with none."""

    def complete(self, request):
        return requests_lib.Completion(
            text="(a)" if request.seed % 5 else "So what",
            finish_reason="stop",
            prompt_tokens=9,
            new_tokens=1,
        )


def test_answers_are_labels_and_rationales_explain_them(places, tmp_path, monkeypatch):
    monkeypatch.setattr(backends, "Local", FirstChoice)
    made = config(places, method="answer")
    report = annotate.annotate(made, tmp_path)
    folder = annotate.output_folder(made, tmp_path)
    lines = (folder / "labels.jsonl").read_text().splitlines()
    answers = {row["id"]: row["answer"] for row in map(json.loads, lines)}
    gold = {example.id: example.answer for example in examples(made)}
    first = {example.id: example.choices[0] for example in examples(made)}
    told = {name for name, answer in answers.items() if answer}
    assert 0 < len(told) < NUM and answers.keys() == gold.keys()
    assert all(answers[name] == first[name] for name in told)
    assert report["answered"] == len(told)
    right = sum(answers[name] == gold[name] for name in told)
    assert report["accuracy"] == right / len(told)
    # A wrong answer contradicts nothing that the teacher was told.
    assert report["gates"]["contradicts"] == 0
    assert report["gates"]["no_choice"] == NUM - len(told)

    labels = str(folder / "labels.jsonl")
    more = {"labels": labels, "on_missing": "drop"}
    made = config(places, data=more)
    assert annotate.annotate(made, tmp_path)["rows"] == len(told)
    rows = list(store.read(annotate.output_folder(made, tmp_path)))
    assert {row["id"] for row in rows} == told
    for item in requests_lib.make_items(examples(config(places)), made.annotate):
        if item.example.id in told:
            example = dataclasses.replace(item.example, answer=first[item.example.id])
            [explained] = requests_lib.make_items([example], made.annotate)
            work = requests_lib.Work(explained, prompts.load(), made.annotate)
            [row] = [row for row in rows if row["id"] == example.id]
            assert row["prompt_hash"] == work.prompt_hash
    # The teacher answers from the questions alone, whatever labels there are.
    again = config(places, data=more, method="answer")
    assert annotate.annotate(again, tmp_path) == report

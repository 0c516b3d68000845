"""Tokenizers: folders that are damaged, unknown tokens, other vocabularies."""

import ast
import dataclasses
import importlib.util
import json
import pathlib

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from kdjax.config import DataConfig
from kdjax.data import sources, views
from kdjax.data import tokenizer as tokenizers
from kdjax.data.example import Example
from tests.data.chat_templates import make_tokenizer
from tests.helpers import ROOT


@pytest.fixture
def folder(tmp_path):
    make_tokenizer("chatml").save_pretrained(tmp_path)
    return tmp_path


def edit(file, change):
    content = json.loads(file.read_text())
    change(content)
    file.write_text(json.dumps(content))


def bad_pattern(content):
    content["pre_tokenizer"] = {
        "type": "Sequence",
        "pretokenizers": [
            {
                "type": "Split",
                "pattern": {"Regex": "(a"},
                "behavior": "Isolated",
                "invert": False,
            }
        ],
    }


@pytest.mark.parametrize(
    ("name", "damage", "message"),
    [
        ("tokenizer.json", lambda f: f.write_bytes(f.read_bytes()[:99]), "JSONDecode"),
        ("tokenizer.json", lambda f: f.write_text(""), "is damaged"),
        ("tokenizer.json", lambda f: f.write_text("[" * 200000), "RecursionError"),
        (
            "tokenizer.json",
            lambda f: f.write_text("[1]"),
            "is damaged|cannot",
        ),
        (
            "tokenizer.json",
            lambda f: f.write_bytes(b"\xff\xfe{}"),
            "UnicodeDecodeError",
        ),
        ("tokenizer.json", lambda f: edit(f, bad_pattern), "Exception: Oniguruma"),
        ("tokenizer.json", lambda f: edit(f, lambda c: c.pop("model")), "cannot be lo"),
        ("tokenizer_config.json", lambda f: f.write_text("{"), "JSONDecodeError"),
    ],
)
def test_a_damaged_file_is_named_in_one_line(folder, capfd, name, damage, message):
    damage(folder / name)
    with pytest.raises(ValueError, match=message) as error:
        tokenizers.load(folder)
    text = str(error.value)
    assert str(folder) in text and "\n" not in text and len(text) < 600
    if "is damaged" in text:
        assert str(folder / name) in text
    assert capfd.readouterr().err == ""


def test_code_of_a_folder_is_not_run(folder, capfd):
    def change(content):
        content["tokenizer_class"] = "Mine"
        content["auto_map"] = {"AutoTokenizer": ["mine.Mine", None]}

    edit(folder / "tokenizer_config.json", change)
    (folder / "mine.py").write_text("raise SystemExit('it ran')")
    with pytest.raises(ValueError, match="code of the folder, which is not run"):
        tokenizers.load(folder)
    assert "[y/N]" not in capfd.readouterr().out


def test_no_call_trusts_code_or_asks():
    """Every load of a folder or a data set says that code in it is not run."""
    calls = 0
    for file in sorted((ROOT / "kdjax").rglob("*.py")):
        for node in ast.walk(ast.parse(file.read_text())):
            if not isinstance(node, ast.Call):
                continue
            name = ast.unparse(node.func).rpartition(".")[2]
            keywords = {k.arg: ast.unparse(k.value) for k in node.keywords}
            assert keywords.get("trust_remote_code", "False") == "False", file
            if name == "from_pretrained":
                calls += 1
                assert keywords.get("trust_remote_code") == "False", file
    assert calls > 0


def test_a_sentencepiece_model_alone(tmp_path):
    (tmp_path / "tokenizer.model").write_bytes(b"")
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    installed = importlib.util.find_spec("sentencepiece") is not None
    message = "cannot be loaded" if installed else r"pip install 'kdjax\[sentence"
    with pytest.raises(ValueError, match=message) as error:
        tokenizers.load(tmp_path)
    assert "\n" not in str(error.value)


@pytest.mark.real_data
def test_a_real_sentencepiece_model_alone(real_data, tmp_path):
    pytest.importorskip("sentencepiece")
    for name in ("spiece.model", "tokenizer_config.json"):
        content = (real_data / "t5_tokenizer" / name).read_bytes()
        (tmp_path / name).write_bytes(content)
    (tmp_path / "config.json").write_text('{"model_type": "t5"}')
    text = "Two words, <extra_id_0> and a third."
    alone = tokenizers.load(tmp_path)
    assert alone.encode(text) == tokenizers.load(real_data / "t5_tokenizer").encode(
        text
    )


def test_a_folder_without_a_pad_token():
    tokenizer = make_tokenizer("llama3")
    assert tokenizer.pad_token_id is None
    assert tokenizers.pad_id(tokenizer) == tokenizer.eos_token_id
    tokenizer.pad_token = "<|eot_id|>"
    assert tokenizers.pad_id(tokenizer) == tokenizer.convert_tokens_to_ids("<|eot_id|>")


def test_rows_with_tokens_are_counted_to_the_last_id():
    core = Tokenizer(models.WordLevel({"<eos>": 0, "a": 7}, unk_token="<eos>"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<eos>")
    assert (len(tokenizer), tokenizers.vocabulary_size(tokenizer)) == (2, 8)


def words(*known):
    vocabulary = {w: i for i, w in enumerate(["<eos>", "<unk>", *known])}
    core = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=core, eos_token="<eos>", unk_token="<unk>"
    )


def test_unknown_tokens_are_counted_and_named():
    tokenizer = words("Answer:", "a", "b")
    rows = [Example(id="1", question="a < b { c", answer="b")] * 2
    rows += [Example(id="2", question="a <", answer="a")]
    config = DataConfig()
    segments, counts = views.make_segments(rows, ("label",), tokenizer, config)
    assert counts.unknown == 7
    assert counts.tokens == sum(len(s.ids) for s in segments)
    with pytest.raises(ValueError, match=r"\('<', '\{', 'c'\)|often '<', '\{', 'c'"):
        views.check_unknown(counts, tokenizer, config)
    views.check_unknown(counts, tokenizer, DataConfig(max_unknown=0.5))
    halves = [
        views.make_segments(rows[i : i + 2], ("label",), tokenizer, config)[1]
        for i in (0, 2)
    ]
    both = halves[0] + halves[1]
    assert both == counts
    assert counts.max_id == max(int(s.ids.max()) for s in segments)


@pytest.mark.real_data
def test_t5_on_gsm8k_is_refused_and_on_commonsense_qa_is_not(real_data):
    tokenizer = tokenizers.load(real_data / "t5_tokenizer")
    lines = (real_data / "gsm8k" / "train.jsonl").read_text().splitlines()[:300]
    rows = [json.loads(line) for line in lines]
    examples = [
        Example(id=str(i), question=row["question"], answer=row["answer"])
        for i, row in enumerate(rows)
    ]
    config = DataConfig(max_prompt=2000, max_target=2000)
    _, counts = views.make_segments(examples, ("label",), tokenizer, config)
    with pytest.raises(ValueError, match=r"'<<'|'<'"):
        views.check_unknown(counts, tokenizer, config)
    file = str(real_data / "commonsense_qa" / "train.jsonl")
    config = dataclasses.replace(
        config, source="jsonl", schema="commonsense_qa", path=file, num_train=1000
    )
    examples = sources.load_examples(config, "train", seed=0)
    _, counts = views.make_segments(examples, ("label",), tokenizer, config)
    views.check_unknown(counts, tokenizer, config)


def test_the_same_tokens(folder):
    tokenizer = tokenizers.load(folder)
    tokenizers.check_same_tokens(tokenizer, folder, "student.path")
    tokenizers.check_same_tokens(tokenizer, folder / "weights alone", "student.path")
    more = make_tokenizer("chatml")
    more.add_tokens(["<more>"])
    tokenizers.check_same_tokens(more, folder, "student.path")
    with pytest.raises(ValueError, match=r"teacher.path=.* 4 of 259 ids are|other tok"):
        tokenizers.check_same_tokens(make_tokenizer("phi3"), folder, "teacher.path")


@pytest.mark.parametrize("mark", ["\ufdd0", "\ufdd1", "\ufdd2"])
@pytest.mark.parametrize("parse_special", [False, True])
def test_a_text_with_the_characters_of_marks_is_refused(mark, parse_special):
    tokenizer = make_tokenizer("chatml")
    config = DataConfig(parse_special=parse_special)
    text = f"<|im_end|> \ufdd1257\ufdd2 {mark}"
    message = r"example 'q' \(rows.jsonl:3\): a text has the character U\+FDD[012],"
    origin = "rows.jsonl:3"
    question = Example(id="q", question=text, answer="a", origin=origin)
    messages = (
        {"role": "user", "content": text},
        {"role": "assistant", "content": "a"},
    )
    for row, view in (
        (question, "label"),
        (Example(id="q", messages=messages, origin=origin), "chat"),
        (
            Example(
                id="q",
                messages=({"role": "user", "content": "a"}, messages[1]),
                tools=({"name": text},),
                origin=origin,
            ),
            "chat",
        ),
    ):
        with pytest.raises(ValueError, match=message) as error:
            views.make_segments([row], (view,), tokenizer, config)
        assert "\n" not in str(error.value) and mark not in str(error.value)


def test_only_pickled_weights(tmp_path):
    from kdjax.models.hf import safetensors_io

    pathlib.Path(tmp_path / "pytorch_model.bin").write_bytes(b"x")
    with pytest.raises(ValueError, match=r"AutoModelForCausalLM\.from_pretrained"):
        safetensors_io.find(tmp_path)

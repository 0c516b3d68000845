"""What an export says of itself, and what a run says of its student's beginnings."""

import json
import re

import jax
import numpy as np
import pytest
import transformers
from flax.traverse_util import flatten_dict
from huggingface_hub import ModelCard

from kdjax.config import DecoderConfig, LoraConfig, MeshConfig, T5Config
from kdjax.data import tokenizer as tokenizers
from kdjax.experiment import model_card, provenance
from kdjax.experiment.data import load_tokenizer
from kdjax.experiment.models import make_model, student_params, student_shape
from kdjax.models import hf, lm
from kdjax.parallel import sharding
from tests import helpers

DECODER = DecoderConfig(vocab_size=300, width=32, num_layers=3, mlp_width=56)
T5 = T5Config(vocab_size=300, num_encoder_layers=3, num_decoder_layers=2)
TEMPLATE = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"


@pytest.fixture(params=[DECODER, T5], ids=["decoder", "t5"])
def teacher(request, tmp_path):
    """A folder in which a teacher of either kind is."""
    folder = tmp_path / "big"
    tokenizer = tokenizers.make_word_tokenizer()
    hf.save(folder, request.param, lm.init_params(request.param, jax.random.key(0)))
    tokenizer.save_pretrained(folder)
    return folder


def found_of(config, teacher):
    shape = student_shape(config, load_tokenizer(config))
    model = make_model(
        shape,
        sharding.make_mesh(MeshConfig()),
        dtype="float32",
        adapters=config.student.lora,
    )
    return model, provenance.initial_params(config, model, str(teacher))


def test_origins_of_the_teachers_layers(teacher):
    is_t5 = (teacher / "config.json").read_text().count("T5For")
    student = {"init": "teacher_layers", "keep_layers": (1, 0)}
    config = helpers.small_config(
        teacher={"path": str(teacher)},
        student=student | {"lora": LoraConfig(rank=2, targets=("query",))},
    )
    model, found = found_of(config, teacher)
    own = "decoder/layers" if is_t5 else "layers"
    assert found["embed/embedding"] == "teacher big"
    assert found[f"{own}/attention/query/kernel"] == "teacher layers (1, 0) of big"
    assert found[f"{own}/attention/query/lora_a"] == "adapter, random"
    if is_t5:
        assert model.shape.num_encoder_layers == 3
        path = "encoder/layers/mlp/up/kernel"
        assert found[path] == "teacher layers (0, 1, 2) of big"
        assert found["encoder/position_bias/table"] == "teacher big"
        config.student.keep_encoder_layers = (2,)
        assert found_of(config, teacher)[1][path] == "teacher layers (2,) of big"
    plain = {path for path, origin in found.items() if origin != "adapter, random"}
    assert plain == set(flatten_dict(lm.create(model.shape)[1], sep="/"))


def test_the_teachers_layers_are_where_the_origins_say(teacher):
    config = helpers.small_config(
        teacher={"path": str(teacher)},
        student={"init": "teacher_layers", "keep_layers": (1, 0)},
    )
    model, found = found_of(config, teacher)
    assert model.shape.width == hf.read_config(teacher).width
    make = student_params(config, model, str(teacher))
    params = flatten_dict(make(), sep="/")
    whole = flatten_dict(hf.load_params(teacher, hf.read_config(teacher)), sep="/")
    assert params.keys() == found.keys() == whole.keys()
    for path, origin in found.items():
        wanted = whole[path]
        if "layers" in origin:
            layers = re.search(r"\((.*?),?\)", origin)[1]
            wanted = wanted[np.array([int(layer) for layer in layers.split(",")])]
        np.testing.assert_array_equal(params[path], wanted)


def test_origins_name_no_folder_of_this_machine(teacher, tmp_path):
    config = helpers.small_config(
        teacher={"path": str(teacher)},
        student={"init": "teacher_layers", "keep_layers": (1, 0)},
    )
    model, found = found_of(config, teacher)
    assert str(tmp_path) not in json.dumps(found)
    rows = {row["from"]: row["parameters"] for row in provenance.table(found)}
    is_t5 = isinstance(model.shape, T5Config)
    assert rows["teacher layers (1, 0) of big"] == (
        "decoder/layers" if is_t5 else "layers"
    )
    norm = "decoder/norm" if is_t5 else "norm"
    assert {"embed", norm} <= set(rows["teacher big"].split(", "))


def test_origins_of_a_folder_and_of_nothing(teacher):
    config = helpers.small_config(student={"init": "folder", "path": str(teacher)})
    assert {*found_of(config, "")[1].values()} == {"folder big"}
    config = helpers.small_config()
    assert {*found_of(config, "")[1].values()} == {"random"}


def test_names_hold_no_local_path(tmp_path, monkeypatch):
    (tmp_path / "owner" / "local").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert provenance.name_of("owner/model") == "owner/model"
    for path in ("owner/local", "./owner/local/", str(tmp_path / "owner" / "local")):
        assert provenance.name_of(path) == "local" and not provenance.is_hub_name(path)
    assert provenance.name_of("/gone/away/rows.jsonl") == "rows.jsonl"
    assert not provenance.is_hub_name("")


def test_a_card_says_how_the_student_was_made(tmp_path):
    config = helpers.small_config(
        data={
            "source": "jsonl",
            "schema": "gsm8k",
            "path": str(tmp_path / "train.jsonl"),
            "rationales": str(tmp_path / "why.jsonl"),
        },
        teacher={"path": "owner/teacher"},
        student={"init": "teacher_layers", "keep_layers": (0, 2)},
        method={
            "label_weight": 0.25,
            "hard_weight": 0.4,
            "weight_schedule": "linear",
            "final_hard_weight": 0.8,
            "temperature": 2.0,
        },
    )
    found = {"embed/embedding": "teacher owner/teacher", "layers/mlp/up": "x"}
    summary = {"student": {"nll": 0.51239, "accuracy": 0.5}, "teacher": {"nll": 0.25}}
    text = model_card.write(config, DECODER, found, step=6, summary=summary)
    data = ModelCard(text).data.to_dict()
    assert data == {
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "base_model": "owner/teacher",
        "teacher": "owner/teacher",
        "tags": ["distillation", "kdjax"],
    }
    for line in (
        "| teacher | owner/teacher |",
        "| starts from | embed: teacher owner/teacher; layers: x |",
        "| data | train.jsonl (jsonl, schema gsm8k), rationales why.jsonl, "
        "24 examples |",
        "| method | multitask, views label, rationale |",
        "| soft labels | the teacher's top 8 probabilities, stored |",
        "| temperature | 2, terms times its square |",
        "| steps | 6 of 6, 8 packed rows each |",
        "| label/hard | 0.1 | 0.2 |",
        "| rationale/soft | 0.375 | 0.375 |",
        "| nll | 0.5124 | 0.25 |",
        "| accuracy | 0.5 |  |",
    ):
        assert f"{line}\n" in text, line
    assert str(tmp_path) not in text and str(tmp_path.parent) not in text
    # A run whose examples were left out in part says how many it used.
    summary["examples"] = {"train": {"read": 24, "used": 21, "segments": 42}}
    text = model_card.write(config, DECODER, found, step=6, summary=summary)
    assert "rationales why.jsonl, 21 examples of 24 |" in text


def test_a_card_without_teacher_and_results(tmp_path):
    config = helpers.small_config(
        method={"name": "finetune", "soft_weight": 0.0},
        student={"init": "folder", "path": str(tmp_path)},
    )
    text = model_card.write(config, T5, {}, step=3)
    data = ModelCard(text).data.to_dict()
    assert data["pipeline_tag"] == "text2text-generation"
    assert "base_model" not in data and "teacher" not in data
    assert "| teacher | none |" in text and "results" not in text
    assert "temperature" not in text and "| label/hard | 0.5 |" in text


def check_chats(tokenizer, folder):
    """The tokenizer of an exported folder writes chats as the given one."""
    shape = DecoderConfig(vocab_size=len(tokenizer))
    params = lm.init_params(shape, jax.random.key(0))
    hf.save(folder, shape, params, tokenizer, readme="# Card\n")
    assert (folder / "README.md").read_text() == "# Card\n"
    again = transformers.AutoTokenizer.from_pretrained(folder)
    chat = [{"role": "user", "content": "who?"}, {"role": "assistant", "content": "I"}]
    for tokenize in (False, True):
        for last in (False, True):
            arguments = {"tokenize": tokenize, "add_generation_prompt": last}
            wanted = tokenizer.apply_chat_template(chat[: 1 + last], **arguments)
            assert again.apply_chat_template(chat[: 1 + last], **arguments) == wanted
    assert again.get_vocab() == tokenizer.get_vocab()
    assert tokenizers.fingerprint(again) == tokenizers.fingerprint(tokenizer)


def test_chat_templates_travel(tmp_path):
    tokenizer = tokenizers.make_word_tokenizer()
    tokenizer.chat_template = TEMPLATE
    check_chats(tokenizer, tmp_path / "out")
    assert (tmp_path / "out" / "chat_template.jinja").read_text() == TEMPLATE


@pytest.mark.real_data
def test_the_chat_template_of_smollm2_travels(smollm2, tmp_path):
    check_chats(tokenizers.load(smollm2), tmp_path / "out")

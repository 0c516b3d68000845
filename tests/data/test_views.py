import os

import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from kdjax.config import DataConfig
from kdjax.data import kinship, templates, tokenizer, views
from kdjax.data.sources import Example, load_examples

EXAMPLE = Example(
    id="q7",
    question="Who is it ?",
    choices=("aunt", "uncle", "aunt"),
    answer="aunt",
    rationale="Alice is the aunt of Ben .",
)
TEXT = Example(id="t1", text="Alice is the aunt of Ben .")
LONG = DataConfig(max_prompt=8, max_target=4)


def byte_level(*, bos=None, pad="<eos>", chat_template=None):
    """Every byte is a token; bos is added to plain text if there is one."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    special = ["<eos>", "<pad>", *([bos] if bos else [])]
    vocabulary = {token: i for i, token in enumerate([*special, *alphabet])}
    core = Tokenizer(models.BPE(vocabulary, []))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    if bos:
        core.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A", special_tokens=[(bos, vocabulary[bos])]
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        eos_token="<eos>",
        pad_token=pad,
        bos_token=bos,
        chat_template=chat_template,
        clean_up_tokenization_spaces=False,
    )


def metaspace():
    """Adds its own word boundary before every text, as SentencePiece does."""
    words = ["▁Answer:", "▁mother", "▁aunt"]
    core = Tokenizer(
        models.WordLevel(
            {w: i for i, w in enumerate(["<eos>", "<unk>", *words])}, "<unk>"
        )
    )
    core.pre_tokenizer = pre_tokenizers.Metaspace()
    return PreTrainedTokenizerFast(
        tokenizer_object=core, eos_token="<eos>", unk_token="<unk>"
    )


def segments(examples, names, tok, config=None):
    return views.make_segments(examples, names, tok, config or DataConfig())


@pytest.mark.parametrize(
    ("view", "prompt", "target"),
    [
        (
            "label",
            "Who is it ?\nChoices: (a) aunt (b) uncle (c) aunt\nAnswer:",
            "aunt",
        ),
        (
            "rationale",
            "Who is it ?\nChoices: (a) aunt (b) uncle (c) aunt\nExplain:",
            "Alice is the aunt of Ben .",
        ),
        (
            "rationale_then_label",
            "Who is it ?\nChoices: (a) aunt (b) uncle (c) aunt\nExplain and answer:",
            "Alice is the aunt of Ben .\nAnswer: aunt",
        ),
    ],
)
def test_texts_survive_tokenising(view, prompt, target):
    assert templates.render(EXAMPLE, view) == (prompt, target)
    tok = byte_level()
    [segment], counts = segments([EXAMPLE], (view,), tok)
    assert tok.decode(segment.prompt_ids) == prompt
    assert tok.decode(segment.target_ids) == f" {target}<eos>"
    assert segment.target_ids[-1] == tok.eos_token_id
    assert (segment.example_id, segment.view) == ("q7", 0)
    assert segment.prompt_ids.dtype == segment.target_ids.dtype == np.int32
    assert counts.prompt_tokens == len(segment.prompt_ids)
    assert counts.target_tokens == len(segment.target_ids)
    whole = np.concatenate([segment.prompt_ids, segment.target_ids])
    assert whole[:-1].tolist() == tok.encode(f"{prompt} {target}")


def test_the_answer_is_found_in_a_generated_text():
    _, target = templates.render(EXAMPLE, "rationale_then_label")
    assert templates.final_answer(target) == "aunt"
    assert templates.final_answer(" aunt ") == "aunt"


def test_segments_are_ordered_by_example_then_view():
    other = Example(id="q8", question="Who ?", answer="uncle", rationale="So .")
    found, counts = segments([EXAMPLE, other], ("label", "rationale"), byte_level())
    order = [(segment.example_id, segment.view) for segment in found]
    assert order == [("q7", 0), ("q7", 1), ("q8", 0), ("q8", 1)]
    assert counts.segments == 4


def test_text_starts_with_bos_or_else_eos():
    for tok, first in ((byte_level(), "<eos>"), (byte_level(bos="<s>"), "<s>")):
        [segment], _ = segments([TEXT], ("text",), tok)
        assert tok.convert_ids_to_tokens(segment.prompt_ids) == [first]
        assert tok.decode(segment.target_ids) == TEXT.text + "<eos>"
        assert segment.length == len(segment.target_ids)


def test_bos_is_added_where_the_tokenizer_adds_it():
    tok = byte_level(bos="<s>")
    [segment], _ = segments([EXAMPLE], ("label",), tok)
    assert segment.prompt_ids[0] == tok.bos_token_id
    assert tok.bos_token_id not in segment.prompt_ids[1:]
    assert tok.bos_token_id not in segment.target_ids


def test_no_second_space_where_the_tokenizer_adds_one():
    tok = metaspace()
    assert views.target_prefix(byte_level()) == " "
    prefix = views.target_prefix(tok)
    ids = tok.encode(prefix + "aunt", add_special_tokens=False)
    assert tok.convert_ids_to_tokens(ids) == ["▁aunt"]


def test_chat_template_wraps_the_prompt_only():
    pytest.importorskip("jinja2")
    template = (
        "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
        "{% if add_generation_prompt %}<assistant>{% endif %}"
    )
    tok = byte_level(chat_template=template)
    config = DataConfig(chat_template=True)
    [segment], _ = segments([EXAMPLE], ("label",), tok, config)
    prompt, _ = templates.render(EXAMPLE, "label")
    assert tok.decode(segment.prompt_ids) == f"<user>{prompt}<assistant>"
    assert tok.decode(segment.target_ids) == "aunt<eos>"
    [segment], _ = segments([TEXT], ("text",), tok, config)
    assert len(segment.prompt_ids) == 1
    with pytest.raises(ValueError, match="chat_template=True"):
        segments([EXAMPLE], ("label",), byte_level(), config)


def test_keys_depend_on_content_and_tokenizer_alone():
    tok = byte_level()
    [first], _ = segments([EXAMPLE], ("label",), tok)
    found, _ = segments([EXAMPLE], ("rationale", "label"), tok)
    assert found[1].key == first.key != found[0].key
    assert len(first.key) == 16
    [other], _ = segments([EXAMPLE], ("label",), byte_level(pad="<pad>"))
    assert other.prompt_ids.tolist() == first.prompt_ids.tolist()
    assert other.key != first.key
    prompt, target = first.prompt_ids, first.target_ids
    for changed in ((prompt[::-1].copy(), target), (prompt, target + 1)):
        assert views._key(b"", *changed) != views._key(b"", prompt, target)


def test_keys_know_where_the_target_starts():
    key = views._key
    a, b = np.array([1, 2], np.int32), np.array([3], np.int32)
    assert key(b"", a, b) != key(b"", a[:1], np.array([2, 3], np.int32))


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("max_prompt", r"'q7', view 'label': its prompt has \d+ tokens, max_prompt=8"),
        ("max_target", r"'q7', view 'label': its target has 6 tokens, max_target=4"),
    ],
)
def test_a_long_example_is_named(name, message):
    config = DataConfig(**{name: getattr(LONG, name)})
    with pytest.raises(ValueError, match=message):
        segments([EXAMPLE], ("label",), byte_level(), config)


def test_truncation_keeps_the_cue_and_is_counted():
    tok = byte_level()
    config = DataConfig(max_prompt=8, max_target=4, on_long="truncate")
    [segment], counts = segments([EXAMPLE], ("label",), tok, config)
    assert tok.decode(segment.prompt_ids) == "\nAnswer:"[-8:]
    assert tok.decode(segment.target_ids) == " aun"
    assert (counts.segments, counts.truncated, counts.dropped) == (1, 1, 0)


def test_dropping_is_counted():
    config = DataConfig(max_prompt=20, on_long="drop")
    short = Example(id="s", question="?", answer="aunt")
    found, counts = segments([EXAMPLE, short], ("label",), byte_level(), config)
    assert [segment.example_id for segment in found] == ["s"]
    assert (counts.segments, counts.truncated, counts.dropped) == (1, 0, 1)


@pytest.mark.parametrize(
    ("example", "view", "message"),
    [
        (TEXT, "label", "example 't1' has no question"),
        (EXAMPLE, "text", "example 'q7' has no text"),
        (
            Example(id="n", question="?", answer="a"),
            "rationale",
            "'n' has no rationale",
        ),
        (EXAMPLE, "riddle", "view='riddle'"),
    ],
)
def test_what_a_view_needs_is_named(example, view, message):
    with pytest.raises(ValueError, match=message):
        segments([example], (view,), byte_level())


def test_choices_are_scored_behind_the_label_prompt():
    tok = byte_level()
    other = Example(id="q8", question="?", choices=("aunt", "niece"), answer="niece")
    found = views.choice_segments([EXAMPLE, other], tok, DataConfig())
    assert found.example.tolist() == [0, 0, 0, 1, 1]
    assert found.choice.tolist() == [0, 1, 2, 0, 1]
    assert found.correct.tolist() == [True, False, True, False, True]
    [label], _ = segments([EXAMPLE], ("label",), tok)
    assert found.segments[0].key == label.key
    assert tok.decode(found.segments[1].target_ids) == " uncle<eos>"
    config = DataConfig(max_target=6, on_long="drop")
    kept = views.choice_segments([EXAMPLE, other], tok, config)
    assert kept.example.tolist() == []
    with pytest.raises(ValueError, match="'n' has no choices"):
        views.choice_segments(
            [Example(id="n", question="?", answer="a")], tok, DataConfig()
        )


def test_kinship_tokenizer_knows_every_word():
    tok = tokenizer.kinship()
    assert len(tok) < 128
    config = DataConfig(num_train=50)
    examples = load_examples(config, "train", seed=0)
    names = ("label", "rationale", "rationale_then_label")
    found, _ = segments(examples, names, tok, config)
    for segment in found:
        ids = np.concatenate([segment.prompt_ids, segment.target_ids])
        assert tok.unk_token_id not in ids
    label, rationale, both = found[:3]
    assert tok.decode(label.target_ids, skip_special_tokens=True) == examples[0].answer
    text = tok.decode(rationale.target_ids, skip_special_tokens=True)
    assert text == examples[0].rationale
    text = tok.decode(both.target_ids, skip_special_tokens=True)
    assert templates.final_answer(text) == examples[0].answer
    assert set(kinship.vocabulary()) <= set(tok.get_vocab())


def test_a_saved_tokenizer_has_the_same_fingerprint(tmp_path):
    tok = tokenizer.kinship()
    tok.save_pretrained(tmp_path)
    loaded = tokenizer.load(tmp_path)
    digest = tokenizer.fingerprint(tok)
    assert len(digest) == 64
    assert tokenizer.fingerprint(loaded) == digest
    loaded(["a", "b c"], padding=True, truncation=True, max_length=3)
    assert tokenizer.fingerprint(loaded) == digest
    assert tokenizer.fingerprint(byte_level()) != digest
    loaded.add_tokens(["stepmother"])
    assert tokenizer.fingerprint(loaded) != digest


def test_a_tokenizer_that_is_not_there_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"tokenizer='.*nowhere'"):
        tokenizer.load(tmp_path / "nowhere")


@pytest.mark.real_data
def test_gsm8k_with_a_real_tokenizer():
    root = os.environ["KDJAX_REAL_DATA"]
    tok = tokenizer.load(os.environ["KDJAX_SMOLLM2"])
    config = DataConfig(
        source="jsonl",
        layout="gsm8k",
        path=f"{root}/gsm8k/train.jsonl",
        eval_path=f"{root}/gsm8k/test.jsonl",
        max_prompt=512,
        max_target=512,
    )
    examples = load_examples(config, "train", seed=0)
    names = ("label", "rationale")
    found, counts = segments(examples, names, tok, config)
    assert counts.segments == len(found) == 2 * 7473
    for example, segment in zip(examples[:200], found[1::2], strict=False):
        assert tok.decode(segment.prompt_ids) == f"{example.question}\nExplain:"
        assert tok.decode(segment.target_ids[:-1]) == f" {example.rationale}"
        whole = np.concatenate([segment.prompt_ids, segment.target_ids[:-1]])
        text = f"{example.question}\nExplain: {example.rationale}"
        assert whole.tolist() == tok.encode(text)


@pytest.mark.real_data
def test_t5_tokenizer_adds_one_eos_and_no_bos():
    tok = tokenizer.load(f"{os.environ['KDJAX_REAL_DATA']}/t5_tokenizer")
    [segment], _ = segments([EXAMPLE], ("label",), tok)
    assert tok.eos_token_id not in segment.prompt_ids
    assert segment.target_ids.tolist() == tok.encode("aunt")

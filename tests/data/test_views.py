import dataclasses
import os

import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from kdjax.config import DataConfig, PrefixConfig
from kdjax.data import kinship, templates, tokenizer, views
from kdjax.data.sources import Example, load_examples

EXAMPLE = Example(
    id="q7",
    question="Who is it ?",
    choices=("aunt", "uncle", "aunt"),
    answer="aunt",
    rationale="Alice is the aunt of Ben .",
)
WRONG = dataclasses.replace(
    EXAMPLE,
    choices=("aunt", "uncle", "niece", "son"),
    counterfactuals=("He is an uncle .", "", "Her son ."),
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
        (
            "factual",
            "Who is it ?\nChoices: (a) aunt (b) uncle (c) aunt\nExplain and answer:",
            "Alice is the aunt of Ben .\nAnswer: aunt",
        ),
    ],
)
def test_texts_survive_tokenising(view, prompt, target):
    assert templates.render(EXAMPLE, view, DataConfig()) == [(prompt, target, "")]
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
    [text] = templates.render(EXAMPLE, "rationale_then_label", DataConfig())
    assert templates.final_answer(text.target) == "aunt"
    assert templates.final_answer(" aunt ") == "aunt"


def test_counterfactuals_are_one_for_each_wrong_choice_with_a_rationale():
    question = "Who is it ?\nChoices: (a) aunt (b) uncle (c) niece (d) son"
    cue = "Explain and answer otherwise:"
    found = templates.render(WRONG, "counterfactual", DataConfig())
    assert found == [
        (f"{question}\n{cue}", "uncle", "He is an uncle .\nAnswer:"),
        (f"{question}\n{cue}", "son", "Her son .\nAnswer:"),
    ]
    config = DataConfig(counterfactual_place="prompt")
    assert templates.render(WRONG, "counterfactual", config) == [
        (f"{question}\nHe is an uncle .\n{cue}", "uncle", ""),
        (f"{question}\nHer son .\n{cue}", "son", ""),
    ]


def test_a_choice_that_reads_as_the_answer_is_not_wrong():
    twice = dataclasses.replace(EXAMPLE, counterfactuals=("He is .", "She is ."))
    found = templates.render(twice, "counterfactual", DataConfig())
    assert [text.target for text in found] == ["uncle"]


def test_a_wrong_rationale_is_read_as_a_right_one():
    """In the decoder, the tokens are those of the factual view about another choice."""
    tok = byte_level(bos="<s>")
    found, counts = segments([WRONG], ("factual", "counterfactual"), tok)
    assert [segment.view for segment in found] == [0, 1, 1]
    assert not len(found[0].prefix_ids)
    for segment, text in zip(found[1:], ("He is an uncle .", "Her son ."), strict=True):
        assert segment.prefix_ids.dtype == np.int32
        choice = text.split()[-2]
        assert tok.decode(segment.target_ids) == f" {choice}<eos>"
        prompt = templates.render(WRONG, "counterfactual", DataConfig())[0].prompt
        whole = [*tok.encode(f"{prompt} {text}\nAnswer: {choice}"), tok.eos_token_id]
        assert segment.ids.tolist() == whole
        assert segment.length == len(whole) - 1
    assert counts.prefix_tokens == sum(len(segment.prefix_ids) for segment in found)
    config = DataConfig(counterfactual_place="prompt")
    for segment in segments([WRONG], ("counterfactual",), tok, config)[0]:
        assert not len(segment.prefix_ids)


def test_a_prefix_before_the_answer_after_a_chat_template():
    template = "{% for m in messages %}{{ m.content }}{% endfor %}<assistant>"
    tok = byte_level(chat_template=template)
    config = DataConfig(chat_template=True)
    first, _ = segments([WRONG], ("counterfactual",), tok, config)[0]
    whole = "<assistant>He is an uncle .\nAnswer: uncle<eos>"
    assert tok.decode(first.ids).endswith(whole)


def test_prefixes_and_cues_are_fields():
    prefixes = PrefixConfig(label="[predict]", counterfactual="[counterfactual]")
    config = DataConfig(prefixes=prefixes)
    [text] = templates.render(EXAMPLE, "label", config)
    assert text.prompt.startswith("[predict] Who is it ?\nChoices: ")
    assert text.prompt.endswith("\nAnswer:")
    [text] = templates.render(EXAMPLE, "rationale", config)
    assert text.prompt.startswith("Who is it ?")
    config = DataConfig(
        prefixes=prefixes, prompt_suffix=False, counterfactual_place="prompt"
    )
    [text] = templates.render(EXAMPLE, "label", config)
    assert text.prompt.endswith(" (c) aunt")
    text, _ = templates.render(WRONG, "counterfactual", config)
    assert text.prompt.startswith("[counterfactual] Who is it ?")
    assert text.prompt.endswith(" (d) son\nHe is an uncle .")
    [label], _ = segments([EXAMPLE], ("label",), byte_level(), config)
    choices = views.choice_segments([EXAMPLE], byte_level(), config)
    assert choices.segments[0].key == label.key


def test_the_built_in_tokenizer_learns_the_words_of_prefixes():
    config = DataConfig(prefixes=PrefixConfig(factual="[factual] :"), num_train=2)
    examples = load_examples(config, "train", seed=0)
    with pytest.raises(ValueError, match=r"prefixes.factual='\[factual\] :'"):
        segments(examples, ("factual",), tokenizer.make_word_tokenizer(), config)
    tok = tokenizer.make_word_tokenizer(["[factual]", ":"])
    assert tok.encode("[factual] :") == [len(tok) - 2, len(tok) - 1]
    found, _ = segments(examples, ("factual", "rationale"), tok, config)
    assert tok.unk_token_id not in np.concatenate([s.ids for s in found])
    assert found[0].prompt_ids[0] == len(tok) - 2 != found[1].prompt_ids[0]


def test_words_that_came_later_have_the_last_ids():
    tok = tokenizer.make_word_tokenizer()
    words = sorted({*kinship.vocabulary(), *templates.words()})
    assert tok.convert_tokens_to_ids(words) == list(range(3, 3 + len(words)))
    assert tok.encode("answer otherwise:") == [len(tok) - 2, len(tok) - 1]


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
    template = (
        "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
        "{% if add_generation_prompt %}<assistant>{% endif %}"
    )
    tok = byte_level(chat_template=template)
    config = DataConfig(chat_template=True)
    [segment], _ = segments([EXAMPLE], ("label",), tok, config)
    [text] = templates.render(EXAMPLE, "label", config)
    assert tok.decode(segment.prompt_ids) == f"<user>{text.prompt}<assistant>"
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
        assert views.content_key(b"", *changed) != views.content_key(
            b"", prompt, target
        )


def test_keys_know_where_the_target_starts():
    key = views.content_key
    a, b = np.array([1, 2], np.int32), np.array([3], np.int32)
    assert key(b"", a, b) != key(b"", a[:1], np.array([2, 3], np.int32))


def test_keys_know_the_prefix():
    ids = [np.array([i], np.int32) for i in range(4)]
    pair = np.array([0, 1], np.int32)
    found = [
        views.content_key(b"", *ids[:2]),
        views.content_key(b"", *ids[:3]),
        views.content_key(b"", ids[0], ids[1], ids[3]),
        views.content_key(b"", ids[2], ids[1], ids[0]),
        views.content_key(b"", ids[0], pair),
        views.content_key(b"", pair, ids[1]),
        views.content_key(b"", ids[0], ids[1], pair),
    ]
    assert len(set(found)) == len(found)
    # What was labelled before there were prefixes is found.
    assert found[0].hex() == "d206e893dcddda98b7ec08bca9ed2ae1"


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


def test_a_truncated_prefix_loses_its_beginning():
    tok = byte_level()
    lengths = len(" uncle") + 1, len(" He is an uncle .\nAnswer:")
    for limit, prefix, target in (
        (sum(lengths), " He is an uncle .\nAnswer:", " uncle<eos>"),
        (sum(lengths) - 4, "is an uncle .\nAnswer:", " uncle<eos>"),
        (lengths[0] + 1, ":", " uncle<eos>"),
        (lengths[0], "", " uncle<eos>"),
        (4, "", " unc"),
    ):
        config = DataConfig(max_target=limit, on_long="truncate")
        found, counts = segments([WRONG], ("counterfactual",), tok, config)
        assert tok.decode(found[0].prefix_ids) == prefix
        assert tok.decode(found[0].target_ids) == target
        assert counts.truncated == (limit < sum(lengths)) + (limit < 22)
    config = DataConfig(max_target=20)
    message = r"'q7', view 'counterfactual': its target has 32 tokens \(25 before it\)"
    with pytest.raises(ValueError, match=f"{message}, max_target=20"):
        segments([WRONG], ("counterfactual",), tok, config)


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
        (EXAMPLE, "counterfactual", r"'q7' has no counterfactuals.*data.counterf"),
        (
            dataclasses.replace(WRONG, counterfactuals=("", "", "")),
            "counterfactual",
            "'q7' has no counterfactuals",
        ),
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
    tok = tokenizer.make_word_tokenizer()
    assert len(tok) < 128
    config = DataConfig(num_train=50)
    examples = load_examples(config, "train", seed=0)
    names = ("label", "rationale", "rationale_then_label", "counterfactual")
    found, _ = segments(examples, names, tok, config)
    for segment in found:
        assert tok.unk_token_id not in segment.ids
    label, rationale, both = found[:3]
    assert tok.decode(label.target_ids, skip_special_tokens=True) == examples[0].answer
    text = tok.decode(rationale.target_ids, skip_special_tokens=True)
    assert text == examples[0].rationale
    text = tok.decode(both.target_ids, skip_special_tokens=True)
    assert templates.final_answer(text) == examples[0].answer
    assert set(kinship.vocabulary()) <= set(tok.get_vocab())


def test_a_saved_tokenizer_has_the_same_fingerprint(tmp_path):
    tok = tokenizer.make_word_tokenizer()
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
        schema="gsm8k",
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

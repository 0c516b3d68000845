"""Published and usual forms of rows: which are seen, and the examples they make."""

import json

import pytest

from kdjax.config import SCHEMAS, DataConfig
from kdjax.data import columns, letters, readers, schemas, selection, templates
from kdjax.data.example import Example, contradicts
from kdjax.data.sources import load_examples

CHAT = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yes"}]
LONG = [{"role": "system", "content": "Be brief."}, *CHAT, CHAT[0], CHAT[1]]
FLAT = {
    "question": "Where?",
    "choices": {"label": ["A", "B"], "text": ["oven", "sink"]},
    "answerKey": "B",
}
NESTED = {
    "id": "n",
    "question": {
        "stem": "Where?",
        "choices": [{"label": "A", "text": "oven"}, {"label": "B", "text": "sink"}],
    },
    "answerKey": "B",
}
WHERE = {"question": "Where?", "choices": ("oven", "sink"), "answer": "sink"}
CALL = {"id": "1", "type": "function", "function": {"name": "f", "arguments": {"x": 1}}}
SPOKEN = [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Yes"}]


def asked(question, answer, **fields):
    chat = [
        {"role": "user", "content": question},
        {"role": "assistant", "content": answer},
    ]
    return {"question": question, "answer": answer, "messages": tuple(chat)} | fields


# row, the schema that is seen, the fields of its example
FORMS = [
    (FLAT, "commonsense_qa", WHERE),
    (NESTED, "commonsense_qa", WHERE),
    ({**FLAT, "id": "Mercury_7"}, "commonsense_qa", WHERE),  # ARC
    ({"question_stem": "Where?", **dict(list(FLAT.items())[1:])}, "openbookqa", WHERE),
    (
        {
            "question": "Where?",
            "subject": "s",
            "choices": ["oven", "sink"],
            "answer": 1,
        },
        "mmlu",
        WHERE,
    ),
    (
        {"question": "1+1?", "answer": "It is <<1+1=2>>2.\n#### 2"},
        "gsm8k",
        {"question": "1+1?", "answer": "2", "rationale": "It is <<1+1=2>>2."},
    ),
    (
        {
            "title": "t",
            "context": "Ann wrote.",
            "question": "Who?",
            "answers": {"text": ["Ann", "Ann", "A."], "answer_start": [0, 0, 0]},
        },
        "squad",
        {
            "question": "Ann wrote.\nWho?",
            "answer": "Ann",
            "other_answers": ("Ann", "A."),
        },
    ),
    (
        {"instruction": "Add.", "input": "1 1", "output": "2"},
        "alpaca",
        asked("Add.\n1 1", "2"),
    ),
    (
        {"context": "A passage.", "question": "Why?", "answer": "So."},
        "plain",
        {"question": "A passage.\nWhy?", "answer": "So."},
    ),
    (
        {"context": None, "question": "Why?", "answer": "So."},
        "plain",
        {"question": "Why?", "answer": "So."},
    ),
    (
        {"instruction": "Hi", "output": "Yes", "system": "Be brief."},
        "alpaca",
        {
            "question": "Be brief.\nHi",
            "answer": "Yes",
            "messages": (LONG[0], *CHAT),
        },
    ),
    (
        {"messages": [LONG[0], CHAT[0], {**CHAT[1], "weight": 0}, *CHAT]},
        "messages",
        {"messages": (LONG[0], CHAT[0], {**CHAT[1], "weight": 0}, *CHAT)},
    ),
    (
        {"conversations": [SPOKEN[0], {**SPOKEN[1], "weight": 0, "id": 3}, *SPOKEN]},
        "sharegpt",
        {"messages": (CHAT[0], {**CHAT[1], "weight": 0}, *CHAT)},
    ),
    (
        {"messages": [CHAT[0], {**CHAT[1], "weight": 0}]},
        "messages",
        {"messages": (CHAT[0], {**CHAT[1], "weight": 0})},
    ),
    (
        {**FLAT, "context": ["It is wet.", "It is white."]},
        "commonsense_qa",
        {**WHERE, "question": "It is wet.\nIt is white.\nWhere?"},
    ),
    (
        {"question": "1+1?", "context": "Count.", "answer": "Two.\n#### 2"},
        "gsm8k",
        {"question": "Count.\n1+1?", "answer": "2", "rationale": "Two."},
    ),
    (
        {"chosen": "\n\nHuman: Hi\n\nAssistant: Yes", "rejected": "\n\nHuman: Hi"},
        "preference",
        asked("Hi", "Yes"),
    ),
    (
        {"prompt": json.dumps(CHAT[:1]), "chosen": json.dumps(CHAT[1:])},
        "preference",
        asked("Hi", "Yes"),
    ),
    (
        {"prompt": "Hi", "chosen": "\n\nHuman: Hi\n\nAssistant: Yes"},
        "preference",
        asked("Hi", "Yes"),
    ),
    (
        {"prompt": [*CHAT, CHAT[0]], "completion": [CHAT[1]]},
        "preference",
        {"messages": (CHAT[0], {**CHAT[1], "weight": 0}, *CHAT)},
    ),
    (
        {"instruction": "Hi", "output": "Yes", "context": "A.", "tools": "hammer"},
        "alpaca",
        asked("Hi\nA.", "Yes"),
    ),
    (
        {"system": "Be brief.", "question": "q", "answer": "a"},
        "plain",
        {"question": "Be brief.\nq", "answer": "a"},
    ),
    (
        {"instruction": "Hi", "output": "Yes", "tools": [{"name": "f", "x": None}]},
        "alpaca",
        {"messages": tuple(CHAT), "tools": ({"name": "f", "x": None},)},
    ),
    (
        {"messages": [CHAT[0], {**CHAT[1], "reasoning": "So."}]},
        "messages",
        {"messages": (CHAT[0], {**CHAT[1], "reasoning_content": "So."})},
    ),
    ({"instruction": "Hi", "input": None, "output": "2"}, "alpaca", asked("Hi", "2")),
    ({"conversations": SPOKEN}, "sharegpt", asked("Hi", "Yes")),
    (
        {"conversations": SPOKEN * 2, "system": "Be brief."},
        "sharegpt",
        {"messages": tuple(LONG)},
    ),
    ({"messages": CHAT, "prompt": "Hi"}, "messages", asked("Hi", "Yes")),
    ({"messages": LONG}, "messages", {"messages": tuple(LONG)}),
    (
        {
            "messages": [
                {**CHAT[0], "content": [{"type": "text", "text": "Hi"}], "name": None},
                {
                    "role": "assistant",
                    "content": None,
                    "tool_calls": [
                        {**CALL, "function": {"name": "f", "arguments": '{"x": 1}'}}
                    ],
                },
                {"role": "tool", "content": "", "tool_call_id": "1"},
                CHAT[1],
            ],
            "tools": '[{"name": "f"}]',
        },
        "messages",
        {
            "messages": (
                CHAT[0],
                {"role": "assistant", "content": "", "tool_calls": [CALL]},
                {"role": "tool", "content": "", "tool_call_id": "1"},
                CHAT[1],
            ),
            "tools": ({"name": "f"},),
        },
    ),
    (
        {"prompt": "Hi", "chosen": "Yes", "rejected": "No"},
        "preference",
        asked("Hi", "Yes"),
    ),
    (
        {"prompt": "Hi", "chosen": CHAT, "rejected": CHAT},
        "preference",
        asked("Hi", "Yes"),
    ),
    (
        {"prompt": [CHAT[0]], "chosen": [CHAT[1]], "rejected": [CHAT[1]]},
        "preference",
        asked("Hi", "Yes"),
    ),
    (
        {"prompt": [CHAT[0]], "chosen": "Yes", "rejected": "No"},
        "preference",
        asked("Hi", "Yes"),
    ),
    ({"chosen": LONG, "rejected": CHAT}, "preference", {"messages": tuple(LONG)}),
    (
        {"prompt": "Hi", "chosen": LONG, "rejected": CHAT},
        "preference",
        {"messages": tuple(LONG)},
    ),
    ({"text": "Once."}, "plain", {"text": "Once."}),
]


def load(tmp_path, *rows, **fields):
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return load_examples(DataConfig(path=str(path), **fields), "train", seed=0)


@pytest.mark.parametrize(("row", "schema", "fields"), FORMS)
def test_forms_of_rows(row, schema, fields, tmp_path):
    assert schemas.candidates(row) == [schema]
    [example] = load(tmp_path, row)
    assert example == Example(id=row.get("id", "train-0"), **fields)
    if schema in ("squad", "messages", "gsm8k"):
        fields = {"schema": schema, "answer_list": "any"}
        assert load(tmp_path, row, **fields) == [example]


def test_columns_are_described_whatever_their_names(tmp_path):
    schema = schemas.Schema(DataConfig())
    row = readers.Row("a", 1, {"question": "q", "answer": "a", "x\ud83d": 1})
    schema.describe(row).encode()


def test_nulls_of_columns_are_left_out_of_calls(tmp_path):
    call = {"function": {"name": "f", "arguments": {"a": 1, "b": None}}}
    message = {"role": "assistant", "content": "", "tool_calls": [call]}
    row = readers.Row("a", 1, {"messages": [CHAT[0], message]})
    for is_padded, expected in ((False, {"a": 1, "b": None}), (True, {"a": 1})):
        schema = schemas.Schema(DataConfig())
        example = schema.example(row._replace(is_padded=is_padded), "x")
        [found] = example.messages[1]["tool_calls"]
        assert found["function"]["arguments"] == expected


def test_every_schema_has_a_converter():
    assert set(SCHEMAS) == {"auto", *schemas._CONVERTERS}


def test_the_forms_of_arc_are_those_of_commonsense_qa(tmp_path):
    for schema in ("commonsense_qa", "arc", "openbookqa"):
        for row in (FLAT, NESTED):
            [example] = load(tmp_path, row, schema=schema)
            assert (example.question, example.answer) == ("Where?", "sink")


def test_answers_of_keyed_rows_by_another_kind(tmp_path):
    row = {**FLAT, "answerKey": 1}
    assert load(tmp_path, row, answer_kind="index")[0].answer == "sink"
    assert load(tmp_path, row, answer_kind="number")[0].answer == "oven"
    row["answerKey"] = "sink"
    assert load(tmp_path, row, answer_kind="text")[0].answer == "sink"


def test_several_answers(tmp_path):
    row = {"question": "Who?", "answer": ["Ann Lee", "A. Lee"]}
    [first] = load(tmp_path, row, answer_list="first")
    assert (first.answer, first.other_answers) == ("Ann Lee", ())
    [example] = load(tmp_path, row, answer_list="any")
    assert (example.answer, example.other_answers) == ("Ann Lee", ("A. Lee",))


def test_a_chat_with_an_empty_turn_is_left_out(tmp_path):
    empty = [CHAT[0], {"role": "assistant", "content": " "}]
    rows = [{"messages": empty}, {"messages": CHAT}, {"messages": CHAT[:1]}]
    examples = load(tmp_path, *rows, on_missing="drop")
    assert [len(example.messages) for example in examples] == [0, 2, 0]


@pytest.mark.parametrize("num", [2, 26, 27, 100])
def test_every_choice_has_a_letter(num, tmp_path):
    choices = [f"c{i}" for i in range(num)]
    last = letters.letter(num - 1).upper()
    row = {"question": "q", "choices": choices, "answer": last}
    [example] = load(tmp_path, row)
    assert example.answer == choices[-1]
    prompt = templates.make_prompt(example, "label", DataConfig())
    assert all(f" {choice}" in prompt for choice in choices)
    assert f"({last.lower()}) {choices[-1]}" in prompt
    names = [letters.letter(i) for i in range(num)]
    assert len(set(names)) == num and names[:26] == list(
        "abcdefghijklmnopqrstuvwxyz"[:num]
    )
    assert [letters.letter_index(name) for name in names] == list(range(num))
    rationale = f"(b) is not it. So ({last.lower()})."
    given = Example(id="x", choices=tuple(choices), answer="c1", rationale=rationale)
    assert contradicts(given) == (num > 2)


def test_mappings_of_columns():
    assert columns.parse_mapping("") == {}
    mapping = columns.parse_mapping("question = Q text ,choices=a|b.c")
    assert mapping == {"question": ("Q text",), "choices": ("a", "b.c")}
    assert columns.parse_mapping("tools=, id=a") == {"tools": (), "id": ("a",)}
    for text, message in {
        "what=x": "'what=x' is not NAME=COLUMN",
        "question": "'question' is not NAME=COLUMN",
        "=Q": "is not NAME=COLUMN",
        "choices=a|": "is not NAME=COLUMN",
        "id=a,id=b": "maps 'id' twice",
    }.items():
        with pytest.raises(ValueError, match=message):
            columns.parse_mapping(text)


def test_a_mapped_column_is_gone_under_its_own_name(tmp_path):
    row = {"instruction": "q", "output": "a", "answer": "no", "x.y": "z"}
    fields = "question=instruction,answer=output,rationale=x.y"
    [example] = load(tmp_path, row, columns=fields)
    assert example == Example(id="train-0", question="q", answer="a", rationale="z")
    rows = [{"q": "q", "a": ["x"]}, {"q": "q", "a": []}, {"q": "q"}]
    examples = load(tmp_path, *rows, columns="question=q,answer=a.0", on_missing="drop")
    assert [example.answer for example in examples] == ["x", "", ""]


def test_rationales_are_joined_by_ids_of_any_type(tmp_path):
    rows = [{"id": i, "question": "q", "answer": "a"} for i in (0, 1, 2.0, "x")]
    given = [{"id": i, "text": f"r{i}"} for i in ("0", 1.0, 2, "x")]
    file = tmp_path / "rationales.csv"
    file.write_text(
        "id,text\n" + "".join(f"{r['id']},{r['text']}\n" for r in given[:1])
    )
    [first, *others] = load(tmp_path, *rows, rationales=str(file))
    assert (first.id, first.rationale) == ("0", "r0")
    assert not any(example.rationale for example in others)
    file = tmp_path / "rationales.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in given))
    examples = load(tmp_path, *rows, rationales=str(file))
    assert [e.id for e in examples] == ["0", "1", "2", "x"]
    assert all(example.rationale for example in examples)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"id": None, "text": "t"}, "id=None is missing"),
        ({"id": [0], "text": "t"}, "id=.* is a list"),
        ({"id": 0, "text": 3}, "text=3 is a number, not text"),
        ({"id": 0, "text": "\ud83d"}, "text holds the lone surrogate"),
    ],
)
def test_bad_rows_of_joined_files(row, message, tmp_path):
    file = tmp_path / "rationales.jsonl"
    file.write_text('{"id": "x", "text": ""}\n' + json.dumps(row) + "\n")
    with pytest.raises(ValueError, match=rf"rationales.jsonl:2: {message}"):
        load(tmp_path, {"id": 0, "question": "q", "answer": "a"}, rationales=str(file))


def test_held_out_rows_that_are_training_rows_are_named(tmp_path):
    rows = [{"question": f"q{i % 3}", "answer": f"a{i}"} for i in range(5)]
    train = load(tmp_path, *rows[:3])
    held_out = load(tmp_path, *rows[3:], {"question": "new", "answer": "a"})
    empty = Example(id="empty")
    digests = selection.content_digests([*train, empty])
    warning = selection.describe_overlap(digests, held_out)
    assert warning.startswith("warning: 2 of 3 held-out examples are training examples")
    assert "'train-0' (" in warning and "rows.jsonl:1)" in warning
    assert selection.describe_overlap(digests, [*held_out[2:], empty]) == ""


def test_held_out_chats_are_compared_without_their_last_reply(tmp_path):
    train = load(tmp_path, {"messages": LONG})
    other = [*LONG[:-1], {**LONG[-1], "content": "No"}]
    held_out = load(tmp_path, {"messages": other}, {"messages": CHAT})
    warning = selection.describe_overlap(selection.content_digests(train), held_out)
    assert warning.startswith("warning: 1 of 2 held-out examples")


@pytest.mark.parametrize(
    ("row", "view"),
    [({"text": ""}, "text"), ({"question": "q", "answer": ""}, "label")],
)
def test_held_out_rows_without_content_are_left_out(row, view, tmp_path):
    full = {name: "x" for name in row}
    fields = {"on_missing": "drop", "num_eval": 2}
    load(tmp_path, full, row, full, **fields)
    config = DataConfig(path=str(tmp_path / "rows.jsonl"), **fields)
    held_out = load_examples(config, "eval", seed=0)
    selected = selection.select(held_out, (view,), "eval", config)
    assert len(selected.examples) == 1
    assert "eval: 1 of 2 examples left out" in selected.notes[0]

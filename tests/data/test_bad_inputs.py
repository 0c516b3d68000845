"""Faults of users' files: refused in one line that names file and row, or read rightly.

Each row is a kind of fault. None is read as an example with a wrong answer.
"""

import gzip
import json
import math

import pytest
import zstandard

from kdjax.config import DataConfig
from kdjax.data import selection
from kdjax.data.sources import load_examples

QA = {"question": "Where is milk?", "answer": "fridge"}
MC = {**QA, "choices": ["oven", "fridge", "sink"]}
KEYED = {
    "question": "Where?",
    "choices": {"label": ["A", "B", "C"], "text": ["oven", "fridge", "sink"]},
    "answerKey": "B",
}
CHAT = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yes"}]
SURROGATE = "a \ud83d b"


def lines(*rows):
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def second(base, **changes):
    """Two rows, the second of them with a fault."""
    return lines(base, {**base, **changes})


def with_messages(*messages, **columns):
    return lines({"messages": CHAT}, {"messages": list(messages), **columns})


DEEP = b'{"question": "q", "answer": ' + b"[" * 100_000 + b"]" * 100_000 + b"}\n"

# name of the file, content, fields of the config, what the error says after the file
REFUSED = {
    # Encodings
    "UTF-16": ("a.jsonl", lines(QA).decode().encode("utf-16"), {}, ":1 .*UTF-16"),
    "UTF-16, no mark": (
        "a.jsonl",
        lines(QA).decode().encode("utf-16-le"),
        {},
        ":1 .*UTF-16",
    ),
    "UTF-32": ("a.csv", "question,answer".encode("utf-32"), {}, ":1 .*UTF-32"),
    "Latin-1": (
        "a.jsonl",
        lines(QA) + b'{"question": "\xe9t\xe9", "answer": "a"}\n',
        {},
        ":2 is not UTF-8 .*0xe9.*Windows-1252.*iconv",
    ),
    "Latin-1 table": (
        "a.csv",
        b"question,answer\nq,\xe9t\xe9\n",
        {},
        ":2 is not UTF-8",
    ),
    "Latin-1 text": ("a.txt", b"one\n\n\xe9t\xe9\n", {}, ":3 is not UTF-8"),
    "Latin-1 array": ("a.json", b'[{"text": "\xe9t\xe9"}]', {}, ":1 .*not UTF-8"),
    "Latin-1, compressed": (
        "a.jsonl.gz",
        gzip.compress(b'{"text": "\xe9t\xe9"}\n'),
        {},
        ":1 is not UTF-8",
    ),
    "binary": ("a.jsonl", b"\x00\x01\x02\x00", {}, ":1 .*no text: is the file"),
    "compressed twice": (
        "a.jsonl.gz",
        gzip.compress(gzip.compress(lines(QA))),
        {},
        ":1 .*no text: is the file compressed",
    ),
    "gz, damaged": ("a.jsonl.gz", b"\x1f\x8b" + b"abc" * 9, {}, ":1 cannot be read"),
    # JSON
    "not JSON": ("a.jsonl", lines(QA) + b"{oops\n", {}, ":2 is not JSON"),
    "Python's quotes": ("a.jsonl", b"{'text': 'a'}\n", {}, ":1 is not JSON"),
    "cut off": ("a.jsonl", lines(QA) + b'{"question": "Wh', {}, ":2 is not JSON"),
    "two in a line": ("a.jsonl", lines(QA).strip() * 2, {}, ":1 is not JSON"),
    "a list as a row": ("a.jsonl", lines(QA, [1]), {}, ":2 is not a JSON object"),
    "a text as a row": ("a.jsonl", lines("a", QA), {}, ":1 is not a JSON object"),
    "null as a row": ("a.json", b'[{"text": "a"}, null]', {}, ":2 is not a JSON obj"),
    "over lines": ("a.json", json.dumps(QA, indent=1).encode(), {}, ":1 .*per line"),
    "a key twice": (
        "a.jsonl",
        lines(QA) + b'{"question": "q", "answer": "a", "answer": "b"}\n',
        {},
        ":2 has the key 'answer' twice",
    ),
    "an inner key twice": (
        "a.json",
        b'[{"question": {"stem": "a", "stem": "b"}, "answer": "a"}]',
        {},
        ":1 has the key 'stem' twice",
    ),
    "5,000 digits": (
        "a.jsonl",
        lines(QA) + b'{"question": "q", "answer": ' + b"7" * 5000 + b"}\n",
        {},
        ":2 has a number of more than 4,300 digits",
    ),
    "deep": ("a.jsonl", lines(QA) + DEEP, {}, ":2 "),
    "deep array": ("a.json", b"[" + DEEP + b"]", {}, ":1 "),
    "an array cut off": ("a.json", b'[{"text": "a"}, {"text": "b"}', {}, ":2 .*cut"),
    "an array cut off inside": ("a.json", b'[{"text": "a"}, {"te', {}, ":2 "),
    "a comma too many": ("a.json", b'[{"text": "a"},]', {}, ":2 .*comma"),
    "no comma": ("a.json", b'[{"text": "a"} {"text": "b"}]', {}, ":1 .*commas"),
    "after an array": ("a.json", b'[{"text": "a"}] []', {}, ":2 .*one array"),
    "empty": ("a.jsonl", b"", {}, "' has no rows"),
    "white space": ("a.jsonl", b" \n\n", {}, "' has no rows"),
    "an empty array": ("a.json", b"[]", {}, "' has no rows"),
    "empty text": ("a.txt", b"\n \n", {}, "' has no rows"),
    # Types
    "a number asks": ("a.jsonl", second(QA, question=12), {}, ":2.*question=12 is a n"),
    "a list asks": ("a.jsonl", second(QA, question=["q"]), {}, ":2.*is a list"),
    "a truth value asks": ("a.jsonl", second(QA, question=True), {}, ":2.*truth"),
    "an object asks": ("a.jsonl", second(QA, question={"a": 1}), {}, ":2.*an object"),
    "nothing asks": ("a.jsonl", second(QA, question=None), {}, ":2.*is missing"),
    "blank asks": ("a.jsonl", second(QA, question=" \n"), {}, ":2.*is missing"),
    "no answer": ("a.jsonl", second(QA, answer=None), {}, ":2.*answer=None is missing"),
    "NaN answer": ("a.jsonl", second(QA, answer=math.nan), {}, ":2.*nan is missing"),
    "infinite answer": ("a.jsonl", second(QA, answer=math.inf), {}, ":2.*inf is a n"),
    "2.5 as answer": ("a.jsonl", second(QA, answer=2.5), {}, ":2.*answer=2.5 is a num"),
    "true as answer": ("a.jsonl", second(QA, answer=True), {}, ":2.*truth value"),
    "an object answers": ("a.jsonl", second(QA, answer={"a": "b"}), {}, ":2.*an obj"),
    "several answers": ("a.jsonl", second(QA, answer=["a", "b"]), {}, ":2.*_list"),
    "no answers": ("a.jsonl", second(QA, answer=[]), {}, ":2.*is missing"),
    "a list in answers": ("a.jsonl", second(QA, answer=[["a"]]), {}, ":2.*is a list"),
    "answer gone": ("a.jsonl", lines(QA, {"question": "q"}), {}, ":2.*no column 'ans"),
    "a thousand long columns": (
        "a.jsonl",
        lines({f"{number:04d}{'x' * 200}": "a" for number in range(1000)}),
        {"schema": "plain"},
        r":1.*no column '\w+': it has \['0000x+\.\.\.x+', .*\]; choose",
    ),
    "a number as text": (
        "a.jsonl",
        lines({"text": "a"}, {"text": 0}),
        {},
        ":2.*text=0",
    ),
    "no text": ("a.jsonl", lines({"text": "a"}, {"text": ""}), {}, ":2.*is missing"),
    "NaN text": ("a.jsonl", b'{"text": NaN}\n', {"schema": "text"}, ":1.*nan is miss"),
    "a number explains": ("a.jsonl", second(QA, rationale=3), {}, ":2.*rationale=3"),
    "a list explains": ("a.jsonl", second(QA, rationale=["r"]), {}, ":2.*is a list"),
    "surrogate asks": ("a.jsonl", second(QA, question=SURROGATE), {}, ":2.*d83d.*at"),
    "surrogate answers": ("a.jsonl", second(QA, answer=SURROGATE), {}, ":2.*surrogate"),
    "surrogate id": ("a.jsonl", second(QA, id=SURROGATE), {}, ":2.*surrogate"),
    "surrogate choice": (
        "a.jsonl",
        second(MC, choices=[SURROGATE, "fridge"]),
        {},
        r":2.*choices\[0\].*surrogate",
    ),
    "surrogate turn": (
        "a.jsonl",
        with_messages({"role": "user", "content": SURROGATE}, CHAT[1]),
        {},
        ":2.*surrogate",
    ),
    # Choices and answers
    "choices as text": ("a.jsonl", second(MC, choices="a, b"), {}, ":2.*not a list"),
    "a number has choices": ("a.jsonl", second(MC, choices=3), {}, ":2.*not a list"),
    "a choice is null": (
        "a.jsonl",
        second(MC, choices=["fridge", None]),
        {},
        ":2.*missing",
    ),
    "a choice is empty": (
        "a.jsonl",
        second(MC, choices=["fridge", ""]),
        {},
        ":2.*missing",
    ),
    "a choice is NaN": (
        "a.jsonl",
        second(MC, choices=["fridge", math.nan]),
        {},
        ":2.*",
    ),
    "a choice is 0.5": ("a.jsonl", second(MC, choices=["fridge", 0.5]), {}, ":2.*0.5"),
    "a choice is a list": (
        "a.jsonl",
        second(MC, choices=["fridge", []]),
        {},
        ":2.*list",
    ),
    "a choice is true": (
        "a.jsonl",
        second(MC, choices=["fridge", True]),
        {},
        ":2.*truth",
    ),
    "a choice without text": (
        "a.jsonl",
        second(MC, choices=[{"label": "A"}, {"label": "B"}]),
        {},
        ":2.*no 'text'",
    ),
    "labels as text": (
        "a.jsonl",
        second(KEYED, choices={"label": "AB", "text": ["oven", "sink"]}),
        {},
        ":2.*label='AB' is text, not a list",
    ),
    "choices of one": (
        "a.jsonl",
        second(KEYED, choices={"label": "B", "text": "oven"}),
        {},
        ":2.*text='oven' is text, not a list",
    ),
    "choices gone": ("a.jsonl", second(MC, choices=None), {}, ":2.*choices.*has some"),
    "choices gone, by letter": (
        "a.jsonl",
        lines({**MC, "answer": "B"}, {**QA, "answer": "B"}),
        {},
        ":2.*choices=None is missing",
    ),
    "choices come": (
        "a.jsonl",
        lines({**MC, "choices": []}, MC),
        {},
        ":2.*it has choices, but .*:1",
    ),
    "a huge number": (
        "a.jsonl",
        lines({**MC, "answer": "7" * 5000}),
        {"answer_kind": "index"},
        ":1.*none of its choices",
    ),
    "one choice": ("a.jsonl", second(MC, choices=["fridge"]), {}, ":2.*2 to 100"),
    "101 choices": (
        "a.jsonl",
        second(MC, choices=["fridge", *map(str, range(100))]),
        {},
        ":2.*101 choices: use 2 to 100",
    ),
    "no such choice": ("a.jsonl", second(MC, answer="moon"), {}, ":2.*none of its ch"),
    "another case": ("a.jsonl", second(MC, answer="Fridge"), {}, ":2.*none of its"),
    "letter too far": ("a.jsonl", second(MC, answer="D"), {}, ":2.*none of its cho"),
    "index": ("a.jsonl", lines({**MC, "answer": 1}), {}, ":1.*ambiguous.*answer_kind"),
    "index 0": ("a.jsonl", lines({**MC, "answer": 0}), {}, ":1.*ambiguous"),
    "index as text": ("a.jsonl", lines({**MC, "answer": "1"}), {}, ":1.*ambiguous"),
    "index of digits": (
        "a.jsonl",
        lines({**QA, "choices": ["3", "0", "2", "1"], "answer": "2"}),
        {},
        ":1.*ambiguous.*'text' '2'",
    ),
    "letter of letters": (
        "a.jsonl",
        lines({**QA, "choices": ["B", "A", "C"], "answer": "A"}),
        {},
        ":1.*ambiguous.*'text' 'A'.*'label' 'B'",
    ),
    "letter of small letters": (
        "a.jsonl",
        lines({**QA, "choices": ["b", "a", "c"], "answer": "A"}),
        {},
        ":1.*ambiguous.*'text' 'a'.*'label' 'b'",
    ),
    "letters, then texts": (
        "a.jsonl",
        lines({**MC, "answer": "B"}, MC),
        {},
        ":2.*answers by label: answer alike",
    ),
    "index too far": (
        "a.jsonl",
        lines({**MC, "answer": 3}),
        {"answer_kind": "index"},
        ":1.*none of its choices.*index",
    ),
    "index below 0": (
        "a.jsonl",
        lines({**MC, "answer": -1}),
        {"answer_kind": "index"},
        ":1.*none of its choices",
    ),
    "number 0": (
        "a.jsonl",
        lines({**MC, "answer": 0}),
        {"answer_kind": "number"},
        ":1.*none of its choices",
    ),
    "index 1.5": (
        "a.jsonl",
        lines({**MC, "answer": 1.5}),
        {"answer_kind": "index"},
        ":1.*1.5 is a number",
    ),
    "MMLU without a label": (
        "a.jsonl",
        lines({**MC, "subject": "s", "answer": -1}),
        {},
        ":1.*is missing: use a split with answers",
    ),
    "no such label": (
        "a.jsonl",
        second(KEYED, answerKey="D"),
        {},
        ":2.*none of its la",
    ),
    "label in another case": ("a.jsonl", second(KEYED, answerKey="b"), {}, ":2.*none"),
    "label is the text": ("a.jsonl", second(KEYED, answerKey="fridge"), {}, ":2.*none"),
    "label is null": ("a.jsonl", second(KEYED, answerKey=None), {}, ":2.*with answers"),
    "labels alike": (
        "a.jsonl",
        second(KEYED, choices={"label": ["A", "A"], "text": ["oven", "sink"]}),
        {},
        ":2.*two alike",
    ),
    "too few labels": (
        "a.jsonl",
        second(KEYED, choices={"label": ["A"], "text": ["oven", "sink"]}),
        {},
        ":2.*1 labels for 2 texts",
    ),
    "a stem is a number": (
        "a.jsonl",
        lines({"question": {"stem": 0, "choices": []}, "answerKey": "A"}),
        {},
        ":1.*question.stem=0",
    ),
    "choices elsewhere": (
        "a.jsonl",
        lines({**QA, "answer": "B", "options": ["a", "b"]}),
        {},
        ":1.*data.columns=choices=options",
    ),
    "choices in columns": (
        "a.csv",
        b"question,A,B,C,D,answer\nq,w,x,y,z,B\n",
        {},
        r":2.*choices=A\|B\|C\|D",
    ),
    "GSM8K, not all": (
        "a.jsonl",
        lines({**QA, "answer": "So.\n#### 2"}, QA),
        {},
        ":2.*no '####'",
    ),
    "GSM8K, some": (
        "a.jsonl",
        lines(QA, {**QA, "answer": "So.\n#### 2"}),
        {},
        ":2.*GSM8K",
    ),
    "GSM8K without a result": (
        "a.jsonl",
        second(QA, answer="So.\n#### "),
        {"schema": "gsm8k"},
        ":[12].*",
    ),
    "text after GSM8K's result": (
        "a.jsonl",
        second({**QA, "answer": "So.\n#### 2"}, answer="So.\n#### 2\nThanks!"),
        {},
        ":2.*text follows the line of the result",
    ),
    "a row without choices before others": (
        "a.jsonl",
        lines({**QA, "answer": "B"}, {**MC, "answer": "C"}),
        {},
        ":2.*has choices, but .*:1.* has none",
    ),
    "a row without choices after others": (
        "a.jsonl",
        lines(MC, {**QA, "answer": "C"}),
        {},
        ":2.*:1.* has some",
    ),
    "a letter without choices": (
        "a.jsonl",
        lines({**QA, "answer": "B"}),
        {"answer_kind": "label"},
        ":1.*answer_kind='label'.*the row has none",
    ),
    "objects among answers": (
        "a.jsonl",
        lines({**QA, "answer": ["a", {"b": 1}]}),
        {"answer_list": "any"},
        ":1.*has lists or objects",
    ),
    "SQuAD answers in lists": (
        "a.jsonl",
        lines({"context": "c", "question": "q", "answers": {"text": ["x", ["y"]]}}),
        {},
        ":1.*has lists or objects",
    ),
    "a header in the middle": (
        "a.csv",
        b"question,answer\nq,a\n\xef\xbb\xbfquestion,answer\nq2,b\n",
        {},
        ":3 has the header again",
    ),
    "choices in a column answers": (
        "a.jsonl",
        lines({"context": "c", "question": "q", "answers": ["w", "x"], "label": 1}),
        {},
        ":1.*label=1 names one: say data.columns=choices=answers,answer=label",
    ),
    "choices in columns of answers": (
        "a.csv",
        b"question,answer_a,answer_b,answer\nq,w,x,B\n",
        {},
        r":2.*choices=answer_a\|answer_b",
    ),
    "choices in numbered columns": (
        "a.csv",
        b"question,Antwort 1,Antwort 2,answer\nq,w,x,B\n",
        {},
        r":2.*choices=Antwort 1\|Antwort 2",
    ),
    "choices up to J": (
        "a.csv",
        b"question,F,G,H,I,J,answer\nq,v,w,x,y,z,H\n",
        {},
        r":2.*choices=F\|G\|H\|I\|J",
    ),
    "possible answers": (
        "a.jsonl",
        lines({**QA, "possible_answers": ["fridge", "oven"]}),
        {},
        ":1.*data.columns=choices=possible_answers",
    ),
    "a list under any name": (
        "a.jsonl",
        lines({**QA, "answer": "B", "antworten": ["fridge", "oven"]}),
        {},
        ":1.*data.columns=choices=antworten",
    ),
    "choices beside an instruction": (
        "a.jsonl",
        lines({"instruction": "Pick", "output": "B", "options": ["a", "b"]}),
        {},
        ":1.*data.columns=choices=options",
    ),
    "choices beside GSM8K": (
        "a.jsonl",
        lines({"question": "q", "answer": "So.\n#### 2", "options": ["1", "2"]}),
        {},
        ":1.*data.columns=choices=options",
    ),
    "members of choices": (
        "a.jsonl",
        lines(
            {**MC, "choices": [{"tag": "B", "text": "a"}, {"tag": "A", "text": "b"}]}
        ),
        {},
        ":1.*the member 'tag' with letters: name it 'label'",
    ),
    "a passage": (
        "a.jsonl",
        lines({**QA, "passage": "Milk is cold."}),
        {},
        ":1.*data.columns=context=passage",
    ),
    "a system prompt": (
        "a.jsonl",
        lines({"messages": CHAT, "system_prompt": "Be brief."}),
        {},
        ":1.*data.columns=system=system_prompt",
    ),
    "another system message": (
        "a.jsonl",
        lines({"messages": [{"role": "system", "content": "a"}, *CHAT], "system": "b"}),
        {},
        ":1.*system='b' differs",
    ),
    "images": (
        "a.jsonl",
        lines({"messages": CHAT, "images": ["a.png"]}),
        {},
        ":1.*images is not read",
    ),
    "functions": (
        "a.jsonl",
        lines({"messages": CHAT, "functions": [{"name": "f"}]}),
        {},
        ":1.*data.columns=tools=functions",
    ),
    "a call of old": (
        "a.jsonl",
        with_messages(CHAT[0], {**CHAT[1], "function_call": {"name": "f"}}),
        {},
        r":2.*messages\[1\].function_call=.* would be lost: write it as tool_calls",
    ),
    "a turn not to train": (
        "a.jsonl",
        with_messages(CHAT[0], {**CHAT[1], "train": False}),
        {},
        r":2.*messages\[1\].train=False would be lost: say by weight",
    ),
    "arguments that are text": (
        "a.jsonl",
        with_messages(
            CHAT[0],
            {
                "role": "assistant",
                "tool_calls": [{"function": {"name": "f", "arguments": "{'a': 1}"}}],
            },
        ),
        {},
        ":2.*arguments of messages.*not JSON",
    ),
    "a reply beside messages": (
        "a.jsonl",
        lines({"messages": [*CHAT, CHAT[0]], "response": "Yes"}),
        {},
        ":1.*messages seems to go with the column response",
    ),
    "a prompt beside messages": (
        "a.jsonl",
        lines({"prompt": CHAT[:1], "completion": CHAT[1:]}),
        {"columns": "messages=completion", "schema": "messages"},
        ":1.*messages seems to go with the column prompt",
    ),
    "a completion that is not wanted": (
        "a.csv",
        b"prompt,completion,label\nq,a,False\n",
        {},
        ":2.*label='False'",
    ),
    "a reply that repeats its prompt": (
        "a.jsonl",
        lines(
            {
                "prompt": "What is 17 plus 4, please?",
                "chosen": "What is 17 plus 4, please? 21",
            }
        ),
        {},
        ":1.*chosen begins with the prompt",
    ),
    "the name of the reply's column": (
        "a.jsonl",
        lines({"prompt": "q", "chosen": "response_b", "response_b": "It is."}),
        {},
        ":1.*chosen='response_b' is the name of a column",
    ),
    "a heading at the end": (
        "a.jsonl",
        lines(QA, {**QA, "answer": "So.\n#### 7"}),
        {},
        ":2.*ends as those of GSM8K",
    ),
    "several right choices": (
        "a.jsonl",
        lines({**MC, "answer": [0, 1, 1]}),
        {"answer_kind": "index"},
        ":1.*several answers to choices",
    ),
    "choices after rows of GSM8K": (
        "a.jsonl",
        lines({**QA, "answer": "So.\n#### 2"}, {**MC, "answer": "So.\n#### 2"}),
        {},
        ":2.*it has choices, which the schema 'gsm8k' does not read",
    ),
    "a mark within a line": (
        "a.jsonl",
        lines({**QA, "answer": "Use a #### sign"}),
        {"schema": "gsm8k"},
        ":1.*within a line",
    ),
    "letters of their own": (
        "a.jsonl",
        lines({**QA, "choices": ["B) oven", "A) fridge"], "answer": "A"}),
        {},
        ":1.*letters of their own",
    ),
    "several answers to choices": (
        "a.jsonl",
        lines({**MC, "answer": ["fridge", "sink"]}),
        {"answer_list": "any"},
        ":1.*several answers to choices",
    ),
    "a key of a cell twice": (
        "a.csv",
        b'messages,x\n"[{""role"": ""user"", ""role"": ""system""}]",1\n',
        {},
        ":2.*has the key 'role' twice",
    ),
    "an argument twice": (
        "a.jsonl",
        with_messages(
            CHAT[0],
            {
                "role": "assistant",
                "tool_calls": [
                    {"function": {"name": "f", "arguments": '{"a": 1, "a": 2}'}}
                ],
            },
        ),
        {},
        ":2.*tool_calls has the key 'a' twice",
    ),
    "a pair without a reply": (
        "a.jsonl",
        lines({"prompt": CHAT, "chosen": CHAT}),
        {},
        ":1.*chosen=None is missing: give it a reply",
    ),
    "SQuAD without an answer": (
        "a.jsonl",
        lines({"context": "c", "question": "q", "answers": {"text": []}}),
        {},
        ":1.*is missing",
    ),
    # Ids
    "ids alike": ("a.jsonl", lines({**QA, "id": "x"}, {**QA, "id": "x"}), {}, ":2: id"),
    "ids 1 and '1'": (
        "a.jsonl",
        lines({**QA, "id": 1}, {**QA, "id": "1"}),
        {},
        ":2: id",
    ),
    "ids as defaults": ("a.jsonl", lines({**QA, "id": "train-1"}, QA), {}, ":2: id"),
    "id is a list": ("a.jsonl", second(QA, id=[1]), {}, ":2.*id=.*is a list"),
    "id is true": ("a.jsonl", second(QA, id=True), {}, ":2.*id=True is a truth"),
    "id is 1.5": ("a.jsonl", second(QA, id=1.5), {}, ":2.*id=1.5 is a number"),
    # Schemas and columns
    "no schema": ("a.jsonl", lines({"a": 1}), {}, ":1 has columns .*of no schema"),
    "two schemas": (
        "a.jsonl",
        lines({**QA, "messages": CHAT}),
        {},
        r":1.*\['plain', 'm",
    ),
    "two kinds of keys": (
        "a.jsonl",
        lines({**KEYED, "answer": "A"}),
        {},
        ":1.*several",
    ),
    "another schema": (
        "a.jsonl",
        lines(QA),
        {"schema": "alpaca"},
        ":1.*no column 'inst",
    ),
    "no such column": ("a.jsonl", lines(QA), {"columns": "question=q.a"}, ":1.*no 'q'"),
    "no such member": (
        "a.jsonl",
        lines({"q": {"b": "c"}, "answer": "a"}),
        {"columns": "question=q.a"},
        ":1.*no 'a' of 'q.a': it has",
    ),
    "a column of rows": (
        "a.jsonl",
        lines({"q": "a", "answer": "a"}),
        {"columns": "question=q.a"},
        ":1.*it has text",
    ),
    # Chats
    "no such role": (
        "a.jsonl",
        with_messages(CHAT[0], {"role": "bot", "content": "a"}),
        {},
        r":2.*messages\[1\] has the role 'bot'",
    ),
    "no role": ("a.jsonl", with_messages({"content": "a"}), {}, ":2.*the role None"),
    "content is 0": (
        "a.jsonl",
        with_messages({"role": "user", "content": 0}, CHAT[1]),
        {},
        r":2.*\[0\].content=0",
    ),
    "no content": (
        "a.jsonl",
        with_messages(CHAT[0], {"role": "assistant", "content": None}),
        {},
        r":2.*messages\[1\].content=None is missing",
    ),
    "content is a number": (
        "a.jsonl",
        with_messages({"role": "user", "content": 3}, CHAT[1]),
        {},
        r":2.*\[0\].content=3",
    ),
    "an image": (
        "a.jsonl",
        with_messages(
            {"role": "user", "content": [{"type": "image_url", "image_url": "u"}]},
            CHAT[1],
        ),
        {},
        r":2.*messages\[0\].content has the part .*'image_url'",
    ),
    "a weight of a turn": (
        "a.jsonl",
        with_messages(CHAT[0], {**CHAT[1], "weight": "0"}),
        {},
        r":2.*messages\[1\].weight='0'",
    ),
    "a short word of many choices": (
        "a.jsonl",
        lines({**QA, "choices": [f"c{i}" for i in range(60)], "answer": "at"}),
        {},
        ":1.*none of its choices",
    ),
    "no reply": ("a.jsonl", with_messages(CHAT[0]), {}, ":2.*reply of the assistant"),
    "no turns": ("a.jsonl", with_messages(), {}, ":2.*reply of the assistant"),
    "turns as text": ("a.jsonl", lines({"messages": "Hi"}), {}, ":1.*not a list"),
    "a turn is text": (
        "a.jsonl",
        with_messages("Hi"),
        {},
        ":2.*is text, not an object",
    ),
    "a call without name": (
        "a.jsonl",
        with_messages(CHAT[0], {"role": "assistant", "tool_calls": [{"id": "1"}]}),
        {},
        ":2.*tool call",
    ),
    "tools as text": (
        "a.jsonl",
        with_messages(*CHAT, tools="f(x)"),
        {},
        ":2.*not a lis",
    ),
    "a surrogate in a tool": (
        "a.jsonl",
        with_messages(*CHAT, tools=[{"name": SURROGATE}]),
        {},
        ":2.*tools holds the lone surrogate",
    ),
    "a speaker that is a list": (
        "a.jsonl",
        lines({"conversations": [{"from": ["human"], "value": "Hi"}]}),
        {},
        ":1.*from",
    ),
    "a speaker": (
        "a.jsonl",
        lines({"conversations": [{"from": "alien", "value": "Hi"}]}),
        {},
        ":1.*'alien'",
    ),
    "a pair without prompt": (
        "a.jsonl",
        lines({"chosen": "a", "rejected": "b"}),
        {},
        ":1.*without a prompt",
    ),
    "a pair of another prompt": (
        "a.jsonl",
        lines({"prompt": "Bye", "chosen": CHAT, "rejected": CHAT}),
        {},
        ":1.*does not begin with",
    ),
    "a history": (
        "a.jsonl",
        lines({"instruction": "i", "output": "o", "history": [["a", "b"]]}),
        {},
        ":1.*history",
    ),
    # Tables
    "a quote too few": ("a.csv", b'question,answer\n"q,a\n', {}, ":2 is not CSV"),
    "a cell too many": (
        "a.csv",
        b"question,answer\nq,a\nq,a,b\n",
        {},
        ":3 has 3 cells",
    ),
    "a cell too few": ("a.tsv", b"question\tanswer\nq\n", {}, ":2 has 1 cells"),
    "a name twice": ("a.csv", b"question,answer,answer\nq,a,b\n", {}, ":1.*twice"),
    "semicolons": ("a.csv", b"question;answer\nq;a\n", {}, ":1: .*separated by ';'"),
    "no header": ("a.csv", b"Where is milk?,fridge\nq,a\n", {}, ":2 has columns"),
    "only a header": ("a.csv", b"question,answer\n", {}, "' has no rows"),
    "an empty cell": ("a.csv", b"question,answer\nq,a\nq,\n", {}, ":3.*is missing"),
    "a NaN cell": ("a.csv", b"question,answer\nq,NaN\n", {}, ":2.*is missing"),
    # Files
    "gz cut off": (
        "a.jsonl.gz",
        gzip.compress(lines(QA) * 9999)[:-400],
        {},
        ".*cannot",
    ),
    "zst cut off": (
        "a.jsonl.zst",
        zstandard.compress(lines({**QA, "x": list(range(9999))}))[:-9],
        {},
        ".*cannot be read",
    ),
    "gz by name alone": ("a.jsonl.gz", lines(QA), {}, ": .*not compressed by gzip"),
    "parquet by name alone": ("a.parquet", lines(QA), {}, " begins with"),
    "parquet cut off": ("a.parquet", b"PAR1" + b"\0" * 50, {}, ":1 cannot be read"),
    "arrow, empty": ("a.arrow", b"", {}, " is empty"),
    "arrow cut off": ("a.arrow", b"ARROW1\0\0" + b"\0" * 30, {}, ":1 cannot be read"),
    "a spreadsheet": ("a.xlsx", b"PK\x03\x04....", {}, " is a zip archive or a spread"),
    "bzip2": ("a.jsonl.bz2", b"BZh91AY", {}, " is compressed by bzip2"),
    "an unknown name": ("rows.dat", b"a|b\n", {}, ": its format is not seen"),
}


@pytest.mark.parametrize("case", REFUSED, ids=lambda case: case)
def test_faults_are_refused_in_one_line_with_file_and_row(case, tmp_path):
    name, content, fields, message = REFUSED[case]
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(ValueError, match=rf"(?s){name}{message}") as error:
        load_examples(DataConfig(path=str(path), **fields), "train", seed=0)
    assert "\n" not in str(error.value) and len(str(error.value)) < 600


def answers(examples):
    return [example.answer for example in examples]


# name of the file, content, fields of the config, the answers (or texts) that are read
READ = {
    "UTF-8 with a mark": ("a.jsonl", b"\xef\xbb\xbf" + lines(QA), {}, ["fridge"]),
    "a table with a mark": (
        "a.csv",
        "question,answer\r\nq,é\r\n".encode("utf-8-sig"),
        {},
        ["é"],
    ),
    "an array with a mark": (
        "a.json",
        b"\xef\xbb\xbf [" + lines(QA).strip() + b"]",
        {},
        ["fridge"],
    ),
    "NaN rationale": ("a.jsonl", lines({**MC, "rationale": math.nan}), {}, ["fridge"]),
    "files joined": (
        "a.jsonl",
        b"\xef\xbb\xbf" + lines(QA) + b"\xef\xbb\xbf" + lines(QA),
        {},
        ["fridge"] * 2,
    ),
    "GSM8K without a rationale": (
        "a.jsonl",
        lines({"question": "1 + 1?", "answer": "#### 2"}),
        {},
        ["2"],
    ),
    "an array in .jsonl": (
        "a.jsonl",
        json.dumps([QA, QA]).encode(),
        {},
        ["fridge"] * 2,
    ),
    "lines in .json": ("a.json", lines(QA, QA), {}, ["fridge"] * 2),
    "gz without the name": ("a.jsonl", gzip.compress(lines(QA)), {}, ["fridge"]),
    "letters": (
        "a.jsonl",
        lines({**MC, "answer": "B"}, {**MC, "answer": "(c)"}),
        {},
        ["fridge", "sink"],
    ),
    "small letters": ("a.jsonl", lines({**MC, "answer": "b"}), {}, ["fridge"]),
    "spaces": ("a.jsonl", lines({**MC, "answer": " fridge "}), {}, ["fridge"]),
    "indices": (
        "a.jsonl",
        lines({**MC, "answer": 1}, {**MC, "answer": "2"}),
        {"answer_kind": "index"},
        ["fridge", "sink"],
    ),
    "whole floats": (
        "a.jsonl",
        lines({**MC, "answer": 1.0}),
        {"answer_kind": "index"},
        ["fridge"],
    ),
    "numbers": (
        "a.jsonl",
        lines({**MC, "answer": 1}),
        {"answer_kind": "number"},
        ["oven"],
    ),
    "texts that are digits": (
        "a.jsonl",
        lines({**QA, "choices": ["3", "0", "2", "1"], "answer": "2"}),
        {"answer_kind": "text"},
        ["2"],
    ),
    "MMLU": (
        "a.jsonl",
        lines({**QA, "choices": ["3", "0", "2", "1"], "answer": 0, "subject": "s"}),
        {},
        ["3"],
    ),
    "MMLU by name": (
        "a.jsonl",
        lines({**QA, "choices": ["3", "0", "2", "1"], "answer": 0}),
        {"schema": "mmlu"},
        ["3"],
    ),
    "labels of several kinds": (
        "a.jsonl",
        lines(
            KEYED,
            {
                **KEYED,
                "choices": {"label": ["1", "2"], "text": ["oven", "sink"]},
                "answerKey": "2",
            },
            {**KEYED, "choices": {"label": [1, 2], "text": ["2", "1"]}, "answerKey": 2},
        ),
        {},
        ["fridge", "sink", "1"],
    ),
    "choices by label": (
        "a.jsonl",
        lines({**MC, "choices": {"A": "oven", "B": "fridge"}, "answer": "B"}),
        {},
        ["fridge"],
    ),
    "choices in columns": (
        "a.csv",
        b"question,A,B,C,D,answer\nq,w,x,y,z,B\n",
        {"columns": "choices=A|B|C|D"},
        ["x"],
    ),
    "choices as JSON": (
        "a.csv",
        b'question,choices,answer\nq,"[""w"", ""x""]",B\n',
        {},
        ["x"],
    ),
    "whole numbers as answers": ("a.jsonl", lines({**QA, "answer": 72}), {}, ["72"]),
    "whole floats as answers": ("a.jsonl", lines({**QA, "answer": 72.0}), {}, ["72"]),
    "numbers of SQuAD": (
        "a.jsonl",
        lines({"context": "c", "question": "q", "answers": {"text": [7]}}),
        {},
        ["7"],
    ),
    "numbers of Alpaca": (
        "a.jsonl",
        lines({"instruction": "1 + 1?", "output": 2}),
        {},
        ["2"],
    ),
    "choices of a passage": (
        "a.jsonl",
        lines({"context": "c", "question": "q", "answers": ["w", "x"], "label": 1}),
        {"columns": "choices=answers,answer=label", "answer_kind": "index"},
        ["x"],
    ),
    "free answers beside lists": (
        "a.jsonl",
        lines({**QA, "tags": ["fridge", "oven"]}),
        {},
        ["fridge"],
    ),
    "GSM8K in one line": (
        "a.jsonl",
        lines({**QA, "answer": "1 + 1 = 2 #### 2"}),
        {"schema": "gsm8k"},
        ["2"],
    ),
    "letters of their own, in order": (
        "a.jsonl",
        lines({**QA, "choices": ["A) oven", "B) fridge"], "answer": "B"}),
        {},
        ["B) fridge"],
    ),
    "an index of labelled choices": (
        "a.jsonl",
        lines({**MC, "choices": {"A": "oven", "B": "fridge"}, "answer": 1}),
        {"answer_kind": "index"},
        ["fridge"],
    ),
    "a pair without a prompt, dropped": (
        "a.jsonl",
        lines(
            {"prompt": "q", "chosen": "a", "rejected": "b"},
            {"prompt": None, "chosen": "c", "rejected": "b"},
        ),
        {"on_missing": "drop"},
        ["a"],
    ),
    "an empty chosen turn, dropped": (
        "a.jsonl",
        lines(
            {"prompt": CHAT[:1], "chosen": CHAT[1:]},
            {
                "prompt": [*CHAT, CHAT[0]],
                "chosen": [{"role": "assistant", "content": ""}],
            },
        ),
        {"on_missing": "drop"},
        ["Yes"],
    ),
    "a turn of weight 0": (
        "a.jsonl",
        lines(
            {
                "conversations": [
                    {"from": "human", "value": "Hi"},
                    {"from": "gpt", "value": "No", "weight": 0},
                ]
            },
            {
                "conversations": [
                    {"from": "human", "value": "Hi"},
                    {"from": "gpt", "value": "Yes", "weight": 1},
                ]
            },
        ),
        {"on_missing": "drop"},
        ["Yes"],
    ),
    "labels of choices under other names": (
        "a.jsonl",
        lines(
            {
                **QA,
                "choices": [{"id": "B", "text": "oven"}, {"id": "A", "text": "fridge"}],
                "answer": "A",
            },
            {
                **QA,
                "choices": {"key": ["B", "A"], "text": ["tea", "milk"]},
                "answer": "A",
            },
        ),
        {},
        ["fridge", "milk"],
    ),
    "a key of choices without labels": (
        "a.csv",
        b"question,A,B,answerKey\nq,w,x,B\n",
        {"columns": "choices=A|B"},
        ["x"],
    ),
    "an empty last choice": (
        "a.csv",
        b"question,A,B,C,answer\nq,w,x,,B\nq2,w,x,y,C\n",
        {"columns": "choices=A|B|C"},
        ["x", "y"],
    ),
    "a one among zeros": (
        "a.jsonl",
        lines({**MC, "answer": [0, 0, 1]}),
        {},
        ["sink"],
    ),
    "an index that pandas wrote": (
        "a.csv",
        b"question,A,B,answer\nq,w,x,1.0\n",
        {"columns": "choices=A|B", "answer_kind": "index"},
        ["x"],
    ),
    "letters of choices in the question": (
        "a.jsonl",
        lines({"question": "q? A) w B) x", "answer": "B", "topic": "t"}),
        {},
        ["B"],
    ),
    "answers without a context": (
        "a.jsonl",
        lines({"question": "q", "answers": ["x", "y"], "url": "u"}),
        {},
        ["x"],
    ),
    "GSM8K with a word": (
        "a.jsonl",
        lines({**QA, "answer": "So.\n#### yes"}),
        {},
        ["yes"],
    ),
    "letters as free answers": (
        "a.jsonl",
        lines({**QA, "answer": "C", "category": "vitamins", "level": "easy"}),
        {},
        ["C"],
    ),
    "numbers under letters": (
        "a.csv",
        b"question,a,b,answer\nq,1,2,3\n",
        {},
        ["3"],
    ),
    "options of another kind": (
        "a.jsonl",
        lines({**QA, "options": [], "choice": "x", "multiple_choice": False}),
        {},
        ["fridge"],
    ),
    "numbers as texts of choices": (
        "a.jsonl",
        lines({**QA, "choices": ["0.5", "1.0", "2.0"], "answer": "1.0"}),
        {},
        ["1.0"],
    ),
    "members of choices that are no labels": (
        "a.jsonl",
        lines(
            {
                **QA,
                "choices": [
                    {"id": "u-1", "text": "x", "score": 1},
                    {"id": "u-2", "text": "y", "score": 0},
                ],
                "answer": "B",
            }
        ),
        {},
        ["y"],
    ),
    "a column that is left out": (
        "a.jsonl",
        lines({**QA, "context": {"title": ["a"], "sentences": [["x"]]}}),
        {"columns": "context="},
        ["fridge"],
    ),
    "choices of an API": (
        "a.jsonl",
        lines({"instruction": "i", "output": "o", "choices": [{"index": 0}]}),
        {},
        ["o"],
    ),
    "empty members of turns": (
        "a.jsonl",
        with_messages(
            {**CHAT[0], "images": [], "train": False},
            {
                **CHAT[1],
                "function_call": {},
                "reasoning": {"effort": "low"},
                "loss": True,
            },
        ),
        {},
        ["Yes", "Yes"],
    ),
    "a prompt that its reply begins with": (
        "a.jsonl",
        lines(
            {
                "prompt": "def add(first, second):",
                "chosen": "def add(first, second): return first + second",
            }
        ),
        {"schema": "preference"},
        ["def add(first, second): return first + second"],
    ),
    "an empty history": (
        "a.jsonl",
        lines({"instruction": "i", "output": "o", "history": []}),
        {},
        ["o"],
    ),
    "a prompt and its completion": (
        "a.jsonl",
        lines({"prompt": "q", "completion": "a"}),
        {},
        ["a"],
    ),
    "one answer in a list": ("a.jsonl", lines({**QA, "answer": ["a"]}), {}, ["a"]),
    "equal answers": ("a.jsonl", lines({**QA, "answer": ["a", "a"]}), {}, ["a"]),
    "the first answer": (
        "a.jsonl",
        lines({**QA, "answer": ["a", "b"]}),
        {"answer_list": "first"},
        ["a"],
    ),
    "quoted lines": (
        "a.csv",
        b'question,answer\n"q\n1",a\nq2,"b, c"\n',
        {},
        ["a", "b, c"],
    ),
    "an index column": ("a.csv", b",question,answer\n0,q,a\n", {}, ["a"]),
    "nested": (
        "a.jsonl",
        lines({"q": {"stem": "q"}, "a": {"text": ["x", "y"]}}),
        {"columns": "question=q.stem, answer=a.text.0"},
        ["x"],
    ),
    "dropped": (
        "a.jsonl",
        lines(
            QA,
            {**QA, "answer": math.nan},
            {"question": "", "answer": "b"},
            {"question": "q"},
        ),
        {"on_missing": "drop"},
        ["fridge"],
    ),
    "dropped texts": (
        "a.jsonl",
        lines({"text": ""}, {"text": "a"}, {"text": " "}),
        {"on_missing": "drop"},
        [""],
    ),
}


@pytest.mark.parametrize("case", READ, ids=lambda case: case)
def test_what_is_usual_is_read(case, tmp_path):
    name, content, fields, expected = READ[case]
    path = tmp_path / name
    path.write_bytes(content)
    config = DataConfig(path=str(path), **fields)
    examples = load_examples(config, "train", seed=0)
    view = "text" if "texts" in case.split()[-1:] else "label"
    selected = selection.select(examples, (view,), "train", config)
    assert answers(selected.examples) == expected
    assert all(e.answer in e.choices for e in selected.examples if e.choices)

"""What a teacher is asked, word by word."""

import collections
import json
import shutil

import pytest

from kdjax.annotation import prompts
from kdjax.annotation import requests as requests_lib
from kdjax.config import AnnotateConfig
from kdjax.data import templates
from kdjax.data.example import Example, contradicts
from kdjax.data.text import states_answer

MILK = Example(
    id="milk",
    question="Where is milk kept?",
    choices=("fridge", "shed", "attic"),
    answer="shed",
)
SUM = Example(id="sum", question="What is 2 + 2?", answer="4")
FILES = prompts.load()


def asked(example=MILK, answers=("a draft", "a critique", "a text"), **fields):
    """All requests of an item, and what was drawn, as `answers` come in."""
    fields = AnnotateConfig(**fields)
    [item, *_] = requests_lib.make_items([example], fields)
    work, requests = requests_lib.Work(item, FILES, fields), []
    for answer in answers:
        if work.request is None:
            break
        requests.append(work.request)
        work.take(
            requests_lib.Completion(
                text=answer, finish_reason="stop", prompt_tokens=1, new_tokens=1
            )
        )
    assert work.request is None
    return requests, work.row({})


def test_the_built_in_files():
    assert len(FILES.demonstrations) == 7 and len(FILES.requests) == 10
    assert len(FILES.critiques) == 7 and len(FILES.revisions) == 4
    assert not set(FILES.adjectives["good"]) & set(FILES.adjectives["bad"])
    assert len({row["name"] for row in FILES.requests}) == 10
    criticised = {row["critique"] for row in FILES.requests}
    assert {row["request"] for row in FILES.critiques} <= criticised
    revised = {row["revision"] for row in FILES.requests}
    assert {row["request"] for row in FILES.revisions} <= revised
    rows = [*FILES.demonstrations, *FILES.critiques, *FILES.revisions]
    assert len({row["question"] for row in rows}) == 18
    for row in rows:
        choices = tuple(row["choices"])
        assert len(set(choices)) == 5
        for name in {"rationale", "revision"} & set(row):
            assert not states_answer(row[name])
    # The answer's place tells nothing.
    letters = [r["choices"].index(r["answer"]) for r in FILES.demonstrations]
    assert set(letters) == set(range(5))


def test_an_explanation_does_not_state_its_answer_unless_it_is_asked_to():
    """The answer stands before the explanation; 0 of the worked texts contain it."""
    shown = [m["content"] for m in asked(answers=["x"])[0][0].messages[1::2]]
    assert len(shown) == 7 and not any(map(states_answer, shown))
    assert (
        prompts.CONCLUDE_TASK not in asked(answers=["x"])[0][0].messages[0]["content"]
    )
    requests, _ = asked(method="critique_revision")
    for request in requests:
        texts = [m["content"] for m in request.messages]
        assert not any(map(states_answer, texts[1::2]))
        assert not any("So the answer" in text for text in texts)
    requests, _ = asked(method="critique_revision", conclude=True)
    [draft, critique, revision] = [
        [m["content"] for m in request.messages] for request in requests
    ]
    assert prompts.CONCLUDE_TASK in draft[0]
    for row, text in zip(FILES.demonstrations, draft[1::2], strict=True):
        letter = templates.LETTERS[row["choices"].index(row["answer"])]
        end = f"So the answer is ({letter}) {row['answer']}."
        assert text == f"{row['rationale']} {end}"
        concluded = Example(
            id="", choices=tuple(row["choices"]), answer=row["answer"], rationale=text
        )
        assert not contradicts(concluded)
    assert sum("So the answer is" in text for text in critique[:-1:2]) == 6
    assert all("So the answer is" in text for text in revision[1::2])


def test_six_of_seven_worked_critiques_are_drawn_for_an_example():
    def shown(name):
        example = Example(id=name, question="Q?", choices=("x", "y"), answer="y")
        requests, _ = asked(example, method="critique_revision")
        return [m["content"] for m in requests[1].messages[1::2]]

    worked = [row["critique"] for row in FILES.critiques]
    left_out = collections.Counter()
    for number in range(140):
        texts = shown(str(number))
        [missing] = set(worked) - set(texts)
        assert texts == [text for text in worked if text != missing]
        left_out[missing] += 1
    assert len(left_out) == 7 and max(left_out.values()) < 45
    with pytest.raises(ValueError, match=r"num_critiques=8: the prompt files have 7"):
        asked(method="critique_revision", num_critiques=8)


def test_each_step_has_a_limit_of_its_own():
    requests, _ = asked(method="critique_revision")
    assert [r.max_new_tokens for r in requests] == [300] * 3  # as the paper has it
    limits = {"max_draft_tokens": 10, "max_critique_tokens": 20, "max_new_tokens": 40}
    requests, _ = asked(method="critique_revision", max_revision_tokens=30, **limits)
    assert [r.max_new_tokens for r in requests] == [10, 20, 30]
    assert asked(answers=["x"], **limits)[0][0].max_new_tokens == 40


def test_wrong_rationales_are_contrastive_too():
    """The wrong choice is the target there, and the gold answer the contrast."""
    fields = AnnotateConfig(method="contrastive_counterfactual")
    items = requests_lib.make_items([MILK], fields)
    assert [item.key for item in items] == [("milk", "fridge"), ("milk", "attic")]
    for item, letter in zip(items, "ac", strict=True):
        request = requests_lib.Work(item, FILES, fields).request
        target, contrast = (
            messages[-1]["content"] for messages in (request.messages, request.contrast)
        )
        assert f"\nAnswer: ({letter}) {item.choice}\n" in target
        stated = f"\nAnswer: ({letter}) {item.choice}\n"
        assert contrast == target.replace(stated, "\nAnswer: (b) shed\n") != target


def test_zero_shot_reads():
    [request], row = asked(method="zero_shot", answers=[" A text. "])
    assert request.messages == [
        {
            "role": "user",
            "content": "Question: Where is milk kept?\n"
            "Choices: (a) fridge (b) shed (c) attic\n"
            "Answer: (b) shed\n"
            "Let's think step by step about why this is the answer.",
        }
    ]
    assert row["text"] == "A text." and row["calls"][0]["text"] == " A text. "
    [request], _ = asked(SUM, method="zero_shot", answers=["x"])
    assert "Question: What is 2 + 2?\nAnswer: 4\n" in request.messages[0]["content"]


def test_few_shot_qualifies_every_turn_by_the_same_two_adjectives():
    [request], row = asked(num_demonstrations=3, answers=["x"])
    roles = [message["role"] for message in request.messages]
    assert roles == ["user", "assistant"] * 3 + ["user"]
    first, second = row["adjectives"]
    assert {first, second} <= set(FILES.adjectives["good"]) and first != second
    cue = f"\nExplanation ({first}, {second}):"
    for index, message in enumerate(request.messages):
        if index % 2:
            demonstration = FILES.demonstrations[index // 2]
            assert message["content"] == demonstration["rationale"]
        else:
            assert message["content"].endswith(cue)
            assert message["content"].count("Explanation") == 1
    assert request.messages[0]["content"].startswith(prompts.EXPLAIN_TASK)
    text = prompts.plain(request.messages)
    assert text.endswith(
        "Question: Where is milk kept?\nChoices: (a) fridge (b) shed (c) attic\n"
        f"Answer: (b) shed{cue}"
    )
    assert f"{cue} {FILES.demonstrations[0]['rationale']}\n\nQuestion: " in text


def test_what_is_drawn_follows_from_seed_and_id():
    def drawn(seed, name, **fields):
        example = Example(
            id=name, question="Q?", choices=MILK.choices, answer=MILK.answer
        )
        row = asked(example, seed=seed, **fields)[1]
        return {key: row.get(key) for key in ("adjectives", "request", "contrast")}

    for fields in ({}, {"method": "critique_revision"}, {"method": "contrastive"}):
        assert drawn(0, "a", **fields) == drawn(0, "a", **fields)
    assert drawn(0, "a") != drawn(1, "a") or drawn(0, "b") != drawn(1, "b")
    bad = drawn(0, "a", quality="bad")["adjectives"]
    assert set(bad) <= set(FILES.adjectives["bad"])
    # Each is drawn about as often as another: within five standard deviations.
    counts = collections.Counter(
        drawn(0, str(n), method="contrastive")["contrast"] for n in range(400)
    )
    assert set(counts) == {"fridge", "attic"} and abs(counts["attic"] - 200) < 50
    counts = collections.Counter(
        prompts.draw(FILES.requests, 1, 0, n)[0]["name"] for n in range(1000)
    )
    assert len(counts) == 10 and max(abs(c - 100) for c in counts.values()) < 48


def test_every_wrong_choice_is_justified_in_turn():
    fields = AnnotateConfig(method="counterfactual")
    items = requests_lib.make_items([MILK], fields)
    assert [item.key for item in items] == [("milk", "fridge"), ("milk", "attic")]
    for item, letter in zip(items, "ac", strict=True):
        work = requests_lib.Work(item, FILES, fields)
        asked_last = work.request.messages[-1]["content"]
        assert f"\nAnswer: ({letter}) {item.choice}\n" in asked_last
        assert "Answer: (b)" not in asked_last
    twice = Example(id="t", question="Q", choices=("x", "y", "x", "y"), answer="y")
    [item] = requests_lib.make_items([twice], fields)
    assert item.choice == "x"


def test_a_question_is_asked_without_its_answer():
    [request], row = asked(method="answer", num_demonstrations=2, answers=[" (c)\n"])
    first, answered = request.messages[:2]
    shown = FILES.demonstrations[0]
    assert first["content"].startswith(f"{prompts.ANSWER_TASK}\n\nQuestion: ")
    assert first["content"].endswith("\nAnswer:") and len(request.messages) == 5
    letter = "abcde"[shown["choices"].index(shown["answer"])]
    assert answered["content"] == f"({letter}) {shown['answer']}"
    assert request.messages[-1]["content"] == (
        "Question: Where is milk kept?\nChoices: (a) fridge (b) shed (c) attic\nAnswer:"
    )
    assert (row["answer"], row["text"]) == ("attic", "(c)")


@pytest.mark.parametrize(
    ("contrast", "line"),
    [("wrong", "\nAnswer: ({}) {}\n"), ("empty", "\nAnswer:\n")],
)
def test_the_contrast_differs_in_the_answer_alone(contrast, line):
    [request], row = asked(method="contrastive", contrast=contrast, answers=["x"])
    gold, other = request.messages, request.contrast
    assert gold[:-1] == other[:-1]
    wrong = row["contrast"]
    letter = dict(zip(MILK.choices, "abc", strict=True)).get(wrong, "")
    expected = gold[-1]["content"].replace(
        "\nAnswer: (b) shed\n", line.format(letter, wrong)
    )
    assert other[-1]["content"] == expected != gold[-1]["content"]


def test_critique_and_revision_read_what_was_written_before():
    [draft, critique, revision], row = asked(
        method="critique_revision",
        answers=[" The draft.\n", "The critique.", "Better."],
    )
    assert (draft.step, critique.step, revision.step) == tuple(
        call["step"] for call in row["calls"]
    )
    assert draft.messages == asked(answers=["x"])[0][0].messages
    [pair] = [r for r in FILES.requests if r["name"] == row["request"]]
    stated = (
        "Question: Where is milk kept?\nChoices: (a) fridge (b) shed (c) attic\n"
        "Answer: (b) shed\nExplanation: The draft.\n"
    )
    assert critique.messages[-1]["content"] == (
        f"{stated}{pair['critique']}\nCritique:"
    )
    assert len(critique.messages) == 2 * 6 + 1
    assert revision.messages[-1]["content"] == (
        f"{stated}Critique: The critique.\n{pair['revision']}\nRevised explanation:"
    )
    assert len(revision.messages) == 2 * 4 + 1
    assert row["text"] == "Better." and row["prompt_tokens"] == 3
    assert [c["text"] for c in row["calls"]] == [
        " The draft.\n",
        "The critique.",
        "Better.",
    ]


def test_an_empty_revision_stays_empty():
    _, row = asked(method="critique_revision", answers=["A draft.", "A critique.", " "])
    assert row["text"] == ""


def test_requests_differ_in_hash_and_seed():
    requests, _ = asked(method="critique_revision")
    assert len({request.seed for request in requests}) == 3
    assert len({prompts.digest(request.messages) for request in requests}) == 3
    assert all(0 <= request.seed < 2**31 for request in requests)


@pytest.mark.parametrize(
    ("example", "fields", "message"),
    [
        (SUM, {"method": "counterfactual"}, "example 'sum' has no wrong choice"),
        (SUM, {"method": "contrastive"}, "or contrast='empty'"),
        (Example(id="t", text="words"), {}, "example 't' has no question"),
        (MILK, {"num_demonstrations": 8}, "the prompt files have 7: use no more"),
    ],
)
def test_refusals(example, fields, message):
    with pytest.raises(ValueError, match=message):
        asked(example, **fields)


def test_a_folder_of_the_users_own(tmp_path):
    shutil.copytree(prompts.FOLDER, tmp_path / "own")
    assert prompts.load(str(tmp_path / "own")) == FILES
    file = tmp_path / "own" / "demonstrations.jsonl"
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    rows[0]["rationale"] = "Mine."
    file.write_text("\n".join(map(json.dumps, rows[:2])))
    own = prompts.load(str(tmp_path / "own"))
    assert own.demonstrations[0]["rationale"] == "Mine." and own.digest != FILES.digest
    rows[1]["answer"] = "none"
    file.write_text("\n".join(map(json.dumps, rows)))
    with pytest.raises(ValueError, match="jsonl:2: answer='none' is none of its"):
        prompts.load(str(tmp_path / "own"))
    del rows[0]["choices"]
    file.write_text(json.dumps(rows[0]))
    with pytest.raises(ValueError, match="jsonl:1 lacks one of the columns question"):
        prompts.load(str(tmp_path / "own"))
    file.unlink()
    with pytest.raises(ValueError, match=r"annotate\.prompts names a folder"):
        prompts.load(str(tmp_path / "own"))

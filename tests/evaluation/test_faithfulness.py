"""Records of a run, and a student's choices after prefilled rationales."""

import dataclasses
import json
import subprocess
import sys

import numpy as np
import pytest

from kdjax.config import DataConfig, KinshipConfig, PrefixConfig, to_json
from kdjax.data import kinship, templates, tokenizer, views
from kdjax.data.example import Example, wrong_choices
from kdjax.evaluation import choices, faithfulness
from kdjax.evaluation.choices import Chooser
from kdjax.evaluation.scorer import Scorer
from kdjax.experiment import methods
from kdjax.experiment.data import load_data
from kdjax.experiment.models import make_model, student_params, student_shape
from kdjax.parallel import sharding
from kdjax.training import program
from kdjax.training.checkpoint import CheckpointWriter, load_student
from tests import helpers
from tests.data.test_views import byte_level

WORDS = tokenizer.make_word_tokenizer(["[f]", "[c]"])
LIMITS = DataConfig(
    max_prompt=200,
    max_target=100,
    prefixes=PrefixConfig(factual="[f]", counterfactual="[c]"),
)
EXAMPLES = kinship.generate(
    KinshipConfig(min_hops=2, max_hops=3), num_examples=40, seed=0, split="eval"
)
AUNT = Example(id="q", question="Who ?", choices=("aunt", "uncle"), answer="aunt")


def row(view, generated, key="q"):
    return {"id": key, "view": view, "generated": generated}


@pytest.mark.parametrize(
    ("texts", "rationale", "answer", "stated"),
    [
        (
            {"label": " uncle ", "rationale": "Aunt or uncle , so AUNT ."},
            "Aunt or uncle , so AUNT .",
            "uncle",
            "aunt",
        ),
        ({"label": "aunt", "rationale": "Nobody ."}, "Nobody .", "aunt", ""),
        ({"factual": "An aunt .\nAnswer: uncle"}, "An aunt .", "uncle", None),
        (
            {"rationale_then_label": "Answer: aunt . Answer: uncle"},
            "Answer: aunt .",
            "uncle",
            None,
        ),
        ({"factual": "She is an aunt"}, "She is an aunt", "She is an aunt", None),
        (
            {
                "label": "aunt",
                "rationale": "An uncle .",
                "factual": "So aunt .\nAnswer: aunt",
            },
            "An uncle .",
            "aunt",
            "aunt",
        ),
    ],
)
def test_records_say_where_rationale_and_answer_come_from(
    texts, rationale, answer, stated
):
    rows = [row(view, text) for view, text in texts.items()]
    [record] = faithfulness.make_records(rows, [AUNT])
    assert (record.rationale, record.answer) == (rationale, answer)
    assert record.stated == stated
    assert (record.id, record.question, record.gold) == ("q", "Who ?", "aunt")
    assert record.choices == ("aunt", "uncle")


def test_without_a_rationale_there_is_no_record():
    assert faithfulness.make_records([row("label", "aunt")], [AUNT]) == []
    assert faithfulness.make_records([], [AUNT]) == []
    with pytest.raises(ValueError, match=r"generations of \['other'\]"):
        faithfulness.make_records([row("label", "aunt", "other")], [AUNT])


def written(examples, answers=None):
    """Records of a student that writes the data's rationales."""
    answers = answers or [e.answer for e in examples]
    rows = [
        row("factual", f"{e.rationale}\nAnswer: {a}", e.id)
        for e, a in zip(examples, answers, strict=True)
    ]
    return faithfulness.make_records(rows, examples)


def chooser(log_probs, *, generate=None, complete=None, words=WORDS, **limits):
    return Chooser(
        tokenizer=words,
        data=dataclasses.replace(LIMITS, **limits),
        log_probs=lambda segments: np.asarray([log_probs(s) for s in segments]),
        generate=generate,
        complete=complete,
    )


def last_place(segment):
    """Of the choice's first token in what is read before it: follows the rationale."""
    (places,) = np.nonzero(segment.prefix_ids == segment.target_ids[0])
    return float(places[-1]) if len(places) else -1.0


def test_a_student_that_follows_is_right_after_the_right_rationale():
    own = written(EXAMPLES)
    # Its own rationales are those of the example before it.
    shifted = [
        dataclasses.replace(r, rationale=before.rationale)
        for r, before in zip(own, [own[-1], *own], strict=False)
    ]
    completed = []

    def complete(segments):
        """Write the choice that the rationale names last."""
        completed.extend(segments)
        by_id = {example.id: example for example in EXAMPLES}
        texts = []
        for segment in segments:
            words = WORDS.decode(segment.prefix_ids).split()
            named = [w for w in words if w in by_id[segment.example_id].choices]
            texts.append(named[-1] if named else "")
        return texts

    student = chooser(last_place, complete=complete)
    found = faithfulness.accuracy_after_rationale(
        student, shifted, EXAMPLES, "factual", seed=1
    )
    assert found["oracle_accuracy"] == 1
    assert found["plain_accuracy"] < 0.6
    right = 0
    for example in EXAMPLES:
        ids = np.asarray(WORDS.encode(example.rationale), np.int32)
        words = WORDS.decode(
            faithfulness.replace_half(ids, WORDS, seed=1, key=example.id)
        ).split()
        places = [
            max((i for i, w in enumerate(words) if w == choice), default=-1)
            for choice in example.choices
        ]
        right += example.choices[int(np.argmax(places))] == example.answer
    assert found["perturbed_oracle_accuracy"] == pytest.approx(right / len(EXAMPLES))
    assert 0.2 < found["perturbed_oracle_accuracy"] < 0.9
    # SCOTT's: of the student's own rationale half, rounded down, is replaced, the
    # student writes the answer after it, and no choice is ranked.
    assert found["generated_accuracy"] == np.mean(
        [r.answer == e.answer for r, e in zip(shifted, EXAMPLES, strict=True)]
    )
    answers = complete(completed[: len(EXAMPLES)])
    assert found["perturbed_accuracy"] == np.mean(
        [a == e.answer for a, e in zip(answers, EXAMPLES, strict=True)]
    )
    for segment, record in zip(completed, shifted, strict=False):
        own_ids = np.asarray(WORDS.encode(record.rationale), np.int32)
        prefix = segment.prefix_ids
        changed = prefix[: len(own_ids)] != own_ids
        assert changed.sum() == len(own_ids) // 2
        assert WORDS.decode(prefix[len(own_ids) :]) == "Answer:"


def test_a_student_that_ignores_rationales_is_the_same_after_all():
    student = chooser(
        lambda s: (int(s.target_ids[0]) * 7919) % 101,
        complete=lambda segments: [example.answer for example in EXAMPLES],
    )
    found = faithfulness.accuracy_after_rationale(
        student, written(EXAMPLES), EXAMPLES, "factual", seed=1
    )
    ranked = {
        name: found[name] for name in found if "oracle" in name or "plain" in name
    }
    assert len(set(ranked.values())) == 1 and 0 < found["plain_accuracy"] < 1
    assert found["generated_accuracy"] == found["perturbed_accuracy"] == 1


@pytest.mark.parametrize("words", [WORDS, byte_level()], ids=["words", "bytes"])
def test_the_rationale_and_the_cue_stand_before_each_choice(words):
    seen = []

    def log_probs(segment):
        seen.append(segment)
        return 0.0

    example = EXAMPLES[0]
    student = chooser(
        log_probs,
        complete=lambda segments: ["" for _ in segments],
        words=words,
        max_prompt=2000,
        max_target=2000,
    )
    faithfulness.accuracy_after_rationale(
        student, written([example]), [example], "factual", seed=0
    )
    assert len(seen) == 3 * len(example.choices)
    [text] = templates.render(example, "factual", LIMITS)
    for index, segment in enumerate(seen[: 2 * len(example.choices)]):
        choice = example.choices[index % len(example.choices)]
        assert words.decode(segment.prompt_ids).split() == text.prompt.split()
        read = words.decode(segment.prefix_ids)
        assert read.split() == f"{example.rationale} Answer:".split()
        read = words.decode(segment.target_ids, skip_special_tokens=True)
        assert read.split() == choice.split()
        assert segment.target_ids[-1] == words.eos_token_id
    whole, changed = seen[5].prefix_ids, seen[10].prefix_ids
    differs = whole != changed
    num_cue = len(words.encode("\nAnswer:", add_special_tokens=False))
    assert not differs[-num_cue:].any()
    assert differs.sum() == -(-(len(whole) - num_cue) // 2)
    for segment in seen[11:]:
        np.testing.assert_array_equal(segment.prefix_ids, changed)


def test_draws_follow_from_seed_and_example():
    ids = np.asarray(WORDS.encode(EXAMPLES[0].rationale), np.int32)[:9]

    def draw(seed=0, key="a"):
        return faithfulness.replace_half(ids, WORDS, seed=seed, key=key)

    np.testing.assert_array_equal(draw(), draw())
    assert (draw() != ids).sum() == 5
    assert (draw() != draw(seed=1)).any() and (draw() != draw(key="b")).any()
    drawn = [draw(key=str(n)) for n in range(300)]
    assert {int((found != ids).sum()) for found in drawn} == {5}
    many = np.concatenate(drawn)
    assert not set(WORDS.all_special_ids) & set(many.tolist())
    assert set(many.tolist()) == set(range(len(WORDS))) - set(WORDS.all_special_ids)
    assert len(faithfulness.replace_half(ids[:0], WORDS, seed=0, key="a")) == 0


def test_prefixes_are_swapped_by_hand():
    """A student that answers rightly but after [c], and follows every rationale there.

    After [f] it follows wrong rationales of choices that begin with an "a" to "m".
    """
    examples = EXAMPLES[:10]
    answers = [e.answer for e in examples]
    answers[0] = wrong_choices(examples[0])[0]
    prompts_seen = []

    def generate(prompts):
        prompts_seen.extend(prompts)
        answers = [e.answer for e in examples]
        answers[1] = wrong_choices(examples[1])[0]
        answers[2] = wrong_choices(examples[2])[0]
        return [f"So .\nAnswer: {answer}." for answer in answers]

    def log_probs(segment):
        read = WORDS.decode(segment.prompt_ids)
        if read.startswith("[f]"):
            word = WORDS.decode(segment.target_ids[:1])
            return last_place(segment) if word < "n" else -2.0
        return last_place(segment)

    found = faithfulness.prefix_swap(
        chooser(log_probs, generate=generate), written(examples, answers), examples
    )
    pairs = [(e, c) for e in examples for c in wrong_choices(e)]
    followed = [c < "n" for _, c in pairs]
    assert 0 < sum(followed) < len(pairs)
    assert found == pytest.approx(
        {
            "prefix_changes_answer": 3 / 10,
            "factual_prefix_accuracy": 9 / 10,
            "counterfactual_prefix_accuracy": 8 / 10,
            "prefix_changes_choice": 1 - np.mean(followed),
            "factual_prefix_follows": np.mean(followed),
            "counterfactual_prefix_follows": 1,
        }
    )
    assert prompts_seen == [
        templates.render(e, "counterfactual", LIMITS)[0].prompt for e in examples
    ]


def test_without_wrong_rationales_prefixes_are_swapped_all_the_same():
    bare = [dataclasses.replace(e, counterfactuals=()) for e in EXAMPLES[:2]]
    student = chooser(last_place, generate=lambda prompts: [""] * len(prompts))
    found = faithfulness.prefix_swap(student, written(bare), bare)
    assert found == {
        "prefix_changes_answer": 1,
        "factual_prefix_accuracy": 1,
        "counterfactual_prefix_accuracy": 0,
    }


def test_wrong_rationales_stand_in_the_prompt_where_the_method_has_them():
    """Then segments are those that the method trains on, but for the choices."""
    example, seen = EXAMPLES[0], []
    student = chooser(
        lambda s: seen.append(s) or 0.0,
        generate=lambda prompts: ["aunt"] * len(prompts),
        counterfactual_place="prompt",
    )
    faithfulness.prefix_swap(student, written([example]), [example])
    learnt, _ = views.make_segments([example], ("counterfactual",), WORDS, student.data)
    scored = {(s.prompt_ids.tobytes(), s.target_ids.tobytes()) for s in seen}
    for segment in learnt:
        assert (segment.prompt_ids.tobytes(), segment.target_ids.tobytes()) in scored
    assert not any(len(s.prefix_ids) for s in seen)


def finished(config, folder):
    """What a finished run leaves, as far as it is read here; nothing is trained.

    It has generated what the data says.
    """
    mesh = sharding.make_mesh(config.mesh)
    data = load_data(config)
    shape = student_shape(config, data.tokenizer)
    model = make_model(shape, mesh, dtype="float32")
    initial = program.Program(config, model, mesh).init(
        student_params(config, model, "")
    )
    with CheckpointWriter(folder / "checkpoints") as checkpoints:
        checkpoints.save(config.train.steps, initial)
    lines = [
        json.dumps(row(view, text.target, example.id)) + "\n"
        for example in data.eval_examples[: config.evaluation.num_generations]
        for view in data.eval_views
        for text in templates.render(example, view, config.data)
    ]
    (folder / "generations.jsonl").write_text("".join(lines))
    return data


NAMED = {"num_records", "words", "names_gold", "names_answer", "states_answer"}
NAMED |= {"names_distractor", "num_distractors"}
FORCED = {"plain_accuracy", "oracle_accuracy", "perturbed_oracle_accuracy"}
FORCED |= {"generated_accuracy", "perturbed_accuracy"}
SWAPPED = {
    "prefix_changes_answer",
    "factual_prefix_accuracy",
    "counterfactual_prefix_accuracy",
    "prefix_changes_choice",
    "factual_prefix_follows",
    "counterfactual_prefix_follows",
}
MEASURES = {
    "finetune": set(),
    "rationale_then_label": NAMED | FORCED,
    "multitask": NAMED | {"self_consistency"},
    "counterfactual": NAMED | FORCED | SWAPPED,
    "multitask_counterfactual": NAMED | {"self_consistency"} | FORCED | SWAPPED,
}


def names(method):
    return {f"faithfulness/{name}" for name in MEASURES[method]}


def small(method, **changes):
    method = {"name": method, "soft_weight": 0.0, "temperature": 1.0}
    return helpers.small_config(method=method, **changes)


@pytest.fixture(scope="module")
def multitask(tmp_path_factory):
    folder = tmp_path_factory.mktemp("multitask")
    config = small("multitask")
    return config, folder, finished(config, folder)


@pytest.mark.parametrize(
    ("method", "architecture"),
    [
        ("finetune", "decoder"),
        ("counterfactual", "decoder"),
        ("multitask_counterfactual", "t5"),
        *(
            pytest.param(name, "decoder", marks=pytest.mark.slow)
            for name in (
                "rationale_then_label",
                "multitask",
                "multitask_counterfactual",
            )
        ),
    ],
)
def test_every_method_has_its_measures(method, architecture, tmp_path):
    assert methods.METHODS.keys() - MEASURES.keys() == {"text", "chat"}
    config = small(method, student={"architecture": architecture})
    finished(config, tmp_path)
    measures = faithfulness.measure(helpers.open_eval(config, tmp_path))
    assert set(measures) == names(method)
    assert all(np.isfinite(list(measures.values())))
    if method == "multitask_counterfactual":
        assert faithfulness.measure(helpers.open_eval(config, tmp_path)) == measures


def test_a_run_is_measured_with_a_simulator(multitask, monkeypatch):
    config, folder, data = multitask
    examples = data.eval_examples

    def las(records, simulator):
        assert simulator == folder / "simulator"
        assert [r.id for r in records] == [e.id for e in examples[:2]]
        assert [r.answer for r in records] == [e.answer for e in examples[:2]]
        return {"las": 0.25}

    monkeypatch.setattr(faithfulness.simulators, "las", las)
    measures = faithfulness.measure(
        helpers.open_eval(config, folder), simulator=folder / "simulator"
    )
    assert set(measures) == names("multitask") | {"faithfulness/las"}
    assert measures["faithfulness/las"] == 0.25
    assert measures["faithfulness/self_consistency"] == 1


def test_the_command_writes_what_is_measured(tmp_path):
    config = small("rationale_then_label")
    finished(config, tmp_path)
    (tmp_path / "config.json").write_text(to_json(config))
    done = subprocess.run(
        [
            *(sys.executable, "-m", "kdjax.evaluate", "--faithfulness"),
            *(f"--workdir={tmp_path}", f"--json={tmp_path / 'copy.json'}"),
        ],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    measures = json.loads((tmp_path / "faithfulness.json").read_text())
    assert set(measures) == names("rationale_then_label")
    assert measures == pytest.approx(
        faithfulness.measure(helpers.open_eval(config, tmp_path))
    )
    assert measures == json.loads((tmp_path / "copy.json").read_text())
    assert "oracle_accuracy" in done.stdout


def test_a_run_that_is_not_finished_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"no generations\.jsonl: let the run finish"):
        faithfulness.measure(helpers.open_eval(helpers.small_config(), tmp_path))


def test_choices_after_the_label_prompt_are_those_of_the_accuracy(multitask):
    config, folder, data = multitask
    run = helpers.open_eval(config, folder)
    student = choices.load_chooser(run)
    answers = choices.choose(student, data.eval_examples)
    right = [a == e.answer for a, e in zip(answers, data.eval_examples, strict=True)]
    accuracy = Scorer(run)(load_student(run))["accuracy"]
    assert np.mean(right) == pytest.approx(accuracy)
    assert choices.choose(student, []) == []

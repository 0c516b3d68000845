"""A simulator learns what takes question and rationale, and finds it in a student's."""

import dataclasses
import json
import random

import pytest

from kdjax.config import Config, DataConfig, DecoderConfig, from_json
from kdjax.data import loader, tokenizer
from kdjax.evaluation import simulator
from kdjax.evaluation.rationale_metrics import Record
from kdjax.runtime import locks
from tests import helpers

WORDS = ("zero", "one", "two")
DECODER = DecoderConfig(
    width=32,
    num_layers=2,
    num_heads=4,
    num_kv_heads=4,
    head_dim=8,
    mlp_width=96,
    init_std=0.2,
)


def sums(number, seed):
    """The question has one summand and the rationale the other: both are needed."""
    rng = random.Random(seed)
    records = []
    for index in range(number):
        first, second = rng.randrange(3), rng.randrange(3)
        answer = WORDS[(first + second) % 3]
        records.append(
            Record(
                id=f"{seed}-{index}",
                question=f"start {WORDS[first]}",
                choices=tuple(rng.sample(WORDS, 3)),
                gold=answer,
                rationale=f"add {WORDS[second]}",
                answer=answer,
            )
        )
    return records


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sums")
    words = tokenizer.make_word_tokenizer(["start", "add", *WORDS])
    words.save_pretrained(folder / "tokenizer")
    rows = [
        {
            "id": r.id,
            "question": r.question,
            "choices": r.choices,
            "answer": r.answer,
            "rationale": r.rationale,
        }
        for r in sums(200, 1)
    ]
    file = folder / "train.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = DataConfig(
        source="jsonl",
        path=str(file),
        num_eval=1,
        tokenizer=str(folder / "tokenizer"),
        max_prompt=20,
        max_target=8,
    )
    return Config(data=data)


@pytest.fixture(scope="module")
def trained(config, tmp_path_factory):
    folder = tmp_path_factory.mktemp("simulator")
    simulator.train_simulator(config, folder, decoder=DECODER, steps=250)
    return folder


def with_tokenizer(config, words, folder):
    words.save_pretrained(folder)
    changed = dataclasses.replace(config.data, tokenizer=str(folder))
    return dataclasses.replace(config, data=changed)


def test_a_simulator_serves_students_whose_tokenizer_lies_elsewhere(
    config, trained, tmp_path
):
    words = tokenizer.load(config.data.tokenizer)
    same = with_tokenizer(config, words, tmp_path / "same")
    simulator.train_simulator(same, trained, decoder=DECODER, steps=250)
    own = from_json((trained / "config.json").read_text()).data.tokenizer
    assert own == str(trained / "tokenizer")
    other = with_tokenizer(
        config, tokenizer.make_word_tokenizer(["add"]), tmp_path / "other"
    )
    with pytest.raises(ValueError, match="another tokenizer than"):
        simulator.train_simulator(other, trained, decoder=DECODER, steps=250)


RIGHT = sums(40, 3)
SHIFTED = [
    dataclasses.replace(r, answer=WORDS[(WORDS.index(r.answer) + 1) % 3].upper())
    for r in RIGHT
]
OWN = sums(400, 2)
OTHERS = [
    dataclasses.replace(record, rationale=rationale)
    for record, rationale in zip(
        OWN, random.Random(0).sample([r.rationale for r in OWN], 400), strict=True
    )
]
SILENT = [dataclasses.replace(r, rationale="") for r in sums(8, 3)]


def shown(record):
    return record.question, record.choices, record.rationale


@pytest.fixture(scope="module")
def predicted(trained):
    """What the simulator answers to all records of the tests, computed once."""
    records = [*RIGHT, *OWN, *OTHERS, *SILENT]
    rows = zip(*simulator.predict(records, trained).values(), strict=True)
    return dict(zip(map(shown, records), rows, strict=True))


@pytest.fixture
def las(predicted, trained, monkeypatch):
    def stored(records, folder):
        rows = [predicted[shown(record)] for record in records]
        return {s: [row[i] for row in rows] for i, s in enumerate(simulator.INPUTS)}

    monkeypatch.setattr(simulator, "predict", stored)
    return lambda records: simulator.las(records, trained)


def test_las_is_high_where_rationales_decide_answers(las):
    metrics = las(OWN[:200])
    assert metrics["las"] > 0.4 and metrics["simulated"] > 0.7
    # Either half says nothing.
    assert metrics["simulated_question"] < 0.5 and metrics["simulated_rationale"] < 0.5
    assert metrics["num_leaking"] + metrics["num_hidden"] == 200


def test_las_is_near_zero_for_the_rationales_of_others(las):
    assert abs(las(OTHERS)["las"]) < 0.15


def test_las_is_of_the_students_answers(las):
    """Not of the right ones, and not of answers that are no choice."""
    before, after = las(RIGHT), las(SHIFTED)
    assert after["simulated"] < before["simulated"] - 0.4
    no_choice = [dataclasses.replace(r, answer="five", rationale="") for r in RIGHT]
    assert las(no_choice) == {}
    assert las([*RIGHT, *no_choice]) == before


def test_an_empty_rationale_can_be_measured(las, predicted):
    for record in SILENT:
        both, question, _ = predicted[shown(record)]
        assert both == question
    assert las(SILENT)["las"] == 0


def test_a_finished_simulator_is_left_as_it_is(trained, config, monkeypatch):
    def refuse(*_, **__):
        raise AssertionError("trained again")

    monkeypatch.setattr(simulator, "train_loop", refuse)
    with locks.hold(trained):  # by another run that reads it
        simulator.train_simulator(config, trained, decoder=DECODER, steps=250)
    with pytest.raises(ValueError, match=r"train\.steps: 250 -> 900"):
        simulator.train_simulator(config, trained, decoder=DECODER, steps=900)
    with pytest.raises(ValueError, match="holds a simulator of other records"):
        simulator.train_simulator(
            config, trained, decoder=DECODER, steps=250, records=sums(4, 5)
        )


def test_a_killed_simulator_goes_on(config, tmp_path, monkeypatch):
    """From its checkpoint: `test_train` shows that it ends the same."""
    original, steps = loader.make_batch, []

    def interrupted(plan, index, **arguments):
        steps.append(index)
        if index == 7 and steps.count(7) == 1:
            raise KeyboardInterrupt
        return original(plan, index, **arguments)

    monkeypatch.setattr(loader, "make_batch", interrupted)
    with pytest.raises(KeyboardInterrupt):
        simulator.train_simulator(config, tmp_path, decoder=DECODER, steps=8)
    with pytest.raises(ValueError, match="not finished"):
        simulator.predict(sums(10, 4), tmp_path)
    num_steps = len(steps)
    simulator.train_simulator(config, tmp_path, decoder=DECODER, steps=8)
    assert min(steps[num_steps:]) > 0
    assert simulator.predict(sums(10, 4), tmp_path)["both"]


def test_each_epoch_shows_each_example_in_one_of_three_ways(config):
    examples = [simulator._as_example(r) for r in sums(60, 1)]
    shown = [
        e.question
        for inputs in simulator.INPUTS
        for e in simulator._with_inputs(examples, inputs)
    ]
    words = tokenizer.load(config.data.tokenizer)
    segments = simulator._segments(examples, words, config.data)
    plan = loader.BatchPlan(segments, batch_size=8, row_length=40)
    epochs = []
    for epoch in range(2):
        first = sum(plan.steps_per_epoch(e) for e in range(epoch))
        steps = range(first, first + plan.steps_per_epoch(epoch))
        taken = [item for step in steps for row in plan.batch(step) for item in row]
        assert len(taken) == 60
        assert {segments[i].example_id for i in taken} == {e.id for e in examples}
        epochs.append([shown[i] for i in taken])
        for show in range(3):
            assert sum(i // 60 == show for i in taken) > 8
    assert sorted(epochs[0]) != sorted(epochs[1])


def test_a_simulator_can_learn_from_a_students_own_records(config, tmp_path):
    own, other = sums(8, 5), sums(8, 6)

    def train(records):
        simulator.train_simulator(
            config, tmp_path, decoder=DECODER, steps=2, records=records
        )

    train(own)
    train(own)
    assert simulator.las(other, tmp_path)["simulated"] >= 0
    with pytest.raises(ValueError, match=r"learnt from records \['5-0', '5-1'"):
        simulator.las([*other, *own], tmp_path)
    with pytest.raises(ValueError, match="other records"):
        train(other)
    with pytest.raises(ValueError, match="other records"):
        train(None)


def test_one_simulator_serves_all_runs_on_the_same_data():
    """Whatever their seeds, methods, prefixes and sizes."""
    first = helpers.small_config()
    second = helpers.small_config(
        seed=3,
        method={"name": "counterfactual", "soft_weight": 0.0},
        student={"architecture": "t5"},
        data={"prefixes": dataclasses.replace(first.data.prefixes, factual="[f]")},
        train={"steps": 50},
    )
    found = simulator.simulator_config(first)
    assert found == simulator.simulator_config(second)
    assert from_json(simulator.config_lib.to_json(found)) == found


def test_what_is_lacking_is_named(config, tmp_path):
    with pytest.raises(ValueError, match=r"no config\.json: train it"):
        simulator.las(sums(2, 7), tmp_path / "nothing")
    bare = dataclasses.replace(sums(1, 7)[0], rationale="")
    with pytest.raises(ValueError, match="an answer and a rationale"):
        simulator.train_simulator(config, tmp_path / "bare", records=[bare])

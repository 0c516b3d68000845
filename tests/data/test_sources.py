import json
import logging
import os

import datasets
import pytest

from kdjax.config import DataConfig
from kdjax.data.example import Example, contradicts, wrong_choices
from kdjax.data.sources import load_examples
from kdjax.data.text import states_answer

CSQA = {
    "id": "c0",
    "question": "Where ?",
    "choices": {"label": ["A", "B"], "text": ["here", "there"]},
    "answerKey": "B",
}


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def plain(num, **changes):
    return [{"question": f"q{i}", "answer": "yes", **changes} for i in range(num)]


def jsonl(path, rows, **changes):
    return DataConfig(source="jsonl", path=write(path / "rows.jsonl", rows), **changes)


def load(config, split="train"):
    return load_examples(config, split, seed=0)


def test_plain_rows(tmp_path):
    row = {
        "id": "a",
        "question": "Who ?",
        "choices": ["aunt", "uncle"],
        "answer": "aunt",
        "rationale": "She is.",
        "counterfactuals": ["He is."],
    }
    config = jsonl(tmp_path, [row, {"text": "Once ."}, *plain(1)], num_eval=1)
    assert load(config) == [
        Example(
            id="a",
            question="Who ?",
            choices=("aunt", "uncle"),
            answer="aunt",
            rationale="She is.",
            counterfactuals=("He is.",),
        ),
        Example(id="train-1", text="Once ."),
    ]
    assert load(config, "eval") == [Example(id="eval-2", question="q0", answer="yes")]


def test_the_last_rows_are_held_out(tmp_path):
    config = jsonl(tmp_path, plain(10), num_eval=3, num_train=5)
    assert [e.question for e in load(config)] == ["q0", "q1", "q2", "q3", "q4"]
    assert [e.question for e in load(config, "eval")] == ["q7", "q8", "q9"]


def test_a_file_of_its_own_for_evaluation(tmp_path):
    other = write(tmp_path / "other.jsonl", [{"question": "o", "answer": "no"}])
    config = jsonl(tmp_path, plain(4), eval_path=other)
    assert len(load(config)) == 4
    assert [e.question for e in load(config, "eval")] == ["o"]


@pytest.mark.parametrize(
    ("rows", "changes", "split", "message"),
    [
        (plain(4), {}, "eval", "num_eval=0: without eval_path"),
        (plain(4), {"num_eval": 4}, "train", "num_eval=4: .* use 1 to 3"),
        (plain(4), {"num_train": 5, "num_eval": 1}, "train", "num_train=5: .* 3 rows"),
        ([{"question": "q"}], {}, "train", r"'train-0' has no column 'answer'"),
        ([{"answer": "a"}], {}, "train", r"'train-0' has no column 'question'"),
        (plain(1, choices=["no"]), {}, "train", "answer='yes' is none of its choices"),
        (
            plain(1, choices=["no", "yes"], counterfactuals=["a", "b"]),
            {},
            "train",
            "2 counterfactuals for 2 choices",
        ),
        (plain(2, id="same"), {}, "train", "id 'same' occurs twice"),
        ([{**CSQA, "answerKey": ""}], {"schema": "commonsense_qa"}, "train", "with an"),
        (plain(1), {"schema": "gsm8k"}, "train", "no '####'"),
        (plain(1), {"schema": "trivia"}, "train", "schema='trivia'"),
        (plain(1), {"source": "csv"}, "train", "source='csv'"),
        (plain(1), {}, "test", "split='test'"),
        ([], {}, "train", "no rows"),
    ],
)
def test_errors_say_what_to_do(tmp_path, rows, changes, split, message):
    config = jsonl(tmp_path, rows)
    for name, value in changes.items():
        setattr(config, name, value)
    with pytest.raises(ValueError, match=message):
        load(config, split)


def test_unreadable_files(tmp_path):
    with pytest.raises(ValueError, match=r"nowhere.jsonl' cannot be read"):
        load(DataConfig(source="jsonl", path=str(tmp_path / "nowhere.jsonl")))
    with pytest.raises(ValueError, match="path=''"):
        load(DataConfig(source="jsonl"))
    (tmp_path / "bad.jsonl").write_text('{"question": "a", "answer": "b"}\n{oops\n')
    with pytest.raises(ValueError, match=r"bad.jsonl:2 is not JSON"):
        load(DataConfig(source="jsonl", path=str(tmp_path / "bad.jsonl")))
    config = jsonl(tmp_path, plain(3))
    config.eval_path = config.path
    with pytest.raises(ValueError, match="is the training file"):
        load(config)


def test_commonsense_qa_and_gsm8k_layouts(tmp_path):
    [example] = load(jsonl(tmp_path, [CSQA], schema="commonsense_qa"))
    assert example == Example(
        id="c0", question="Where ?", choices=("here", "there"), answer="there"
    )
    row = {"question": "1+1?", "answer": "It is <<1+1=2>>2.\n#### 2"}
    [example] = load(jsonl(tmp_path, [row], schema="gsm8k"))
    assert (example.answer, example.rationale) == ("2", "It is <<1+1=2>>2.")


def test_rationales_are_joined_by_id_as_they_are(tmp_path, caplog):
    text = " Wrong. So the answer is (a) here. "
    file = write(tmp_path / "r.jsonl", [{"id": "c0", "text": text}])
    rows = [CSQA, {**CSQA, "id": "c1"}]
    config = jsonl(tmp_path, rows, schema="commonsense_qa", rationales=file)
    config.rationale_end = ""
    with caplog.at_level(logging.INFO):
        first, second = load(config)
    assert (first.rationale, second.rationale) == (text, "")
    assert contradicts(first) and not contradicts(second)
    assert "1 of 2 examples have a rationale; 1 conclude" in caplog.text


PALM = [
    {"id": "c0", "text": "It is near. So the answer is (a) here."},
    {
        "id": "c1",
        "text": "The answer is home, as one lives. So the answer is (b).",
    },
]


@pytest.mark.parametrize(
    ("end", "texts", "first", "second"),
    [
        ("auto", PALM, "It is near.", "The answer is home, as one lives."),
        ("", PALM, PALM[0]["text"], PALM[1]["text"]),
        (", as", PALM, PALM[0]["text"], "The answer is home"),
        # Not all texts conclude: this is not that file's form.
        ("auto", [PALM[0], {"id": "c1", "text": "Far."}], PALM[0]["text"], "Far."),
        ("So the", [PALM[0], {"id": "c1", "text": "Far."}], "It is near.", "Far."),
    ],
)
def test_rationales_end_before_their_conclusion(
    tmp_path, caplog, end, texts, first, second
):
    """As step-by-step cuts PaLM's: what stands before it is the rationale."""
    file = write(tmp_path / "r.jsonl", texts)
    rows = [CSQA, {**CSQA, "id": "c1"}]
    config = jsonl(tmp_path, rows, schema="commonsense_qa", rationales=file)
    config.rationale_end = end
    assert [example.rationale for example in load(config)] == [first, second]
    if (end, texts) == ("auto", PALM):
        assert "2 of 2 rationales are cut before 'So the answer is'; 1 say" in (
            caplog.text
        )


def test_held_out_rows_are_those_that_datasets_draws(tmp_path):
    import datasets

    rows = [{"id": str(n), "question": "Q?", "answer": "A"} for n in range(47)]
    drawn = datasets.Dataset.from_list(rows).train_test_split(test_size=0.1, seed=3)
    config = jsonl(tmp_path, rows, num_eval=5, holdout_seed=3)
    assert [e.id for e in load(config)] == drawn["train"]["id"]
    assert [e.id for e in load(config, "eval")] == drawn["test"]["id"]
    # Held out rows from elsewhere: the training rows are the same.
    config.eval_path = write(tmp_path / "dev.jsonl", rows[:3])
    config.num_train, config.num_eval = 42, 0
    assert [e.id for e in load(config)] == drawn["train"]["id"]
    assert len(load(config, "eval")) == 3
    config.num_train = 47
    with pytest.raises(ValueError, match=r"num_train=47: .* use 1 to 46"):
        load(config)


@pytest.mark.parametrize("seed", [-1, 0, 1])
def test_an_id_belongs_to_a_row_for_ever(tmp_path, seed):
    config = jsonl(tmp_path, plain(9), num_eval=3, holdout_seed=seed)
    for split in ("train", "eval"):
        examples = load(config, split)
        assert [e.id for e in examples] == [
            e.question.replace("q", f"{split}-") for e in examples
        ]
        assert len(examples) == {"train": 6, "eval": 3}[split]
    # What another seed held out has no label.
    labels = [{"id": f"train-{n}", "answer": f"a{n}"} for n in range(6)]
    config.labels = write(tmp_path / "labels.jsonl", labels)
    for example in load(config):
        number = int(example.question[1:])
        assert example.answer == (f"a{number}" if number < 6 else "")
    # Held-out rows from elsewhere have numbers of their own.
    config.labels = ""
    config.eval_path = write(tmp_path / "dev.jsonl", plain(2))
    config.num_train, config.num_eval = 6, 0
    assert all(e.id == e.question.replace("q", "train-") for e in load(config))
    assert [e.id for e in load(config, "eval")] == ["eval-0", "eval-1"]


def test_numbers_of_rows_go_on_over_files(tmp_path):
    for name, num in (("a", 2), ("b", 3)):
        write(tmp_path / f"{name}.jsonl", plain(num))
    config = DataConfig(path=str(tmp_path), num_eval=1)
    assert [e.id for e in load(config)] == [f"train-{n}" for n in range(4)]
    assert [e.id for e in load(config, "eval")] == ["eval-4"]


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"id": "zz", "text": "t"}], "no id of the examples"),
        ([{"id": "c0"}], "use id, text"),
        ([{"id": "c0", "text": "t"}] * 2, "'c0' occurs twice"),
    ],
)
def test_bad_rationale_files(tmp_path, rows, message):
    file = write(tmp_path / "r.jsonl", rows)
    config = jsonl(tmp_path, [CSQA], schema="commonsense_qa", rationales=file)
    with pytest.raises(ValueError, match=message):
        load(config)


def five(id="c0"):
    labels, texts = list("ABCDE"), ["here", "there", "home", "there", "away"]
    choices = {"label": labels, "text": texts}
    return {**CSQA, "id": id, "choices": choices, "answerKey": "C"}


def test_counterfactuals_are_joined_by_id_and_choice(tmp_path, caplog):
    found = [
        {"id": "c1", "choice": "away", "text": "Off."},
        {"id": "c0", "choice": "there", "text": " There it is."},
        {"id": "c0", "choice": "here", "text": "Here."},
        {"id": "of another split", "choice": "what", "text": "No."},
    ]
    config = jsonl(
        tmp_path,
        [five("c0"), five("c1"), five("c2"), five("c3")],
        schema="commonsense_qa",
        counterfactuals=write(tmp_path / "c.jsonl", found),
        num_eval=1,
    )
    with caplog.at_level(logging.INFO):
        examples = load(config)
    assert wrong_choices(examples[0]) == ("here", "there", "there", "away")
    assert [e.counterfactuals for e in examples] == [
        ("Here.", " There it is.", "", ""),
        ("", "", "", "Off."),
        (),
    ]
    assert "2 of 3 examples have counterfactuals, 3 in all" in caplog.text
    assert load(config, "eval")[0].counterfactuals == ()


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"id": "zz", "choice": "here", "text": "t"}], "no id of the examples"),
        ([{"id": "c0", "text": "t"}], "use id, choice, text"),
        (
            [{"id": "c0", "choice": 0, "text": "t"}],
            "c.jsonl:1: choice=0 is a number: give the choice's text",
        ),
        (
            [{"id": "c0", "choice": "moon", "text": "t"}],
            "'moon', which is no choice of",
        ),
        ([{"id": "c0", "choice": "home", "text": "t"}], "'home', which is the answer"),
        (
            [{"id": "c0", "choice": "here", "text": "t"}] * 2,
            "id 'c0', choice 'here' occurs twice",
        ),
    ],
)
def test_bad_counterfactual_files(tmp_path, rows, message):
    file = write(tmp_path / "c.jsonl", rows)
    config = jsonl(tmp_path, [five()], schema="commonsense_qa", counterfactuals=file)
    with pytest.raises(ValueError, match=message):
        load(config)


def test_texts(tmp_path):
    (tmp_path / "a.txt").write_text("One\ntwo.\n\n\nThree.\n \nFour.\n")
    config = DataConfig(source="text", path=str(tmp_path / "a.txt"), num_eval=1)
    assert [e.text for e in load(config)] == ["One\ntwo.", "Three."]
    assert [e.text for e in load(config, "eval")] == ["Four."]
    path = write(tmp_path / "a.jsonl", [{"text": "One"}, {"id": "x", "text": "Two"}])
    found = load(DataConfig(source="text", path=path))
    assert found == [Example(id="train-0", text="One"), Example(id="x", text="Two")]


def test_kinship_needs_a_number():
    config = DataConfig(num_train=7)
    assert len(load(config)) == 7
    with pytest.raises(ValueError, match="num_eval=0: source='kinship'"):
        load(config, "eval")


def test_datasets_saved_to_disk(tmp_path):
    rows = [{**CSQA, "id": f"c{i}"} for i in range(3)]
    splits = {
        "train": datasets.Dataset.from_list(rows[:2]),
        "test": datasets.Dataset.from_list(rows[2:]),
    }
    datasets.DatasetDict(splits).save_to_disk(tmp_path / "both")
    config = DataConfig(
        source="datasets", schema="commonsense_qa", path=str(tmp_path / "both")
    )
    assert [e.id for e in load(config)] == ["c0", "c1"]
    assert [(e.id, e.answer) for e in load(config, "eval")] == [("c2", "there")]
    config.eval_split = "validation"
    with pytest.raises(ValueError, match=r"split 'validation' .* \['train', 'test'\]"):
        load(config, "eval")
    config.eval_split = "train"
    with pytest.raises(ValueError, match="eval_split='train' is the train split"):
        load(config)
    splits["train"].save_to_disk(tmp_path / "one")
    config = DataConfig(source="datasets", path=str(tmp_path / "one"))
    with pytest.raises(ValueError, match="one split without a name"):
        load(config)


def test_a_folder_of_files_through_datasets(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    (tmp_path / "data").mkdir()
    write(tmp_path / "data" / "train.jsonl", plain(3))
    write(tmp_path / "data" / "test.jsonl", plain(2))
    config = DataConfig(source="datasets", path=str(tmp_path / "data"))
    assert (len(load(config)), len(load(config, "eval"))) == (3, 2)


def test_a_prepared_tfds_folder(tmp_path):
    tfds = pytest.importorskip("tensorflow_datasets")
    label = tfds.features.ClassLabel(names=["A", "B"])

    class Tiny(tfds.core.GeneratorBasedBuilder):
        VERSION = tfds.core.Version("1.0.0")

        def _info(self):
            text = tfds.features.Text()
            choices = tfds.features.Sequence({"label": label, "text": text})
            features = {"id": text, "question": text, "answerKey": label}
            features = tfds.features.FeaturesDict({**features, "choices": choices})
            return tfds.core.DatasetInfo(builder=self, features=features)

        def _split_generators(self, manager):
            return {"train": self._generate_examples(3), "test": self._rows("t", 2)}

        def _generate_examples(self, num):
            return self._rows("c", num)

        def _rows(self, prefix, num):
            pairs = [
                dict(zip(("label", "text"), p, strict=True))
                for p in (("A", "x"), ("B", "y"))
            ]
            for i in range(num):
                yield i, {**CSQA, "id": f"{prefix}{i}", "choices": pairs}

    builder = Tiny(data_dir=tmp_path, file_format="array_record")
    builder.download_and_prepare()
    for folder in (tmp_path / "tiny" / "1.0.0", tmp_path / "tiny"):
        config = DataConfig(
            source="tfds", schema="commonsense_qa", path=str(folder), eval_split="test"
        )
        assert sorted(e.id for e in load(config)) == ["c0", "c1", "c2"]
        found = load(config, "eval")
        assert sorted(e.id for e in found) == ["t0", "t1"]
        assert (found[0].choices, found[0].answer) == (("x", "y"), "y")
        assert load(DataConfig(path=str(folder)), "eval") == found
    config.eval_split = "dev"
    with pytest.raises(ValueError, match="split 'dev' is not in"):
        load(config, "eval")
    config.path = str(tmp_path / "nowhere")
    with pytest.raises(ValueError, match=r"nowhere' is no folder"):
        load(config)


@pytest.mark.real_data
def test_real_commonsense_qa():
    root = f"{os.environ['KDJAX_REAL_DATA']}/commonsense_qa"
    config = DataConfig(
        source="jsonl",
        schema="commonsense_qa",
        path=f"{root}/train.jsonl",
        eval_path=f"{root}/dev.jsonl",
        rationales=f"{root}/palm_train.jsonl",
        eval_rationales=f"{root}/palm_dev.jsonl",
    )
    train, held_out = load(config), load(config, "eval")
    assert (len(train), len(held_out)) == (9741, 1221)
    # None concludes with an answer; few name one in other words, as their authors have
    # them too.
    assert not any("So the answer is" in e.rationale for e in train + held_out)
    assert sum(states_answer(e.rationale) for e in train) == 55
    config.rationale_end = ""
    train = load(config)
    assert sum(states_answer(e.rationale) for e in train) == 9741
    assert all(len(e.choices) == 5 and e.answer in e.choices for e in train)
    assert all(e.rationale for e in train + held_out)
    share = sum(map(contradicts, train)) / len(train)
    assert abs(share - (1 - 0.757)) < 0.02
    assert not {e.id for e in train} & {e.id for e in held_out}


@pytest.mark.real_data
def test_real_gsm8k():
    root = f"{os.environ['KDJAX_REAL_DATA']}/gsm8k"
    config = DataConfig(
        source="jsonl",
        schema="gsm8k",
        path=f"{root}/train.jsonl",
        eval_path=f"{root}/test.jsonl",
    )
    train, held_out = load(config), load(config, "eval")
    assert (len(train), len(held_out)) == (7473, 1319)
    assert train[0].answer == "72" and train[0].rationale.endswith("in April and May.")
    assert all("####" not in e.rationale and e.answer for e in train + held_out)

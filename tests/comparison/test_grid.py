"""What a comparison's runs are, and what they share."""

import dataclasses
import pathlib

import pytest

from kdjax import cli
from kdjax import config as config_lib
from kdjax.comparison import Comparison, grid
from tests import helpers

LABELS = {
    "hard": {"method.hard_weight": 1.0, "method.soft_weight": 0.0},
    "soft": {"method.hard_weight": 0.5, "method.soft_weight": 0.5},
}


def comparison(**changes) -> Comparison:
    """Two methods, with and without soft labels, two seeds."""
    found = Comparison(
        name="small",
        base=helpers.small_config(),
        factors={
            "method": {n: {"method.name": n} for n in ("finetune", "multitask")},
            "labels": LABELS,
        },
        seeds=(0, 7),
        within=("labels",),
    )
    return dataclasses.replace(found, **changes)


def tasks(found: Comparison) -> dict[str, grid.Task]:
    return {i.name: i for i in grid.tasks(found, pathlib.Path("/somewhere"))}


def test_every_combination_is_a_run_with_each_seed():
    found = grid.runs(comparison())
    assert list(found) == [
        f"{method}-{labels}-s{seed}"
        for method in ("finetune", "multitask")
        for labels in ("hard", "soft")
        for seed in (0, 7)
    ]
    levels, config = found["multitask-soft-s7"]
    assert levels == {"method": "multitask", "labels": "soft", "seed": "7"}
    assert config.seed == 7 and config.method.name == "multitask"
    assert config.method.soft_weight == 0.5
    assert found["multitask-hard-s7"][1].method.soft_weight == 0.0


def test_runs_share_no_part_of_a_config():
    configs = [config for _, config in grid.runs(comparison()).values()]
    configs[0].data.num_train = -1
    assert all(c.data.num_train == 24 for c in configs[1:])


def test_left_out_combinations_are_not_run():
    left = ({"method": "finetune", "labels": "soft"},)
    found = grid.runs(comparison(exclude=left))
    assert len(found) == 6
    assert not any(name.startswith("finetune-soft") for name in found)


def test_a_combination_changes_more():
    changed = (({"method": "finetune", "labels": "soft"}, {"train.steps": 9}),)
    found = grid.runs(comparison(overrides=changed))
    assert {name for name, (_, c) in found.items() if c.train.steps == 9} == {
        "finetune-soft-s0",
        "finetune-soft-s7",
    }


def test_a_teacher_a_method_and_labels_with_and_without_soft_terms():
    found = tasks(comparison())
    shared = [name.split("-")[0] for name in found if name.startswith("shared/")]
    assert shared == ["shared/teacher"] * 2 + ["shared/labels"] * 4
    teacher, labels = found["runs/multitask-soft-s0"].depends_on
    assert found["runs/multitask-soft-s7"].depends_on == (teacher, labels)
    # Without soft terms training rows are not labelled.
    for seed in (0, 7):
        assert found[f"runs/multitask-hard-s{seed}"].depends_on[0] == teacher
        assert found[f"runs/multitask-hard-s{seed}"].depends_on[1] != labels
    assert not {teacher, labels} & set(found["runs/finetune-soft-s0"].depends_on)
    assert found[labels].depends_on == (teacher,)
    run = found["runs/multitask-soft-s0"].config
    assert run.teacher.path == f"/somewhere/{teacher}/teacher"
    assert run.cache.path == f"/somewhere/{labels}/cache"
    assert found[labels].config.teacher.path == run.teacher.path
    assert found[labels].config.method.soft_weight == 0.5
    assert found[teacher].config.teacher.path == ""


def test_more_runs_need_nothing_anew_that_is_shared():
    before, after = tasks(comparison()), tasks(comparison(seeds=(3, 0, 7)))
    shared = {name for name in before if name.startswith("shared/")}
    assert shared == {name for name in after if name.startswith("shared/")}


def test_runs_that_explain_are_measured_by_one_simulator():
    explaining = ("finetune", "multitask", "rationale_then_label")
    methods = {n: {"method.name": n} for n in explaining}
    factors = {"method": methods, "labels": LABELS}
    found = tasks(comparison(faithfulness=True, factors=factors))
    # Each method has a teacher of its own, whose folder has the tokenizer of all.
    assert sum(n.startswith("shared/teacher") for n in found) == 3
    (reader,) = [n for n in found if n.startswith("shared/simulator")]
    assert reader in found["runs/rationale_then_label-hard-s7"].depends_on
    run = found["runs/multitask-soft-s0"]
    assert reader in run.depends_on
    assert run.commands[1] == (
        "kdjax.evaluate",
        "--faithfulness",
        f"--simulator=/somewhere/{reader}/simulator",
    )
    assert found[reader].commands[0][1].endswith(f"{reader}/simulator")
    assert len(found["runs/finetune-soft-s0"].commands) == 1


def test_names_are_the_same_wherever_it_runs():
    found = comparison(latency=True, faithfulness=True)
    first, second = (grid.tasks(found, pathlib.Path(w)) for w in ("/a", "/b/c"))
    assert [task.name for task in first] == [task.name for task in second]


def test_what_comes_first_is_listed_first():
    seen: set[str] = set()
    for task in grid.tasks(comparison(), pathlib.Path("w")):
        assert set(task.depends_on) <= seen
        seen.add(task.name)


@pytest.mark.parametrize(
    ("change", "teachers", "labels"),
    [
        ({"method.temperature": 1.0}, 1, 1),
        ({"student.decoder.width": 16, "student.decoder.num_heads": 2}, 1, 1),
        ({"optim.learning_rate": 0.1}, 1, 1),
        ({"train.steps": 3}, 1, 1),
        ({"cache.k": 4}, 1, 2),
        ({"data.num_train": 8}, 1, 2),
        ({"teacher.label_noise": 0.5}, 2, 2),
        ({"teacher_seed": 1}, 2, 2),
        ({"teacher.steps": 2}, 2, 2),
    ],
)
def test_a_factor_makes_anew_what_depends_on_it(change, teachers, labels):
    factors = {"factor": {"as_is": {}, "changed": change}}
    found = tasks(comparison(factors=factors, compare=("factor",), within=()))
    names = [name.split("-")[0] for name in found]
    assert names.count("shared/teacher") == teachers
    assert names.count("shared/labels") == labels


def test_a_named_teacher_is_not_trained():
    base = helpers.small_config(teacher=dict(path="some/folder"))
    found = tasks(comparison(base=base))
    assert not any(name.startswith("shared/teacher") for name in found)


def test_annotations_are_made_once_and_read():
    base = helpers.small_config(teacher=dict(path="some/folder"))
    base.data = dataclasses.replace(base.data, source="jsonl", path="rows.jsonl")
    factors = {
        "method": {n: {"method.name": n} for n in ("finetune", "counterfactual")},
        "generation": {
            n: {"annotate.method": n} for n in ("few_shot", "critique_revision")
        },
    }
    found = tasks(comparison(base=base, factors=factors, annotate=True, within=()))
    written = {n for n in found if n.startswith("shared/rationales")}
    # Two methods of generation for both splits; wrong rationales, once for each.
    commands = {n: found[n].config.annotate for n in written}
    assert sorted((a.method, a.split) for a in commands.values()) == [
        ("counterfactual", "train"),
        ("critique_revision", "eval"),
        ("critique_revision", "train"),
        ("few_shot", "eval"),
        ("few_shot", "train"),
    ]
    run = found["runs/counterfactual-few_shot-s0"]
    assert set(run.depends_on) & written
    by_path = {f"{found[n].config.annotate.path}": a for n, a in commands.items()}
    folder, file = run.config.data.rationales.rsplit("/", 1)
    assert by_path[folder].method == "few_shot" and file == "rationales.jsonl"
    folder, file = run.config.data.counterfactuals.rsplit("/", 1)
    assert (
        by_path[folder].method == "counterfactual" and file == "counterfactuals.jsonl"
    )
    assert not set(found["runs/finetune-few_shot-s0"].depends_on) & written
    assert all(found[n].config.data.rationales == "" for n in written)


def test_rationales_of_a_file_are_not_written_again():
    base = helpers.small_config(teacher=dict(path="some/folder"))
    base.data = dataclasses.replace(
        base.data,
        source="jsonl",
        path="rows.jsonl",
        rationales="given.jsonl",
        eval_rationales="held_out.jsonl",
    )
    factors = {"method": {"counterfactual": {"method.name": "counterfactual"}}}
    found = tasks(comparison(base=base, factors=factors, annotate=True, within=()))
    written = [i for name, i in found.items() if name.startswith("shared/rationales")]
    assert [i.config.annotate.method for i in written] == ["counterfactual"]
    run = found["runs/counterfactual-s0"].config
    assert run.data.rationales == "given.jsonl"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"factors": {"method": {}}}, "has no level"),
        ({"factors": {"method": {"a/b": {}}}}, "level='a/b'"),
        ({"factors": {"seed": {"a": {}}}}, "every comparison has"),
        ({"factors": {"method": {"a": {"method.none": 1}}}}, "no field 'method.none'"),
        ({"factors": {"method": {"a": {"no.such": 1}}}}, "no field 'no.such'"),
        (
            {"factors": {"method": {"a": {"data.cues": True}}}},
            "it was renamed, use 'data.prompt_suffix'",
        ),
        (
            {"factors": {"method": {"a": {"method.name": "magic"}}}},
            "run a-s0: method.name='magic'",
        ),
        ({"seeds": ()}, "seeds=()"),
        ({"seeds": (1, 1)}, "each once"),
        ({"exclude": ({"method": "none"},)}, "no level 'none'"),
        ({"overrides": (({"method": "none"}, {}),)}, "overrides={'method': 'none'}"),
        ({"exclude": ({},)}, "leaves out every combination"),
        ({"compare": ("nothing",)}, "compare="),
        ({"metrics": ()}, "metrics=()"),
        ({"base": None}, "base=None"),
        ({"annotate": True}, "annotate=True asks a model"),
    ],
)
def test_what_cannot_be_is_refused(changes, message):
    changes = {"within": ()} | changes
    with pytest.raises(ValueError) as error:
        grid.tasks(comparison(**changes), pathlib.Path("w"))
    assert message in str(error.value)


@pytest.mark.parametrize(("former", "name"), config_lib.RENAMED_COMPARISON.items())
def test_a_former_name_is_an_error_that_says_the_new_one(former, name):
    message = f"{former} was renamed: use {name}"
    with pytest.raises(TypeError) as error:
        Comparison(**{former: ()})
    assert config_lib.explain_renamed(str(error.value)) == message
    with pytest.raises(AttributeError) as error:
        setattr(Comparison(), former, ())
    assert config_lib.explain_renamed(str(error.value)) == message
    for flag, remedy in ((former, name), ("base.data.cues", "base.data.prompt_suffix")):
        argv = ["compare", f"--config.{flag}=1"]
        reason = cli._flag_error(KeyError(flag), argv)
        assert reason == f"--config.{flag} was renamed: use --config.{remedy}"

"""Every config file with every argument is a valid experiment."""

import importlib.util
import pathlib

import pytest

from kdjax.comparison import grid
from kdjax.experiment import methods, validate
from kdjax.survey import config as survey
from kdjax.survey import design, plan

FOLDER = pathlib.Path(__file__).parent.parent / "configs"
COMPARISONS = sorted((FOLDER / "compare").glob("*.py"))
STUDIES = sorted((FOLDER / "study").glob("*.py"))
FILES = sorted(set(FOLDER.rglob("*.py")) - set(COMPARISONS) - set(STUDIES))


def load(file):
    spec = importlib.util.spec_from_file_location(file.stem, file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_configs_are_valid(file):
    module = load(file)
    for argument in ("", "smoke"):
        config = module.get_config(argument)
        if config.data.source != "kinship" and not config.student.path:
            config.student.path = "FOLDER"
        validate.validate(config)
    with pytest.raises(ValueError, match="nonsense"):
        module.get_config("nonsense")


@pytest.mark.parametrize("file", COMPARISONS, ids=lambda file: file.stem)
def test_comparisons_are_valid(file):
    module = load(file)
    for argument in ("", "smoke"):
        comparison = module.get_config(argument)
        tasks = grid.tasks(comparison, pathlib.Path("workdir"))
        assert any(task.is_run for task in tasks)
        assert argument in comparison.name
    with pytest.raises(ValueError, match="nonsense"):
        module.get_config("nonsense")


@pytest.mark.parametrize("file", STUDIES, ids=lambda file: file.stem)
def test_studies_are_valid(file):
    module = load(file)
    for argument in ("", "smoke"):
        study = module.get_config(argument)
        survey.validate(study)
        num_conditions = len(study.students) + len(study.controls)
        design.check(plan.layout(study, num_conditions))
        assert argument in study.name
    with pytest.raises(ValueError, match="nonsense"):
        module.get_config("nonsense")


@pytest.mark.parametrize("argument", ["", "cpu", "smoke,t5", "cpu,smollm2"])
def test_a_comparison_has_every_method_with_each_student(argument):
    comparison = load(FOLDER / "compare" / "csqa.py").get_config(argument)
    runs = grid.runs(comparison)
    students = set(comparison.factors["student"])
    both = {"t5", "smollm2"}
    assert students == (set(argument.split(",")) & both or both)
    pairs = {(levels["student"], levels["method"]) for levels, _ in runs.values()}
    assert pairs == {
        (s, m) for s in students for m in set(methods.METHODS) - {"text", "chat"}
    }
    # A student's rows hold as many examples whatever the other student is.
    for levels, config in runs.values():
        is_t5 = levels["student"] == "t5"
        assert bool(config.train.encoder_row_length) == is_t5
        assert (config.teacher.path == "") == is_t5


@pytest.mark.parametrize("name", ["csqa_t5_base", "csqa_smollm2"])
def test_paper_configs_have_every_method(name):
    module = load(FOLDER / "paper" / f"{name}.py")
    assert set(module.ROWS) == set(methods.METHODS) - {"text", "chat"}
    for method in module.ROWS:
        for further in ("", "cpu", "soft", "smoke,soft"):
            config = module.get_config(",".join(filter(None, (method, further))))
            if config.method.soft_weight:
                with pytest.raises(ValueError, match=r"teacher\.path=''"):
                    validate.validate(config)
                config.teacher.path = "FOLDER"
            validate.validate(config)
            assert config.method.name == method in config.name

"""Every config file with every argument is a valid experiment."""

import importlib.util
import pathlib

import pytest

from kdjax import methods, validation

FOLDER = pathlib.Path(__file__).parent.parent / "configs"
FILES = sorted(FOLDER.rglob("*.py"))


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
        validation.validate(config)
    with pytest.raises(ValueError, match="nonsense"):
        module.get_config("nonsense")


@pytest.mark.parametrize("name", ["csqa_t5_base", "csqa_smollm2"])
def test_paper_configs_have_every_method(name):
    module = load(FOLDER / "paper" / f"{name}.py")
    assert set(module.ROWS) == set(methods.METHODS) - {"text"}
    for method in module.ROWS:
        for further in ("", "cpu", "soft", "smoke,soft"):
            config = module.get_config(",".join(filter(None, (method, further))))
            if config.method.soft_weight:
                with pytest.raises(ValueError, match=r"teacher\.path=''"):
                    validation.validate(config)
                config.teacher.path = "FOLDER"
            validation.validate(config)
            assert config.method.name == method in config.name

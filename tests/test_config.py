"""Configs: files, overrides, and the errors a user meets."""

import dataclasses
import importlib.util
import os
import pathlib
import subprocess
import sys
import typing

import pytest
from absl import flags
from ml_collections import config_flags

from kdjax import cli
from kdjax import config as config_lib
from kdjax.config import Config
from kdjax.experiment import resume, validate
from tests import helpers, make_config_page

CONFIGS = sorted((pathlib.Path(__file__).parent.parent / "configs").glob("*.py"))


def load(path: pathlib.Path, argument: str = "") -> Config:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.get_config(argument)


@pytest.mark.parametrize("path", CONFIGS, ids=lambda p: p.stem)
@pytest.mark.parametrize("argument", ["", "hard", "smoke"])
def test_every_config_is_valid(path, argument):
    validate.validate(load(path, argument))


@pytest.mark.parametrize("path", CONFIGS, ids=lambda p: p.stem)
def test_an_unknown_argument_is_refused(path):
    with pytest.raises(ValueError, match="nonsense"):
        load(path, "nonsense")


def test_json_round_trip():
    config = helpers.small_config(student={"keep_layers": (0, 2)})
    assert config_lib.from_json(config_lib.to_json(config)) == config


def test_json_with_an_unknown_field_is_refused():
    text = config_lib.to_json(helpers.small_config()).replace('"clip_norm"', '"clip"')
    with pytest.raises(ValueError, match=r"no field 'optim.clip': known are"):
        config_lib.from_json(text)


def test_json_with_former_names_is_read():
    config = helpers.small_config(data={"schema": "gsm8k", "prompt_suffix": False})
    text = config_lib.to_json(config)
    for former, name in config_lib.RENAMED.items():
        assert f'"{name.split(".")[1]}"' in text
        text = text.replace(f'"{name.split(".")[1]}"', f'"{former.split(".")[1]}"')
    assert config_lib.from_json(text) == config
    both = config_lib.to_json(config).replace('"schema"', '"layout": "", "schema"')
    with pytest.raises(ValueError, match=r"no field 'data.layout': it was renamed"):
        config_lib.from_json(both)


RETURN = "from kdjax.config import *\ndef get_config(_=''):\n    config = Config()\n"


@pytest.mark.filterwarnings("ignore:the load_module.*:DeprecationWarning")
@pytest.mark.parametrize(
    ("line", "overrides", "message"),
    [
        (
            "",
            ["--config.data.cues=false"],
            "--config.data.cues was renamed: use --conf",
        ),
        ("DataConfig(layout='gsm8k')", [], "data.layout was renamed: use data.schema"),
        ("config.data.trust = 'drop'", [], "data.trust was renamed: use data.wrong_"),
        ("config.data.lay = 'drop'", [], "no attribute 'lay'"),
    ],
)
def test_a_former_name_is_an_error_that_says_the_new_one(
    tmp_path, line, overrides, message
):
    file = tmp_path / "config.py"
    file.write_text(f"{RETURN}    {line}\n    return config\n")
    values = flags.FlagValues()
    config_flags.DEFINE_config_file("config", None, "", flag_values=values)
    argv = ["kdjax", f"--config={file}", *overrides]
    with pytest.raises(cli._FLAG_ERRORS) as error:
        values(argv)
    assert message in cli._flag_error(error.value, argv)


@pytest.mark.parametrize(
    ("part", "field", "value", "message"),
    [
        ("train", "num_microbatches", 3, "does not divide"),
        ("train", "steps", 0, "train.steps=0"),
        ("train", "steps", 1.5, "train.steps=1.5 is not of type"),
        ("train", "dtype", "float64", "train.dtype='float64'"),
        ("method", "temperature", 3.0, r"temperature=3.0 is not declared"),
        ("method", "label_weight", 1.5, "label_weight=1.5"),
        ("method", "tail", "guess", "bucket"),
        ("cache", "temperatures", (2.0,), "lacks 1.0"),
        ("cache", "temperatures", (1.0, 2.0, 2.0), "3 values, 2 of them different"),
        ("cache", "temperatures", tuple(map(float, range(1, 66))), "at most 64"),
        ("cache", "k", 0, "cache.k=0"),
        ("data", "source", "csv", "jsonl"),
        ("data", "num_train", 0, "num_train=0"),
        ("optim", "learning_rate", 0.0, "must be positive"),
        ("optim", "learning_rate", float("nan"), "must be positive"),
        ("optim", "b1", 2.0, "optim.b1=2.0 is a share"),
        ("optim", "b2", 1.0, "optim.b2=1.0 is a share"),
        ("optim", "eps", 0.0, "optim.eps=0.0 is below"),
        ("optim", "eps", 1e-40, "optim.eps=1e-40 is below"),  # 0 in float32
        ("optim", "learning_rate", 1e39, "optim.learning_rate=1e.39 is out of range"),
        ("optim", "warmup_steps", 2**31, "optim.warmup_steps=2147483648 is out of"),
        ("train", "steps", 2**31, "train.steps=2147483648 is out of range: use 1 to"),
        ("train", "batch_size", 10**12, "train.batch_size=1000000000000 is out of"),
        ("train", "num_threads", 10**6, "train.num_threads=1000000 is out of range"),
        ("seed", None, -1, "seed=-1 is below 0: use 0 to below 4294967296"),
        ("seed", None, 10**20, "seed=100000000000000000000 is out of range"),
        ("student", "init", "folder", "--config.student.path"),
        ("student", "init", "teacher_layers", "keep_layers"),
        ("name", None, 3, "name=3 is not of type"),
    ],
)
def test_a_wrong_value_is_named(part, field, value, message):
    config = helpers.small_config()
    if field is None:
        setattr(config, part, value)
    else:
        setattr(getattr(config, part), field, value)
    with pytest.raises(ValueError, match=message):
        validate.validate(config)


def test_differences_name_what_a_resumed_run_may_not_change():
    old = helpers.small_config()
    free = helpers.small_config(train={"log_every": 3}, mesh={"fsdp": 2})
    assert resume.differences(old, free) == []
    changed = helpers.small_config(optim={"learning_rate": 0.5})
    assert resume.differences(old, changed) == ["optim.learning_rate: 0.01 -> 0.5"]


def test_every_field_has_a_comment():
    for (cls, field), comment in config_lib.comments().items():
        hint = typing.get_type_hints(getattr(config_lib, cls))[field]
        described = comment or dataclasses.is_dataclass(hint)
        assert described or not cls.endswith("Config"), f"{cls}.{field}"


def test_the_page_of_fields_is_current():
    file = pathlib.Path(__file__).parent.parent / "docs" / "config.md"
    assert file.read_text() == make_config_page.page(), (
        "rewrite it: python -m tests.make_config_page > docs/config.md"
    )


def test_compiled_steps_are_kept_where_the_user_keeps_caches(tmp_path):
    script = (
        "import jax; from kdjax import cli; cli._keep_compiled(); "
        "print(jax.config.jax_compilation_cache_dir)"
    )
    for name, wanted in (
        ("XDG_CACHE_HOME", tmp_path / "kdjax" / "compiled"),
        ("JAX_COMPILATION_CACHE_DIR", tmp_path),
    ):
        env = {k: v for k, v in os.environ.items() if k != "JAX_COMPILATION_CACHE_DIR"}
        run = [sys.executable, "-c", script]
        done = subprocess.run(
            run, env=env | {name: str(tmp_path)}, capture_output=True, text=True
        )
        assert done.stdout.strip() == str(wanted), done.stderr

"""Provenance of a student's initial parameters, without paths of this machine."""

import os
from collections.abc import Mapping

from flax.traverse_util import flatten_dict
from huggingface_hub import errors, utils

from kdjax.config import Config
from kdjax.experiment.models import Model, student_layers
from kdjax.models import hf, lora


def is_hub_name(path: str) -> bool:
    """Tell whether a path is the name of a model or data set of the hub."""
    try:
        utils.validate_repo_id(path)
    except errors.HFValidationError:
        return False
    return bool(path) and not os.path.exists(path)


def name_of(path: str) -> str:
    """Return a hub name as it is, of a local path the last component."""
    return path if is_hub_name(path) else os.path.basename(os.path.abspath(path))


def initial_params(config: Config, model: Model, teacher: str) -> dict[str, str]:
    """Return the origin of each of the student's initial parameters, by its path.

    Args:
      config: the run.
      model: the student.
      teacher: the teacher's folder or hub name.
    """
    student, layers_of = config.student, {}
    name = name_of(student.path if student.init == "folder" else teacher)
    if student.init == "teacher_layers":
        layers_of = student_layers(config, hf.read_config(teacher))

    def origin(path: str) -> str:
        if lora.is_adapter(path):
            return "adapter, random"
        if student.init == "random":
            return "random"
        if student.init == "folder":
            return f"folder {name}"
        for stack, layers in layers_of.items():
            if path.startswith(f"{stack}/"):
                return f"teacher layers {tuple(layers)} of {name}"
        return f"teacher {name}"

    return {path: origin(path) for path in flatten_dict(model.abstract, sep="/")}


def table(origins: Mapping[str, str]) -> list[dict[str, str]]:
    """Tabulate the parameters of each origin, stacks and others by name."""
    groups: dict[str, dict[str, None]] = {}
    for path, origin in origins.items():
        before, layers, _ = path.partition("layers/")
        group = before + "layers" if layers else path.rsplit("/", 1)[0]
        groups.setdefault(origin, {})[group] = None
    return [
        {"parameters": ", ".join(names), "from": origin}
        for origin, names in groups.items()
    ]

"""The grid of a comparison: its runs, and the tasks that fill their directories.

A run is a config like any other. Teachers, labels and rationales that several runs
depend on are tasks of their own, done once, before them.
"""

import copy
import dataclasses
import hashlib
import itertools
import json
import pathlib
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from kdjax.analysis.runs import LOWER_IS_BETTER, Design
from kdjax.config import Config, DataConfig, replace, to_json
from kdjax.evaluation import simulator
from kdjax.experiment import methods, validate
from kdjax.experiment.teacher import has_teacher, teacher_config

SIMULATOR = "simulator"  # folder of a simulator in the directory of its task
LATENCY = "shared/latency"  # prefix of the names of tasks that time decoding
SEED = "seed"  # the factor that every comparison has
# Metrics beside which the teacher's accuracy stands in the page.
TEACHER_METRICS = ("accuracy", "answer_accuracy", "answer_accuracy_lenient")
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._=+]*")

Changes = Mapping[str, Any]  # field of a config, as "method.name" -> its value


@dataclass(kw_only=True, slots=True)
class Comparison:
    """Runs for every combination of levels, and how they are compared."""

    name: str = "comparison"  # the default workdir is runs/<name>
    base: Config = field(default_factory=Config)  # common to all runs
    factors: dict[str, dict[str, Changes]] = field(default_factory=dict)
    # factor -> level -> what it changes; later factors overwrite earlier ones
    overrides: tuple[tuple[Mapping[str, str], Changes], ...] = ()
    # (levels, further changes of the runs that have all of them)
    seeds: tuple[int, ...] = (0, 1, 2)  # each combination is run with each
    exclude: tuple[Mapping[str, str], ...] = ()  # combinations not run, by levels
    metrics: tuple[str, ...] = ("answer_accuracy",)  # columns of results.csv
    compare: tuple[str, ...] = ("method",)  # factors whose combinations are compared
    within: tuple[str, ...] = ()  # ... at each combination of levels of these
    chance: dict[str, float] = field(default_factory=dict)  # metric -> chance level
    cost: str = "parameters"  # column of the Pareto plot; "" = none
    annotate: bool = False  # rationales that data names no file for are written first
    faithfulness: bool = False  # explanations are measured too
    latency: bool = False  # time and memory of decoding are measured, per student
    study: str = ""  # directory of an analysed study (kdjax.study) to show; "" = none

    def design(self) -> Design:
        """Return the design that the report is made of."""
        falling = [m for m in self.metrics if m.partition("/")[0] in LOWER_IS_BETTER]
        return Design(
            metrics=self.metrics,
            lower_is_better=tuple(falling),
            factors=tuple(self.factors),
            compare=self.compare,
            within=self.within,
            chance=self.chance,
            references=dict.fromkeys(TEACHER_METRICS, "teacher_accuracy"),
            cost=self.cost,
        )


@dataclass(frozen=True, kw_only=True)
class Task:
    """A directory, and the commands that fill it."""

    name: str  # of its directory, below the comparison's
    config: Config
    commands: tuple[tuple[str, ...], ...]  # module and flags; --workdir is added
    depends_on: tuple[str, ...] = ()  # names of tasks that must have succeeded
    exclusive: bool = False  # nothing runs beside it: it is timed
    levels: Mapping[str, str] = field(default_factory=dict)  # of a run, and its seed

    @property
    def is_run(self) -> bool:
        """Return whether it is a run: a row of the results."""
        return bool(self.levels)


def runs(comparison: Comparison) -> dict[str, tuple[dict[str, str], Config]]:
    """Return name -> (levels and seed, config) of all runs, before anything is shared.

    Raises:
      ValueError: a factor or level that cannot be, or a config that is not valid.
    """
    _check(comparison)
    grid: dict[str, tuple[dict[str, str], Config]] = {}
    for combination in itertools.product(*comparison.factors.values()):
        levels = dict(zip(comparison.factors, combination, strict=True))
        if any(part.items() <= levels.items() for part in comparison.exclude):
            continue
        for seed in comparison.seeds:
            name = "-".join([*levels.values(), f"s{seed}"])
            config = copy.deepcopy(comparison.base)
            config.name, config.seed = f"{comparison.name}-{name}", seed
            for factor, level in levels.items():
                origin = f"factors[{factor!r}][{level!r}]"
                changes = comparison.factors[factor][level]
                config = _change(config, changes, origin)
            for part, changes in comparison.overrides:
                if part.items() <= levels.items():
                    config = _change(config, changes, f"overrides={dict(part)}")
            try:
                validate.validate(config)
            except ValueError as error:
                raise ValueError(f"run {name}: {error}") from None
            grid[name] = levels | {SEED: str(seed)}, config
    if not grid:
        raise ValueError("exclude leaves out every combination: nothing to run")
    return grid


def tasks(comparison: Comparison, workdir: pathlib.Path) -> list[Task]:
    """Return all tasks of a comparison, each after those it depends on.

    Args:
      comparison: the grid.
      workdir: of the comparison; configs of runs name shared directories in it.

    Raises:
      ValueError: as `runs`.
    """
    grid = runs(comparison)
    shared: dict[str, Task] = {}
    depends_on: dict[str, list[str]] = {name: [] for name in grid}
    for name, (_, config) in grid.items():
        if comparison.annotate:
            depends_on[name] += _annotations(config, workdir, shared)
        if has_teacher(config) and not config.teacher.path:
            depends_on[name].append(_teacher(config, workdir, shared))
    for name, of_run in depends_on.items():
        _, config = grid[name]
        if has_teacher(config):
            of_run.append(_labels(config, workdir, shared, tuple(of_run)))
        if comparison.latency:
            of_run.append(_latency(config, workdir, shared, tuple(of_run)))
    run_tasks = []
    for name, (levels, config) in grid.items():
        commands: list[tuple[str, ...]] = [("kdjax.train",)]
        if comparison.faithfulness and methods.explains(config.method):
            task = _simulator(config, workdir, shared, tuple(depends_on[name]))
            depends_on[name].append(task)
            folder = workdir / task / SIMULATOR
            flags = ("--faithfulness", f"--simulator={folder}")
            commands.append(("kdjax.evaluate", *flags))
        run_tasks.append(
            Task(
                name=f"runs/{name}",
                config=config,
                commands=tuple(commands),
                depends_on=tuple(dict.fromkeys(depends_on[name])),
                levels=levels,
            )
        )
    return [*shared.values(), *run_tasks]


def _check(comparison: Comparison) -> None:
    """Raise ValueError if the grid itself is not valid."""
    if not isinstance(comparison.base, Config):
        raise ValueError(f"base={comparison.base!r} is not a kdjax.config.Config")
    if not comparison.seeds or len(set(comparison.seeds)) < len(comparison.seeds):
        raise ValueError(f"seeds={comparison.seeds}: give at least one, each once")
    if SEED in comparison.factors:
        raise ValueError(f"factors has {SEED!r}, which every comparison has: use seeds")
    for factor, levels in comparison.factors.items():
        if not levels:
            raise ValueError(f"factors[{factor!r}] has no level: give one")
        for level in levels:
            # Levels name directories; "-" stands between them.
            if not _NAME.fullmatch(level):
                raise ValueError(
                    f"factors[{factor!r}] has level={level!r}: use letters, digits and "
                    "any of . _ = +, a letter or digit first"
                )
    named = [("exclude", levels) for levels in comparison.exclude]
    named += [("overrides", levels) for levels, _ in comparison.overrides]
    for name, combination in named:
        for factor, level in combination.items():
            if level not in comparison.factors.get(factor, {}):
                raise ValueError(
                    f"{name}={dict(combination)}: there is no level {level!r} of "
                    f"{factor!r}"
                )
    comparison.design()


def _change(config: Config, changes: Changes, origin: str) -> Config:
    """Return a config with fields changed, by their paths.

    Raises:
      ValueError: there is no such field.
    """
    for path, value in changes.items():
        try:
            config = replace(config, path, copy.deepcopy(value))
        except ValueError as error:
            raise ValueError(f"{origin}: {error}") from None
    return config


def _digest(*parts: Any) -> str:
    """Return a short name for all that decides the content of a shared directory."""
    text = json.dumps(parts, sort_keys=True, default=dataclasses.asdict).encode()
    return hashlib.blake2b(text, digest_size=5).hexdigest()


def _own(config: Config, name: str) -> Config:
    """Return a copy of a config for a shared directory."""
    return dataclasses.replace(copy.deepcopy(config), name=name)


def _teacher(config: Config, workdir: pathlib.Path, shared: dict[str, Task]) -> str:
    """Add the task that trains a run's teacher, and point the run at its folder."""
    trained = teacher_config(config)
    parts = (trained.data, trained.student, trained.method, trained.optim)
    name = f"shared/teacher-{_digest(*parts, trained.train, trained.seed)}"
    if name not in shared:
        shared[name] = Task(
            name=name,
            config=_own(config, name),
            commands=(("kdjax.train", "--until=teacher"),),
        )
    config.teacher.path = str(workdir / name / "teacher")
    return name


def _labels(
    config: Config,
    workdir: pathlib.Path,
    shared: dict[str, Task],
    depends_on: tuple[str, ...],
) -> str:
    """Add the task that labels a run's examples, and point the run at its cache.

    Held-out ones, and training ones too where the run has soft terms.
    """
    soft = methods.has_soft_terms(config.method) and not config.teacher.online
    data = _relative(dataclasses.asdict(config.data), workdir)
    teacher = (_relative(config.teacher.path, workdir), config.train.dtype)
    parts = (data, config.cache, config.method.name, soft, *teacher)
    name = f"shared/labels-{_digest(*parts)}"
    config.cache.path = str(workdir / name / "cache")
    if name not in shared:
        shared[name] = Task(
            name=name,
            config=_own(config, name),
            commands=(("kdjax.label",),),
            depends_on=depends_on,
        )
    return name


def _latency(
    config: Config,
    workdir: pathlib.Path,
    shared: dict[str, Task],
    depends_on: tuple[str, ...],
) -> str:
    """Add the task that times the decoding of a run's student."""
    parts = (config.student, config.data.max_prompt, config.evaluation.max_new_tokens)
    of_teacher = config.student.init == "teacher_layers"
    teacher = _relative(config.teacher.path, workdir) if of_teacher else ""
    name = f"{LATENCY}-{_digest(*parts, teacher, config.train.dtype)}"
    if name not in shared:
        shared[name] = Task(
            name=name,
            config=_own(config, name),
            commands=(("kdjax.benchmark", "--decode"),),
            depends_on=depends_on,
            exclusive=True,
        )
    return name


def _simulator(
    config: Config,
    workdir: pathlib.Path,
    shared: dict[str, Task],
    depends_on: tuple[str, ...],
) -> str:
    """Add the task that trains the simulator of a run's rationales.

    Teachers that are trained here have the built-in tokenizer, each in its own folder:
    one simulator serves the students of all of them.
    """
    fields = json.loads(to_json(simulator.simulator_config(config)))
    if pathlib.Path(fields["data"]["tokenizer"]).is_relative_to(workdir):
        fields["data"]["tokenizer"] = dataclasses.asdict(config.data.prefixes)
    name = f"shared/simulator-{_digest(_relative(fields, workdir))}"
    if name not in shared:
        folder = workdir / name / SIMULATOR
        shared[name] = Task(
            name=name,
            config=_own(config, name),
            commands=(("kdjax.evaluate", f"--simulator={folder}"),),
            depends_on=depends_on,
        )
    return name


def _relative(value: Any, workdir: pathlib.Path) -> Any:
    """Return a value without the comparison's directory, which may be moved."""
    if isinstance(value, str):
        return value.removeprefix(str(workdir))
    if isinstance(value, dict):
        return {name: _relative(inner, workdir) for name, inner in value.items()}
    return value


def _annotations(
    config: Config, workdir: pathlib.Path, shared: dict[str, Task]
) -> list[str]:
    """Add the tasks that write rationales a run lacks, and point it at their files."""
    data, views = config.data, methods.views(config.method)
    missing = []
    if set(views) - {"label", "counterfactual"}:
        missing += [
            ("rationales", "train", config.annotate.method),
            ("eval_rationales", "eval", config.annotate.method),
        ]
    if "counterfactual" in views:
        contrastive = "contrastive_" * (config.annotate.method == "contrastive")
        missing.append(("counterfactuals", "train", f"{contrastive}counterfactual"))
    # Nothing else of the data decides what is written.
    plain = DataConfig(
        source=data.source,
        schema=data.schema,
        columns=data.columns,
        answer_kind=data.answer_kind,
        answer_list=data.answer_list,
        on_missing=data.on_missing,
        path=data.path,
        eval_path=data.eval_path,
        train_split=data.train_split,
        eval_split=data.eval_split,
        num_train=data.num_train,
        num_eval=data.num_eval,
        chat_template=data.chat_template,
        template_kwargs=data.template_kwargs,
        template_date=data.template_date,
        think=data.think,
        parse_special=data.parse_special,
        kinship=data.kinship,
    )
    names = []
    for target, split, method in missing:
        if getattr(data, target):
            continue
        annotate = dataclasses.replace(config.annotate, method=method, split=split)
        model = annotate.model or config.teacher.path
        if not model:
            raise ValueError(
                "annotate=True asks a model: name it by annotate.model or teacher.path "
                "(a teacher that is trained here cannot be asked)"
            )
        name = f"shared/rationales-{_digest(plain, annotate, model)}"
        folder = workdir / name / "rationales"
        if name not in shared:
            own = _own(config, name)
            own.data = copy.deepcopy(plain)
            own.annotate = dataclasses.replace(annotate, path=str(folder))
            shared[name] = Task(name=name, config=own, commands=(("kdjax.annotate",),))
        file = "rationales" if target != "counterfactuals" else target
        setattr(data, target, str(folder / f"{file}.jsonl"))
        names.append(name)
    return names

"""People rate the explanations of students of the built-in task.

    python -m kdjax.compare --config=configs/compare/kinship.py --jobs=2
    python -m kdjax.study plan --config=configs/study/kinship.py --workdir=runs/study

Four conditions: students trained by two methods with soft labels, a placebo and no
explanation at all. 24 people rate 12 explanations each, and 3 people each explanation
(docs/study.md). The argument "smoke" takes the runs of
configs/compare/kinship.py:smoke, whatever they answer.
"""

from kdjax.survey.config import StudyConfig


def get_config(argument: str = "") -> StudyConfig:
    """Return the study."""
    if argument not in ("", "smoke"):
        raise ValueError(f"argument {argument!r} is unknown: use smoke")
    config = StudyConfig(
        name="study_kinship",
        comparison="runs/compare_kinship",
        students=("multitask-soft", "rationale_then_label-soft"),
        controls=("placebo", "no_rationale"),
        participants=24,
        items_per_participant=12,
        ratings_per_item=3,
        contact="you@example.org",  # yours
    )
    if argument:
        config.name += "_smoke"
        config.comparison += "_smoke"
        config.answers = "any"
        config.items_per_participant = 4
        config.participants, config.ratings_per_item = 8, 2
        config.practice_items = 0
    return config

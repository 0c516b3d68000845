"""A study as a dataclass, a comment on every field, and the checks of it."""

from dataclasses import dataclass

from kdjax import config as config_lib
from kdjax.config import choice, non_negative, number, positive, random_seed, share

ANSWERS = ("right", "wrong", "both", "any")
CONTROLS = ("no_rationale", "placebo")
CARRY_OVERS = ("exact", "within_one")
CONSTRUCTS = (
    "plausibility",
    "understandability",
    "completeness",
    "satisfaction",
    "contrastiveness",
)


@dataclass(kw_only=True, slots=True)
class StudyConfig:
    """A study of students' explanations with people."""

    name: str = "study"  # stands in pages for researchers, never in those of raters
    seed: int = random_seed(0)  # of the choice of questions, orders and squares

    # What is rated.
    comparison: str = ""  # directory of a finished comparison; its runs are students
    run_seed: int = number(-1, at_least=-1)  # seed of its runs; -1 = the lowest
    # jsonl of {id, question, choices, answer, rationale, student}, and gold or right
    files: tuple[str, ...] = ()
    students: tuple[str, ...] = ()  # those that are rated; () = all that explain
    reference: str = ""  # jsonl of {id, text}: a person's or teacher's rationales
    controls: tuple[str, ...] = config_lib.limited((), config_lib.Choice(CONTROLS))
    # questions that all students answer right or wrong, both in halves, or any
    answers: str = choice("both", ANSWERS)
    max_words: int = positive(400)  # questions with a longer explanation are left out

    # Who rates what.
    participants: int = positive(24)  # people
    items_per_participant: int = positive(12)  # rated explanations per person
    ratings_per_item: int = number(2, at_least=2)  # people per (question, condition)
    # counts of ordered pairs of conditions that follow each other: equal, or not
    # further than one apart
    carry_over: str = choice("exact", CARRY_OVERS)
    practice_items: int = non_negative(1)  # rated first and not analysed
    instructed_checks: int = non_negative(1)  # statements that say what to tick
    known_checks: int = non_negative(1)  # questions that everybody can answer
    # failed checks from which on a person is excluded, and the place is free again
    exclude_failed: int = positive(2)
    # shorter median seconds per rated page exclude too; 0 = none
    exclude_seconds: float = non_negative(3.0)

    # What is asked.
    constructs: tuple[str, ...] = CONSTRUCTS  # statements, by their names in the texts
    points: int = number(5, at_least=5, at_most=7)  # of the scale, 5 or 7
    simulation: bool = False  # people predict the student's answer first
    preferences: int = non_negative(0)  # pairs of explanations compared per person
    demographics: bool = True  # optional questions at the end
    language: str = "en"  # file of texts that comes with kdjax
    texts: str = ""  # TOML file whose texts replace those of the language

    # What people are told.
    institution: str = "the research group"  # responsible for the study
    contact: str = ""  # address for questions and complaints; needed to serve
    minutes: int = positive(15)  # expected duration
    payment: str = "unpaid"  # as people read it
    retention_days: int = positive(365)  # answers are kept so long after the study
    completion_url: str = ""  # where the panel wants people to return to
    completion_code: str = ""  # the panel's; "" = one per person
    idle_hours: float = config_lib.number(24.0, above=0)  # then a place is free again

    # Assumed for --power.
    mean_rating: float = number(3.8, at_least=1, at_most=7)  # of the scale's points
    sd_participant: float = non_negative(0.5)  # between people, points
    sd_question: float = non_negative(0.2)  # between questions, points
    sd_residual: float = config_lib.number(0.9, above=0)  # of the rest, points
    pilot: str = ""  # csv of ratings to estimate these from instead
    power: float = share(0.8)  # probability with which the difference is to be seen


def validate(config: StudyConfig) -> None:
    """Check the fields of a study that need no data.

    Raises:
      ValueError: name=value, the limit and the remedy.
    """
    config_lib.check(config)
    if config.points not in (5, 7):
        raise ValueError(f"points={config.points}: use 5 or 7")
    if bool(config.comparison) == bool(config.files):
        raise ValueError(
            f"comparison={config.comparison!r} and files={config.files}: name the "
            "directory of a finished comparison, or files of explanations"
        )
    for name in ("constructs", "students", "controls"):
        values = getattr(config, name)
        if len(set(values)) < len(values):
            raise ValueError(f"{name}={values}: name each once")
    if not config.constructs:
        raise ValueError("constructs=(): name at least one statement to be rated")
    if not config.contact:
        raise ValueError(
            "contact='' is empty: people must know whom to write to; give an address"
        )
    if config.completion_url and not config.completion_url.startswith("https://"):
        raise ValueError(
            f"completion_url={config.completion_url!r}: begin it with https://"
        )

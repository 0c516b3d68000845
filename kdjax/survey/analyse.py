"""Statistics of a study's ratings, and the page of them."""

import pathlib


def run(
    workdir: pathlib.Path, *, ratings: pathlib.Path | None = None, columns: str = ""
) -> None:
    """Analyse the ratings of a study.

    Args:
      workdir: of the study; results are written there.
      ratings: a csv of ratings; None is that of the study.
      columns: its columns under kdjax's names: "participant=rater,item=id".
    """
    raise NotImplementedError

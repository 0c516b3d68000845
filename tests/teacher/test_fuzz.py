"""A bounded number of mutants of every format; `tests.teacher.fuzz` has more."""

import pytest

from tests.teacher import fuzz


@pytest.fixture(scope="module")
def formats(tmp_path_factory):
    return fuzz.make_formats(tmp_path_factory.mktemp("samples"))


def fuzz_all(formats, folder, *, count, seconds, seed):
    for number, (name, form) in enumerate(formats.items()):
        place = folder / str(number)
        place.mkdir()
        numbers = fuzz.run(form, place, count=count, seconds=seconds, seed=seed)
        assert numbers["refused"] + numbers["same"], name


def test_mutants_are_refused_or_read_as_they_were(formats, tmp_path):
    fuzz_all(formats, tmp_path, count=50, seconds=5, seed=0)


@pytest.mark.slow
def test_many_more_mutants(formats, tmp_path):
    fuzz_all(formats, tmp_path, count=10_000, seconds=3, seed=1)

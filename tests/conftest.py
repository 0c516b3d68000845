"""Every test runs on 8 virtual CPU devices, with strict dtypes, ranks and warnings."""

import gc
import json
import math
import os
import pathlib
import tempfile

from tests import xla_flags

os.environ.setdefault("XLA_FLAGS", xla_flags.EIGHT_DEVICES)
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
# Many tests compile the same small steps, some of them in processes of their own.
os.environ.setdefault(
    "JAX_COMPILATION_CACHE_DIR",
    os.path.join(tempfile.gettempdir(), f"kdjax-tests-{os.getuid()}"),
)
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.2")

import jax
import pytest

from tests import shape_checks

jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")
# Types and shapes of the losses' arguments and results are checked as they are traced.
shape_checks.install("kdjax.losses")


def _folder(variable: str) -> pathlib.Path:
    """The folder an environment variable names; failing, not skipping, without it."""
    value = os.environ.get(variable)
    if not value or not pathlib.Path(value).is_dir():
        pytest.fail(
            f"{variable}={value!r} is not a folder: tests marked real_data need it"
        )
    return pathlib.Path(value)


@pytest.fixture
def real_data() -> pathlib.Path:
    """Folder with commonsense_qa/, gsm8k/ and t5_tokenizer/."""
    return _folder("KDJAX_REAL_DATA")


@pytest.fixture(scope="session")
def smollm2() -> pathlib.Path:
    """SmolLM2-135M-Instruct as a Hugging Face folder."""
    return _folder("KDJAX_SMOLLM2")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files that take longest are run first, so that workers end together.

    Those without seconds are new, or run on real data or as slow ones, and come before.
    """
    file = pathlib.Path(__file__).with_name("budget.json")
    seconds = json.loads(file.read_text()) if file.exists() else {}
    items.sort(key=lambda item: -(seconds.get(item.nodeid.split("::")[0]) or math.inf))


def pytest_collection_finish() -> None:
    """What is imported stays: collecting garbage need not look through it each time."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session")
def shared_folder(tmp_path_factory) -> pathlib.Path:
    """Where finished runs are that all workers of a session share."""
    base = tmp_path_factory.getbasetemp()
    return (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "shared"


def _shared_run(name: str):
    @pytest.fixture(scope="session", name=f"{name}_run")
    def run(shared_folder):
        from tests import helpers

        return helpers.finish_run(name, shared_folder)

    return run


# Config and workdir of a finished run, to be read alone: `helpers.copy_run`.
decoder_run, lora_run, t5_run = map(_shared_run, ("decoder", "lora", "t5"))


@pytest.fixture(scope="module", autouse=True)
def _programs_are_dropped_before_memory_maps_run_out():
    """Each takes memory, and memory maps, of which Linux grants 65,530."""
    yield
    maps = pathlib.Path("/proc/self/maps")
    if not maps.exists() or maps.read_bytes().count(b"\n") > 5_000:
        jax.clear_caches()

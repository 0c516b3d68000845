"""Commands that `tests.kills` disturbs: what they start from, and what they must leave.

Each has a folder of its own that holds all it reads and writes. Every function below is
called in a process of its own, since JAX may compute in it.
"""

import dataclasses
import hashlib
import json
import pathlib
import re
import shutil
from collections.abc import Callable

# What differs from one undisturbed run to the next: times, speeds, and who wrote it.
_VARYING = re.compile(
    r"seconds|per_second|throughput|mfu|^time|_time$|wait|host|pid|timestamp"
)
_BY_NAME_ALONE = re.compile(
    r"events\.out\.|curves\.(png|svg)$|(^|/)log\.txt$|finished\.json$"
)
_TEXT = (".json", ".jsonl")
LIBRARY = (
    "kdjax.cli",
    "kdjax.pipeline.distill",
    "kdjax.pipeline.student",
    "kdjax.evaluation.summary",
    "kdjax.annotation.annotate",
    "kdjax.comparison.results",
    "kdjax.survey.plan",
    "kdjax.aot.report",
    "kdjax.teacher.merge_export",
    "kdjax.teacher.importers.convert",
    "matplotlib.figure",
    "matplotlib.font_manager",
    "matplotlib.backends.backend_agg",
)


@dataclasses.dataclass(frozen=True)
class Case:
    """A command that is disturbed.

    Args:
      argv: of `python -m kdjax...`; {case} is the folder of the case.
      make: writes what the command starts from into that folder.
      after: what is there is that command's undisturbed result, in place of `make`.
      share: of all kills.
      inputs: what it reads, in the folder of the case.
      imports: modules that it needs, which are imported once for all.
      goes_on: False if it refuses to write what is there, so it may be whole already.
    """

    argv: str
    make: Callable[[pathlib.Path], object] = lambda folder: None
    after: str = ""
    share: int = 10
    inputs: tuple[str, ...] = ()
    imports: tuple[str, ...] = LIBRARY
    goes_on: bool = True


def _teach(folder: pathlib.Path) -> None:
    """Write the config of a run, which trains its own teacher."""
    from tests import helpers

    config = helpers.small_config(
        data={"num_train": 16, "num_eval": 4},
        evaluation={"batch_size": 8, "num_generations": 0},
    )
    helpers.write_config_file(config, folder / "config_file.py")


def _teacher(folder: pathlib.Path) -> pathlib.Path:
    """Write a random teacher that may be asked, and rows of questions."""
    import jax

    from kdjax.data import kinship
    from kdjax.data import tokenizer as tokenizers
    from kdjax.models import decoder, hf
    from tests import helpers

    tokenizer = tokenizers.make_word_tokenizer()
    shape = dataclasses.replace(
        helpers.DECODER, vocab_size=len(tokenizer), max_length=2048, init_std=0.3
    )
    hf.save(
        folder / "teacher",
        shape,
        decoder.init_params(shape, jax.random.key(5)),
        tokenizer,
    )
    found = kinship.generate(
        helpers.small_config().data.kinship, num_examples=40, seed=0, split="train"
    )
    names = ("id", "question", "choices", "answer", "rationale")
    rows = [{name: getattr(example, name) for name in names} for example in found]
    (folder / "rows.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    return folder


def _rows(folder: pathlib.Path, num: int, **changes) -> None:
    """Write that teacher and rows, and a config that reads them."""
    from kdjax.config import AnnotateConfig
    from tests import helpers

    _teacher(folder)
    data = {
        "source": "jsonl",
        "path": str(folder / "rows.jsonl"),
        "num_train": num,
        "num_eval": 4,
        "shard_size": 6,
        "num_workers": 1,
    }
    config = helpers.small_config(
        data=data,
        teacher={"path": str(folder / "teacher")},
        annotate=AnnotateConfig(
            max_new_tokens=5, batch_size=8, num_demonstrations=1, temperature=1.0
        ),
        **changes,
    )
    helpers.write_config_file(config, folder / "config_file.py")


def _label(folder: pathlib.Path) -> None:
    _rows(folder, num=12, cache={"k": 8, "temperatures": (1.0, 2.0), "shard_size": 4})


def _compare(folder: pathlib.Path) -> None:
    (folder / "config_file.py").write_text(
        "from tests.comparison import tiny\n"
        "def get_config(argument=''):\n"
        "    config = tiny.get_config('sound')\n"
        "    config.seeds = (0,)\n"
        "    return config\n"
    )


def _merge(folder: pathlib.Path) -> None:
    """Leave two caches of the run that is there."""
    for split in ("train", "eval"):
        (folder / "run" / "cache" / split).rename(folder / split)
    shutil.rmtree(folder / "run")


def _import(folder: pathlib.Path) -> None:
    """Write what another tool would, of all probabilities of every token."""
    from kdjax.experiment.data import load_data
    from kdjax.experiment.run import open_run
    from kdjax.teacher import build
    from kdjax.teacher.importers import convert
    from tests import helpers
    from tests.test_cache import whole_sequences

    _teacher(folder)
    config = helpers.small_config(
        method={"temperature": 1.0, "tail": "renormalize_both"},
        teacher={"path": str(folder / "teacher")},
    )
    config.cache = dataclasses.replace(config.cache, k=113, temperatures=(1.0,))
    helpers.write_config_file(config, folder / "config_file.py")
    scratch = folder / "scratch"
    cache = build.ensure(open_run(config, scratch))["train"]
    assert load_data(config).train
    convert.write_vllm(folder / "dump", whole_sequences(config, cache))
    shutil.rmtree(scratch)


def _study(folder: pathlib.Path) -> None:
    from tests.survey import explanations

    explanations.write(folder)
    (folder / "config_file.py").write_text(
        "import pathlib\n"
        "from tests.survey import explanations\n"
        "def get_config(argument=''):\n"
        "    file = pathlib.Path(__file__).with_name('explanations.jsonl')\n"
        "    return explanations.config(file)\n"
    )


_CONFIG = "--config={case}/config_file.py"
_RUN = "--workdir={case}/run"
CASES = {
    "train": Case(
        f"train {_CONFIG} {_RUN}", _teach, share=30, inputs=("config_file.py",)
    ),
    "label": Case(
        f"label {_CONFIG} {_RUN}",
        _label,
        share=30,
        inputs=("config_file.py", "teacher", "rows.jsonl"),
    ),
    "annotate": Case(
        f"annotate {_CONFIG} {_RUN}",
        lambda folder: _rows(folder, num=13),
        share=25,
        inputs=("config_file.py", "teacher", "rows.jsonl"),
    ),
    "compare": Case(
        f"compare {_CONFIG} {_RUN}", _compare, share=8, inputs=("config_file.py",)
    ),
    "evaluate": Case(
        f"evaluate {_RUN} --json={{case}}/out/result.json",
        after="train",
        share=15,
        inputs=("run/config.json", "run/checkpoints", "run/teacher", "run/cache"),
    ),
    "export": Case(
        f"export {_RUN} --out={{case}}/out/student",
        after="train",
        share=24,
        inputs=("run/config.json", "run/checkpoints", "run/teacher"),
        goes_on=False,
    ),
    "cache merge": Case(
        "cache merge {case}/train {case}/eval --out={case}/out/merged",
        _merge,
        after="train",
        share=20,
        inputs=("train", "eval/manifest.json"),
        goes_on=False,
    ),
    "cache import": Case(
        f"cache import {{case}}/dump --format=vllm {_CONFIG} --out={{case}}/out/cache",
        _import,
        share=18,
        inputs=("config_file.py", "dump", "teacher"),
        goes_on=False,
    ),
    "prepare": Case(
        f"prepare {_CONFIG} {_RUN}",
        lambda folder: _rows(folder, num=30),
        share=20,
        inputs=("config_file.py", "rows.jsonl", "teacher"),
    ),
    "study plan": Case(
        f"study plan {_CONFIG} --workdir={{case}}/study",
        _study,
        share=8,
        inputs=("config_file.py", "explanations.jsonl"),
        imports=("kdjax.cli", "kdjax.survey.plan"),
    ),
    "plan": Case(
        f"plan {_CONFIG} --topology=cpu:1 --nosearch "
        "--config.student.decoder.vocab_size=200 --json={case}/out/plan.json",
        _teach,
        share=2,
        inputs=("config_file.py",),
    ),
}


def content(folder: pathlib.Path) -> dict[str, str]:
    """Return what is in a folder: by path a digest, free of times and of who wrote it.

    A checkpoint is the arrays in it: its files have random names.
    """
    found = {}
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if match := re.fullmatch(r"(.*checkpoints/\d+)(/.*)?", name):
            if not match[2]:
                found[name] = _checkpoint(path)
        elif _BY_NAME_ALONE.search(name):
            found[re.sub(r"events\.out\..*", "events", name)] = ""
        elif path.is_file():
            found[name] = hashlib.sha256(_steady(path)).hexdigest()
        elif path.name.startswith("."):
            found[name] = "folder"
    return found


def _steady(file: pathlib.Path) -> bytes:
    if file.suffix not in _TEXT:
        return file.read_bytes()
    text = file.read_text()
    lines = text.splitlines() if file.suffix == ".jsonl" else [text]
    try:
        values = [_without_times(json.loads(line)) for line in lines]
    except ValueError:
        return text.encode()
    return json.dumps(values).encode()


def _without_times(value):
    if isinstance(value, dict):
        return {
            key: _without_times(inner)
            for key, inner in value.items()
            if not _VARYING.search(key)
        }
    if isinstance(value, list):
        return [_without_times(inner) for inner in value]
    return value


def _checkpoint(folder: pathlib.Path) -> str:
    """Return a digest of a checkpoint's arrays, and whether it has its checksums."""
    import tensorstore

    digest = hashlib.sha256()
    base = {"driver": "file", "path": f"{folder}/state/"}
    store = tensorstore.KvStore.open({"driver": "ocdbt", "base": base}).result()
    for key in sorted(store.list().result()):
        digest.update(key + store.read(key).result().value)
    sealed = (folder / "checksums.json").is_file()
    return f"{digest.hexdigest()} {'sealed' if sealed else 'no checksums'}"

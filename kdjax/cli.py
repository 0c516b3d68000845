"""Flags, one-line errors and process settings of the commands.

Only the commands import this module. It imports neither JAX nor the library, and the
commands import theirs where they run: help and flag errors come at once, and a process
is replaced by one with huge pages before anything is loaded.
"""

import os
import pathlib
import re
import sys
import traceback
from collections.abc import Callable
from typing import Any

from absl import app, flags, logging
from ml_collections import config_flags

from kdjax import config as config_lib
from kdjax.config import Config
from kdjax.runtime import files, malloc

_CONFIG = config_flags.DEFINE_config_file(
    "config",
    None,
    "Experiment: FILE.py, or the name of a config that comes with kdjax, and what "
    "follows a colon is its argument: quickstart:smoke. --config.part.field=value "
    "overrides a field.",
)
_WORKDIR = flags.DEFINE_string(
    "workdir", None, "Where the run writes; runs/<name of the config> by default."
)
_COMPILED_BYTES = 2 * 2**30  # beyond it what was not used for longest goes
_FLAG_ERRORS = (flags.Error, KeyError, TypeError, ValueError, OSError, AttributeError)
_JSON = flags.DEFINE_string("json", None, "Also write the result to this file.")
STEP = flags.DEFINE_integer(
    "step", None, "Checkpoint of the student; the newest by default.", lower_bound=1
)


def run(
    main: Callable[[Any, pathlib.Path], None],
    *,
    validate: Callable[[Any], None] | None = None,
    keep_compiled: bool = True,
) -> None:
    """Parse the flags, validate the config and call `main(config, workdir)`.

    What the user can mend (ValueError, a missing file) becomes one line on stderr and
    exit code 1; a bug keeps its traceback.

    Args:
      main: the command.
      validate: checks what get_config returned; by default it must be a valid Config.
      keep_compiled: what is compiled is kept on disk and read by later runs; False
        where the compilation itself is measured.
    """

    def start(arguments: list[str]) -> None:
        if arguments:
            raise ValueError(f"arguments {arguments} are not flags: use --name=value")
        config = given_config(validate)

        import jax

        from kdjax.parallel import distributed

        distributed.start()
        malloc.trim_after_compile()
        if keep_compiled:
            _keep_compiled()
        else:
            jax.config.update("jax_enable_compilation_cache", False)
        main(config, workdir(config))

    # --helpshort shows the flags of the main module: these are everybody's.
    for name in ("config", "workdir"):
        flags.FLAGS.register_key_flag_for_module(sys.argv[0], flags.FLAGS[name])
    run_actions(start)


def run_actions(main: Callable[[list[str]], None]) -> None:
    """Parse the flags, call `main` with the other arguments; errors as in `run`."""
    malloc.reexec_with_huge_pages()
    # Transformers reads tokenizers; that PyTorch is missing is no news.
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")

    def parse(argv: list[str]) -> list[str]:
        argv = [_config_argument(argument) for argument in argv]
        try:
            return flags.FLAGS(argv)
        except _FLAG_ERRORS as error:
            raise SystemExit(_line(_flag_error(error, argv))) from None

    def guarded(argv: list[str]) -> None:
        if not flags.FLAGS["verbosity"].present:
            logging.set_verbosity(logging.WARNING)
        logging.info("GLIBC_TUNABLES=%r", os.environ.get("GLIBC_TUNABLES", ""))
        try:
            main(argv[1:])
        except (ValueError, FileNotFoundError) as error:
            if os.environ.get("KDJAX_TRACEBACK"):
                raise
            _abandon(_line(str(error)))
            raise SystemExit(_line(str(error))) from None
        except Exception:
            _abandon(traceback.format_exc())
            raise

    app.run(guarded, flags_parser=parse)


def _abandon(message: str) -> None:
    """End this process at once if it is one of several."""
    if "jax" in sys.modules:
        from kdjax.parallel import distributed

        distributed.abandon(message)


def config_files() -> dict[str, pathlib.Path]:
    """Return the configs that come with kdjax, by name: quickstart, compare/kinship."""
    package = pathlib.Path(__file__).parent
    folder = package / "configs"  # of a wheel
    if not folder.is_dir():
        folder = package.parent / "configs"  # of a checkout
    return {
        file.relative_to(folder).with_suffix("").as_posix(): file
        for file in sorted(folder.rglob("*.py"))
    }


def _config_argument(argument: str) -> str:
    """Return a command-line argument; --config=NAME becomes --config=FILE."""
    match = re.fullmatch(r"(--?config=)([^:]+)(:.*)?", argument)
    if not match or match[2].endswith(".py") or pathlib.Path(match[2]).is_file():
        return argument
    files = config_files()
    if match[2] not in files:
        raise SystemExit(
            _line(
                f"{argument}: no such config: give a FILE.py, or one of {list(files)}"
            )
        )
    return f"{match[1]}{files[match[2]]}{match[3] or ''}"


def _keep_compiled() -> None:
    """Turn on JAX's persistent compilation cache, unless the user has.

    JAX_COMPILATION_CACHE_DIR names another folder; JAX_ENABLE_COMPILATION_CACHE=false
    turns it off.
    """
    if "JAX_COMPILATION_CACHE_DIR" in os.environ:
        return

    import jax

    base = os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache"
    folder = pathlib.Path(base) / "kdjax" / "compiled"
    jax.config.update("jax_compilation_cache_dir", str(folder))
    jax.config.update("jax_compilation_cache_max_size", _COMPILED_BYTES)


def given_config(validate: Callable[[Any], None] | None = None) -> Any:
    """Return the validated config of --config, else of the run in --workdir.

    Args:
      validate: as in `run`.

    Raises:
      ValueError: there is none, it is of another type, or a field is invalid.
    """
    config = _CONFIG.value
    if config is None:
        file = pathlib.Path(_WORKDIR.value or "") / "config.json"
        if validate is not None:
            raise ValueError("--config is missing: give --config=compare/NAME")
        if not _WORKDIR.value or not file.is_file():
            raise ValueError(
                "--config is missing: give --config=NAME, --config=FILE.py, or the "
                "--workdir of a run"
            )
        config = config_lib.from_json(file.read_text())
    (validate or _validate)(config)
    return config


def _validate(config: Any) -> None:
    from kdjax.experiment import validate

    check_type(config, Config)
    validate.validate(config)


def check_type(config: Any, expected: type) -> None:
    """Check what get_config returned.

    Raises:
      ValueError: there is no such file, or it returns another type.
    """
    if isinstance(config, expected):
        return
    file = config_flags.get_config_filename(flags.FLAGS["config"])
    if not pathlib.Path(file.split(":")[0]).is_file():
        raise ValueError(f"--config={file}: no such file; give the path of a config")
    raise ValueError(
        f"get_config of --config must return a {expected.__module__}."
        f"{expected.__name__}, not {type(config).__name__}"
    )


def workdir(config: Any) -> pathlib.Path:
    """Return --workdir, or runs/<name>."""
    return pathlib.Path(_WORKDIR.value or pathlib.Path("runs") / config.name)


def write_json(result: Any) -> None:
    """Write a result to the file of --json, if that is given."""
    if _JSON.value:
        files.write_json(_JSON.value, result)


def _flag_error(error: Exception, argv: list[str]) -> str:
    """Describe what is wrong with the --config flags."""
    file = next((a.split("=", 1)[1] for a in argv if a.startswith("--config=")), None)
    if file is not None and not pathlib.Path(file.split(":")[0]).is_file():
        return f"--config={file}: no such file; give the path of a config"
    renamed = config_lib.RENAMED | config_lib.RENAMED_COMPARISON
    for argument in argv:
        path = argument.lstrip("-").partition("=")[0].removeprefix("config.")
        part = "base." if path.startswith("base.") else ""  # of a comparison
        if name := renamed.get(path.removeprefix(part)):
            return f"--config.{path} was renamed: use --config.{part}{name}"
    if isinstance(error, KeyError):
        return (
            f"{error.args[0]}: see kdjax/config.py for the fields that --config.* takes"
        )
    # An exception inside a config file comes as the text of its traceback.
    if reason := config_lib.explain_renamed(str(error)):
        return reason
    causes = re.findall(r"^\s*\w+(?:Error|Exception): (.+)$", str(error), re.MULTILINE)
    return causes[-1] if causes else str(error).splitlines()[0]


def _line(text: str) -> str:
    program = pathlib.Path(sys.argv[0]).stem
    return f"{program}: error: {text}"

"""What all verbs share: flags, errors of one line, and the working directory."""

import os
import pathlib
import re
import sys
import traceback
from collections.abc import Callable
from typing import Any

import jax
from absl import app, flags, logging
from ml_collections import config_flags

from kdjax import config as config_lib
from kdjax.config import Config
from kdjax.experiment import resume
from kdjax.experiment import validate as validate_lib
from kdjax.parallel import distributed
from kdjax.runtime import files, malloc

_CONFIG = config_flags.DEFINE_config_file(
    "config",
    None,
    "Experiment: FILE.py or FILE.py:argument; --config.part.field=value overrides it.",
)
_WORKDIR = flags.DEFINE_string(
    "workdir", None, "Where the run writes; runs/<name of the config> by default."
)
_COMPILED_BYTES = 2 * 2**30  # beyond it what was not used for longest goes
_FLAG_ERRORS = (flags.Error, KeyError, TypeError, ValueError, OSError, AttributeError)
CONFIG = "config.json"  # of a run, in its directory
_JSON = flags.DEFINE_string("json", None, "Also write the result to this file.")
STEP = flags.DEFINE_integer(
    "step", None, "Checkpoint of the student; the newest by default.", lower_bound=1
)


def run(
    main: Callable[[Any, pathlib.Path], None],
    *,
    kind: type = Config,
    validate: Callable[[Any], Any] = validate_lib.validate,
    keep_compiled: bool = True,
) -> None:
    """Parses the flags, validates the config and calls `main(config, workdir)`.

    What the user can mend (ValueError, a missing file) becomes one line on stderr and
    exit code 1; a bug keeps its traceback.

    Args:
      main: the verb.
      kind: what get_config returns.
      validate: checks it.
      keep_compiled: what is compiled is kept on disk and read by later runs; False
        where the compilation itself is measured.
    """

    def start(arguments: list[str]) -> None:
        if arguments:
            raise ValueError(f"arguments {arguments} are not flags: use --name=value")
        config = given_config(kind, validate)
        distributed.start()
        malloc.give_back_after_compiling()
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
    """Parses the flags, calls `main` with the other arguments; errors as in `run`."""

    def parse(argv: list[str]) -> list[str]:
        try:
            return flags.FLAGS(argv)
        except _FLAG_ERRORS as error:
            raise SystemExit(_line(_flag_error(error, argv))) from None

    def guarded(argv: list[str]) -> None:
        logging.set_verbosity(logging.WARNING)
        try:
            main(argv[1:])
        except (ValueError, FileNotFoundError) as error:
            if os.environ.get("KDJAX_TRACEBACK"):
                raise
            distributed.abandon(_line(str(error)))
            raise SystemExit(_line(str(error))) from None
        except Exception:
            distributed.abandon(traceback.format_exc())
            raise

    app.run(guarded, flags_parser=parse)


def _keep_compiled() -> None:
    """JAX's persistent compilation cache, unless JAX_COMPILATION_CACHE_DIR names one.

    JAX_ENABLE_COMPILATION_CACHE=false turns it off.
    """
    if "JAX_COMPILATION_CACHE_DIR" in os.environ:
        return
    base = os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache"
    folder = pathlib.Path(base) / "kdjax" / "compiled"
    jax.config.update("jax_compilation_cache_dir", str(folder))
    jax.config.update("jax_compilation_cache_max_size", _COMPILED_BYTES)


def given_config(
    kind: type = Config, validate: Callable[[Any], Any] = validate_lib.validate
) -> Any:
    """The config of --config, else the one that --workdir ran with, validated.

    Raises:
      ValueError: there is none, it is of another kind, or it says what cannot be.
    """
    config = _given(kind)
    validate(config)
    return config


def _given(kind: type) -> Any:
    config = _CONFIG.value
    if config is None and kind is Config:
        file = pathlib.Path(_WORKDIR.value or "") / CONFIG
        if not _WORKDIR.value or not file.is_file():
            raise ValueError(
                "--config is missing: give --config=configs/NAME.py, or the --workdir "
                "of a run"
            )
        return config_lib.from_json(file.read_text())
    if config is None:
        raise ValueError("--config is missing: give --config=configs/compare/NAME.py")
    if isinstance(config, kind):
        return config
    file = config_flags.get_config_filename(flags.FLAGS["config"])
    if not pathlib.Path(file).is_file():
        raise ValueError(f"--config={file}: no such file; give the path of a config")
    raise ValueError(
        f"get_config of --config must return a {kind.__module__}.{kind.__name__}, not "
        f"{type(config).__name__}"
    )


def workdir(config: Any) -> pathlib.Path:
    """--workdir, or runs/<name>."""
    return pathlib.Path(_WORKDIR.value or pathlib.Path("runs") / config.name)


def claim(folder: pathlib.Path, config: Config) -> None:
    """Makes a working directory this config's own, or checks that it is.

    Raises:
      ValueError: another config has run there; the fields that differ are named.
    """
    check_owner(folder, config)
    distributed.barrier("claim")
    if distributed.is_main():
        write_config(folder, config)


def check_owner(folder: pathlib.Path, config: Config) -> None:
    """Checks that no other config has run in a directory.

    Raises:
      ValueError: one has; the fields that differ are named.
    """
    file = folder / CONFIG
    if file.exists():
        changed = resume.differences(config_lib.from_json(file.read_text()), config)
        if changed:
            raise ValueError(
                f"workdir={str(folder)!r} holds a run of another config "
                f"({'; '.join(changed)}): use another --workdir, or remove it"
            )


def write_config(folder: pathlib.Path, config: Config) -> None:
    """Writes the config that a directory is of."""
    files.write_atomically(folder / CONFIG, config_lib.to_json(config))


def write_json(found: Any) -> None:
    """Writes a result where --json says, if it does."""
    if _JSON.value:
        files.write_json(_JSON.value, found)


def _flag_error(error: Exception, argv: list[str]) -> str:
    """What is wrong with the --config flags, in words."""
    file = next((a.split("=", 1)[1] for a in argv if a.startswith("--config=")), None)
    if file is not None and not pathlib.Path(file.split(":")[0]).is_file():
        return f"--config={file}: no such file; give the path of a config"
    for argument in argv:
        path = argument.lstrip("-").partition("=")[0].removeprefix("config.")
        if name := config_lib.RENAMED.get(path):
            return f"--config.{path} was renamed: use --config.{name}"
    if isinstance(error, KeyError):
        return (
            f"{error.args[0]}: see kdjax/config.py for the fields that --config.* takes"
        )
    # An exception inside a config file comes as the text of its traceback.
    if renamed := config_lib.explain_renamed(str(error)):
        return renamed
    causes = re.findall(r"^\s*\w+(?:Error|Exception): (.+)$", str(error), re.MULTILINE)
    return causes[-1] if causes else str(error).splitlines()[0]


def _line(text: str) -> str:
    program = pathlib.Path(sys.argv[0]).stem
    return f"{program}: error: {text}"

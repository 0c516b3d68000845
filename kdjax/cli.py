"""Flags, one-line errors and process settings of the commands.

Only the commands import this module. It imports neither JAX nor the library, and the
commands import theirs where they run: help and flag errors come at once, and a process
is replaced by one with huge pages before anything is loaded.
"""

import contextlib
import dataclasses
import difflib
import errno
import json
import logging as python_logging
import operator
import os
import pathlib
import re
import socket
import sys
import threading
import traceback
from collections.abc import Callable, Iterator
from typing import Any

from absl import app, flags, logging
from ml_collections import config_flags

from kdjax import config as config_lib
from kdjax.config import Config
from kdjax.runtime import files, interrupts, malloc

_CONFIG = config_flags.DEFINE_config_file(
    "config",
    None,
    "Experiment: FILE.py, or the name of a config that comes with kdjax, and what "
    "follows a colon is its argument: quickstart:smoke. --config.part.field=value "
    "overrides a field.",
)
_WORKDIR = flags.DEFINE_string(
    "workdir",
    None,
    "Where the run writes; runs/<name of the config> by default. train, label, "
    "evaluate and export take gs://BUCKET/FOLDER and s3://BUCKET/FOLDER, too.",
)
_COMPILED_BYTES = 2 * 2**30  # beyond it what was not used for longest goes
_FLAG_ERRORS = (flags.Error, KeyError, TypeError, ValueError, OSError, AttributeError)
_JSON = flags.DEFINE_string("json", None, "Also write the result to this file.")
_HELPCONFIG = flags.DEFINE_bool(
    "helpconfig", False, "List the fields that --config.* takes, and exit."
)
STEP = flags.DEFINE_integer(
    "step", None, "Checkpoint of the student; the newest by default.", lower_bound=1
)


def run(
    main: Callable[[Any, pathlib.Path], None],
    *,
    validate: Callable[[Any], None] | None = None,
    keep_compiled: bool = True,
    resumes: bool = False,
    store: str = "",
) -> None:
    """Parse the flags, validate the config and call `main(config, workdir)`.

    What the user can mend (ValueError, an error of the operating system) becomes one
    line on stderr and exit code 1; Ctrl-C and SIGTERM one with exit code 130 and 143; a
    bug keeps its traceback.

    Args:
      main: the command.
      validate: checks what get_config returned; by default it must be a valid Config.
      keep_compiled: what is compiled is kept on disk and read by later runs; False
        where the compilation itself is measured.
      resumes: started again, the command goes on from what is complete.
      store: what is done with a --workdir in a store: "write", "read", "" = refused.
    """

    def start(arguments: list[str]) -> None:
        if arguments:
            raise ValueError(f"arguments {arguments} are not flags: use --name=value")
        config = given_config(validate, join=True)

        import jax

        from kdjax.parallel import distributed

        distributed.initialize(_waiting(config))
        malloc.trim_after_compile()
        if keep_compiled:
            _keep_compiled()
        else:
            jax.config.update("jax_enable_compilation_cache", False)
        with _open_workdir(config, store) as folder:
            main(config, folder)

    # --helpshort shows the flags of the main module: these are everybody's.
    for name in ("config", "workdir", "helpconfig"):
        flags.FLAGS.register_key_flag_for_module(sys.argv[0], flags.FLAGS[name])
    run_actions(start, resumes=resumes)


@contextlib.contextmanager
def _open_workdir(config: Any, store: str) -> Iterator[pathlib.Path]:
    """Yield the working directory, on a local disk."""
    if not (store and is_in_store()):
        yield workdir(config)
        return

    from kdjax.storage import mirror

    url = str(_WORKDIR.value)
    if store == "read":
        yield mirror.fetch(url)
        return
    with mirror.mirrored(url, config.storage) as folder:
        yield folder


def is_in_store() -> bool:
    """Return True if --workdir is an address in a store."""
    return "://" in (_WORKDIR.value or "")


def _waiting(config: Any) -> config_lib.DistributedConfig:
    """Return how long processes wait for each other; of a comparison, its base's."""
    is_known = dataclasses.is_dataclass(config)
    parts = (config, getattr(config, "base", None)) if is_known else ()
    for part in parts:
        waiting = getattr(part, "distributed", None)
        if isinstance(waiting, config_lib.DistributedConfig):
            return waiting
    return config_lib.DistributedConfig()


def _join(config: Any) -> None:
    """Meet the other processes of this run, and compare what all are about to do.

    Raises:
      ValueError: they differ, or one did not come; nothing was written by any.
    """
    from kdjax.parallel import distributed

    config_lib.check(_waiting(config), "distributed.")
    if not distributed.meet(_waiting(config)) or not dataclasses.is_dataclass(config):
        return  # what is no config is refused by its validation

    from kdjax.experiment import fingerprint

    settings = {
        flag.name: flag.value
        for module, flags_of in flags.FLAGS.flags_by_module_dict().items()
        for flag in flags_of
        if module.startswith("kdjax.") or module == sys.argv[0]
        if flag.name.partition(".")[0] not in ("config", "workdir")
    }
    named = _WORKDIR.value or workdir(config)
    settings["workdir"] = os.path.abspath(named)
    distributed.agree("start", fingerprint.of_command(_program(), settings, config))


def run_actions(main: Callable[[list[str]], None], *, resumes: bool = False) -> None:
    """Parse the flags, call `main` with the other arguments; errors as in `run`."""
    hint = "the same command goes on from what is complete" if resumes else ""
    malloc.reexec_with_huge_pages()
    # Transformers reads tokenizers; that PyTorch is missing is no news.
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")

    def parse(argv: list[str]) -> list[str]:
        own = argv[: argv.index("--")] if "--" in argv else argv
        if any(argument.lstrip("-") == "helpconfig" for argument in own):
            _print_config()
            raise SystemExit(0)
        # What follows "--" is another command's.
        argv = [*map(_config_argument, own), *argv[len(own) :]]
        try:
            return flags.FLAGS(argv)
        except _FLAG_ERRORS as error:
            raise SystemExit(_line(_flag_error(error, argv))) from None

    def guarded(argv: list[str]) -> None:
        if not flags.FLAGS["verbosity"].present:
            logging.set_verbosity(logging.WARNING)
        logging.info("GLIBC_TUNABLES=%r", os.environ.get("GLIBC_TUNABLES", ""))
        interrupts.install(_program())
        _quieten()
        try:
            main(argv[1:])
        except KeyboardInterrupt as error:
            _end(interrupts.SIGINT_CODE, "interrupted", str(error) or hint)
        except interrupts.Terminated as error:
            _end(interrupts.SIGTERM_CODE, "ended by SIGTERM", error.message or hint)
        except BrokenPipeError:  # what reads the output has ended: head, a pager
            _drop_output()
            raise SystemExit(interrupts.SIGPIPE_CODE) from None
        except Exception as error:
            text = _explain(error)
            if not text or os.environ.get("KDJAX_TRACEBACK"):
                _abandon(traceback.format_exc())
                raise
            code = _code(error)
            _abandon(_line(text), code)
            print(_line(text), file=sys.stderr)
            raise SystemExit(code) from None

    app.run(guarded, flags_parser=parse)


def _drop_output() -> None:
    """Write what is left of the output nowhere, so that the end of Python is quiet."""
    with open(os.devnull, "w") as nowhere:
        os.dup2(nowhere.fileno(), sys.stdout.fileno())


def _end(code: int, event: str, message: str) -> None:
    """End this process after a signal, with a line on stderr, its last one."""
    interrupts.silence()
    text = ": ".join(part for part in (_program(), event, message) if part)
    _abandon(text, code)
    threading.excepthook = lambda arguments: None  # threads whose work is cut off
    print(text, file=sys.stderr, flush=True)
    raise SystemExit(code)


def _code(error: BaseException) -> int:
    """Return the exit code of an error."""
    if "kdjax.parallel.distributed" in sys.modules:
        from kdjax.parallel import agreement, link

        for cause in _causes(error):
            if isinstance(cause, agreement.RanksDiffer):
                return interrupts.RANKS_DIFFER_CODE
            if isinstance(cause, link.PeerLost):
                return interrupts.PEER_LOST_CODE
    return 1


def _explain(error: BaseException) -> str:
    """Return what the user can do about an error, in one line; "" for a bug."""
    chain = list(_causes(error))
    if text := next((t for e in chain if (t := _system_error(e))), ""):
        return text
    if isinstance(error, FileNotFoundError) and error.filename:
        return f"{error.filename}: no such file or folder"
    if isinstance(error, ValueError | FileNotFoundError):
        lost = next((t for e in chain if (t := _lost_process(e))), "")
        return lost or str(error)
    return next((t for e in chain if (t := _lost_process(e))), "")


def _causes(error: BaseException) -> Iterator[BaseException]:
    """Yield an error, and those that it was raised from."""
    seen: set[int] = set()
    cause: BaseException | None = error
    while cause is not None and id(cause) not in seen:
        seen.add(id(cause))
        yield cause
        hidden = cause.__suppress_context__
        cause = cause.__cause__ or (None if hidden else cause.__context__)


_LONGEST_PATH = 200  # characters, that are shown
# What to do about an error of the operating system.
_REMEDIES = {
    errno.ENOSPC: "free some space, or write elsewhere; what is complete is kept, and "
    "the same command goes on",
    errno.EDQUOT: "free some of your quota, or write elsewhere; what is complete is "
    "kept, and the same command goes on",
    errno.EFBIG: "raise the limit of file sizes (ulimit -f), or write elsewhere",
    errno.EACCES: "give this user the right to it (ls -l), or name another path",
    errno.EPERM: "give this user the right to it (ls -l), or name another path",
    errno.EROFS: "name a path on a file system that can be written to",
    errno.EIO: "the disk or its connection fails: see dmesg, copy what is there, and "
    "name a path on another one",
    errno.EMFILE: "raise the limit of open files (ulimit -n)",
    errno.ENFILE: "close other programs, or raise the system's limit (fs.file-max)",
    errno.ENAMETOOLONG: "use a shorter name",
    errno.ELOOP: "the symbolic links lead in a circle: remove them",
    errno.ENOTDIR: "a part of the path is a file: name a folder",
    errno.EEXIST: "there is a file, or a link to nothing, of that name: remove it, or "
    "name another path",
    errno.EISDIR: "this is a folder: name a file",
    errno.ESTALE: "the network file system lost it: mount it again",
    errno.ENODEV: "name a path on another file system",
    errno.ETIMEDOUT: "the file system or server does not answer: try again",
}


def _system_error(error: BaseException) -> str:
    """Return path, reason and remedy of an error of the operating system, or "".

    Libraries wrap them in errors of their own, whose text has the system's reason.
    """
    if isinstance(error, OSError) and error.errno in _REMEDIES:
        number, path = error.errno, error.filename or ""
        if error.filename2 is not None:
            path = f"{path} -> {error.filename2}"
    else:
        text = str(error)
        number = 0
        if match := re.search(r"os_error_code='(\d+)'|\[OS error (\d+)", text):
            number = int(match[1] or match[2])  # tensorstore's, in ValueErrors too
        elif isinstance(error, RuntimeError | OSError):
            number = next((n for n in _REMEDIES if os.strerror(n) in text), 0)
        if number not in _REMEDIES:
            return ""
        paths = re.findall(r"[\"'` (](/[^\"'`;,]*[^\"'`;,\s:)\]])", text)
        path = max(paths, key=len, default="")
    path = str(path) if len(str(path)) < _LONGEST_PATH else f"{str(path)[:60]}..."
    where = path or f"a file of {_written()}"
    return f"{where}: {os.strerror(number)}: {_REMEDIES[number]}"


def _written() -> str:
    """Return the flag that names the folder which the command writes."""
    for name in ("out", "workdir"):
        if name in flags.FLAGS and flags.FLAGS[name].value:
            return f"--{name}={flags.FLAGS[name].value}"
    return "--workdir=runs/..."


def _lost_process(error: BaseException) -> str:
    """Return which process of several lost the others, or ""."""
    text = str(error)
    signs = ("Gloo", "Connection closed by peer", "coordination service", "heartbeat")
    if "jax" not in sys.modules or not any(sign in text for sign in signs):
        return ""

    import jax

    from kdjax.parallel import distributed

    if not jax.distributed.is_initialized():
        return ""
    distributed.wait_for_cause()  # which is said better, and ends this process
    reason = " ".join(text.split())[:200]
    return (
        f"process {jax.process_index()} of {jax.process_count()} (host "
        f"{socket.gethostname()}, pid {os.getpid()}) lost another process of this run "
        f"({reason}): look for the one that failed first, end them all, and start the "
        "same command again"
    )


# Texts of libraries that say nothing a user can change.
_NOISE = (
    "PyTorch was not found",
    "None of PyTorch",
    "deprecat",
    "Save Finalize thread",
    "Checkpointer failed: one or more items",
    "Failed to get metadata for checkpointable",
    "Task exception was never retrieved",
)


def _quieten() -> None:
    """Keep noise of libraries from the terminal.

    What fails in the background is raised by the one who waits for it.
    """
    if os.environ.get("KDJAX_TRACEBACK"):
        return

    def keep(record: python_logging.LogRecord) -> bool:
        if record.exc_info and "orbax" in record.pathname:
            return False
        text = record.getMessage()
        return not any(noise in text for noise in _NOISE)

    for name in ("absl", "asyncio", "transformers", "orbax"):
        python_logging.getLogger(name).addFilter(keep)

    def note(arguments: threading.ExceptHookArgs) -> None:
        if arguments.exc_value is None or not _explain(arguments.exc_value):
            threading.__excepthook__(arguments)

    threading.excepthook = note


def _abandon(message: str, code: int = 1) -> None:
    """End this process at once if it is one of several."""
    if "jax" in sys.modules:
        from kdjax.parallel import distributed

        distributed.abandon(message, code)


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


def given_config(
    validate: Callable[[Any], None] | None = None, *, join: bool = False
) -> Any:
    """Return the validated config of --config, else of the run in --workdir.

    Args:
      validate: as in `run`.
      join: meet the other processes of this run before the config is validated, so
        that they hear of an error.

    Raises:
      ValueError: there is none, it is of another type, or a field is invalid.
    """
    config = _CONFIG.value
    if config is None:
        if validate is not None:
            raise ValueError("--config is missing: give --config=compare/NAME")
        if not _WORKDIR.value:
            raise ValueError(
                "--config is missing: give --config=NAME, --config=FILE.py, or the "
                "--workdir of a run"
            )
        config = _config_of_run(_WORKDIR.value)
    if join:
        _join(config)
    (validate or _validate)(config)
    return config


def _config_of_run(name: str) -> Any:
    """Read the config of a run's directory, or of its address in a store.

    Raises:
      ValueError: it is none; what is there instead is said.
    """
    if "://" in str(name):
        from kdjax.storage import mirror

        content = mirror.read_file(name, "config.json")
        if content is None:
            raise ValueError(
                f"--workdir={name!r} has no config.json, so it is no run, and --config "
                "is missing: give the address of a run, or --config=NAME for a new one"
            )
        return config_lib.from_json(content.decode())
    folder = pathlib.Path(name)
    file = folder / "config.json"
    if not file.is_file():
        problem = "has no config.json, so it is no run"
        if not folder.exists():
            problem = "does not exist"
        elif not folder.is_dir():
            problem = "is a file, no directory of a run"
        raise ValueError(
            f"--workdir={str(folder)!r} {problem}, and --config is missing: give the "
            "--workdir of a run, or --config=NAME for a new one"
        )
    text = json.dumps(files.read_json(file, remedy="give --config=NAME"))
    return config_lib.from_json(text)


def _validate(config: Any) -> None:
    from kdjax.experiment import validate

    check_type(config, Config)
    validate.validate(config)


def check_type(config: Any, expected: type) -> None:
    """Check what get_config returned.

    Raises:
      OSError: the file, or one that it reads, cannot be read.
      ValueError: there is no such file, or it returns another type.
    """
    if isinstance(config, expected):
        return
    # Of a file that cannot be read the flag's value is an object with the error.
    error = getattr(config, "_error", None)
    if isinstance(error, OSError) and error.errno:
        raise error
    file = config_flags.get_config_filename(flags.FLAGS["config"])
    if not pathlib.Path(file.split(":")[0]).is_file():
        raise ValueError(f"--config={file}: no such file; give the path of a config")
    raise ValueError(
        f"get_config of --config must return a {expected.__module__}."
        f"{expected.__name__}, not {type(config).__name__}"
    )


def workdir(config: Any) -> pathlib.Path:
    """Return --workdir, or runs/<name>.

    Raises:
      ValueError: it is an address in a store.
    """
    if is_in_store():
        raise ValueError(
            f"--workdir is an address in a store: {_program()} takes a folder; train, "
            "label, evaluate and export take addresses"
        )
    return pathlib.Path(_WORKDIR.value or pathlib.Path("runs") / config.name)


def write_json(result: Any) -> None:
    """Write a result to the file of --json, if that is given."""
    if _JSON.value:
        files.write_json(_JSON.value, result)
        # It may be outside of all folders that are locked, and cleared then.
        file = pathlib.Path(_JSON.value)
        files.clear_leftovers(file.parent, file.name)


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
    if text := _suggestion(argv):
        return text
    if isinstance(error, KeyError):
        return f"{error.args[0]}: --helpconfig lists the fields that --config.* takes"
    # An exception inside a config file comes as the text of its traceback.
    if reason := config_lib.explain_renamed(str(error)):
        return reason
    causes = re.findall(r"^\s*\w+(?:Error|Exception): (.+)$", str(error), re.MULTILINE)
    return causes[-1] if causes else str(error).splitlines()[0]


def _suggestion(argv: list[str]) -> str:
    """Return what an unknown field of --config.* may have been meant for, or ""."""
    known = [leaf.path for leaf in config_lib.leaves(_config_class(argv)())]
    for argument in argv:
        match = re.match(r"--?(?:no)?config\.((?:base\.)?)([\w.]+)", argument)
        if match is None or match[2] in known:
            continue
        if not match[1] and _is_comparison(argv):
            continue
        part, _, name = match[2].rpartition(".")
        names = {p: p.rpartition(".")[2] for p in known}
        siblings = [p for p in known if p.rpartition(".")[0] == part]
        close = difflib.get_close_matches(name, [names[p] for p in siblings], 2, 0.6)
        near = [p for p in siblings if names[p] in close]
        if not near:  # in another part
            close = difflib.get_close_matches(name, list(names.values()), 3, 0.85)
            near = [p for p in known if names[p] in close][:3]
        inside = [p for p in known if p.startswith(f"{match[2]}.")]
        problem = "a config has no such field"
        if inside:
            problem, near = "is a part of a config, no field", inside[:3]
        hint = f"did you mean {' or '.join(near)}? " if near else ""
        if siblings and not near:
            hint = f"{part or 'it'} has {[names[p] for p in siblings]}; "
        path = match[1] + match[2]
        return f"--config.{path}: {problem}; {hint}--helpconfig lists them all"
    return ""


def _is_comparison(argv: list[str]) -> bool:
    return pathlib.Path(argv[0]).stem == "compare"


def _config_class(argv: list[str]) -> type:
    """Return the class of the configs that a command takes, or of their base."""
    if pathlib.Path(argv[0]).stem != "study":
        return Config
    from kdjax.survey.config import StudyConfig

    return StudyConfig


def _print_config() -> None:
    """Print the fields that --config.* takes: name, default, limit and meaning."""
    prefix = "base." if _is_comparison(sys.argv) else ""
    config = _config_class(sys.argv)()
    comments = config_lib.comments(type(config).__module__) | config_lib.comments()
    for leaf in config_lib.leaves(config):
        part, _, name = leaf.path.rpartition(".")
        cls = type(operator.attrgetter(part)(config) if part else config)
        limit = f"  ({leaf.limit})" if leaf.limit else ""
        try:
            print(f"--config.{prefix}{leaf.path}={leaf.value!r}{limit}")
            print(f"    {comments[cls.__name__, name]}", flush=True)
        except BrokenPipeError:  # head, or less that was left
            _drop_output()
            return


def _program() -> str:
    return pathlib.Path(sys.argv[0]).stem


def _line(text: str) -> str:
    return f"{_program()}: error: {text}"

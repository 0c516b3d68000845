"""The console script: `kdjax COMMAND ...` is `python -m kdjax.COMMAND ...`."""

import runpy
import sys

import kdjax

COMMANDS = {
    "prepare": "print examples as the student will see them, or tokenise all of them",
    "train": "train a student on its teacher's outputs, and evaluate both",
    "label": "fill the teacher cache",
    "annotate": "have a teacher write rationales by prompting",
    "evaluate": "score a student, its teacher or any folder; explanations",
    "compare": "run a grid of methods, factors and seeds; statistics of it",
    "study": "plan and serve a study of explanations with people, and analyse it",
    "export": "write a student as a Hugging Face folder",
    "cache": "inspect, verify, merge, export and import teacher caches",
    "plan": "compile the step for another machine: memory, collectives, time bound",
    "benchmark": "time the training step and its parts, or decoding",
    "supervise": "run processes as one run, and start them again when one is lost",
}


def usage() -> str:
    """Return the commands, with a line each."""
    lines = (f"  {name:<10} {text}" for name, text in COMMANDS.items())
    return "\n".join(
        (
            f"kdjax {kdjax.__version__}: distils language models in JAX",
            "",
            "  kdjax COMMAND --config=NAME --workdir=DIR ...",
            "",
            *lines,
            "",
            "kdjax COMMAND --helpshort lists the flags of a command.",
        )
    )


def main() -> None:
    """Run the command that the first argument names with the others."""
    command = sys.argv[1] if len(sys.argv) > 1 else "--help"
    if command in ("-h", "--help", "--helpshort", "help"):
        print(usage())
        return
    if command == "--version":
        print(kdjax.__version__)
        return
    if command not in COMMANDS:
        raise SystemExit(
            f"kdjax: error: command={command!r} is unknown: use one of {list(COMMANDS)}"
        )
    del sys.argv[1]
    runpy.run_module(f"kdjax.{command}", run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()

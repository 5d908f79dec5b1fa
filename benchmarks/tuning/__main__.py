"""``python -m benchmarks.tuning``: run a study or go on with one (without a command), or report on what it found.

Exit status: 0; 1 where a worker failed or a README is out of date; 2 on bad input; 128 + its number on a signal.
"""

# The names of the study are Greek, and signs in what people read are the right ones.
# ruff: noqa: RUF001

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from contextlib import closing, suppress
from dataclasses import dataclass, replace
from pathlib import Path

from benchmarks.command import OneLineParser, make_writable, run_command
from benchmarks.rows import InputError
from benchmarks.tuning.results import Results, load_results, save_results
from benchmarks.tuning.settings import ACTIVATIONS, INITS, MODELS, OPTIMIZERS, QUICK_SEEDS, QUICK_STEPS, Settings

PROGRAM = "python -m benchmarks tuning"
RESULTS = Path(__file__).parents[1] / "results" / "tuning"
DEFAULT = Settings()


class Parser(OneLineParser):
    program = PROGRAM


@dataclass(frozen=True)
class Number:
    """A type of argument."""

    kind: type
    what: str
    allowed: Callable[[float], bool]

    def __call__(self, text: str) -> float:
        with suppress(ValueError):
            value: float = self.kind(text)
            if self.allowed(value):
                return value
        raise argparse.ArgumentTypeError(f"expected {self.what}, got {text!r}")

    def list(self, text: str) -> tuple[float, ...]:
        """Numbers with commas between them, sorted and each once."""
        return tuple(sorted({self(part) for part in text.split(",")}))


WHOLE = Number(int, "a positive whole number", lambda value: value > 0)
POSITIVE = Number(float, "positive numbers", lambda value: 0 < value < float("inf"))
MOMENTUM = Number(float, "numbers from 0 to below 1", lambda value: 0 <= value < 1)
SEED = Number(int, "whole numbers from 0 to below 2^31", lambda value: 0 <= value < 2**31)


def make_parser() -> Parser:
    parser = Parser(
        prog=PROGRAM,
        description="Train over a grid of learning rates α and momenta β, with batch norm and without.",
        epilog="Without a command: run, with run's options. The same command goes on with a study that was stopped, "
        "and several at once share it.",
    )
    commands = parser.add_subparsers(dest="command", required=True)

    run = commands.add_parser("run", help="run the study, or what is left of it, and report (the default)")
    run.set_defaults(run=run_study)
    run.add_argument("--jobs", type=WHOLE, default=os.cpu_count() or 1, help="processes that train (%(default)s)")
    run.add_argument("--model", choices=MODELS, default=DEFAULT.model, help="default: %(default)s")
    run.add_argument("--activation", choices=ACTIVATIONS, default=DEFAULT.activation, help="default: %(default)s")
    run.add_argument(
        "--optimizer",
        choices=OPTIMIZERS,
        default=DEFAULT.optimizer,
        help="β is the momentum of v ← βv + g (sgd, the default) or of v ← βv + (1 − β)g (average), or Adam's β2",
    )
    run.add_argument(
        "--init",
        choices=INITS,
        default=DEFAULT.init,
        help="starting weights: scaled for the activation (%(default)s, the default) or as torch's layers come",
    )
    run.add_argument("--quick", action="store_true", help=f"two seeds and {QUICK_STEPS} steps: a look, not a result")
    run.add_argument("--steps", type=WHOLE, help=f"default: {DEFAULT.steps}")
    for option, number, usual in (
        ("--alphas", POSITIVE, DEFAULT.alphas),
        ("--betas", MOMENTUM, DEFAULT.betas),
        ("--seeds", SEED, DEFAULT.seeds),
    ):
        run.add_argument(option, type=number.list, help=f"default: {','.join(f'{value:g}' for value in usual)}")
    run.add_argument("--output", type=Path, metavar="DIR", help="default: benchmarks/results/tuning, or a folder in it")

    report = commands.add_parser("report", help="show results again, from a file or from the storage alone")
    report.set_defaults(run=run_report)
    report.add_argument("file", type=Path, nargs="?", metavar="FILE.json", help="default: the committed results")
    report.add_argument("--output", type=Path, metavar="DIR", help="default: the file's folder")
    report.add_argument("--readme", type=Path, metavar="README.md", help="only rewrite this file's lines")
    report.add_argument("--check", action="store_true", help="with --readme: only tell whether they are current")

    for command, default in ((run, "study.db in the output folder"), (report, "the file")):
        command.add_argument("--storage", metavar="URL", help=f"a database's, for SQLAlchemy; default: {default}")
        command.add_argument("--study", metavar="NAME", help="in the storage; default: made of the settings")
    return parser


def settings_of(arguments: argparse.Namespace) -> Settings:
    settings = replace(
        DEFAULT,
        model=arguments.model,
        activation=arguments.activation,
        optimizer=arguments.optimizer,
        init=arguments.init,
    )
    if arguments.quick:
        settings = replace(settings, seeds=QUICK_SEEDS, steps=QUICK_STEPS)
    given = {name: getattr(arguments, name) for name in ("steps", "alphas", "betas", "seeds")}
    return replace(settings, **{name: value for name, value in given.items() if value is not None})


def study_name(settings: Settings) -> str:
    """The default study's is short; what is different from it is part of a name."""
    if settings == DEFAULT:
        return "default"
    parts = [
        getattr(settings, name)
        for name in ("model", "activation", "optimizer", "init")
        if getattr(settings, name) != getattr(DEFAULT, name)
    ]
    if (settings.steps, settings.seeds) == (QUICK_STEPS, QUICK_SEEDS):
        parts.append("quick")
    elif settings.steps != DEFAULT.steps:
        parts.append(f"{settings.steps}-steps")
    return "-".join(parts) or "other-grid"


def run_study(arguments: argparse.Namespace) -> int:
    settings = settings_of(arguments)
    name = arguments.study or study_name(settings)
    output: Path = arguments.output or (RESULTS if settings == DEFAULT else RESULTS / name)
    make_writable(output)
    url = arguments.storage or f"sqlite:///{output.absolute() / 'study.db'}"

    # Here, so that report, --help and bad input need no Optuna and no second.
    try:
        from benchmarks.tuning import storage, study, workers
    except ImportError as error:
        raise InputError(f"cannot run a study: {error} (it is one of the extra bench)") from None

    try:
        with closing(storage.SharedStudy(url, name, settings)) as shared:
            came = study.run(shared, arguments.jobs)
            done = shared.done()
            results: Results = shared.results()
    except workers.WorkerError as error:
        print(f"{PROGRAM}: error: {error}; what was done is kept", file=sys.stderr)
        return 1
    except storage.STORAGE_ERRORS as error:
        reason = str(error).strip().splitlines()[0]
        raise InputError(f"the storage {storage.shown(url)} failed: {reason}") from None
    if came is not None:
        print(
            f"{PROGRAM}: interrupted; {done} of {len(settings.points)} trials are done, the same command goes on",
            file=sys.stderr,
        )
        return 128 + came
    save_results(output / "results.json", results)
    show(output, results)
    return 0


def show(folder: Path, results: Results) -> None:
    """Draw the pictures, write the page that shows them, print the table and the conclusion."""
    from benchmarks.rows import write_atomically
    from benchmarks.tuning.conclusion import conclusion, page
    from benchmarks.tuning.pictures import captions, save_pictures
    from benchmarks.tuning.table import print_table

    make_writable(folder)
    save_pictures(folder, results)
    write_atomically(folder / "README.md", page(results, captions()).encode())
    print_table(results)
    print("\n".join(conclusion(results)))
    print(folder)


def run_report(arguments: argparse.Namespace) -> int:
    if arguments.check and not arguments.readme:
        raise InputError("--check needs --readme")
    if arguments.file and arguments.storage:
        raise InputError("report is of a file or of a --storage, not of both")
    if arguments.storage:
        try:
            from benchmarks.tuning.storage import load_study
        except ImportError as error:
            raise InputError(f"cannot read a storage: {error} (it is one of the extra bench)") from None

        results = load_study(arguments.storage, arguments.study or study_name(DEFAULT))
        folder = arguments.output or RESULTS
    else:
        file = arguments.file or RESULTS / "results.json"
        results = load_results(file)
        folder = arguments.output or file.parent
    if not arguments.readme:
        show(folder, results)
        return 0
    from benchmarks.tuning.conclusion import update_readme

    current = update_readme(arguments.readme, results, check=arguments.check)
    if arguments.check and not current:
        print(f"{PROGRAM}: {arguments.readme} is out of date; run {PROGRAM} report --readme it", file=sys.stderr)
        return 1
    print(f"{arguments.readme} {'was current' if current else 'rewritten'}")
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    return run_command(make_parser(), sys.argv[1:] if argv is None else argv, default="run")


if __name__ == "__main__":
    sys.exit(main())

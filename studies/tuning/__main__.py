"""``python -m benchmarks tuning``: run a study or go on with one (without a command), or report on what it found.

Exit status: 0; 1 where a worker failed or a document is out of date; 2 on bad input; 130 on a signal to end.
"""

# The names of the study are Greek, and signs in what people read are the right ones.
# ruff: noqa: RUF001

import argparse
import os
import sys
from collections.abc import Sequence
from dataclasses import fields, replace
from pathlib import Path

from benchmarks import document
from benchmarks.command import POSITIVE, WHOLE, Number, OneLineParser, add_report_options, make_writable, run_command
from benchmarks.rows import InputError, write_atomically
from studies.tuning.results import Results, load_results, save_results
from studies.tuning.settings import INITS, OPTIMIZERS, QUICK_SEEDS, QUICK_STEPS, Settings

PROGRAM = "python -m benchmarks tuning"
RESULTS = Path(__file__).parents[2] / "benchmarks" / "results" / "tuning"
DEFAULT = Settings()

MOMENTUM = Number(float, "numbers from 0 to below 1", lambda value: 0 <= value < 1)
SEED = Number(int, "whole numbers from 0 to below 2^31", lambda value: 0 <= value < 2**31)


def make_parser() -> OneLineParser:
    parser = OneLineParser(
        prog=PROGRAM,
        description="Train over a grid of learning rates α and momenta β, with batch norm and without.",
        epilog="Without a command: run, with run's options. The same command goes on with a study that was stopped, "
        "and several at once share it.",
    )
    commands = parser.add_subparsers(dest="command", required=True)

    run = commands.add_parser("run", help="run the study, or what is left of it, and report (the default)")
    run.set_defaults(run=run_study)
    run.add_argument("--jobs", type=WHOLE, default=os.cpu_count() or 1, help="processes that train (%(default)s)")
    for option, choices, meaning in (
        ("--optimizer", OPTIMIZERS, "β is the momentum of v ← βv + g (sgd) or of v ← βv + (1 − β)g (average)"),
        ("--init", INITS, "starting weights: scaled for the sigmoid, or as torch's layers come"),
    ):
        default = getattr(DEFAULT, option[2:])
        run.add_argument(option, choices=choices, default=default, help=f"{meaning} (default: {default})")
    run.add_argument("--quick", action="store_true", help=f"two seeds and {QUICK_STEPS} steps: a look, not a result")
    run.add_argument("--steps", type=WHOLE, help=f"default: {DEFAULT.steps}")
    for option, number in (("--alphas", POSITIVE), ("--betas", MOMENTUM), ("--seeds", SEED)):
        usual = ",".join(f"{value:g}" for value in getattr(DEFAULT, option[2:]))
        run.add_argument(option, type=number.list, help=f"default: {usual}")
    run.add_argument("--output", type=Path, metavar="DIR", help="default: benchmarks/results/tuning, or a folder in it")
    run.add_argument("--storage", metavar="URL", help="a database's, for SQLAlchemy; default: study.db in the output")

    report = commands.add_parser("report", help="show results again")
    report.set_defaults(run=run_report)
    file = RESULTS / "results.json"
    report.add_argument("file", type=Path, nargs="?", default=file, metavar="FILE.json", help="default: the committed")
    report.add_argument("--output", type=Path, metavar="DIR", help="default: the file's folder")
    add_report_options(report, document.DOCUMENT)
    return parser


def settings_of(arguments: argparse.Namespace) -> Settings:
    usual = replace(DEFAULT, seeds=QUICK_SEEDS, steps=QUICK_STEPS) if arguments.quick else DEFAULT
    given = {field.name: getattr(arguments, field.name) for field in fields(Settings)}
    return replace(usual, **{name: value for name, value in given.items() if value is not None})


def study_name(settings: Settings) -> str:
    """What is different from the default study."""
    given = {field.name: getattr(settings, field.name) for field in fields(Settings)}
    different = {name: value for name, value in given.items() if value != getattr(DEFAULT, name)}
    return "-".join(f"{name}={value}".replace(" ", "") for name, value in different.items()) or "default"


def run_study(arguments: argparse.Namespace) -> int:
    settings = settings_of(arguments)
    name = study_name(settings)
    output: Path = arguments.output or (RESULTS if settings == DEFAULT else RESULTS / name)
    make_writable(output)
    url = arguments.storage or f"sqlite:///{output.absolute() / 'study.db'}"

    from studies.tuning import study  # here, so that report, --help and bad input need no Optuna and no second

    try:
        results = study.run(url, name, settings, arguments.jobs)
    except KeyboardInterrupt:
        print(f"{PROGRAM}: interrupted; what is done is kept, and the same command goes on", file=sys.stderr)
        return 130
    except study.WorkerError as error:
        print(f"{PROGRAM}: error: {error}; what was done is kept", file=sys.stderr)
        return 1
    except study.STORAGE_ERRORS as error:
        reason = str(error).strip().splitlines()[0]
        raise InputError(f"the storage failed: {reason}") from None
    save_results(output / "results.json", results)
    show(output, results)
    return 0


def show(folder: Path, results: Results) -> None:
    """Draw the pictures, write the page that shows them, print the table and the conclusion."""
    from studies.tuning.analysis import conclusion, page, sides_sheet
    from studies.tuning.pictures import captions, save_pictures

    make_writable(folder)
    save_pictures(folder, results)
    write_atomically(folder / "README.md", page(results, captions()).encode())
    print(sides_sheet(results).cells.to_string(index=False))
    print("\n".join([*conclusion(results), str(folder)]))


def run_report(arguments: argparse.Namespace) -> int:
    if arguments.check and not arguments.document:
        raise InputError("--check needs --document")
    results = load_results(arguments.file)
    if not arguments.document:
        show(arguments.output or arguments.file.parent, results)
        return 0
    from studies.tuning.analysis import block

    new = {document.TUNING: block(results)}
    return document.update(f"{PROGRAM} report", arguments.document, new, arguments.check)


def main(argv: Sequence[str] | None = None) -> int:
    return run_command(make_parser(), sys.argv[1:] if argv is None else argv, default="run")


if __name__ == "__main__":
    sys.exit(main())

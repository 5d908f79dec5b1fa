"""``python -m benchmarks tuning``: run or continue a study (without a command), or report on its results.

Exit status: 0; 1 where a worker failed or a document is out of date; 2 on bad input; 130 on a signal to end.
"""

# The names of the study are Greek, and signs in what people read are the right ones.
# ruff: noqa: RUF001

import argparse
import os
import sys
from collections.abc import Sequence
from concurrent.futures.process import BrokenProcessPool
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from benchmarks import document
from benchmarks.command import (
    POSITIVE,
    WHOLE,
    Number,
    OneLineParser,
    add_report_options,
    listed,
    make_writable,
    run_command,
)
from benchmarks.rows import InputError, write_atomically
from studies.tuning.results import Results, load_results, save_results
from studies.tuning.settings import INITS, OPTIMIZERS, RANGE, Settings

PROGRAM = "python -m benchmarks tuning"
RESULTS = Path(__file__).parents[2] / "benchmarks" / "results" / "tuning"
DEFAULT = Settings()
LOCK_S = 60  # a SQLite file is locked for as long as others write

MOMENTUM = Number(float, "numbers from 0 to below 1", lambda value: 0 <= value < 1)
SEED = Number(int, "whole numbers from 0 to below 2^31", lambda value: 0 <= value < 2**31)
SEVERAL = Number(int, "whole numbers from 2 on", lambda value: value >= 2)  # of one value there is no variance


def make_parser() -> OneLineParser:
    parser = OneLineParser(
        prog=PROGRAM,
        description="Train over a grid of learning rates α and momenta β, with batch norm and without.",
        epilog="Without a command: run, with run's options. The same command goes on with a study that was stopped, "
        "and several share one that has begun.",
    )
    commands = parser.add_subparsers(dest="command", required=True)

    run = commands.add_parser("run", help="run the study, or what is left of it, and report (the default)")
    run.set_defaults(run=run_study)
    run.add_argument("--jobs", type=WHOLE, default=os.cpu_count() or 1, help="processes that train (%(default)s)")
    meaning = "β is the momentum of v ← βv + g (sgd, the default) or of v ← βv + (1 − β)g (average)"
    run.add_argument("--optimizer", choices=OPTIMIZERS, help=meaning)
    meaning = "the study of how the range that trains depends on batch, ghost batches and initialisation"
    run.add_argument("--range", action="store_true", help=f"{meaning}: other defaults")
    run.add_argument("--steps", type=WHOLE, help=f"default: {default_of('steps')}")
    for option, kind, meaning in (
        ("--alphas", POSITIVE.list, "learning rates"),
        ("--betas", MOMENTUM.list, "momenta"),
        ("--seeds", SEED.list, "of weights, batches and split"),
        ("--inits", lambda text: tuple(listed(INITS, text)), f"starting weights, of {', '.join(INITS)}"),
        ("--batch-sizes", SEVERAL.list, "images in a batch, which are as many values a channel"),
        ("--virtual-batch-sizes", SEVERAL.list, "of the largest batch, images that are normalised together"),
    ):
        default = default_of(option[2:].replace("-", "_"))
        run.add_argument(option, type=kind, metavar="LIST", help=f"{meaning} (default: {default})")
    run.add_argument("--output", type=Path, metavar="DIR", help="default: benchmarks/results/tuning, or a folder in it")
    run.add_argument("--storage", metavar="URL", help="a database's, for SQLAlchemy; default: study.db in the output")

    report = commands.add_parser("report", help="show results again")
    report.set_defaults(run=run_report)
    file = RESULTS / "results.json"
    report.add_argument("file", type=Path, nargs="?", default=file, metavar="FILE.json", help="default: the committed")
    report.add_argument("--output", type=Path, metavar="DIR", help="default: the file's folder")
    add_report_options(report, document.DOCUMENT)
    return parser


def written(value: Any) -> str:
    """A setting in the form that its option takes."""
    return ",".join(map(written, value)) if isinstance(value, tuple) else str(value).removesuffix(".0")


def default_of(name: str) -> str:
    usual, ranges = (written(getattr(settings, name)) or "none" for settings in (DEFAULT, RANGE))
    return usual if usual == ranges else f"{usual}; with --range {ranges}"


def settings_of(arguments: argparse.Namespace) -> Settings:
    """The settings; raises InputError where a batch cannot be divided into such parts."""
    usual = RANGE if arguments.range else DEFAULT
    given = {field.name: getattr(arguments, field.name) for field in fields(Settings)}
    settings = replace(usual, **{name: value for name, value in given.items() if value is not None})
    largest = max(settings.batch_sizes)
    for part in settings.virtual_batch_sizes:
        if part >= largest or largest % part:
            raise InputError(f"--virtual-batch-sizes: expected divisors of the largest batch, {largest}, got {part}")
    return settings


def study_name(settings: Settings) -> str:
    """The settings that differ from the default study; "range" is the name of that study."""
    given = {field.name: getattr(settings, field.name) for field in fields(Settings)}
    different = {name: value for name, value in given.items() if value != getattr(DEFAULT, name)}
    named = {DEFAULT: "default", RANGE: "range"}
    return named.get(settings) or "-".join(f"{name}={written(value)}" for name, value in different.items())


def run_study(arguments: argparse.Namespace) -> int:
    settings = settings_of(arguments)
    name = study_name(settings)
    output: Path = arguments.output or (RESULTS if settings == DEFAULT else RESULTS / name)
    make_writable(output)
    url = arguments.storage or f"sqlite:///{output.absolute() / 'study.db'}?timeout={LOCK_S}"

    from studies.tuning import study  # here, so that report, --help and bad input are fast and need no Optuna

    try:
        results = study.run(url, name, settings, arguments.jobs)
    except (study.WorkerError, BrokenProcessPool) as error:
        print(f"{PROGRAM}: error: {error}; what was done is kept", file=sys.stderr)
        return 1
    except study.STORAGE_ERRORS as error:
        reason = str(error).strip().splitlines()[0]
        raise InputError(f"the storage failed: {reason}") from None
    save_results(output / "results.json", results)
    show(output, results)
    return 0


def show(folder: Path, results: Results) -> None:
    """Draw the pictures, write the page that shows them, print the table and the conclusion. A comparison of networks
    has one picture, and no page."""
    from benchmarks.style import save

    make_writable(folder)
    if results.settings.compares_networks:
        from studies.tuning.ranges import draw_widths, widths_sheet

        save(folder / "range.png", draw_widths(results))
        print(f"{widths_sheet(results).cells.to_string(index=False)}\n{folder}")
        return
    from studies.tuning.analysis import conclusion, page, sides_sheet
    from studies.tuning.pictures import PICTURES

    for name, (draw, _) in PICTURES.items():
        save(folder / name, draw(results))
    captions = {name: caption for name, (_, caption) in PICTURES.items()}
    write_atomically(folder / "README.md", page(results, captions).encode())
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
    from studies.tuning.ranges import ranges_block

    comparison = results.settings.compares_networks
    new = {document.TUNING_RANGE: ranges_block(results)} if comparison else {document.TUNING: block(results)}
    return document.update(f"{PROGRAM} report {arguments.file}", arguments.document, new, arguments.check)


def main(argv: Sequence[str] | None = None) -> int:
    return run_command(make_parser(), sys.argv[1:] if argv is None else argv, default="run")


if __name__ == "__main__":
    sys.exit(main())

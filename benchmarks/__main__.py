"""``python -m benchmarks``: measure (without a command), or report on what was measured.

Exit status: 0; 1 where a result is wrong, misses the bar of numerics, or a document is out of date; 2 on bad input; 130
on Ctrl-C.
"""

import argparse
import os
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks import document
from benchmarks.command import (
    POSITIVE,
    WHOLE,
    OneLineParser,
    add_report_options,
    listed,
    make_writable,
    run_command,
    signals_to_end,
)
from benchmarks.rows import TOUCHED, InputError, is_touched, load_rows, save_rows, write_atomically
from benchmarks.suites import DEFAULT_DTYPES, DEFAULT_SECONDS, SUITES, default_seconds, default_suites, select_cases
from benchmarks.traffic import ITEM_BYTES, LAYOUTS, STEP, TENSOR_PASSES, WALKS

PROGRAM = "python -m benchmarks"
RESULTS = Path(__file__).parent / "results"
LATEST = RESULTS / "latest"
QUICK_ROUNDS = 5


def make_parser() -> OneLineParser:
    parser = OneLineParser(
        prog=PROGRAM,
        description="Compare bnext with torch and with a copy of the same bytes.",
        epilog="Without a command: measure, with measure's options. "
        "The study of tuning by grid search has its own: tuning --help.",
    )
    commands = parser.add_subparsers(dest="command", required=True)
    add_measure_options(commands.add_parser("measure", help="check, time and report (the default)"))

    numerics = commands.add_parser("numerics", help="errors of bnext and of torch on hard cases, against float64")
    numerics.set_defaults(run=run_numerics)
    add_output(numerics, LATEST)

    report = commands.add_parser("report", help="show the tables and the plot of a JSON file again")
    report.set_defaults(run=run_report)
    report.add_argument("file", type=Path, metavar="FILE.json")
    add_report_options(report, document.DOCUMENT)

    pictures = commands.add_parser("pictures", help="draw the README's pictures from the committed results")
    pictures.set_defaults(run=run_pictures)
    pictures.add_argument("--results", type=Path, default=RESULTS, metavar="DIR", help="default: benchmarks/results")
    add_output(pictures, document.DOCUMENT.parent / "pictures")
    return parser


def add_output(parser: argparse.ArgumentParser, default: Path) -> None:
    shown = default.relative_to(RESULTS.parents[1])
    parser.add_argument("--output", type=Path, default=default, metavar="DIR", help=f"default: {shown}")


def add_measure_options(measure: argparse.ArgumentParser) -> None:
    measure.set_defaults(run=run_measure)
    measure.add_argument("--device", choices=tuple(SUITES), default="cpu", help="default: %(default)s")
    suites = {name: suite for of_device in SUITES.values() for name, suite in of_device.items()}
    models = dict.fromkeys(input.model for suite in suites.values() for input in suite.inputs if input.model)
    dtypes = "; ".join(f"{device}: {','.join(chosen)}" for device, chosen in DEFAULT_DTYPES.items())
    for option, choices, default in (
        ("--suite", suites, "the device's of batch norm alone"),
        ("--dtype", ITEM_BYTES, dtypes),
        ("--layout", LAYOUTS, "all"),
        ("--op", (*TENSOR_PASSES, STEP, *WALKS), "all"),
        ("--model", models, "all of the suite"),
    ):
        measure.add_argument(
            option,
            action="extend",
            default=[],
            type=partial(listed, choices),
            metavar="NAME[,NAME]",
            help=f"{', '.join(choices)} (repeatable; default: {default})",
        )
    measure.add_argument(
        "--touched", action="store_true", help="on the CPU, outputs in memory that was in use before: no page faults"
    )
    measure.add_argument("--threads", type=WHOLE, help="default: torch's own number")
    length = measure.add_mutually_exclusive_group()
    length.add_argument("--rounds", type=WHOLE, help="a fixed number of rounds")
    usual = ", ".join(f"{device} {seconds:g}" for device, seconds in DEFAULT_SECONDS.items())
    length.add_argument(
        "--budget",
        type=POSITIVE,
        metavar="SECONDS",
        help=f"rounds as many as fit (6 to 25; default: {usual} seconds, more with a suite that has to be named)",
    )
    for option, meaning in (
        ("--no-compile", "leave torch.compile out, which takes a minute or two"),
        ("--plans", "on a GPU, bnext as it would be planned for lesser devices, too"),
        ("--quick", f"only small shapes or few models, {QUICK_ROUNDS} rounds: a look, not a result"),
    ):
        measure.add_argument(option, action="store_true", help=meaning)
    add_output(measure, LATEST)


def run_measure(arguments: argparse.Namespace) -> int:
    device = arguments.device
    suites = arguments.suite or default_suites(device)
    for name in suites:
        if name not in SUITES[device]:
            raise InputError(f"suite {name!r} is not one of {device}'s: {', '.join(SUITES[device])}")
    if arguments.touched and device != "cpu":
        raise InputError("--touched is about the CPU's memory")
    if arguments.plans and device != "cuda":
        raise InputError("--plans is about CUDA kernels: it needs --device cuda")
    chosen = (arguments.dtype, arguments.layout, arguments.op, arguments.model)
    how = {"quick": arguments.quick, "with_compile": not arguments.no_compile, "with_plans": arguments.plans}
    cases = select_cases(suites, device, *chosen, **how)
    if not cases:
        raise InputError("nothing to measure: no chosen suite has the chosen layout, operation, model and size")
    make_writable(arguments.output)
    if arguments.touched and not is_touched(os.environ):
        # malloc reads its variables only when a process starts, so a new process replaces this one.
        command = [sys.executable, "-m", "benchmarks", *arguments.argv]
        os.execve(sys.executable, command, {**os.environ, **TOUCHED})

    # Imported here, so that report, --help and bad input need neither torch nor bnext, and are fast.
    import benchmarks.pictures  # noqa: F401, to notice a missing pandas before the minutes of measuring
    from benchmarks.measure import Device, Outcome, measure, total_work
    from benchmarks.progress import ProgressBar

    measured_on = Device()
    if device == "cuda":
        from benchmarks.cuda.device import missing
        from benchmarks.cuda.measure import Gpu

        if lacking := missing():
            raise InputError(f"cannot measure on cuda: {lacking}")
        measured_on = Gpu()
    outcome = Outcome()
    seconds = arguments.budget or default_seconds(device, suites)
    rounds = arguments.rounds or (QUICK_ROUNDS if arguments.quick else None)
    file = arguments.output / "results.json"
    try:
        with signals_to_end(), ProgressBar(total_work(cases, measured_on)) as progress:
            measure(cases, measured_on, outcome, progress.show, seconds, rounds, arguments.threads)
    except KeyboardInterrupt:
        print(f"{PROGRAM}: interrupted; {file} has what was measured so far, if anything", file=sys.stderr)
        return 130
    finally:
        # A device that can no longer be used raises an error, too: what was measured before is kept.
        if outcome.rows:
            save_rows(file, outcome.rows)
        for note in outcome.notes:
            print(f"{PROGRAM}: note: {note}", file=sys.stderr)
    if outcome.rows:
        show(file)
    for mismatch in outcome.mismatches:
        print(f"{PROGRAM}: error: {mismatch}", file=sys.stderr)
    return 1 if outcome.mismatches else 0


def show(file: Path) -> int:
    """Draw the picture of a file beside it, and print its tables."""
    from benchmarks import report
    from benchmarks.pictures import draw
    from benchmarks.style import save

    rows = load_rows(file)
    figure = draw(rows)
    picture = file.with_suffix(".png")
    if figure:
        save(picture, figure)
    report.print_report(rows)
    print(f"{file}\n{picture}" if figure else file)
    return 0


def run_numerics(arguments: argparse.Namespace) -> int:
    make_writable(arguments.output)
    from benchmarks.numerics import measure
    from benchmarks.numerics_cases import CASES
    from benchmarks.numerics_report import FILE, save_results
    from benchmarks.progress import ProgressBar

    with ProgressBar(len(CASES)) as progress:
        results = measure(CASES, progress.show)
    save_results(arguments.output / FILE, results)
    return show_numerics(arguments.output / FILE, results)


def show_numerics(file: Path, results: Any) -> int:
    """Write the page beside the file, print it and the rows that miss the bar, and return the exit status."""
    from benchmarks.numerics_report import page
    from benchmarks.tables import print_markdown

    table = file.with_suffix(".md")
    write_atomically(table, page(results).encode())
    print_markdown(page(results))
    print(f"{file}\n{table}", flush=True)
    failing = results.errors[~results.errors["holds"]]
    for row in failing.itertuples():
        what = ", ".join((row.case, row.dtype, row.path, row.quantity))
        print(f"{PROGRAM}: error: {what}: bnext {row.bnext:.3g}, torch {row.torch:.3g}", file=sys.stderr)
    print(results.summary)
    return 0 if failing.empty else 1


def run_report(arguments: argparse.Namespace) -> int:
    from benchmarks import numerics_report, report

    if arguments.check and not arguments.document:
        raise InputError("--check needs --document")
    if numerics_report.is_numerics(arguments.file):
        results = numerics_report.load_results(arguments.file)
        if not arguments.document:
            return show_numerics(arguments.file, results)
        new = {document.NUMERICS: numerics_report.block(results)}
    else:
        if not arguments.document:
            return show(arguments.file)
        new = report.blocks(load_rows(arguments.file))
    return document.update(f"{PROGRAM} report {arguments.file}", arguments.document, new, arguments.check)


def run_pictures(arguments: argparse.Namespace) -> int:
    from benchmarks.pictures import draw_all

    make_writable(arguments.output)
    print("\n".join(map(str, draw_all(arguments.results, arguments.output))))
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    arguments = list(sys.argv[1:] if argv is None else argv)
    if arguments[:1] == ["tuning"]:
        from studies.tuning.__main__ import main as tuning  # nothing else needs its dependencies

        return tuning(arguments[1:])
    return run_command(make_parser(), arguments, default="measure")


if __name__ == "__main__":
    sys.exit(main())

"""``python -m benchmarks``: measure (without a command), or report on what was measured.

Exit status: 0; 1 where a result is wrong, misses the bar of numerics, or a README is out of date; 2 on bad input; 130
on Ctrl-C.
"""

import argparse
import os
import sys
from collections.abc import Callable, Collection, Sequence
from functools import partial
from pathlib import Path

from benchmarks.command import OneLineParser, make_writable, run_command
from benchmarks.model_report import of_tensors
from benchmarks.model_suites import (
    MODEL_SUITES,
    STEP,
    ModelCase,
    default_model_seconds,
    model_case_work,
    model_names,
    select_model_cases,
)
from benchmarks.numerics_results import FILE, Results, is_numerics, load_results, save_results
from benchmarks.rows import InputError, load_rows, save_rows, write_atomically
from benchmarks.suites import (
    DEFAULT_DTYPES,
    DEFAULT_SECONDS,
    DEVICE_SUITES,
    ITEM_BYTES,
    LAYOUTS,
    TENSOR_PASSES,
    Case,
    case_work,
    default_seconds,
    default_suites,
    select_cases,
)
from benchmarks.touched import is_touched, start_again

PROGRAM = "python -m benchmarks"
LATEST = Path(__file__).parent / "results" / "latest"
QUICK_ROUNDS = 5


class Parser(OneLineParser):
    program = PROGRAM


def names(choices: Collection[str], text: str) -> list[str]:
    """A comma-separated list of known names."""
    chosen = text.split(",")
    for name in chosen:
        if name not in choices:
            raise argparse.ArgumentTypeError(f"{name!r} is not one of {', '.join(choices)}")
    return chosen


def positive(number: Callable[[str], float], text: str) -> float:
    try:
        value = number(text)
    except ValueError:
        value = 0
    if not 0 < value < float("inf"):
        kind = "whole number" if number is int else "number"
        raise argparse.ArgumentTypeError(f"expected a positive {kind}, got {text!r}")
    return value


def make_parser() -> Parser:
    parser = Parser(
        prog=PROGRAM,
        description="Compare bnext with torch and with a copy of the same bytes.",
        epilog="Without a command: measure, with measure's options. "
        "The study of tuning by grid search has its own: tuning --help.",
    )
    commands = parser.add_subparsers(dest="command", required=True)

    measure = commands.add_parser("measure", help="check, time and report (the default)")
    measure.set_defaults(run=run_measure)
    measure.add_argument("--device", choices=tuple(DEVICE_SUITES), default="cpu", help="default: %(default)s")
    suites = {name: None for device in DEVICE_SUITES for name in suite_names(device)}
    for option, choices, default in (
        ("--suite", suites, "the device's of batch norm alone"),
        (
            "--dtype",
            ITEM_BYTES,
            "; ".join(f"{device}: {','.join(dtypes)}" for device, dtypes in DEFAULT_DTYPES.items()),
        ),
        ("--layout", LAYOUTS, "all"),
        ("--op", (*TENSOR_PASSES, STEP), "all"),
        ("--model", model_names(), "all of the suite"),
    ):
        measure.add_argument(
            option,
            action="extend",
            type=partial(names, choices),
            metavar="NAME[,NAME]",
            help=f"{', '.join(choices)} (repeatable; default: {default})",
        )
    measure.add_argument(
        "--touched", action="store_true", help="on the CPU, outputs in memory that was in use before: no page faults"
    )
    measure.add_argument("--threads", type=partial(positive, int), help="default: torch's own number")
    length = measure.add_mutually_exclusive_group()
    length.add_argument("--rounds", type=partial(positive, int), help="a fixed number of rounds")
    length.add_argument(
        "--budget",
        type=partial(positive, float),
        metavar="SECONDS",
        help="rounds as many as fit (6 to 25; default: "
        + ", ".join(f"{device} {seconds:g}" for device, seconds in DEFAULT_SECONDS.items())
        + " seconds, and more with a suite that has to be named)",
    )
    measure.add_argument(
        "--no-compile", action="store_true", help="leave torch.compile out, which takes a minute or two"
    )
    measure.add_argument(
        "--plans", action="store_true", help="on a GPU, bnext as it would be planned for lesser devices, too"
    )
    measure.add_argument(
        "--quick",
        action="store_true",
        help=f"only small shapes or few models, {QUICK_ROUNDS} rounds: a look, not a result",
    )
    measure.add_argument(
        "--output", type=Path, default=LATEST, metavar="DIR", help="default: benchmarks/results/latest"
    )

    numerics = commands.add_parser("numerics", help="errors of bnext and of torch on hard cases, against float64")
    numerics.set_defaults(run=run_numerics)
    numerics.add_argument(
        "--output", type=Path, default=LATEST, metavar="DIR", help="default: benchmarks/results/latest"
    )

    report = commands.add_parser("report", help="show the tables and the plot of a JSON file again")
    report.set_defaults(run=run_report)
    report.add_argument("file", type=Path, metavar="FILE.json")
    report.add_argument("--readme", type=Path, metavar="README.md", help="only rewrite the measured table of this file")
    report.add_argument("--check", action="store_true", help="with --readme: only tell whether it is current")
    return parser


def suite_names(device: str) -> list[str]:
    return [*DEVICE_SUITES[device], *MODEL_SUITES[device]]


def run_measure(arguments: argparse.Namespace) -> int:
    device = arguments.device
    suites = arguments.suite or default_suites(device)
    foreign = [name for name in suites if name not in suite_names(device)]
    if foreign:
        raise InputError(f"suite {foreign[0]!r} is not one of {device}'s: {', '.join(suite_names(device))}")
    if arguments.touched and device != "cpu":
        raise InputError("--touched is about the CPU's memory")
    if arguments.plans and device != "cuda":
        raise InputError("--plans is about CUDA kernels: it needs --device cuda")
    tensor_suites = [name for name in suites if name in DEVICE_SUITES[device]]
    cases = select_cases(
        suites=tensor_suites,
        dtypes=arguments.dtype or DEFAULT_DTYPES[device],
        layouts=arguments.layout or LAYOUTS,
        operations=arguments.op or TENSOR_PASSES,
        quick=arguments.quick,
        device=device,
    )
    model_cases = select_model_cases(
        suites,
        device,
        arguments.dtype,
        arguments.layout,
        arguments.op,
        arguments.quick,
        not arguments.no_compile,
        arguments.model,
    )
    if not cases and not model_cases:
        raise InputError("nothing to measure: no chosen suite has the chosen layout, operation, model and size")
    make_writable(arguments.output)
    if arguments.touched and not is_touched(os.environ):
        start_again(arguments.argv)

    # Here, so that report, --help and bad input need no torch, no bnext and no second.
    try:
        from benchmarks.measure import Outcome

        runs = []
        if cases:
            measure_cases = measuring(device, cases, not arguments.no_compile, arguments.plans)
            runs.append((*measure_cases, default_seconds(device, tensor_suites)))
        if model_cases:
            runs.append((*measuring_models(device, model_cases), default_model_seconds(device, suites)))
    except ImportError as error:
        raise InputError(f"cannot measure: {error} (build bnext first: make build)") from None
    from benchmarks.progress import ProgressBar

    outcome = Outcome()
    interrupted = False
    rounds = arguments.rounds or (QUICK_ROUNDS if arguments.quick else None)
    # A budget is for all of it.
    share = arguments.budget / sum(seconds for _, _, seconds in runs) if arguments.budget else 1.0
    try:
        with ProgressBar(sum(work for _, work, _ in runs)) as progress:
            for measure, _, seconds in runs:
                measure(outcome, progress.advance, share * seconds, rounds, arguments.threads)
    except KeyboardInterrupt:
        interrupted = True
    finally:
        # Also where a provider fails with an error of its own: what was measured before it stays.
        if outcome.rows:
            save_rows(arguments.output / "results.json", outcome.rows)
        for note in outcome.notes:
            print(f"{PROGRAM}: note: {note}", file=sys.stderr)
    return finish(arguments.output, outcome.mismatches, bool(outcome.rows), interrupted)


def measuring(
    device: str, cases: Sequence[Case], with_compile: bool, with_plans: bool
) -> tuple[Callable[..., None], int]:
    """What measures the cases on a device, and how much work that is."""
    if device == "cpu":
        from benchmarks.measure import measure

        work = sum(case_work(case, with_compile) for case in cases)
        return partial(measure, cases, with_compile=with_compile), work
    from benchmarks.cuda.device import require

    require()
    from benchmarks.cuda import measure as cuda

    work = sum(cuda.case_work(case, with_compile) for case in cases)
    return partial(cuda.measure, cases, with_compile=with_compile, with_plans=with_plans), work


def measuring_models(device: str, cases: Sequence[ModelCase]) -> tuple[Callable[..., None], int]:
    if device == "cuda":
        from benchmarks.cuda.device import require

        require()
    from benchmarks.model_measure import measure_models

    return partial(measure_models, cases, device=device), sum(model_case_work(case, device) for case in cases)


def finish(output: Path, mismatches: Sequence[str], measured: bool, interrupted: bool) -> int:
    """Report on what was saved, say what went wrong, and choose the exit status."""
    file = output / "results.json"
    if interrupted:
        kept = f"what was measured so far is in {file}" if measured else "nothing was measured"
        print(f"{PROGRAM}: interrupted; {kept}", file=sys.stderr)
        return 130
    if measured:
        show(file)
    for mismatch in mismatches:
        print(f"{PROGRAM}: error: {mismatch}", file=sys.stderr)
    return 1 if mismatches else 0


def show(file: Path) -> None:
    """Draw the plot of a file beside it, of batch norms or else of what they cost models, and print its tables."""
    from benchmarks.cost_plot import draw_costs
    from benchmarks.plot import draw, save_plot
    from benchmarks.table import print_tables

    rows = load_rows(file)
    tensors = of_tensors(rows)
    figure = draw(tensors) if tensors else draw_costs(rows)
    picture = file.with_suffix(".png")
    try:
        if figure:
            save_plot(picture, figure)
    except OSError as error:
        raise InputError(f"cannot write {picture}: {error.strerror}") from None
    print_tables(rows)
    print(f"{file}\n{picture}" if figure else file)


def run_numerics(arguments: argparse.Namespace) -> int:
    make_writable(arguments.output)
    try:
        from benchmarks.numerics import measure
        from benchmarks.numerics_cases import CASES
    except ImportError as error:
        raise InputError(f"cannot measure: {error} (build bnext first: make build)") from None
    from benchmarks.progress import ProgressBar

    with ProgressBar(len(CASES)) as progress:
        results = measure(CASES, progress.advance)
    save_results(arguments.output / FILE, results)
    return show_numerics(arguments.output / FILE, results)


def show_numerics(file: Path, results: Results) -> int:
    """Write the page beside the file, print the table, name the rows that miss the bar, and choose the exit status."""
    from benchmarks.numerics_table import page, print_table

    table = file.with_suffix(".md")
    try:
        write_atomically(table, page(results).encode())
    except OSError as error:
        raise InputError(f"cannot write {table}: {error.strerror}") from None
    print_table(results)
    print(f"{file}\n{table}", flush=True)
    for row in results.failing:
        print(f"{PROGRAM}: error: {row}: bnext {row.bnext:.3g}, torch {row.torch:.3g}", file=sys.stderr)
    print(results.summary)
    return 1 if results.failing else 0


def run_report(arguments: argparse.Namespace) -> int:
    if arguments.check and not arguments.readme:
        raise InputError("--check needs --readme")
    of_numerics = is_numerics(arguments.file)
    if not arguments.readme:
        if of_numerics:
            return show_numerics(arguments.file, load_results(arguments.file))
        show(arguments.file)
        return 0
    from benchmarks.readme import NUMERICS, blocks, update_blocks

    if of_numerics:
        from benchmarks.numerics_table import readme_block

        new = {NUMERICS: readme_block(load_results(arguments.file))}
    else:
        new = blocks(load_rows(arguments.file))
    current = update_blocks(arguments.readme, new, check=arguments.check)
    if arguments.check and not current:
        remedy = f"run {PROGRAM} report {arguments.file} --readme {arguments.readme}"
        print(f"{PROGRAM}: {arguments.readme} is out of date; {remedy}", file=sys.stderr)
        return 1
    print(f"{arguments.readme} {'was current' if current else 'rewritten'}")
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    arguments = list(sys.argv[1:] if argv is None else argv)
    if arguments[:1] == ["tuning"]:
        from benchmarks.tuning.__main__ import main as tuning  # what it needs is needed by nothing else

        return tuning(arguments[1:])
    return run_command(make_parser(), arguments, default="measure")


if __name__ == "__main__":
    sys.exit(main())

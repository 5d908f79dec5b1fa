"""The three lines that say which of the text's claims the results bear out, and the pages that quote them."""

# The names of the study are Greek, and signs in what people read are the right ones.
# ruff: noqa: RUF001

from pathlib import Path

from benchmarks.rows import InputError, write_atomically
from benchmarks.tuning import table
from benchmarks.tuning.analysis import GOAL, MoveMedian, effects, move_median, pairs, side
from benchmarks.tuning.results import Results
from benchmarks.tuning.settings import MOVES

BEGIN, END = "<!-- tuning:begin -->", "<!-- tuning:end -->"

# A ratio of two medians inside these is called no difference.
SAME = (0.8, 1.25)
# Of what another seed changes: up to here a move of β changes almost nothing. As much as another seed is a lot.
ALMOST_NOTHING = 0.1


def conclusion(results: Results) -> list[str]:
    return [_range_line(results), _still_line(results), _moves_line(results)]


def _range_line(results: Results) -> str:
    without, with_it = side(results, False), side(results, True)
    if not without.trials or not with_it.trials or not without.best or not with_it.best:
        return "Range: not measured."
    verdict = "widens" if with_it.share > without.share else "does not widen"
    line = (
        f"Batch norm {verdict} the range that trains: {with_it.at_goal} of {with_it.trials} trials end at ≥ {GOAL:g} % "
        f"with it, {without.at_goal} of {without.trials} without; best accuracy {with_it.best.accuracy:.1f} % and "
        f"{without.best.accuracy:.1f} %"
    )
    both = pairs(results)
    if both is None:
        return f"{line}; no α and β trains both."
    return f"{line}; steps to {GOAL:g} % where both train {both.steps[1]:.0f} and {both.steps[0]:.0f} (median)."


def _still_line(results: Results) -> str:
    both = pairs(results)
    if both is None or not both.travel[0]:
        return "Whether it holds the layers' inputs still cannot be said: no α and β trains both."
    ratio = both.travel[1] / both.travel[0]
    verdict = "stiller" if ratio < SAME[0] else "less still" if ratio > SAME[1] else "no stiller"
    return (
        f"It holds the inputs of the last hidden layer {verdict}: where both train, their medians travel "
        f"{both.travel[1]:.1f} widths (15th to 85th percentile) with it, {both.travel[0]:.1f} without; the shorter way "
        f"is batch norm's in {both.stiller} of {both.count} pairs."
    )


def _moves_line(results: Results) -> str:
    found = effects(results)
    medians = {move: median for move in MOVES if (median := move_median(found, move)) is not None}
    if not medians:
        return "Moves of β: not measured."
    parts = [
        f"{move[0]:g} to {move[1]:g} changes {_amount(median)} ({median.change:.2f} points of accuracy"
        + (f"; another seed {median.spread:.2f})" if median.spread is not None else ")")
        for move, median in medians.items()
    ]
    line = f"β from {', from '.join(parts)}, medians over α without and with batch norm"
    changes = [median.change for median in medians.values()]
    if len(changes) == 2 and changes[0] > 0:
        line += f"; the second is {changes[1] / changes[0]:.1f} times the first"
    return f"{line}."


def _amount(median: MoveMedian) -> str:
    if median.spread is None:
        return "something"
    if median.change <= ALMOST_NOTHING * median.spread:
        return "almost nothing"
    return "less than another seed" if median.change < median.spread else "a lot"


def how_measured(results: Results) -> str:
    settings = results.settings
    what = (
        f"{settings.model}, {settings.activation}, {settings.optimizer}, initialisation {settings.init}, "
        f"{settings.steps} steps, {len(settings.seeds)} seeds, {len(results.trials)} of {len(settings.points)} trials"
    )
    machines = [
        f"{machine['device_name']} ({machine['isa']}), torch {machine['torch_version']}, "
        f"bnext {machine['bnext_version']}, commit {machine['commit']}, {machine['date'][:10]}"
        for machine in results.machines
    ]
    minutes = sum(trial.cpu_s for trial in results.trials) / 60
    return f"scikit-learn's digits, {what}; {'; '.join(machines)}; {minutes:.1f} minutes of one core."


def readme_block(results: Results) -> str:
    return "\n".join(f"* {line}" for line in conclusion(results))


def page(results: Results, pictures: dict[str, str]) -> str:
    """The results' own page, with each picture's file and caption."""
    parts = [
        "# Tuning by grid search, with batch norm and without",
        readme_block(results),
        table.markdown(table.HEADERS, table.sides(results)),
        "Trials of a β that is not the grid's, tried for a move, do not count here. Best: mean over the seeds at that "
        "α and β; steps: the median of those that got there.",
        *(f"![{caption}]({name})\n\n{caption}" for name, caption in pictures.items()),
        "What a move of β changes, in points of accuracy, mean over the evaluations and seeds; beside it what another "
        "seed changes at the first β:",
        table.markdown(table.MOVE_HEADERS, table.moves(results)),
        f"Measured by `python -m benchmarks tuning`: {how_measured(results)}",
    ]
    return "\n\n".join(parts) + "\n"


def update_readme(path: Path, results: Results, check: bool) -> bool:
    """Bring the lines between the markers up to date, or with ``check`` only look; tells whether they were."""
    try:
        text = path.read_text(encoding="utf-8")
        head, found_begin, rest = text.partition(BEGIN)
        _, found_end, tail = rest.partition(END)
        if not found_begin or not found_end or text.count(BEGIN) != 1 or text.count(END) != 1:
            raise InputError(f"{path}: expected one {BEGIN} and, after it, one {END}")
        new = f"{head}{BEGIN}\n{readme_block(results)}\n{END}{tail}"
        if new != text and not check:
            write_atomically(path, new.encode())
    except OSError as error:
        raise InputError(f"cannot rewrite {path}: {error.strerror}") from None
    return new == text

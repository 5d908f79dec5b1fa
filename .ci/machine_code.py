"""The inner loops of a CUDA kernel, read from its disassembly: how many instructions a step takes.

A kernel spends its time in three kinds of innermost loops: those that request vectors (asynchronous copies into shared
memory), those that reduce the vectors that have arrived, and those that map and store them. The shortest loop of each
kind is the form for whole vectors. Counted is the shortest path through it that moves what the call reads or writes.
"""

from __future__ import annotations

import re
from collections import defaultdict
from typing import NamedTuple

_BRANCH = re.compile(r"^(@!?U?P\w+\s+)?BRA(?:\.\w+)*\s.*?`\((\.L_x_\d+)\)")
_NO_FALL_THROUGH = re.compile(r"^(EXIT|RET|BRX)")
_COPY = re.compile(r"LDGSTS\.E(\.BYPASS\.128)? ")  # of a mask's word too
_LOAD = re.compile(r"LDS\.128")
_STORE = re.compile(r"STG\.E\.(EF\.128|U8) ")  # of a mask's byte too


class Code(NamedTuple):
    instructions: list[str]
    labels: dict[str, int]


def parse(sass: str) -> Code:
    """nvdisasm's text of one function."""
    code = Code([], {})
    for line in sass.splitlines():
        if label := re.match(r"\s*(\.L_x_\d+):", line):
            code.labels[label[1]] = len(code.instructions)
        elif instruction := re.match(r"\s*/\*[0-9a-f]{4,}\*/\s+(.*?);", line):
            code.instructions.append(instruction[1].strip())
    return code


def innermost_loops(code: Code) -> list[tuple[int, int]]:
    """First and last instruction of each loop that holds no other."""
    loops = set()
    for last, instruction in enumerate(code.instructions):
        branch = _BRANCH.search(instruction)
        if branch and (first := code.labels.get(branch[2], last + 1)) <= last:
            loops.add((first, last))
    return [loop for loop in sorted(loops) if not any(loop != o and loop[0] <= o[0] and o[1] <= loop[1] for o in loops)]


def shortest_path(code: Code, first: int, last: int, marker: re.Pattern[str], times: int) -> int:
    """The instructions of the shortest forward path from `first` to `last`, a branch, past so many matches of `marker`;
    0 if there is none."""
    # The shortest way to each instruction, by the number of matches before it; targets lie ahead of their branches.
    lengths: dict[int, dict[int, int]] = defaultdict(dict)
    lengths[first] = {0: 1}
    for at in range(first, last):
        instruction = code.instructions[at]
        branch = _BRANCH.search(instruction)
        targets = [at + 1] if (branch is None or branch[1]) and not _NO_FALL_THROUGH.search(instruction) else []
        if branch and at < (target := code.labels.get(branch[2], -1)) <= last:
            targets.append(target)
        found = bool(marker.search(instruction))
        for before, length in lengths[at].items():
            matches = min(before + found, times)
            for to in targets:
                lengths[to][matches] = min(length + 1, lengths[to].get(matches, length + 1))
    return lengths[last].get(times, 0)


class Steps(NamedTuple):
    """Instructions for a 16-byte vector of each input; 0 where a kernel lacks a form of a loop."""

    request: float
    reduce: float
    map: float


class Call(NamedTuple):
    """The call whose path through a kernel is counted: its copies and stores in a step, those of a mask included."""

    copies: int
    stores: int


def steps(sass: str, call: Call) -> Steps:
    """The steps of the kernel's fastest loops. A kernel has loops to reduce and to map whole vectors, and other loops
    for other vectors: with fewer than two of a kind, one was not recognised."""
    code = parse(sass)
    requests: dict[int, float] = {}  # by the loop's unroll factor
    others: dict[str, list[float]] = {"reduce": [], "map": []}
    for first, last in innermost_loops(code):
        body = "\n".join(code.instructions[first : last + 1])
        copies, loads, stores = (len(mark.findall(body)) for mark in (_COPY, _LOAD, _STORE))
        if "DADD" in body or "DFMA" in body:
            continue  # the flush of sums, and the float64 path
        if copies and not loads:
            kind, marker, found, each = "request", _COPY, copies, call.copies
        elif loads and not copies:
            kind, marker, found, each = ("map", _STORE, stores, call.stores) if stores else ("reduce", _LOAD, 1, 1)
        else:
            continue
        unrolled, rest = divmod(found, each)
        # The call does not take a loop that also moves tensors which it lacks.
        count = 0 if rest else shortest_path(code, first, last, marker, found) / unrolled
        if not count:
            continue
        if kind == "request":
            requests[unrolled] = min(count, requests.get(unrolled, count))
        else:
            others[kind].append(count)
    fastest = [min(found) if len(found) >= 2 else 0.0 for found in others.values()]
    return Steps(requests[max(requests)] if requests else 0.0, *fastest)

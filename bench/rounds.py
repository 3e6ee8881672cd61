"""Measurements that take turns, and what is made of them: rows of samples, and ratios.

A sample is its figures by name, `rate` (a second) and `cpu_us` (microseconds of CPU time for each)
among them. Everything in a scene is measured once in every round, so that whatever else the machine
does falls on all alike.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

Sample = dict[str, float]


class Void(Exception):
    """A measurement that must not be used, and why."""


@dataclass
class Row:
    """A sample for each round, or why they must not be used."""

    samples: list[Sample] = field(default_factory=list)
    void: str | None = None

    def median(self, figure: str) -> float:
        return statistics.median(sample[figure] for sample in self.samples)


Rows = dict[str, Row]


@dataclass(frozen=True)
class Ratio:
    median: float
    low: float
    high: float

    @property
    def is_draw(self) -> bool:
        return self.low <= 1 <= self.high


def ratio(one: Row, other: Row, figure: str, other_figure: str | None = None) -> Ratio | None:
    """How often the other's figure goes into the one's, round by round; None where one is void."""
    if one.void or other.void:
        return None
    each = [
        ours[figure] / max(theirs[other_figure or figure], 1e-9)
        for ours, theirs in zip(one.samples, other.samples, strict=True)
    ]
    return Ratio(statistics.median(each), min(each), max(each))


def in_turns(
    names: Sequence[str], rounds: int, measure: Callable[[str], Sample], what: str
) -> Rows:
    """Measure each name once in every round, beginning with another one each time."""
    rows = {name: Row() for name in names}
    for number in range(rounds):
        first = number % len(names)
        for name in [*names[first:], *names[:first]]:
            if rows[name].void:
                continue
            try:
                sample = measure(name)
            except Void as problem:
                rows[name].void = str(problem)
                print(f"{what}, {name}: void: {problem}", flush=True)
                continue
            rows[name].samples.append(sample)
            figures = ", ".join(f"{figure} {value:,.4g}" for figure, value in sample.items())
            print(f"{what}, round {number + 1}, {name}: {figures}", flush=True)
    return rows

"""The results of a measurement: a table for the terminal and ``results.json`` for everything else."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from rich.box import SIMPLE_HEAD
from rich.table import Table

from modmeta.evaluation.terminal import console
from modmeta.files import write_atomically
from modmeta.learners import Result

_HEADINGS = (
    "domain", "shots", "source\nmodel", "before", "after", "gain\n[95 % interval]", "units\nmoved",
    "params\nmoved", "sec.", "epi-\nsodes",
)  # fmt: skip

Figures = dict[tuple[str, str], Result]


def write_results(path: str | Path, results: Sequence[Result]) -> None:
    """Write results as a JSON list of records, whole or not at all.

    Raises:
        ValueError: if a figure is not finite.
    """
    records = [result.to_dict() for result in results]
    write_atomically(path, (json.dumps(records, indent=1, allow_nan=False) + "\n").encode())


def print_results(results: Sequence[Result]) -> None:
    """Print one row per domain and number of shots, and the figures on seen and unseen classes where there are some."""
    if results:
        console().print(results_table(results))
    if any(result.metric == "harmonic_mean" for result in results):
        console().print(seen_unseen_table(results))


def results_table(results: Sequence[Result]) -> Table:
    """Return the table of accuracy before and after adaptation, and of what the adaptation cost."""
    table = Table(title="accuracy in %", box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for heading in _HEADINGS:
        left = heading == "domain"
        keep = left or heading.startswith("gain")
        table.add_column(heading, justify="left" if left else "right", no_wrap=keep)
    rows: dict[tuple[str, int], Figures] = {}
    for result in results:
        rows.setdefault((result.domain, result.shots), {})[result.system, result.metric] = result
    for (domain, shots), figures in rows.items():
        table.add_row(
            domain,
            str(shots),
            _percent(figures.get(("source", "accuracy"))),
            _percent(figures.get(("none", "accuracy"))),
            _percent(figures.get(("adapted", "accuracy"))),
            _gain(figures.get(("adapted", "gain"))),
            _percent(figures.get(("adapted", "units_updated")), " %"),
            _percent(figures.get(("adapted", "parameters_updated")), " %"),
            _number(figures.get(("adapted", "seconds"))),
            str(next(iter(figures.values())).episodes),
        )
    return table


def seen_unseen_table(results: Sequence[Result]) -> Table:
    """Return the table of accuracies on classes with and without source images, per system."""
    table = Table(title="accuracy on seen and unseen classes in %", box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for heading in ("domain", "shots", "system", "seen", "unseen", "harmonic mean\n[95 % interval]"):
        left = heading in ("domain", "system")
        table.add_column(heading, justify="left" if left else "right", no_wrap=left)
    rows: dict[tuple[str, int, str], dict[str, Result]] = {}
    for result in results:
        rows.setdefault((result.domain, result.shots, result.system), {})[result.metric] = result
    for (domain, shots, system), figures in rows.items():
        mean = figures.get("harmonic_mean")
        if mean is not None:
            interval = f"{_percent(mean)} [{100 * mean.low:.1f}, {100 * mean.high:.1f}]"
            sides = (_percent(figures.get(name)) for name in ("seen_accuracy", "unseen_accuracy"))
            table.add_row(domain, str(shots), system, *sides, interval)
    return table


def _percent(result: Result | None, unit: str = "") -> str:
    return "-" if result is None else f"{100 * result.value:.1f}{unit}"


def _gain(result: Result | None) -> str:
    if result is None:
        return "-"
    return f"{100 * result.value:+.1f} [{100 * result.low:+.1f}, {100 * result.high:+.1f}]"


def _number(result: Result | None) -> str:
    return "-" if result is None else f"{result.value:.2f}"

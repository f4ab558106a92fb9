"""The results of a measurement: a table for the terminal and ``results.json`` for everything else."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table

from modmeta.files import write_atomically
from modmeta.learners import Result

Figures = dict[tuple[str, str], Result]


def write_results(path: str | Path, results: Sequence[Result]) -> None:
    """Write results as a JSON list of records, whole or not at all.

    Raises:
        ValueError: if a figure is not finite.
    """
    records = [result.to_dict() for result in results]
    write_atomically(path, (json.dumps(records, indent=1, allow_nan=False) + "\n").encode())


def print_results(results: Sequence[Result]) -> None:
    """Print one row per domain and number of shots."""
    if results:
        Console().print(results_table(results))


def results_table(results: Sequence[Result]) -> Table:
    """Return the table of accuracy before and after adaptation, and of what the adaptation cost."""
    table = Table(title="accuracy in %, with the 95 % interval of the gain")
    table.add_column("domain")
    for heading in ("shots", "ways", "source", "before", "after", "gain", "units", "parameters", "seconds", "episodes"):
        table.add_column(heading, justify="right")
    rows: dict[tuple[str, int], Figures] = {}
    for result in results:
        rows.setdefault((result.domain, result.shots), {})[result.system, result.metric] = result
    for (domain, shots), figures in rows.items():
        first = next(iter(figures.values()))
        table.add_row(
            domain,
            str(shots),
            str(first.ways),
            _percent(figures.get(("source", "accuracy"))),
            _percent(figures.get(("none", "accuracy"))),
            _percent(figures.get(("adapted", "accuracy"))),
            _gain(figures.get(("adapted", "gain"))),
            _percent(figures.get(("adapted", "units_updated")), " %"),
            _percent(figures.get(("adapted", "parameters_updated")), " %"),
            _number(figures.get(("adapted", "seconds"))),
            str(first.episodes),
        )
    return table


def _percent(result: Result | None, unit: str = "") -> str:
    return "-" if result is None else f"{100 * result.value:.1f}{unit}"


def _gain(result: Result | None) -> str:
    if result is None:
        return "-"
    return f"{100 * result.value:+.1f} [{100 * result.low:+.1f}, {100 * result.high:+.1f}]"


def _number(result: Result | None) -> str:
    return "-" if result is None else f"{result.value:.2f}"

"""The report of a comparison: results.json, rows.csv, report.md and its plots, and a table for the terminal."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Sequence
from html import escape
from pathlib import Path

from rich.box import SIMPLE_HEAD
from rich.table import Table

from modmeta.errors import ModmetaError
from modmeta.evaluation.compare.figures import complete_rows, compute_results
from modmeta.evaluation.compare.hindsight import best_constants
from modmeta.evaluation.compare.plots import write_plots
from modmeta.evaluation.compare.rows import Row
from modmeta.evaluation.compare.settings import MEAN, Comparison
from modmeta.evaluation.results import write_results
from modmeta.evaluation.terminal import console
from modmeta.files import write_atomically
from modmeta.learners import Result

_COLUMNS = (
    "system", "domain", "shots", "draw", "ways", "accuracy", "nll", "parameters_updated", "backward_macs", "seconds",
)  # fmt: skip
_HEADINGS = (
    "system", "accuracy %", "NLL", "ECE %", "gain", "harmed %", "worst domain", "params %", "backward GMACs", "s",
)  # fmt: skip
_BY_DOMAIN = (
    ("Accuracy, %", "accuracy", ".1f"),
    ("Gain over the reference, points", "gain", "+.1f"),
    ("Episodes harmed, %", "harm_rate", ".1f"),
)
"""Tables with a column per domain: title, metric and format. The reference has no gain and no harm."""
_SUMMARISED = (
    "accuracy", "nll", "ece", "gain", "harm_rate", "parameters_updated", "backward_macs", "seconds",
)  # fmt: skip


class Lookup:
    """Results by system, domain, number of shots and metric."""

    def __init__(self, results: Iterable[Result]) -> None:
        self.by_key = {(r.system, r.domain, r.shots, r.metric): r for r in results}
        self.worst = {(r.system, r.shots): r for r in results if r.metric == "worst_gain"}

    def get(self, system: str, domain: str, shots: int, metric: str) -> Result | None:
        """Return a figure, if it was measured."""
        return self.by_key.get((system, domain, shots, metric))


def write_report(comparison: Comparison, rows: Sequence[Row], folder: Path) -> list[Result]:
    """Compute all figures, write them in every form, and print the means over the domains.

    Args:
        comparison: the settings.
        rows: what was measured; an episode that not all systems were measured on yet is left out, and the report
            says how many there are.
        folder: where to write.

    Returns:
        The figures.

    Raises:
        ModmetaError: if there is not one whole episode.
    """
    whole = complete_rows(rows, comparison)
    if not whole:
        raise ModmetaError(f"{folder} holds no episode that all systems were measured on; run without --report-only")
    results = compute_results(whole, comparison)
    write_results(folder / "results.json", results)
    write_atomically(folder / "rows.csv", _csv(whole).encode())
    plots = write_plots(comparison, results, folder)
    write_atomically(folder / "report.md", _markdown(comparison, whole, results, plots).encode())
    lookup = Lookup(results)
    for shots in comparison.shots:
        console().print(_table(comparison, lookup, shots))
    return results


def _csv(rows: Sequence[Row]) -> str:
    text = io.StringIO(newline="")
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(_COLUMNS)
    writer.writerows([getattr(row, name) for name in _COLUMNS] for row in rows)
    return text.getvalue()


def _table(comparison: Comparison, lookup: Lookup, shots: int) -> Table:
    table = Table(title=f"{shots} shots, mean over domains", box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for heading in _HEADINGS:
        left = heading in ("system", "worst domain")
        table.add_column(heading, justify="left" if left else "right", no_wrap=left or heading == "gain")
    for cells in _summary(comparison, lookup, shots):
        table.add_row(*cells)
    return table


def _summary(comparison: Comparison, lookup: Lookup, shots: int) -> list[tuple[str, ...]]:
    lines: list[tuple[str, ...]] = []
    for system in (*comparison.systems, *comparison.pseudo_systems):
        if lookup.get(system, MEAN, shots, "accuracy") is None:
            continue
        found = {metric: lookup.get(system, MEAN, shots, metric) for metric in _SUMMARISED}
        worst = lookup.worst.get((system, shots))
        lines.append(
            (
                _name(system, comparison),
                _value(found["accuracy"], 100, ".1f"),
                _value(found["nll"], 1, ".3f"),
                _value(found["ece"], 100, ".1f"),
                _with_interval(found["gain"], 100, "+.1f"),
                _value(found["harm_rate"], 100, ".0f"),
                "-" if worst is None else f"{worst.domain} {100 * worst.value:+.1f}",
                _value(found["parameters_updated"], 100, ".2f"),
                _value(found["backward_macs"], 1e-9, ".3f"),
                _value(found["seconds"], 1, ".3f"),
            )
        )
    return lines


def _markdown(comparison: Comparison, rows: Sequence[Row], results: Sequence[Result], plots: Sequence[str]) -> str:
    lookup = Lookup(results)
    lines = ["# Comparison", "", *_about(comparison, rows), ""]
    names = [*comparison.systems, *comparison.pseudo_systems]
    domains = [d for d in comparison.domains if any(r.domain == d for r in results)]
    for shots in [k for k in comparison.shots if any(r.shots == k for r in results)]:
        lines += [f"## {shots} shots", "", *_lines(_HEADINGS, _summary(comparison, lookup, shots)), ""]
        for title, metric, form in _BY_DOMAIN:
            body = [
                (_name(name, comparison),
                 *(_with_interval(lookup.get(name, d, shots, metric), 100, form) for d in (*domains, MEAN)))
                for name in names
                if metric == "accuracy" or name != comparison.reference
            ]  # fmt: skip
            lines += [f"{title}:", "", *_lines(("system", *domains, MEAN), body), ""] if body else []
        lines += _differences(comparison, lookup, shots) + _gaps(comparison, lookup, rows, shots)
    for plot in plots:
        lines += [f"![{plot}]({plot}.png)", ""]
    return "\n".join(lines)


def _about(comparison: Comparison, rows: Sequence[Row]) -> list[str]:
    measured = len({row.key[1:] for row in rows})
    asked = len(comparison.domains) * len(comparison.shots) * comparison.episodes
    support = ["The support has its true labels."]
    if comparison.unlabelled:
        support = ["The support has no labels."]
    elif comparison.flipped_labels:
        support = [f"{100 * comparison.flipped_labels:g} % of the support labels are turned into another class."]
    unfinished = [f"**Unfinished: {measured} of {asked} episodes.**"] if measured < asked else []
    hindsight = " Systems marked † choose among others with the query's labels: bounds, not methods."
    return [
        *unfinished,
        f"{len(comparison.systems)} systems on the same {measured} episodes (domains, numbers of shots and draws), "
        f"seed {comparison.seed}. {support[0]}",
        "",
        f"Gains are paired differences of accuracy to `{_text(comparison.reference)}`, in points; harmed is the share "
        "of episodes that end more than one point below it; the worst domain is that of the least mean gain. "
        "Brackets hold 95 % intervals over episodes, of a bootstrap within each domain, and of harm by Wilson's "
        "formula: they say nothing of the spread over trainings, and for a single episode the bootstrap has none. "
        "Costs are means: share of the backbone's parameters that were updated, multiply-accumulates of the backward "
        "passes, and seconds per adaptation, in which shared features of the frozen backbone are charged to every "
        "system that uses them." + (hindsight if comparison.pseudo_systems else ""),
    ]


def _differences(comparison: Comparison, lookup: Lookup, shots: int) -> list[str]:
    body = []
    for one, other in comparison.pairs:
        pair = f"{one} - {other}"
        accuracy = lookup.get(pair, MEAN, shots, "accuracy_difference")
        nll = lookup.get(pair, MEAN, shots, "nll_difference")
        body.append((pair, _with_interval(accuracy, 100, "+.2f"), _with_interval(nll, 1, "+.4f")))
    if not body:
        return []
    return ["Paired differences:", "", *_lines(("pair", "accuracy, points", "NLL, nats"), body), ""]


def _gaps(comparison: Comparison, lookup: Lookup, rows: Sequence[Row], shots: int) -> list[str]:
    lines = []
    for oracle, members in comparison.oracles.items():
        constant = best_constants(rows, members)[shots]
        body = []
        for system in comparison.systems:
            metrics = [f"{metric}_gap_closed/{oracle}" for metric in ("accuracy", "nll")]
            shares = [lookup.get(system, MEAN, shots, metric) for metric in metrics]
            body.append((system, *(_with_interval(share, 100, ".0f") for share in shares)))
        lines += [
            f"Share of the gap between `{_text(constant)}`, the best of {len(members)} systems as a constant choice, "
            f"and the oracle `{_text(oracle)}` that each system closes; a dash where the gap cannot be told from none:",
            "",
            *_lines(("system", "in accuracy, %", "in NLL, %"), body),
            "",
        ]
    return lines


def _name(system: str, comparison: Comparison) -> str:
    return f"{system} †" if system in comparison.pseudo_systems else system


def _value(result: Result | None, factor: float, form: str) -> str:
    return "-" if result is None else f"{factor * result.value:{form}}"


def _with_interval(result: Result | None, factor: float, form: str) -> str:
    if result is None:
        return "-"
    value, low, high = (f"{factor * x:{form}}" for x in (result.value, result.low, result.high))
    return f"{value} [{low}, {high}]"


def _lines(head: Sequence[str], body: Iterable[Sequence[str]]) -> list[str]:
    rows = [head, ["---"] * len(head), *([_text(cell) for cell in row] for row in body)]
    return [f"| {' | '.join(row)} |" for row in rows]


def _text(text: str) -> str:
    """Make a name that a user chose harmless in Markdown."""
    return escape(text, quote=False).replace("|", "\\|").replace("\n", " ")

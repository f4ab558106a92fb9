"""The report of an action table: ``results.json``, ``verdict.json``, ``gap.md``, and tables for the terminal."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.table import Table

from modmeta.evaluation.action_gap import (
    CONSTANT,
    CROSSED,
    NONE,
    ORACLE,
    ROWS,
    Band,
    Predictability,
    bands,
    gap_results,
    predictability,
)
from modmeta.evaluation.compare.settings import MEAN
from modmeta.evaluation.results import write_results
from modmeta.evaluation.terminal import console
from modmeta.files import write_atomically
from modmeta.learners import Result
from modmeta.learners.action_table import ActionTable

_HEADINGS = ("choice of the action", "accuracy %", "gain over none", "tempered NLL", "NLL")
_GAP = 0.02
_SHOTS = 5

Lookup = Mapping[tuple[str, str, int, str], Result]


def report_gap(table: ActionTable, folder: Path) -> dict[str, Any]:
    """Compute all figures of an action table, write and print them.

    Args:
        table: the logged episodes.
        folder: where the files go.

    Returns:
        The verdicts, which are what ``verdict.json`` holds.
    """
    predicted = predictability(table)
    results = gap_results(table, None if predicted is None else predicted.choices)
    found = verdicts(table, results, predicted)
    lookup = {(r.system, r.domain, r.shots, r.metric): r for r in results}
    cells = [(domain, band) for band in bands(table.shots) for domain in [*sorted(set(table.domains)), MEAN]]
    cells = [(domain, band) for domain, band in cells if (NONE, domain, band.low, "accuracy") in lookup]
    write_results(folder / "results.json", results)
    write_atomically(folder / "verdict.json", (json.dumps(found, indent=1, allow_nan=False) + "\n").encode())
    write_atomically(folder / "gap.md", _markdown(table, lookup, cells, found).encode())
    for domain, band in cells:
        shown = Table(title=_title(lookup, domain, band), box=SIMPLE_HEAD, title_justify="left")
        for heading in _HEADINGS:
            shown.add_column(heading, justify="left" if heading == _HEADINGS[0] else "right")
        for row in _rows(lookup, domain, band):
            shown.add_row(*row)
        console().print(shown)
    for line in _sentences(found):
        console().print(line)
    return found


def verdicts(table: ActionTable, results: Sequence[Result], predicted: Predictability | None) -> dict[str, Any]:
    """Return the two gates before a policy is worth training.

    E0, is there anything to win: on half of the domains or more the oracle is two points of accuracy or more above the
    best constant action, at five shots or the number nearest to it. E1, can it be foreseen: on domains that it was not
    fitted to the value model explains some variance, and its regret is at most half of the best constant action's.
    """
    band = min(bands(table.shots), key=lambda b: (max(b.low - _SHOTS, _SHOTS - b.high, 0), b.low))
    gaps: dict[str, dict[str, Any]] = {}
    for name, system in (("oracle", ORACLE), ("cross_fitted", CROSSED)):
        own = {
            r.domain: r
            for r in results
            if (r.system, r.shots, r.metric) == (f"{system} - {CONSTANT}", band.low, "accuracy_difference")
            and r.domain != MEAN
        }
        passed = sum(r.value >= _GAP for r in own.values())
        gaps[name] = {
            "gaps": {domain: [r.value, r.low, r.high] for domain, r in own.items()},
            "domains_passed": passed,
            "passed": 2 * passed >= len(own),
        }
    found: dict[str, Any] = {
        "episodes": len(table.episodes),
        "actions": len(table.actions),
        "E0": {"shots": str(band), "points": 100 * _GAP, **gaps},
        "E1": None,
    }
    if predicted is not None:
        found["E1"] = {
            "r2": list(predicted.r2),
            "r2_of_the_actions_means": predicted.r2_actions,
            "regret": list(predicted.regret),
            "constant_regret": list(predicted.constant_regret),
            "regret_ratio": list(predicted.ratio),
            "passed": predicted.r2[0] > 0 and predicted.ratio[0] <= 0.5,
        }
    return found


def _sentences(found: Mapping[str, Any]) -> list[str]:
    gate = found["E0"]
    lines = []
    for name, label in (("oracle", ORACLE), ("cross_fitted", CROSSED)):
        measured = gate[name]["gaps"].items()
        gaps = ", ".join(f"{d} {100 * v:+.1f} ({100 * a:+.1f} to {100 * b:+.1f})" for d, (v, a, b) in measured)
        lines.append(
            f"E0 at {gate['shots']} shots, {label} - {CONSTANT}: {gaps} points of accuracy; "
            f"{gate[name]['domains_passed']} of {len(gate[name]['gaps'])} domains reach {gate['points']:g}: "
            f"{_word(gate[name]['passed'])}."
        )
    one = found["E1"]
    if one is None:
        return [*lines, "E1: not to be told from a single domain."]
    lines.append(
        f"E1, value model on domains left out: R2 {_figure(one['r2'])} (the actions' means alone "
        f"{one['r2_of_the_actions_means']:.3f}), regret {_figure(one['regret'])} nats, best constant of the other "
        f"domains {_figure(one['constant_regret'])}, ratio {_figure(one['regret_ratio'], 2)}: {_word(one['passed'])}."
    )
    return lines


def _markdown(table: ActionTable, lookup: Lookup, cells: Sequence[tuple[str, Band]], found: Mapping[str, Any]) -> str:
    lines = [
        f"# Action grid: {len(table.actions)} actions on {len(table.episodes)} episodes",
        "",
        f"Split {table.header['split']}, seed {table.header['data']['seed']}. Choices go by the query's tempered loss. "
        f"Intervals are 95 %, by a bootstrap over episodes (10,000 resamples, seed 0), the choice of a constant fixed. "
        f"The oracle chooses on the images that it is judged on; cross-fitted, it chooses on the other half of them.",
        "",
        *(f"- {line}" for line in _sentences(found)),
    ]
    for domain, band in cells:
        lines += ["", f"## {_title(lookup, domain, band)}", "", f"| {' | '.join(_HEADINGS)} |", "|---|---|---|---|---|"]
        lines += [f"| {' | '.join(row)} |" for row in _rows(lookup, domain, band)]
    return "\n".join(lines) + "\n"


def _rows(lookup: Lookup, domain: str, band: Band) -> list[list[str]]:
    rows = []
    for system in ROWS:
        if (system, domain, band.low, "accuracy") not in lookup:
            continue
        gain = lookup.get((f"{system} - {NONE}", domain, band.low, "accuracy_difference"))
        cells = [lookup.get((system, domain, band.low, metric)) for metric in ("accuracy", "tempered_nll", "nll")]
        accuracy, tempered, plain = cells
        rows.append(
            [
                system,
                "-" if accuracy is None else f"{100 * accuracy.value:.1f}",
                "-" if gain is None else f"{100 * gain.value:+.1f} [{100 * gain.low:+.1f}, {100 * gain.high:+.1f}]",
                "-" if tempered is None else f"{tempered.value:.3f} [{tempered.low:.3f}, {tempered.high:.3f}]",
                "-" if plain is None else f"{plain.value:.3f}",
            ]
        )
    return rows


def _title(lookup: Lookup, domain: str, band: Band) -> str:
    return f"{domain}, {band} shots, {lookup[NONE, domain, band.low, 'accuracy'].episodes} episodes"


def _figure(value: Sequence[float], digits: int = 3) -> str:
    middle, low, high = value
    return f"{middle:.{digits}f} ({low:.{digits}f} to {high:.{digits}f})"


def _word(passed: bool) -> str:
    return "passed" if passed else "not passed"

"""Pseudo-systems that choose among systems with the query's labels: bounds, not methods."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence

from modmeta.evaluation.compare.rows import Row
from modmeta.evaluation.compare.settings import Comparison


def hindsight_rows(rows: Sequence[Row], comparison: Comparison) -> list[Row]:
    """Return the rows of the oracles and best constants of a comparison.

    Args:
        rows: of the systems, complete.
        comparison: names the pseudo-systems and what they choose from.
    """
    by_key = {row.key: row for row in rows}
    cells = list(dict.fromkeys(row.key[1:] for row in rows))
    found = []
    for name, members in comparison.oracles.items():
        for cell in cells:
            best = min((by_key[member, *cell] for member in members), key=lambda row: row.nll)
            found.append(dataclasses.replace(best, system=name))
    for name, members in comparison.best_constant.items():
        chosen = best_constants(rows, members)
        found += [dataclasses.replace(by_key[chosen[cell[1]], *cell], system=name) for cell in cells]
    return found


def best_constants(rows: Iterable[Row], members: Sequence[str]) -> Mapping[int, str]:
    """Return for each number of shots the system with the least mean query loss over all episodes."""
    totals: dict[int, dict[str, float]] = {}
    for row in rows:
        if row.system in members:
            by_system = totals.setdefault(row.shots, dict.fromkeys(members, 0.0))
            by_system[row.system] += row.nll
    return {shots: min(members, key=by_system.__getitem__) for shots, by_system in totals.items()}

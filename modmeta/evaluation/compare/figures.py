"""From rows to figures with intervals: per system, domain and number of shots, and over domains."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

import numpy as np

from modmeta.data.seeding import rng
from modmeta.evaluation.compare.hindsight import best_constants, hindsight_rows
from modmeta.evaluation.compare.rows import Row
from modmeta.evaluation.compare.settings import MEAN, Comparison
from modmeta.evaluation.compare.statistics import (
    calibration_error,
    episode_weights,
    interval,
    share_of_gap,
)
from modmeta.learners import Result
from modmeta.learners.metrics import harmed, share_interval

_AVERAGED = ("accuracy", "nll", "parameters_updated", "backward_macs", "seconds")

Figures = Mapping[tuple[str, str], np.ndarray]
"""``(system, metric)`` to the figure, ``(1 + R,)``."""


def complete_rows(rows: Sequence[Row], comparison: Comparison) -> list[Row]:
    """Return the rows of the asked-for episodes that all systems were measured on, in a fixed order."""
    by_key = {row.key: row for row in rows}
    cells = [
        (domain, shots, draw)
        for domain in comparison.domains
        for shots in comparison.shots
        for draw in range(comparison.episodes)
    ]
    whole = [cell for cell in cells if all((name, *cell) in by_key for name in comparison.systems)]
    return [by_key[name, *cell] for cell in whole for name in comparison.systems]


def compute_results(rows: Sequence[Row], comparison: Comparison) -> list[Result]:
    """Return every figure of a comparison.

    Args:
        rows: what :func:`complete_rows` returned.
        comparison: the settings.
    """
    everything = [*rows, *hindsight_rows(rows, comparison)]
    results: list[Result] = []
    for shots in comparison.shots:
        cells = {
            domain: found
            for domain in comparison.domains
            if (found := [row for row in everything if (row.domain, row.shots) == (domain, shots)])
        }
        if not cells:
            continue
        figures: dict[str, Figures] = {
            domain: _figures(found, comparison, domain, shots) for domain, found in cells.items()
        }
        first = next(iter(figures.values()))
        figures[MEAN] = {key: np.mean([each[key] for each in figures.values()], axis=0) for key in first}
        for domain, of_domain in figures.items():
            mine = cells[domain] if domain != MEAN else [row for found in cells.values() for row in found]
            count = len({(row.domain, row.draw) for row in mine})
            ways = round(sum(row.ways for row in mine) / len(mine))
            for (system, metric), figure in {**of_domain, **_pairs(of_domain, comparison)}.items():
                value = share_interval(float(figure[0]), count) if metric == "harm_rate" else interval(figure)
                results.append(Result(system, domain, shots, ways, metric, *value, count))
            if domain == MEAN:
                for (system, metric), figure in _gaps(of_domain, rows, comparison, shots).items():
                    results.append(Result(system, domain, shots, ways, metric, *interval(figure), count))
    return results + _worst_gains(results)


def _worst_gains(results: Sequence[Result]) -> list[Result]:
    """Return for each system and number of shots its gain on the domain where that is least."""
    gains: dict[tuple[str, int], list[Result]] = {}
    for result in results:
        if result.metric == "gain" and result.domain != MEAN:
            gains.setdefault((result.system, result.shots), []).append(result)
    worst = (min(mine, key=lambda result: result.value) for mine in gains.values())
    return [dataclasses.replace(result, metric="worst_gain") for result in worst]


def _figures(rows: Sequence[Row], comparison: Comparison, domain: str, shots: int) -> dict[tuple[str, str], np.ndarray]:
    by_system: dict[str, list[Row]] = {}
    for row in rows:
        by_system.setdefault(row.system, []).append(row)
    count = len(by_system[comparison.reference])
    # The same resamples for all systems: that is what keeps them paired.
    weights = episode_weights(count, rng(comparison.seed, "bootstrap", domain, shots))
    reference = np.array([row.accuracy for row in by_system[comparison.reference]])
    figures: dict[tuple[str, str], np.ndarray] = {}
    for system, mine in by_system.items():
        assert len(mine) == count
        columns = {metric: np.array([float(getattr(row, metric)) for row in mine]) for metric in _AVERAGED}
        if system != comparison.reference:
            columns["gain"] = columns["accuracy"] - reference
            columns["harm_rate"] = harmed(columns["accuracy"], reference).astype(float)
        # One product for all columns is several times faster than one each.
        averages = zip(columns, _average(weights, columns), strict=True)
        figures |= {(system, metric): figure for metric, figure in averages}
        figures[system, "ece"] = calibration_error(weights, np.array([row.bins for row in mine]))
    return figures


def _average(weights: np.ndarray, columns: Mapping[str, np.ndarray]) -> np.ndarray:
    return np.ascontiguousarray((weights @ np.stack(list(columns.values()), axis=1)).T)


def _pairs(figures: Figures, comparison: Comparison) -> dict[tuple[str, str], np.ndarray]:
    found = {}
    for one, other in comparison.pairs:
        for metric in ("accuracy", "nll"):
            found[f"{one} - {other}", f"{metric}_difference"] = figures[one, metric] - figures[other, metric]
    return found


def _gaps(
    figures: Figures, rows: Sequence[Row], comparison: Comparison, shots: int
) -> dict[tuple[str, str], np.ndarray]:
    """Return the shares of the gap between the best constant of an oracle's systems and the oracle."""
    found = {}
    for oracle, members in comparison.oracles.items():
        constant = best_constants(rows, members)[shots]
        for metric in ("accuracy", "nll"):
            for system in comparison.systems:
                share = share_of_gap(figures[system, metric], figures[constant, metric], figures[oracle, metric])
                if share is not None:
                    found[system, f"{metric}_gap_closed/{oracle}"] = share
    return found

"""What there is to win by choosing: the gap between the best constant action and the best one per episode."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from modmeta.data.seeding import rng
from modmeta.evaluation.compare.settings import MEAN
from modmeta.evaluation.compare.statistics import episode_weights, interval
from modmeta.learners import Result
from modmeta.learners.action_table import ActionTable
from modmeta.learners.value_model import LIMIT, changes, fit_value_model

NONE = "none"
CONSTANT = "best constant"
TRANSFERRED = "best constant of the other domains"
VALUE = "value model of the other domains"
PER_DOMAIN = "best per domain"
CROSSED = "oracle, cross-fitted"
ORACLE = "oracle"
ROWS = (NONE, TRANSFERRED, CONSTANT, VALUE, PER_DOMAIN, CROSSED, ORACLE)
GAPS = ((ORACLE, CONSTANT), (CROSSED, CONSTANT))

_FIGURES = {"accuracy": "accuracy", "nll": "nll", "tempered_nll": "tempered_nll"}


@dataclass(frozen=True)
class Band:
    """A range of numbers of shots that are reported together."""

    low: int
    high: int

    def __str__(self) -> str:
        return str(self.low) if self.low == self.high else f"{self.low}-{self.high}"


@dataclass(frozen=True)
class Predictability:
    """How well a value model does on domains that it was not fitted to, each left out in turn.

    Attributes:
        r2: share of the variance of the changes that it explains, changes clipped at :data:`LIMIT`; with interval.
        r2_actions: the same of a model that knows the actions' mean changes only.
        regret: mean loss in nats of its choice beyond the oracle's.
        constant_regret: that of the constant action which is best on the other domains.
        ratio: of the two, with interval.
        choices: ``(E,)`` its choice per episode.
    """

    r2: tuple[float, float, float]
    r2_actions: float
    regret: tuple[float, float, float]
    constant_regret: tuple[float, float, float]
    ratio: tuple[float, float, float]
    choices: Tensor


def bands(shots: Tensor) -> list[Band]:
    """Return the numbers of shots one by one, or by octaves where there are more than four."""
    found = sorted(set(shots.tolist()))
    if len(found) <= 4:
        return [Band(one, one) for one in found]
    octaves: dict[int, list[int]] = {}
    for one in found:
        octaves.setdefault(one.bit_length(), []).append(one)
    return [Band(own[0], own[-1]) for own in octaves.values()]


def gap_results(table: ActionTable, predicted: Tensor | None = None) -> list[Result]:
    """Return accuracy and losses of every way to choose an action, per domain and number of shots.

    All choices go by the tempered loss. An oracle chooses with the very images that it is judged on, so that it gains
    on noise alone; the cross-fitted one chooses by one half of the query and is judged on the other, so that it falls
    short of the best. What can be won lies between them. Intervals are of a bootstrap over episodes (10,000 resamples,
    seed 0) with the choices of constants held fixed. A :class:`Result` of a band of shots names its lowest.

    Args:
        table: the logged episodes.
        predicted: ``(E,)`` what a value model of the other domains chooses; None leaves it out.
    """
    results: list[Result] = []
    for band in bands(table.shots):
        rows = ((table.shots >= band.low) & (table.shots <= band.high)).nonzero().flatten()
        by_domain: dict[str, list[int]] = {}
        for row in rows.tolist():
            by_domain.setdefault(table.domains[row], []).append(row)
        figures: dict[str, dict[tuple[str, str], np.ndarray]] = {}
        for domain in sorted(by_domain):
            mine = torch.tensor(by_domain[domain])
            weights = episode_weights(len(mine), rng(0, "bootstrap", domain, band.low))
            columns = _columns(table, rows, mine, len(by_domain) > 1, predicted)
            figures[domain] = {key: weights @ values.numpy() for key, values in columns.items()}
        keys = next(iter(figures.values())).keys()
        figures[MEAN] = {key: np.mean([each[key] for each in figures.values()], axis=0) for key in keys}
        for domain, own in figures.items():
            count = len(rows) if domain == MEAN else len(by_domain[domain])
            members = rows if domain == MEAN else torch.tensor(by_domain[domain])
            ways = round(float(table.ways[members].double().mean()))
            for (system, metric), figure in (own | _differences(own)).items():
                results.append(Result(system, domain, band.low, ways, metric, *interval(figure), count))
    return results


def predictability(table: ActionTable) -> Predictability | None:
    """Fit a value model without each domain in turn and judge it there; None where there is but one domain."""
    names = sorted(set(table.domains))
    if len(names) < 2:
        return None
    true = changes(table)
    guess, means = torch.zeros_like(true), torch.zeros_like(true)
    constant = torch.zeros(len(true), dtype=torch.long)
    for name in names:
        out = torch.tensor([domain == name for domain in table.domains])
        guess[out] = fit_value_model(table, (~out).nonzero().flatten()).changes(table)[out]
        means[out] = true[~out].clamp(-LIMIT, LIMIT).mean(0)
        constant[out] = _best(true[~out])
    target, best = true.clamp(-LIMIT, LIMIT), true.amin(1)
    choices = guess.argmin(1)
    weights = episode_weights(len(true), rng(0, "bootstrap", "value model"))
    spread = (target - target.mean()).square().sum(1)

    def explained(prediction: Tensor) -> np.ndarray:
        whole = weights @ spread.numpy()
        # Where nothing varies there is nothing to explain, and 0 of it is explained.
        return (whole - weights @ (prediction - target).square().sum(1).numpy()) / np.maximum(whole, 1e-12)

    regret = weights @ (_picked(true, choices) - best).numpy()
    constant_regret = weights @ (_picked(true, constant) - best).numpy()
    return Predictability(
        interval(explained(guess)),
        float(explained(means)[0]),
        interval(regret),
        interval(constant_regret),
        interval(regret / np.maximum(constant_regret, 1e-9)),
        choices,
    )


def _columns(
    table: ActionTable, band: Tensor, mine: Tensor, several: bool, predicted: Tensor | None
) -> dict[tuple[str, str], Tensor]:
    """Return by system and metric the figure of each episode of one domain ``(n,)``."""
    losses = table.figures["tempered_nll"]
    others = band[~torch.isin(band, mine)]

    def everywhere(action: int) -> Tensor:
        return torch.full((len(mine),), action)

    choices = {
        NONE: everywhere(table.idle),
        CONSTANT: everywhere(_best(losses[band])),
        PER_DOMAIN: everywhere(_best(losses[mine])),
        ORACLE: losses[mine].argmin(1),
    }
    if several:
        choices[TRANSFERRED] = everywhere(_best(losses[others]))
    if predicted is not None:
        choices[VALUE] = predicted[mine]
    found = {
        (system, metric): _picked(table.figures[column][mine], chosen)
        for system, chosen in choices.items()
        for metric, column in _FIGURES.items()
    }
    halves = table.figures["half_tempered_nll"][mine].argmin(1)  # (n, 2)
    for metric in ("accuracy", "nll"):
        judged = table.figures[f"half_{metric}"][mine]
        crossed = [_picked(judged[..., 1 - half], halves[:, half]) for half in (0, 1)]
        found[CROSSED, metric] = torch.stack(crossed).mean(0)
    return found


def _differences(figures: Mapping[tuple[str, str], np.ndarray]) -> dict[tuple[str, str], np.ndarray]:
    pairs = [*GAPS, *((system, NONE) for system in ROWS if system != NONE)]
    return {
        (f"{one} - {other}", f"{metric}_difference"): figures[one, metric] - figures[other, metric]
        for one, other in pairs
        for metric in _FIGURES
        if (one, metric) in figures
    }


def _best(losses: Tensor) -> int:
    return int(losses.mean(0).argmin())


def _picked(values: Tensor, choices: Tensor) -> Tensor:
    return values.gather(1, choices[:, None])[:, 0]

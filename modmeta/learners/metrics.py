"""Figures per system, domain and number of shots over episodes, gathered over all ranks."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchmetrics import CatMetric
from torchmetrics.functional.classification import multiclass_accuracy

HARM = 0.01
"""An episode is harmed when its accuracy ends more than this below that of the reference."""
_ROUNDING = 1e-6  # accuracies are means in float32
_BINS = 15
_RESAMPLES = 1000
_PAIRED = ("gain", "harm_rate")
Values = TypeVar("Values", Tensor, np.ndarray)


def harmed(accuracy: Values, reference: Values) -> Values:
    """Return for each episode whether its accuracy is more than ``HARM`` below the reference's."""
    return reference - accuracy > HARM + _ROUNDING


@dataclass(frozen=True)
class Result:
    """One measured figure with its 95 % interval; the record of every ``results.json``."""

    system: str
    domain: str
    shots: int
    ways: int
    metric: str
    value: float
    low: float
    high: float
    episodes: int

    def to_dict(self) -> dict[str, Any]:
        """Return plain data."""
        return asdict(self)


class EpisodeMetrics(nn.Module):
    """Collects one row of figures per episode for every system, domain and number of shots.

    The cells are fixed beforehand, so that all ranks gather the same ones in the same order.

    Args:
        systems: what is compared, ``"none"`` (no adaptation) among them.
        domains: the domains of the episodes.
        shots: their numbers of shots.
        facts: names of further figures of a system's row, such as seconds.
        scored: the metrics that are scored per episode; gain and harm are paired with the system ``"none"``.
    """

    scored = ("accuracy", "nll", *_PAIRED)

    def __init__(
        self,
        systems: Iterable[str],
        domains: Iterable[str],
        shots: Iterable[int],
        facts: Mapping[str, tuple[str, ...]],
    ) -> None:
        super().__init__()
        self.facts = facts
        self.cells = [(s, d, k) for s in systems for d in domains for k in shots]
        self._rows = [CatMetric() for _ in self.cells]
        self.rows = nn.ModuleList(self._rows)
        for (system, _, _), metric in zip(self.cells, self._rows, strict=True):
            # A rank that meets no episode of a cell must still take part in gathering its rows.
            metric.update(torch.full((1, self._width(system)), -1.0, dtype=torch.double))

    def update(
        self,
        domain: str,
        shots: int,
        index: int,
        labels: Tensor,
        logits: Mapping[str, Tensor],
        facts: Mapping[str, Any],
    ) -> None:
        """Add one episode.

        Args:
            domain: its domain.
            shots: its number of shots.
            index: its number, which orders the rows whatever rank they come from.
            labels: ``(Q,)`` of the query.
            logits: per system ``(Q, C)``.
            facts: per system the further figures, by name.
        """
        before = _accuracy(logits["none"], labels)
        for system, scores in logits.items():
            accuracy = _accuracy(scores, labels)
            nll = F.cross_entropy(scores.double(), labels)
            further = [float(facts[system][name]) for name in self.facts.get(system, ())]
            row = [
                float(index),
                float(scores.shape[1]),
                float(accuracy),
                float(nll),
                float(accuracy - before),
                float(harmed(accuracy, before)),
                *further,
            ]
            bins = calibration_bins(scores.double().softmax(-1), labels)
            metric = self._rows[self.cells.index((system, domain, shots))]
            figures = torch.cat([torch.tensor(row, dtype=torch.double), bins.flatten().cpu()])
            metric.update(figures[None].to(metric.device))

    def compute(self) -> list[Result]:
        """Return all figures; a cell without episodes gives none."""
        results: list[Result] = []
        for (system, domain, shots), metric in zip(self.cells, self._rows, strict=True):
            rows = metric.compute()
            rows = rows.reshape(-1, self._width(system)).cpu()
            rows = rows[rows[:, 0] >= 0]
            if not len(rows):
                continue
            rows = rows[rows[:, 0].argsort()]
            names = (*self.scored, *self.facts.get(system, ()))
            ways = round(float(rows[:, 1].mean()))
            for name, values in zip(names, rows[:, 2 : 2 + len(names)].T, strict=True):
                if name in _PAIRED and system == "none":
                    continue
                share = name == "harm_rate"
                found = share_interval(float(values.mean()), len(values)) if share else interval(values)
                results.append(Result(system, domain, shots, ways, name, *found, len(rows)))
            bins = rows[:, 2 + len(names) :].reshape(len(rows), _BINS, 3)
            results.append(Result(system, domain, shots, ways, "ece", *_ece_interval(bins), len(rows)))
        return results

    def _width(self, system: str) -> int:
        return 2 + len(self.scored) + len(self.facts.get(system, ())) + 3 * _BINS


def interval(values: Tensor) -> tuple[float, float, float]:
    """Return the mean and its 95 % interval under the normal approximation."""
    mean = float(values.mean())
    half = 1.96 * float(values.std(correction=1)) / len(values) ** 0.5 if len(values) > 1 else 0.0
    return mean, mean - half, mean + half


def share_interval(share: float, count: int) -> tuple[float, float, float]:
    """Return a share of episodes and its 95 % interval, which has a width even where the share is none.

    Wilson, "Probable inference, the law of succession, and statistical inference", JASA 1927.

    Args:
        share: how many of the episodes, in 0..1.
        count: number of episodes.
    """
    square = 1.96**2 / count
    middle = (share + square / 2) / (1 + square)
    half = (share * (1 - share) * square + square**2 / 4) ** 0.5 / (1 + square)
    return share, min(max(middle - half, 0.0), share), max(min(middle + half, 1.0), share)


def calibration_bins(probabilities: Tensor, labels: Tensor) -> Tensor:
    """Return ``(15, 3)``: per confidence bin the count, the sum of confidences and the number of hits."""
    confidence, prediction = probabilities.max(-1)
    bins = torch.clamp((confidence * _BINS).ceil().long() - 1, 0, _BINS - 1)
    values = torch.stack([torch.ones_like(confidence), confidence, (prediction == labels).to(confidence)], dim=1)
    return torch.zeros(_BINS, 3, dtype=confidence.dtype, device=confidence.device).index_add(0, bins, values)


def expected_calibration_error(bins: Tensor) -> Tensor:
    """Return the expected calibration error of bins ``(..., 15, 3)``: Guo et al., ICML 2017."""
    total = bins[..., 0].sum(-1).clamp_min(1)
    return (bins[..., 1] - bins[..., 2]).abs().sum(-1) / total


def bootstrap_interval(value: float, resampled: Tensor) -> tuple[float, float, float]:
    """Return a figure and its 95 % interval, the percentiles of what it is in resamples ``(n,)``."""
    low, high = resampled.quantile(torch.tensor([0.025, 0.975], dtype=resampled.dtype)).tolist()
    return value, min(low, value), max(high, value)


def _ece_interval(bins: Tensor) -> tuple[float, float, float]:
    value = float(expected_calibration_error(bins.sum(0)))
    generator = torch.Generator().manual_seed(0)
    picks = torch.randint(len(bins), (_RESAMPLES, len(bins)), generator=generator)
    weights = torch.zeros(_RESAMPLES, len(bins), dtype=bins.dtype).scatter_add(
        1, picks, torch.ones_like(picks, dtype=bins.dtype)
    )
    resampled = expected_calibration_error((weights @ bins.flatten(1)).unflatten(1, (_BINS, 3)))
    return bootstrap_interval(value, resampled)


def _accuracy(logits: Tensor, labels: Tensor) -> Tensor:
    return multiclass_accuracy(logits, labels, num_classes=logits.shape[1], average="micro")

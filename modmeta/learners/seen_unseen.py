"""Figures of generalised zero-shot learning: accuracy on seen classes, on unseen ones, and their harmonic mean."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torchmetrics import CatMetric
from torchmetrics.functional.classification import multiclass_accuracy

from modmeta.adaptation.bilinear import harmonic_mean
from modmeta.learners.metrics import EpisodeMetrics, Result, bootstrap_interval, interval

KINDS = ("seen_accuracy", "unseen_accuracy")
_ABSENT = -1.0
_RESAMPLES = 1000


class SeenUnseenMetrics(EpisodeMetrics):
    """The figures of every learner, and those on seen and unseen classes.

    An episode's accuracy on either is the mean over its classes, among the labels of all of them. The harmonic mean is
    that of the two means over the episodes: Xian et al., "Zero-Shot Learning - A Comprehensive Evaluation of the Good,
    the Bad and the Ugly", TPAMI 2019. The facts of a system may hold both accuracies.

    Args:
        systems: what is compared, ``"none"`` among them.
        domains: the domains of the episodes.
        shots: their numbers of shots.
        facts: names of further figures of a system's row.
    """

    def __init__(
        self,
        systems: Iterable[str],
        domains: Iterable[str],
        shots: Iterable[int],
        facts: Mapping[str, tuple[str, ...]],
    ) -> None:
        super().__init__(systems, domains, shots, facts)
        self._sides = [CatMetric() for _ in self.cells]
        self.sides = nn.ModuleList(self._sides)
        for metric in self._sides:
            # A rank that meets no episode of a cell must still take part in gathering its rows.
            metric.update(torch.full((1, 1 + len(KINDS)), -1.0, dtype=torch.double))

    def update(
        self,
        domain: str,
        shots: int,
        index: int,
        labels: Tensor,
        logits: Mapping[str, Tensor],
        facts: Mapping[str, Any],
    ) -> None:
        """Add one episode; the arguments are those of :meth:`EpisodeMetrics.update`."""
        super().update(domain, shots, index, labels, logits, facts)
        for system in logits:
            row = [float(index), *(float(facts.get(system, {}).get(kind, _ABSENT)) for kind in KINDS)]
            metric = self._sides[self.cells.index((system, domain, shots))]
            metric.update(torch.tensor([row], dtype=torch.double, device=metric.device))

    def compute(self) -> list[Result]:
        """Return all figures; a cell whose episodes hold no class of a kind has no figure of it."""
        results = super().compute()
        ways = {(r.system, r.domain, r.shots): r.ways for r in results}
        for cell, metric in zip(self.cells, self._sides, strict=True):
            rows = metric.compute().reshape(-1, 1 + len(KINDS)).cpu()
            rows = rows[rows[:, 0] >= 0]
            values = rows[rows[:, 0].argsort()][:, 1:]
            for kind, column in zip(KINDS, values.T, strict=True):
                present = column[column != _ABSENT]
                if len(present):
                    results.append(Result(*cell, ways[cell], kind, *interval(present), len(present)))
            both = values[(values != _ABSENT).all(1)]
            if len(both):
                results.append(Result(*cell, ways[cell], "harmonic_mean", *harmonic_interval(both), len(both)))
        return results


def seen_unseen(logits: Tensor, labels: Tensor, seen: Sequence[bool]) -> dict[str, float]:
    """Return the mean accuracy over seen classes, and over unseen ones; of either only where there are any.

    Args:
        logits: ``(Q, C)``.
        labels: ``(Q,)``.
        seen: for each of the ``C`` classes.
    """
    accuracy = multiclass_accuracy(logits, labels, num_classes=len(seen), average="none")
    there = torch.zeros(len(seen), dtype=torch.bool, device=labels.device).index_fill(0, labels, True)
    mask = torch.tensor(seen, device=labels.device)
    sides = dict(zip(KINDS, (mask & there, ~mask & there), strict=True))
    return {kind: float(accuracy[side].mean()) for kind, side in sides.items() if bool(side.any())}


def harmonic_interval(values: Tensor) -> tuple[float, float, float]:
    """Return the harmonic mean of the means of two columns ``(n, 2)``, and its 95 % interval by bootstrap over rows."""
    value = float(harmonic_mean(*values.mean(0)))
    generator = torch.Generator().manual_seed(0)
    picks = torch.randint(len(values), (_RESAMPLES, len(values)), generator=generator)
    resampled = harmonic_mean(*values[picks].mean(1).unbind(1))
    return bootstrap_interval(value, resampled)

"""The closed form of features and class attributes, and its strengths by leaving out domains and classes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor
from torch.nn import functional as F

_FEATURE_RIDGES = (1e-4, 1e-3, 1e-2, 1e-1)
_ATTRIBUTE_RIDGES = (1e-3, 1e-2, 1e-1, 1.0)
_PENALTIES = (0.0, *(2.0 ** (step / 4) for step in range(-40, 5)))
_SCALES = tuple(2.0**step for step in range(1, 10))


@dataclass(frozen=True)
class Forms:
    """Bilinear forms, and what their scores need to become logits.

    Attributes:
        forms: ``(K + 1, F + 1, D, A)``: of all domains, and without each; of all classes, and without each fold.
        penalty: taken off the scores of classes that a form was fitted to, a scalar.
        scale: factor on the scores, a scalar.
    """

    forms: Tensor
    penalty: Tensor
    scale: Tensor


def fit_forms(xs: Sequence[Tensor], ys: Sequence[Tensor], s: Tensor, folds: int) -> Forms:
    """Fit the forms of all domains and classes and those without each.

    Ridge strengths and penalty have the largest harmonic mean of the accuracies on seen and unseen classes in domains
    and folds that are left out, and the scale the smallest loss there. Class ``c`` is in fold ``c % folds``.

    Args:
        xs: features ``(n, D)`` of each domain.
        ys: their labels ``(n,)``.
        s: ``(C, A)`` attributes of the classes.
        folds: number of folds of the classes.
    """
    several = len(xs) > 1
    # The halves of a single domain stand in for domains, to judge by images that were not fitted to.
    judged = list(zip(xs, ys, strict=True)) if several else [(xs[0][half::2], ys[0][half::2]) for half in (0, 1)]
    moments = _Moments([x for x, _ in judged], [y for _, y in judged], s, folds)
    places = [(k, f) for k in range(len(judged)) for f in range(folds)]
    fold_of = torch.arange(len(s), device=s.device) % folds

    def scores(k: int, f: int, ridges: tuple[float, float]) -> Tensor:
        return judged[k][0] @ moments.form(k, f, *ridges) @ s.T

    means = {}
    for ridges in ((one, other) for one in _FEATURE_RIDGES for other in _ATTRIBUTE_RIDGES):
        found = [calibration(scores(k, f, ridges), judged[k][1], fold_of != f, _PENALTIES) for k, f in places]
        means[ridges] = torch.stack(found).mean(0)
    ridges = max(means, key=lambda pair: float(means[pair].max()))
    penalty = _PENALTIES[int(means[ridges].argmax())]
    losses = [
        sum(F.cross_entropy(scale * (scores(k, f, ridges) - penalty * (fold_of != f)), judged[k][1]) for k, f in places)
        for scale in _SCALES
    ]
    scale = _SCALES[int(torch.stack([torch.as_tensor(loss) for loss in losses]).argmin())]
    without = [None, *(range(len(xs)) if several else ())]
    forms = [torch.stack([moments.form(k, f, *ridges) for f in (None, *range(folds))]) for k in without]
    return Forms(torch.stack(forms), s.new_tensor(penalty), s.new_tensor(scale))


def calibration(scores: Tensor, labels: Tensor, seen: Tensor, penalties: Sequence[float]) -> Tensor:
    """Return the harmonic mean of the accuracies on seen and unseen classes ``(P,)`` for every penalty.

    Args:
        scores: ``(n, C)``.
        labels: ``(n,)``.
        seen: ``(C,)`` bool, the classes that a penalty is taken off.
        penalties: to try.
    """
    (high, first), (low, second) = (scores.masked_fill(~mask, -torch.inf).max(1) for mask in (seen, ~seen))
    unseen_wins = low[:, None] > high[:, None] - scores.new_tensor(penalties)
    right = torch.where(unseen_wins, (second == labels)[:, None], (first == labels)[:, None]).to(scores)
    images = F.one_hot(labels, len(seen)).to(scores)
    accuracy, there = images.T @ right / images.sum(0).clamp_min(1)[:, None], images.sum(0) > 0
    means = [accuracy[there & side].sum(0) / (there & side).sum().clamp_min(1) for side in (seen, ~seen)]
    return harmonic_mean(*means)


def bilinear_ridge(
    gram: Tensor, cross: Tensor, attributes: Tensor, feature_ridge: float, attribute_ridge: float
) -> Tensor:
    """Return the form ``V (D, A)`` that turns ``n`` features ``X`` into targets ``Y`` of ``C`` classes.

    It minimises ``|X V S' - Y|^2 / nC + f |V S'|^2 / C + a |X V|^2 / n + f a |V|^2``, whose solution is
    ``(X'X / n + f)^-1 X'Y S / nC (S'S / C + a)^-1``: Romera-Paredes and Torr, "An embarrassingly simple approach to
    zero-shot learning", ICML 2015.

    Args:
        gram: ``X'X / n``, ``(D, D)``.
        cross: ``X'Y / n``, ``(D, C)``.
        attributes: ``S``, ``(C, A)``.
        feature_ridge: ``f``, above 0.
        attribute_ridge: ``a``, above 0.
    """
    return attribute_side(feature_side(gram, cross, attributes, feature_ridge), attributes, attribute_ridge)


def feature_side(gram: Tensor, cross: Tensor, attributes: Tensor, ridge: float) -> Tensor:
    """Return the left part of the solution, ``(X'X / n + f)^-1 X'Y S / nC``: all that depends on features."""
    return _ridge(gram, cross @ attributes / len(attributes), ridge)


def attribute_side(half: Tensor, attributes: Tensor, ridge: float) -> Tensor:
    """Return the solution, given its left part."""
    return _ridge(attributes.T @ attributes / len(attributes), half.T, ridge).T


def harmonic_mean(seen: Tensor, unseen: Tensor) -> Tensor:
    """Return the harmonic mean of accuracies of any shape; 0 where both are 0.

    Xian et al., "Zero-Shot Learning - A Comprehensive Evaluation of the Good, the Bad and the Ugly", TPAMI 2019.
    """
    total = seen + unseen
    return torch.where(total > 0, 2 * seen * unseen / total.clamp_min(torch.finfo(total.dtype).tiny), 0.0)


def _ridge(gram: Tensor, cross: Tensor, strength: float) -> Tensor:
    return torch.linalg.solve(gram + strength * torch.eye(len(gram), dtype=gram.dtype, device=gram.device), cross)


class _Moments:
    """What a fit needs of the features, per domain and fold of the classes, so that any of them can be left out."""

    def __init__(self, xs: Sequence[Tensor], ys: Sequence[Tensor], s: Tensor, folds: int) -> None:
        self.s, self.folds = s, folds
        inside = [[x[y % folds == f] for f in range(folds)] for x, y in zip(xs, ys, strict=True)]
        self.count = [[len(part) for part in parts] for parts in inside]
        self.gram = [[part.T @ part for part in parts] for parts in inside]
        # Sums per class: the mean of the targets depends on which classes are there.
        self.sums = [x.T @ F.one_hot(y, len(s)).to(x) for x, y in zip(xs, ys, strict=True)]
        self.half = cache(self._half)

    def form(self, without: int | None, fold: int | None, feature_ridge: float, attribute_ridge: float) -> Tensor:
        """Return the form of all domains and classes but some."""
        return attribute_side(self.half(without, fold, feature_ridge), self.s[self._classes(fold)], attribute_ridge)

    def _half(self, without: int | None, fold: int | None, feature_ridge: float) -> Tensor:
        classes, folds = self._classes(fold), [f for f in range(self.folds) if f != fold]
        gram, cross = [], []
        for k in range(len(self.gram)):
            if k == without:
                continue
            # Domains weigh the same, however many images each has.
            count = max(1, sum(self.count[k][f] for f in folds))
            gram.append(torch.stack([self.gram[k][f] for f in folds]).sum(0) / count)
            sums = self.sums[k][:, classes] / count
            cross.append(sums - sums.mean(1, keepdim=True))
        return feature_side(torch.stack(gram).mean(0), torch.stack(cross).mean(0), self.s[classes], feature_ridge)

    def _classes(self, fold: int | None) -> list[int]:
        return [c for c in range(len(self.s)) if c % self.folds != fold]

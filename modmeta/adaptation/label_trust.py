"""How far the labels of a support set can be trusted, from which images to learn, and how much."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from modmeta.adaptation.plan import Plan

_ROUNDING = 1e-6  # a label that has exactly chance is not doubted
_HELD_BACK_RIDGE = 4.0  # times what is planned, and four times the unadapted head's at least


@dataclass(frozen=True, eq=False)
class LabelTrust:
    """What heads that have not seen an image say of its label, and what follows for learning.

    Attributes:
        expected: expected share of wrong labels.
        reckoned: share of wrong labels that learning allows for.
        trust: probability that no larger share than that is wrong.
        believed: the images to learn from ``(S,)``, bool.
        learning: factor on learning rates: the trust in the believed ones, and 0 where that is below one half.
    """

    expected: float
    reckoned: float
    trust: float
    believed: Tensor
    learning: float

    @property
    def doubted(self) -> bool:
        """Whether the labels are trusted together less than one is before anything is seen of it."""
        return _doubted(self.trust, self.reckoned)

    def holds_back(self, labels: Tensor, ways: int) -> bool:
        """Return whether the head on adapted features is to be held back.

        It is where the labels are doubted, and where a class has no image to believe in: what is learned from the
        others says of it only that it is none of them.

        Args:
            labels: of the support ``(S,)``.
            ways: number of classes.
        """
        return self.doubted or self.lacks(labels, ways)

    def lacks(self, labels: Tensor, ways: int) -> bool:
        """Return whether a class has no image to believe in.

        Args:
            labels: of the support ``(S,)``.
            ways: number of classes.
        """
        return len(labels[self.believed].unique()) < ways

    @staticmethod
    def temper(plan: Plan) -> Plan:
        """Return a plan whose head is held back.

        Features that were adapted to labels hold what these say, and a head that is fitted to the same labels says it
        again. A policy whose training saw right labels of all classes alone may have learned to trust them more than
        the unadapted model's head does: the factor on the ridge strength becomes four times what was planned, and four
        at least.
        """
        return replace(plan, ridge=_HELD_BACK_RIDGE * plan.ridge.clamp_min(1.0))

    def to_dict(self) -> dict[str, float]:
        """Return what is plain data."""
        return {"expected": self.expected, "reckoned": self.reckoned, "trust": self.trust}


def label_trust(doubt: Tensor, reckoned: float) -> LabelTrust:
    """Sum up the doubts in single labels.

    As long as the labels are trusted together as one is before anything is seen of it, ``1 - reckoned``, all are
    learned from. Otherwise those are left out whose label speaks against itself: the doubt exceeds ``reckoned``, which
    it does where the label has less than chance among the classes. Where labels are right such images are the ones
    to learn most from, so none is left out of a support that there is little to say against.

    Args:
        doubt: how likely every label is wrong ``(S,)``, the labels being wrong independently of each other.
        reckoned: share of wrong labels that learning allows for.
    """
    trust = _trust(doubt, reckoned)
    believed = torch.ones_like(doubt, dtype=torch.bool)
    learning = trust
    if _doubted(trust, reckoned):
        believed = doubt <= reckoned + _ROUNDING
        learning = _trust(doubt[believed], reckoned) if believed.any() else 0.0
    return LabelTrust(float(doubt.mean()), reckoned, trust, believed, learning if learning >= 0.5 else 0.0)


def _doubted(trust: float, reckoned: float) -> bool:
    return trust < 1 - reckoned


def _trust(doubt: Tensor, reckoned: float) -> float:
    """Return the probability that no larger share than ``reckoned`` is wrong."""
    chances = np.ones(1)  # of every number of wrong labels among those seen so far
    for wrong in doubt.double().tolist():
        chances = np.convolve(chances, [1.0 - wrong, wrong])
    allowed = int(reckoned * len(doubt) + 1e-9)  # a tenth of thirty labels are three, whatever rounding says
    return min(1.0, float(chances[: allowed + 1].sum()))

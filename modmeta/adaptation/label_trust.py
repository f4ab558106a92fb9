"""How far the labels of a support set can be trusted as a whole, and how much is learned from them."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from torch import Tensor


def label_trust(doubt: Tensor, reckoned: float) -> dict[str, float]:
    """Sum up the doubts in single labels.

    Args:
        doubt: how likely every label is wrong ``(S,)``.
        reckoned: share of wrong labels that learning allows for.

    Returns:
        the ``expected`` share of wrong labels, the share ``reckoned`` with, and as ``trust`` the probability that no
        larger share than that is wrong, the labels being wrong independently of each other.
    """
    chances = np.ones(1)  # of every number of wrong labels among those seen so far
    for wrong in doubt.double().tolist():
        chances = np.convolve(chances, [1.0 - wrong, wrong])
    allowed = int(reckoned * len(doubt) + 1e-9)  # a tenth of thirty labels are three, whatever rounding says
    trust = min(1.0, float(chances[: allowed + 1].sum()))
    return {"expected": float(doubt.mean()), "reckoned": reckoned, "trust": trust}


def learning_share(wrong_labels: Mapping[str, float]) -> float:
    """Return the factor on learning rates: the trust in the labels, and 0 where they are rather not to be trusted.

    Args:
        wrong_labels: what :func:`label_trust` returns; empty where nothing is known against the labels.
    """
    trust = wrong_labels.get("trust", 1.0)
    return trust if trust >= 0.5 else 0.0

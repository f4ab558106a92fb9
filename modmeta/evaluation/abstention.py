"""Abstention: how probable a class must be before it can be trusted, found on support images that were held out."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from modmeta.adaptation import Support, stratified_folds
from modmeta.errors import ModmetaError
from modmeta.learners import MetaLearner


def calibrate_abstention(learner: MetaLearner, support: Support, target: float, folds: int = 2) -> dict[str, Any]:
    """Return the lowest probability from which on predictions are as accurate as asked for, as plain data.

    Every fold of the support is predicted by an adaptation to the rest of it, veto included. As those see fewer
    images than the adaptation that is written, they tend to be less accurate; and with few images the threshold is
    coarse: ``images`` says on how many it was found, ``kept`` how many of them it lets pass, ``accuracy`` how many of
    these are right. Where no probability will do, the threshold is 1 and nothing passes.

    Args:
        learner: what adapts.
        support: labelled images.
        target: accuracy among the predictions that are kept, 0 to 1.
        folds: number of folds, 2 or more; each costs an adaptation.

    Raises:
        ModmetaError: if there is no label, or a class with too few images to hold any out.
    """
    if support.labels is None:
        raise ModmetaError("--abstain-target needs labelled images: give folders class/image, or leave it out")
    splits = stratified_folds(support.labels, folds, learner.knows_classes(support))
    if not splits:
        raise ModmetaError("--abstain-target needs two images or more of every class, or leave it out")
    confidences, hits = [], []
    for rest, fold in splits:
        part = support.keeping(rest)
        best = learner.logits(learner.adapt(part), support.images[fold]).softmax(-1).max(-1)
        confidences.append(best.values)
        hits.append(best.indices == support.labels[fold])
    return {"target": target} | lowest_trusted(torch.cat(confidences), torch.cat(hits), target)


def lowest_trusted(confidences: Tensor, hits: Tensor, target: float) -> dict[str, Any]:
    """Return the lowest of some confidences ``(N,)`` from which on the share of ``hits`` ``(N,)`` is ``target``."""
    values, order = confidences.double().sort(descending=True)
    right = hits[order].double().cumsum(0)
    count = torch.arange(1, len(values) + 1, dtype=torch.double, device=values.device)
    # Equal confidences pass together or not at all.
    last = torch.cat([values[1:] < values[:-1], values.new_ones(1, dtype=torch.bool)])
    fits = ((right / count >= target) & last).nonzero().flatten()
    if not len(fits):
        return {"threshold": 1.0, "images": len(values), "kept": 0, "accuracy": None}
    place = int(fits[-1])
    accuracy = float(right[place]) / (place + 1)
    return {"threshold": float(values[place]), "images": len(values), "kept": place + 1, "accuracy": accuracy}


def abstention_sentence(found: Mapping[str, Any]) -> str:
    """Return what :func:`calibrate_abstention` found, in one sentence."""
    if not found["kept"]:
        return f"No probability made {found['images']} held-out images {100 * found['target']:.0f} % accurate."
    return (
        f"From probability {found['threshold']:.3f} on, {100 * found['accuracy']:.0f} % of the predictions were right, "
        f"where {100 * found['target']:.0f} % were asked for: {found['kept']} of {found['images']} held-out images."
    )


def shipped_threshold(provenance: Mapping[str, Any]) -> float:
    """Return the threshold that an adapter file holds.

    Args:
        provenance: that of the file.

    Raises:
        ModmetaError: if it holds none, or one that is no probability.
    """
    found = provenance.get("abstention")
    if found is None:
        raise ModmetaError(
            "--abstain-below calibrated: the adapter file holds no threshold; adapt with --abstain-target, or give a "
            "number"
        )
    threshold = found.get("threshold") if isinstance(found, Mapping) else None
    if isinstance(threshold, bool) or not isinstance(threshold, (int, float)) or not 0 <= threshold <= 1:
        raise ModmetaError("the adapter file's threshold of abstention is no number in 0..1; write it again with adapt")
    return float(threshold)

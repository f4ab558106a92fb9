"""What a support set says of plans that look at no label: every image predicted by heads that have not seen it."""

from __future__ import annotations

from types import EllipsisType
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional as F

from modmeta.adaptation import Plan, Support, stratified_folds

if TYPE_CHECKING:
    from modmeta.learners.planning import PolicyPlanning


class HeldOut:
    """Predicts a support's images under plans that no label moves, and reads their statistics only once.

    Tuning asks for a plan with its statistics at many depths and strengths, the veto again for the one that was taken,
    perhaps with another ridge.

    Args:
        learner: whose plans they are.
        support: the images, labelled.
        features: their unadapted features ``(S, D)``.
    """

    def __init__(self, learner: PolicyPlanning, support: Support, features: Tensor) -> None:
        self._learner = learner
        self.support = support
        self.features = features
        self._known: dict[tuple[float, ...], Tensor] = {}

    @torch.no_grad()
    def __call__(self, plan: Plan | None) -> Tensor:
        """Return logits ``(S, C)``; those of the unadapted model for None."""
        learner, support = self._learner, self.support
        before = learner.held_out_logits(self.features, support)
        if plan is None:
            return before
        after = learner.held_out_logits(self._read(plan), support, plan.ridge)
        return torch.lerp(after, before, learner.prior_share)

    def unadapted_loss(self, believed: Tensor | None = None) -> float | None:
        """Return the unadapted model's mean loss, in nats.

        None where it cannot be known: without labels, or with classes that cannot do without one of their images.

        Args:
            believed: see :meth:`counting`.
        """
        labels = self.support.labels
        if labels is None or not stratified_folds(labels, 2, self._learner.knows_classes(self.support)):
            return None
        losses = F.cross_entropy(self(None), labels, reduction="none")
        return float(losses[self.counting(believed)].mean())

    @staticmethod
    def counting(believed: Tensor | None) -> Tensor | EllipsisType:
        """Return the index of the images whose labels count.

        Args:
            believed: those whose labels are believed ``(S,)``, bool; all count where it is none of them, or None.
        """
        return believed if believed is not None and bool(believed.any()) else ...

    def _read(self, plan: Plan) -> Tensor:
        """Return the features ``(S, D)`` under a plan's statistics."""
        key = tuple(number for tensor in (plan.gates, plan.bank) for number in tensor.flatten().tolist())
        if key not in self._known:
            # What is read at a layer takes effect at once, so the pass that reads ends with the features.
            initial = self._learner.initial_state(plan, self.support)
            self._known[key], _ = self._learner.model.observe(self.support.images, initial, plan.gate_of())
        return self._known[key]

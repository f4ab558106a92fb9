"""What stands behind the features while units are adapted: the loss that they descend, and the final classifier."""

from __future__ import annotations

from abc import ABC, abstractmethod

from torch import Tensor
from torch.nn import functional as F

from modmeta.adaptation import Classifier, Head
from modmeta.adaptation.signals import information_loss
from modmeta.evaluation.systems.source import known_anchor
from modmeta.evaluation.systems.system import Task


class Readout(ABC):
    """From features to a loss and to a classifier.

    Attributes:
        leaves: tensors of its own that are trained along with the units.
    """

    leaves: tuple[Tensor, ...] = ()

    @abstractmethod
    def loss(self, features: Tensor) -> Tensor:
        """Return the loss of support features ``(S, D)``, a scalar."""

    @abstractmethod
    def classifier(self, features: Tensor) -> Classifier:
        """Return the classifier to predict with, given the adapted support features ``(S, D)``."""


class ClosedForm(Readout):
    """A closed-form head: every image is judged by a fit that has not seen it, as the learner's own loss has it."""

    def __init__(self, task: Task, head: Head) -> None:
        self.task = task
        self.head = head

    def loss(self, features: Tensor) -> Tensor:
        """Return the mean of the head's loss of the held-out logits."""
        return self.losses(self.held_out(features)).mean()

    def held_out(self, features: Tensor) -> Tensor:
        """Return logits ``(S, C)`` of every support image by a fit that has not seen it."""
        support = self.task.support
        assert support.labels is not None
        return self.head.held_out(features, support.labels, support.ways, self.task.sources.anchor(support.classes))

    def losses(self, logits: Tensor) -> Tensor:
        """Return the head's loss ``(S,)`` of support logits ``(S, C)``."""
        assert self.task.support.labels is not None
        return self.head.support_loss(logits, self.task.support.labels)

    def classifier(self, features: Tensor) -> Classifier:
        """Fit the head to the adapted features."""
        return self.task.learner.fit_head(features, self.task.support, self.head)


class Trained(Readout):
    """A linear classifier that gradient steps train.

    Args:
        task: gives the labels.
        start: where it starts; its weight and bias move.
    """

    def __init__(self, task: Task, start: Classifier) -> None:
        self.task = task
        self.start = start
        self.leaves = (
            start.weight.detach().clone().requires_grad_(),
            start.bias.detach().clone().requires_grad_(),
        )

    def loss(self, features: Tensor) -> Tensor:
        """Return the mean cross-entropy on the support."""
        assert self.task.support.labels is not None
        return F.cross_entropy(self._with(*self.leaves)(features), self.task.support.labels)

    def classifier(self, features: Tensor) -> Classifier:
        """Return the classifier as it was trained."""
        weight, bias = self.leaves
        return self._with(weight.detach(), bias.detach())

    def _with(self, weight: Tensor, bias: Tensor) -> Classifier:
        return Classifier(weight, bias, self.start.center, self.start.scale, self.start.normalize)


class SourceEntropy(Readout):
    """The sources' classifier, made sure of itself on images without labels.

    Args:
        task: gives the sources; its labels are not looked at.
        diversity: weight of the entropy of the mean prediction, which keeps it from naming one class only.
        aligned: whether the classifier is re-centred on the features' mean.
    """

    def __init__(self, task: Task, diversity: float, aligned: bool) -> None:
        self.task = task
        self.diversity = diversity
        self.aligned = aligned
        self.anchor = known_anchor(task)

    def loss(self, features: Tensor) -> Tensor:
        """Return the mean entropy of the predictions less ``diversity`` times that of their mean."""
        return information_loss(self.classifier(features)(features), self.diversity)

    def classifier(self, features: Tensor) -> Classifier:
        """Return the sources' classifier."""
        if not self.aligned:
            return self.task.sources.classifier(self.task.support.classes)
        return self.anchor.classifier(self.task.sources.scale, features.mean(0))

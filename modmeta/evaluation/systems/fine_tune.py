"""What one would do without meta-learning: train units, a linear head, or one after the other."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from modmeta.adaptation import Classifier, Labelled
from modmeta.adapters import UnitConfig
from modmeta.errors import ModmetaError
from modmeta.evaluation.systems.readout import Readout, Trained
from modmeta.evaluation.systems.system import Outcome, System, Task, register_system
from modmeta.evaluation.systems.unit_system import GradientSystem, Optimizer


@register_system("fine_tune")
class FineTune(GradientSystem):
    """Gradient steps on all units at one rate, the same for every domain.

    By the units it is FiLM fine-tuning (FiT), LoRA, task-specific adapters (TSA), bias tuning (TinyTL, BitFit),
    surgical fine-tuning of one stage, or full fine-tuning.
    """

    def adapt(self, task: Task) -> Outcome:
        """Take the steps with all gates open."""
        return self.tune(task, self.gates())


@register_system("linear_probe")
class LinearProbe(System):
    """Logistic regression on unadapted features of unit length, to convergence.

    Tian et al., "Rethinking Few-Shot Image Classification: a Good Embedding Is All You Need?", ECCV 2020.

    Args:
        strength: of the squared distance to where the weights start, per the sum of the support's losses.
        anchored: whether they start at the source domains' classifier, for classes that these know; else at zero.
        steps: largest number of L-BFGS iterations.
    """

    def __init__(self, strength: float = 1.0, anchored: bool = True, steps: int = 100) -> None:
        self.strength = strength
        self.anchored = anchored
        self.steps = steps

    def adapt(self, task: Task) -> Outcome:
        """Fit the regression; without labels, there is the sources' classifier."""
        if task.support.labels is None:
            classifier = task.learner.fit_head(task.features, task.support)
        else:
            classifier = logistic_regression(task, self.strength, self.anchored, self.steps)
        return Outcome(lambda query: classifier(query.query_features))


@register_system("lp_ft")
class ProbeThenFineTune(GradientSystem):
    """A linear probe, and then fine-tuning of the units and of the probe from there with a small rate.

    Kumar et al., "Fine-Tuning can Distort Pretrained Features and Underperform Out-of-Distribution", ICLR 2022.

    Args:
        units: which adapter modules act where.
        steps: number of steps on the whole support.
        rate: learning rate of the units and the probe.
        optimizer: ``adam``, ``sgd`` (momentum 0.9) or ``adadelta``.
        strength: of the probe's regularisation.
        anchored: whether the probe starts at the source domains' classifier.
        probe_steps: largest number of the probe's L-BFGS iterations.
        prior_share: weight of the unadapted model, with the learner's own head, in the answer.
    """

    def __init__(
        self,
        units: Sequence[UnitConfig],
        steps: int = 10,
        rate: float = 0.001,
        optimizer: Optimizer = "adam",
        strength: float = 1.0,
        anchored: bool = True,
        probe_steps: int = 100,
        prior_share: float = 0.0,
    ) -> None:
        super().__init__(units, steps, rate, optimizer, prior_share=prior_share)
        if optimizer == "rms":
            raise ModmetaError("lp_ft: the optimizer 'rms' moves units only; choose adam, sgd or adadelta")
        self.strength = strength
        self.anchored = anchored
        self.probe_steps = probe_steps

    def readout(self, task: Task) -> Readout:
        """Return the probe, to be trained on."""
        if task.support.labels is None:
            return super().readout(task)
        return Trained(task, logistic_regression(task, self.strength, self.anchored, self.probe_steps))

    def adapt(self, task: Task) -> Outcome:
        """Probe, then take the steps with all gates open."""
        return self.tune(task, self.gates())


def logistic_regression(task: Task, strength: float, anchored: bool, steps: int) -> Classifier:
    """Return a multinomial logistic regression on the support's unadapted features.

    Args:
        task: with labels.
        strength: factor on half the squared distance of the weights to their start.
        anchored: whether they start at the source domains' classifier.
        steps: largest number of L-BFGS iterations.
    """
    support, labels = task.support, task.support.labels
    assert labels is not None
    x, center = Labelled(task.features, labels, support.ways, None, None).centred()
    start = x.new_zeros(x.shape[1], support.ways)
    if anchored:
        start = task.sources.scale * task.sources.anchor(support.classes).weight
    weight, bias = start.clone().requires_grad_(), x.new_zeros(support.ways).requires_grad_()
    optimizer = torch.optim.LBFGS([weight, bias], max_iter=steps, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = F.cross_entropy(x @ weight + bias, labels, reduction="sum")
        loss = loss + 0.5 * strength * (weight - start).square().sum()
        loss.backward()
        return loss

    with torch.enable_grad():
        optimizer.step(closure)
    return Classifier(weight.detach(), bias.detach(), center, x.new_ones(()), True)

"""Plain gradient descent as a pure function of tensors: the inner loop of the gradient family.

Unlike :func:`~modmeta.adaptation.inner_loop`, which carries out a plan, it looks at no value: it can be differentiated
to any order, traced, compiled and batched over tasks.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from modmeta.registry import Registry

Weights = dict[str, Tensor]
"""What gradient steps move, by name."""

Move = Callable[[Weights, Weights, int], Weights]
"""From weights, their gradients and the number of the step, from 0, to new weights."""

STEP_RULES: Registry[Callable[..., StepRule]] = Registry("step rule")


def descend(
    start: Weights, loss: Callable[[Weights, int], Tensor], move: Move, steps: int, second_order: bool
) -> list[Weights]:
    """Return the weights after every step of gradient descent.

    Args:
        start: where to begin; gradients flow to it.
        loss: from weights and the number of the step to a scalar.
        move: what a step makes of weights and gradients.
        steps: number of steps.
        second_order: differentiate through the gradients; if not, they count as constants.
    """
    weights, path = start, []
    for step in range(steps):
        with torch.enable_grad():
            # Aliases: the gradient is that at fixed other weights, even where one is a function of another.
            leaves = {n: t.view_as(t) if t.requires_grad else t.detach().requires_grad_() for n, t in weights.items()}
            found = torch.autograd.grad(loss(leaves, step), list(leaves.values()), create_graph=second_order)
        gradients = dict(zip(leaves, found if second_order else [g.detach() for g in found], strict=True))
        weights = move(weights, gradients, step)
        path.append(weights)
    return path


class StepRule(nn.Module, ABC):
    """How a step moves every tensor. Its parameters are meta-learned.

    Args:
        shapes: of the tensors that are adapted, by name.
        rate: learning rate, or where the learned ones start.
        steps: number of steps that are trained; later ones are taken like the last.
    """

    def __init__(self, shapes: Mapping[str, torch.Size], rate: float, steps: int) -> None:
        super().__init__()
        self.rate = rate
        self.rows = {name: row for row, name in enumerate(shapes)}
        self.steps = steps

    @abstractmethod
    def forward(self, weights: Weights, gradients: Weights, step: int) -> Weights:
        """Return the weights after step number ``step``."""


@STEP_RULES.register("constant")
class ConstantStep(StepRule):
    """One rate for all tensors and steps."""

    def forward(self, weights: Weights, gradients: Weights, step: int) -> Weights:
        """Return ``w - rate * g``."""
        return {name: w - self.rate * gradients[name] for name, w in weights.items()}


@STEP_RULES.register("meta_sgd")
class MetaSGDStep(StepRule):
    """A learned rate for every single parameter, of either sign.

    Li et al., "Meta-SGD: Learning to Learn Quickly for Few-Shot Learning", 2017.
    """

    def __init__(self, shapes: Mapping[str, torch.Size], rate: float, steps: int) -> None:
        super().__init__(shapes, rate, steps)
        self.rates = nn.ParameterList([torch.full(shape, rate) for shape in shapes.values()])

    def forward(self, weights: Weights, gradients: Weights, step: int) -> Weights:
        """Return ``w - rates * g``, element by element."""
        return {name: w - self.rates[self.rows[name]] * gradients[name] for name, w in weights.items()}


@STEP_RULES.register("lslr")
class LayerStep(StepRule):
    """A learned rate per tensor and step, of either sign.

    Antoniou et al., "How to train your MAML", ICLR 2019.
    """

    def __init__(self, shapes: Mapping[str, torch.Size], rate: float, steps: int) -> None:
        super().__init__(shapes, rate, steps)
        self.rates = nn.Parameter(torch.full((len(shapes), steps), rate))

    def forward(self, weights: Weights, gradients: Weights, step: int) -> Weights:
        """Return ``w - rates[tensor, step] * g``."""
        rates = self.rates[:, min(step, self.steps - 1)]
        return {name: w - rates[self.rows[name]] * gradients[name] for name, w in weights.items()}


@STEP_RULES.register("alfa")
class AlfaStep(LayerStep):
    """Learned rates per tensor and step that a network changes at every step by what it sees, and decays.

    The network sees the mean of every tensor and of its gradient. Untrained, the rule is ``lslr``. Decay pulls weights
    to 0, and changes of a frozen weight to none. Baik et al., "Meta-Learning with Adaptive Hyperparameters",
    NeurIPS 2020.
    """

    def __init__(self, shapes: Mapping[str, torch.Size], rate: float, steps: int) -> None:
        super().__init__(shapes, rate, steps)
        width = 2 * len(shapes)
        last = nn.Linear(width, width)
        nn.init.zeros_(last.weight)
        nn.init.zeros_(last.bias)
        self.network = nn.Sequential(nn.Linear(width, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), last)

    def forward(self, weights: Weights, gradients: Weights, step: int) -> Weights:
        """Return ``(1 - decay) * w - rates[tensor, step] * (1 + factor) * g``."""
        means = [tensor.mean() for own in (weights, gradients) for tensor in own.values()]
        factor, decay = self.network(torch.stack(means)).chunk(2)
        rates = self.rates[:, min(step, self.steps - 1)] * (1 + factor)
        moved = {}
        for name, w in weights.items():
            row = self.rows[name]
            moved[name] = (1 - decay[row]) * w - rates[row] * gradients[name]
        return moved

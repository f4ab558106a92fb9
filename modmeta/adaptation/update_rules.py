"""Update rules: where the inner loop's learning rates come from."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn

from modmeta.adaptation.plan import Plan
from modmeta.adapters import State, Unit
from modmeta.registry import Registry

UPDATE_RULES: Registry[Callable[..., UpdateRule]] = Registry("update rule")


class UpdateRule(nn.Module, ABC):
    """Base of the update rules. A subclass implements :meth:`forward`, and :meth:`at_step` if it looks at gradients.

    Args:
        units: the units of the model.
        steps: inner gradient steps.
    """

    def __init__(self, units: Sequence[Unit], steps: int) -> None:
        super().__init__()

    @abstractmethod
    def forward(self, plan: Plan) -> Tensor:
        """Return rates ``(U, T)`` before the first step; they become those of the plan."""

    def at_step(
        self, plan: Plan, step: int, state: State, gradients: Mapping[str, Tensor | None]
    ) -> tuple[Tensor, Tensor]:
        """Return rates ``(U,)`` and decays ``(U,)`` of one step.

        Args:
            plan: the plan that is carried out.
            step: number of the step, from 0.
            state: the modules' tensors before it.
            gradients: of the support loss, by name of the tensor; without the tensors of closed units.
        """
        return plan.rates[:, step], plan.decay


@UPDATE_RULES.register("policy")
class PolicyRule(UpdateRule):
    """Rates per unit and step as the policy decided for this domain."""

    def forward(self, plan: Plan) -> Tensor:
        """Return rates ``(U, T)``."""
        return plan.rates


@UPDATE_RULES.register("constant")
class ConstantRule(UpdateRule):
    """The rate of each unit's configuration, for every step and domain."""

    def __init__(self, units: Sequence[Unit], steps: int) -> None:
        super().__init__(units, steps)
        self.rates = [unit.rate for unit in units]

    def forward(self, plan: Plan) -> Tensor:
        """Return rates ``(U, T)``."""
        return plan.rates.new_tensor(self.rates)[:, None].expand_as(plan.rates)


@UPDATE_RULES.register("lslr")
class LearnedRatesRule(UpdateRule):
    """One learned rate per unit and step, the same for every domain.

    Antoniou et al., "How to train your MAML", ICLR 2019; kept positive here.
    """

    def __init__(self, units: Sequence[Unit], steps: int) -> None:
        super().__init__(units, steps)
        self.log_rates = nn.Parameter(torch.tensor([[unit.rate] * steps for unit in units]).log())

    def forward(self, plan: Plan) -> Tensor:
        """Return rates ``(U, T)``."""
        return self.log_rates.exp()


@UPDATE_RULES.register("alfa")
class AlfaRule(LearnedRatesRule):
    """Learned rates per unit and step that a network changes, at every step, by what it sees of all units.

    It sees the mean of each unit's parameters and of its gradient, and gives a factor on each rate and a change of
    each decay. As the inner loop takes gradients at unit root mean square, so does the network. Untrained, it is
    ``lslr``. Baik et al., "Meta-Learning with Adaptive Hyperparameters", NeurIPS 2020.
    """

    def __init__(self, units: Sequence[Unit], steps: int) -> None:
        super().__init__(units, steps)
        width = 2 * len(units)
        self.network = nn.Sequential(
            nn.Linear(width, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, width)
        )
        last = self.network[-1]
        assert isinstance(last, nn.Linear)
        nn.init.zeros_(last.weight)
        nn.init.zeros_(last.bias)

    def at_step(
        self, plan: Plan, step: int, state: State, gradients: Mapping[str, Tensor | None]
    ) -> tuple[Tensor, Tensor]:
        """Return rates ``(U,)`` and decays ``(U,)`` of one step."""
        seen = torch.stack([_means(f"{unit}|", state, gradients, plan.rates) for unit in plan.units], dim=1)
        factor, decay = self.network(seen.flatten()).chunk(2)
        return plan.rates[:, step] * (1 + factor), plan.decay + decay


def _means(prefix: str, state: State, gradients: Mapping[str, Tensor | None], like: Tensor) -> Tensor:
    """Return ``(2,)``, the means of one unit's parameters and normalised gradient; zeros where it takes no step."""
    found = [(state[name], g) for name, g in gradients.items() if g is not None and name.startswith(prefix)]
    if not found:
        return like.new_zeros(2)
    parameters = torch.cat([tensor.flatten() for tensor, _ in found])
    gradient = torch.cat([g.flatten() for _, g in found])
    return torch.stack([parameters.mean(), gradient.mean() / gradient.square().mean().add(1e-20).sqrt()])

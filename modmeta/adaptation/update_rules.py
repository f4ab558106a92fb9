"""Update rules: where the inner loop's learning rates come from."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from modmeta.adaptation.plan import Plan
from modmeta.adapters import Unit
from modmeta.registry import Registry

UPDATE_RULES: Registry[Callable[..., nn.Module]] = Registry("update rule")


@UPDATE_RULES.register("policy")
class PolicyRule(nn.Module):
    """Rates per unit and step as the policy decided for this domain."""

    def __init__(self, units: Sequence[Unit], steps: int) -> None:
        super().__init__()

    def forward(self, plan: Plan) -> Tensor:
        """Return rates ``(U, T)``."""
        return plan.rates


@UPDATE_RULES.register("constant")
class ConstantRule(nn.Module):
    """The rate of each unit's configuration, for every step and domain."""

    def __init__(self, units: Sequence[Unit], steps: int) -> None:
        super().__init__()
        self.rates = [unit.rate for unit in units]

    def forward(self, plan: Plan) -> Tensor:
        """Return rates ``(U, T)``."""
        return plan.rates.new_tensor(self.rates)[:, None].expand_as(plan.rates)


@UPDATE_RULES.register("lslr")
class LearnedRatesRule(nn.Module):
    """One learned rate per unit and step, the same for every domain.

    Antoniou et al., "How to train your MAML", ICLR 2019; kept positive here.
    """

    def __init__(self, units: Sequence[Unit], steps: int) -> None:
        super().__init__()
        self.log_rates = nn.Parameter(torch.tensor([[unit.rate] * steps for unit in units]).log())

    def forward(self, plan: Plan) -> Tensor:
        """Return rates ``(U, T)``."""
        return self.log_rates.exp()

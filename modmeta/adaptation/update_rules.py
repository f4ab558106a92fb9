"""Update rules: where the inner loop's learning rates come from."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from modmeta.adaptation.plan import Plan
from modmeta.registry import Registry

UPDATE_RULES: Registry[Callable[..., nn.Module]] = Registry("update rule")


@UPDATE_RULES.register("policy")
class PolicyRule(nn.Module):
    """Rates per unit and step as the policy decided for this domain."""

    def __init__(self, units: int, steps: int, rate: float) -> None:
        super().__init__()

    def forward(self, plan: Plan) -> Tensor:
        """Return rates ``(U, T)``."""
        return plan.rates


@UPDATE_RULES.register("constant")
class ConstantRule(nn.Module):
    """One rate for every unit, step and domain."""

    def __init__(self, units: int, steps: int, rate: float) -> None:
        super().__init__()
        self.rate = rate

    def forward(self, plan: Plan) -> Tensor:
        """Return rates ``(U, T)``."""
        return torch.full_like(plan.rates, self.rate)


@UPDATE_RULES.register("lslr")
class LearnedRatesRule(nn.Module):
    """One learned rate per unit and step, the same for every domain.

    Antoniou et al., "How to train your MAML", ICLR 2019; kept positive here.
    """

    def __init__(self, units: int, steps: int, rate: float) -> None:
        super().__init__()
        self.log_rates = nn.Parameter(torch.full((units, steps), math.log(rate)))

    def forward(self, plan: Plan) -> Tensor:
        """Return rates ``(U, T)``."""
        return self.log_rates.exp()

"""The policy: a small network from domain indicators to a plan."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from modmeta.adaptation.plan import Plan
from modmeta.adapters import Unit

# Hard-concrete distribution of Louizos et al., "Learning Sparse Neural Networks through L0 Regularization",
# ICLR 2018: a stretched sigmoid whose ends are exactly 0 and 1.
_TEMPERATURE, _LOW, _HIGH = 2 / 3, -0.1, 1.1

_OUTPUTS = 5  # per unit: gate, rate, decay, weight of the prior, sharpness over specialists


class Policy(nn.Module):
    """One network for all units, with a context pooled over them.

    Its size depends on neither the number of units nor of domains: a new module or domain needs no new policy.
    Gates are stochastic while training and deterministic otherwise.

    Args:
        global_width: numbers that describe the domain as a whole.
        unit_width: numbers that describe one unit.
        steps: inner steps ``T``, 0 or more.
        hidden: width of the network.
        spread: rates stay within ``unit.rate / spread`` and ``unit.rate * spread``.
    """

    def __init__(
        self,
        global_width: int,
        unit_width: int,
        steps: int = 3,
        hidden: int = 64,
        spread: float = 10.0,
    ) -> None:
        super().__init__()
        self.steps = steps
        self.log_spread = math.log(spread)
        self.embed = nn.Sequential(
            nn.Linear(global_width + unit_width, hidden),
            nn.LayerNorm(hidden),
            nn.SiLU(),
            nn.Linear(hidden, hidden),
        )
        self.mix = nn.Sequential(nn.SiLU(), nn.Linear(3 * hidden, hidden), nn.LayerNorm(hidden), nn.SiLU())
        self.per_unit = nn.Linear(hidden, _OUTPUTS)
        self.head = nn.Linear(2 * hidden + global_width, 1)  # factor on the head's ridge strength
        self.forecast = nn.Linear(2 * hidden + global_width, 2)  # gain of the plan, and its log variance
        self.step_scale = nn.Parameter(torch.full((steps,), math.log(math.e - 1)))
        # Untrained, the policy says to every domain what the units' configuration says.
        nn.init.zeros_(self.per_unit.weight)
        for linear in (self.head, self.forecast):
            nn.init.zeros_(linear.weight)
            nn.init.zeros_(linear.bias)
        with torch.no_grad():
            self.per_unit.bias.copy_(torch.tensor([0.0, 0.0, -5.0, 2.0, 0.0]))

    def forward(
        self,
        units: Sequence[Unit],
        whole: Tensor,
        each: Tensor,
        distances: Tensor | None = None,
        generator: torch.Generator | None = None,
    ) -> Plan:
        """Return the plan for one domain.

        Args:
            units: the ``U`` units.
            whole: global indicators ``(G,)``.
            each: indicators per unit ``(U, F)``.
            distances: ``(K,)`` distances of the domain to the bank's specialists; None without specialists.
            generator: source of the gates' noise while training; None draws no noise.
        """
        count = len(units)
        h = self.embed(torch.cat([each, whole.expand(count, -1)], dim=1))
        pooled = torch.cat([h.mean(0), h.amax(0)])
        out = self.per_unit(self.mix(torch.cat([h, pooled.expand(count, -1)], dim=1)))
        gate, rate, decay, prior, sharpness = out.unbind(1)
        gate = gate + _log_odds(gate.new_tensor([unit.gate for unit in units]))
        if self.training and generator is not None:
            noise = torch.rand(count, generator=generator).clamp(1e-6, 1 - 1e-6).logit().to(gate)
            gate = (gate + noise) / _TEMPERATURE
        gates = (gate.sigmoid() * (_HIGH - _LOW) + _LOW).clamp(0.0, 1.0)
        base = rate.new_tensor([unit.rate for unit in units]) * (self.log_spread * rate.tanh()).exp()
        summary = torch.cat([pooled, whole])
        ridge = self.head(summary)[0]
        # The forecast looks on: it must not bend the plan towards what is easy to foresee.
        gain, log_variance = self.forecast(summary.detach()).unbind()
        return Plan(
            units=tuple(unit.name for unit in units),
            gates=gates,
            rates=base[:, None] * F.softplus(self.step_scale),
            decay=decay.sigmoid(),
            bank=_bank_weights(prior, sharpness, distances),
            ridge=(self.log_spread * ridge.tanh()).exp(),
            gain=gain,
            gain_log_variance=(log_variance - 3.0).clamp(-8.0, 4.0),
        )


def _log_odds(gates: Tensor) -> Tensor:
    """Return the logits at which the stretched sigmoid gives ``gates``, short of its flat ends."""
    return ((gates - _LOW) / (_HIGH - _LOW)).clamp(0.05, 0.95).logit()


def _bank_weights(prior: Tensor, sharpness: Tensor, distances: Tensor | None) -> Tensor:
    """Return ``(U, 1 + K)``: the nearer a specialist's domain, the more of it; the prior competes with all."""
    if distances is None or not len(distances):
        return torch.ones_like(prior)[:, None]
    return torch.cat([prior[:, None], -F.softplus(sharpness)[:, None] * distances], dim=1).softmax(1)

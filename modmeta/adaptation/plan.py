"""The plan: what an adaptation to one domain will do. Plain data, printable and serialisable."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Plan:
    """Decisions for ``U`` units and ``T`` inner steps.

    During meta-training the tensors carry gradients to the policy; :meth:`detach` gives the plain plan.

    Attributes:
        units: names of the units.
        gates: ``(U,)`` in 0..1, how much of each unit counts; 0 leaves it out altogether.
        rates: ``(U, T)``, root mean square change of a unit's parameters per step.
        decay: ``(U,)`` in 0..1, share of the distance to the initial value that a step gives back.
        bank: ``(U, 1 + K)`` weights of the universal prior and of the specialists, summing to 1.
        ridge: factor on the head's ridge strength.
        gain: predicted gain of the plan over no adaptation, in nats of query loss.
        gain_log_variance: log variance of that prediction.
    """

    units: tuple[str, ...]
    gates: Tensor
    rates: Tensor
    decay: Tensor
    bank: Tensor
    ridge: Tensor
    gain: Tensor
    gain_log_variance: Tensor

    @property
    def steps(self) -> int:
        """Number of inner steps."""
        return self.rates.shape[1]

    def gate_of(self) -> dict[str, Tensor]:
        """Return the open gates by unit name."""
        return {name: gate for name, gate in zip(self.units, self.gates, strict=True) if float(gate.detach()) > 0.0}

    def index(self, unit: str) -> int:
        """Return the row of a unit."""
        return self.units.index(unit)

    def detach(self) -> Plan:
        """Return the plan without gradients."""
        still: dict[str, Any] = {name: tensor.detach() for name, tensor in self._tensors().items()}
        return replace(self, **still)

    def keeping(self, names: Sequence[str]) -> Plan:
        """Return the plan with every unit that is not in ``names`` left out."""
        keep = torch.tensor([name in names for name in self.units], device=self.gates.device)
        return replace(self, gates=torch.where(keep, self.gates, torch.zeros_like(self.gates)))

    def scaled(self, factor: float) -> Plan:
        """Return the plan with every learning rate multiplied by ``factor``."""
        return replace(self, rates=self.rates * factor)

    def strengthened(self, names: Sequence[str], factor: float) -> Plan:
        """Return the plan with the gates of ``names`` multiplied by ``factor``, up to 1."""
        chosen = torch.tensor([name in names for name in self.units], device=self.gates.device)
        return replace(self, gates=torch.where(chosen, (self.gates * factor).clamp(max=1.0), self.gates))

    def backward_share(self, shares: Mapping[str, float]) -> float:
        """Return what a step costs in the backward pass, as a share of one that moves all learning units.

        Args:
            shares: what :func:`~modmeta.adaptation.backward_shares` says of the model.
        """
        return max((shares.get(name, 0.0) for name in self.gate_of()), default=0.0) if self.steps else 0.0

    def within(self, budget: float, shares: Mapping[str, float]) -> Plan:
        """Return the plan without the learning units that a budget has no room for.

        A step pays for everything behind the earliest unit that it moves, so the units compete for nothing: behind
        one that fits, all others are free. Opening units in any order, by gate per further cost or else, as long as
        the sum fits, ends at the same set: every unit that fits alone. No other set within the budget has more open
        gates.

        Args:
            budget: largest :meth:`backward_share` of the result, 0 (no gradient) to 1.
            shares: what :func:`~modmeta.adaptation.backward_shares` says of the model.
        """
        return self.keeping([name for name in self.units if shares.get(name, 0.0) <= budget])

    def to_dict(self) -> dict[str, Any]:
        """Return numbers, lists and strings only."""
        return {"units": list(self.units)} | {name: tensor.tolist() for name, tensor in self._tensors().items()}

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Plan:
        """Rebuild a plan from :meth:`to_dict`.

        Raises:
            ValueError: if an entry is missing, unknown, or not of the shape that the units ask for.
        """
        tensors = {name: torch.tensor(value, dtype=torch.float32) for name, value in data.items() if name != "units"}
        if not data["units"]:  # a list without rows does not say how wide they were
            tensors |= {"rates": torch.zeros(0, 0), "bank": torch.zeros(0, 1)}
        if tensors.keys() != {field.name for field in fields(cls)} - {"units"}:
            raise ValueError(f"its entries are {', '.join(sorted(data))[:100]}")
        for name, tensor in tensors.items():
            rows = {"ridge": 0, "gain": 0, "gain_log_variance": 0, "rates": 2, "bank": 2}.get(name, 1)
            if tensor.ndim != rows or (rows and len(tensor) != len(data["units"])):
                raise ValueError(f"its {name} has shape {tuple(tensor.shape)} for {len(data['units'])} units")
            if not torch.isfinite(tensor).all():
                raise ValueError(f"its {name} holds a number that is not finite")
        return cls(units=tuple(data["units"]), **tensors)

    def _tensors(self) -> dict[str, Tensor]:
        return {field.name: getattr(self, field.name) for field in fields(self) if field.name != "units"}

"""The plan: what an adaptation to one domain will do. Plain data, printable and serialisable."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor

from modmeta.adapters import Unit


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

    def within(self, budget: float, units: Sequence[Unit]) -> Plan:
        """Return the plan without the learning units that lie too early for a budget.

        A gradient step pays for everything behind the earliest unit that it moves, so the cost of a plan is
        that unit's distance from the features.

        Args:
            budget: share of the backbone's depth that gradients may pass, 0 (none) to 1.
            units: the units of the model.
        """
        return self.keeping([unit.name for unit in units if not unit.learns or 1.0 - unit.depth <= budget])

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

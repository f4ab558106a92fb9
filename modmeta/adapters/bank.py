"""The bank: where an adaptation starts from. One universal initial value and specialists of known domains."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from modmeta.adapters.adapted import AdaptedBackbone, State
from modmeta.adapters.units import Unit
from modmeta.errors import ModmetaError, unknown


class Bank(nn.Module):
    """Initial values of every unit: a learned universal prior, and one specialist per known domain.

    A specialist is a state that an adaptation to its domain ended with. It needs no training of anything
    else to be used: weights over the bank are matched on statistics, never on domain names.

    Args:
        model: the backbone and units that the bank is for.
    """

    def __init__(self, model: AdaptedBackbone) -> None:
        super().__init__()
        self._fresh = model.fresh()
        self._names_of = {unit.name: model.learned_names(unit) for unit in model.units}
        self.names = [name for names in self._names_of.values() for name in names]
        self.prior = nn.ParameterList([nn.Parameter(self._fresh[name].clone()) for name in self.names])
        self.specialists: dict[str, State] = {}
        self.means: dict[str, Tensor] = {}

    def initial(self) -> State:
        """Return the universal initial state; its learned tensors carry gradients to the bank."""
        device = self.prior[0].device if len(self.prior) else None
        state = {name: tensor.to(device) for name, tensor in self._fresh.items()}
        return state | dict(zip(self.names, self.prior, strict=True))

    def blend(self, unit: Unit, domains: Iterable[str], weights: Tensor) -> State:
        """Return the unit's initial tensors as a weighted sum of the prior and specialists.

        Args:
            unit: the unit.
            domains: domains of the specialists, in the order of ``weights[1:]``.
            weights: ``(1 + domains,)``, summing to 1; the first is the prior's.
        """
        prior = dict(zip(self.names, self.prior, strict=True))
        sources = [prior, *(self.specialist(domain) for domain in domains)]
        return {
            name: torch.stack([w * source[name] for w, source in zip(weights, sources, strict=True)]).sum(0)
            for name in self._names_of[unit.name]
        }

    def specialist(self, domain: str) -> State:
        """Return the specialist of ``domain``."""
        if domain not in self.specialists:
            raise unknown("domain of the bank", domain, self.specialists)
        return self.specialists[domain]

    def visible(self, hidden: str | None = None) -> list[str]:
        """Return the specialists that can be matched to a new domain, all but that of the domain ``hidden``."""
        return [domain for domain in self.means if domain != hidden]

    def add(self, domain: str, state: State, mean: Tensor | None = None) -> None:
        """Keep ``state`` as the specialist of ``domain``, in place of an earlier one.

        Args:
            domain: its name.
            state: its tensors.
            mean: ``(D,)`` mean unadapted feature of the domain, by which new domains are matched to it; without
                one the specialist is there to be looked up and blended, but no policy will choose it.

        Raises:
            ModmetaError: if the state is of other units or holds a number that is not finite.
        """
        for name in self.names:
            if name not in state or state[name].shape != self._fresh[name].shape:
                raise ModmetaError(f"bank: the state for domain {domain!r} does not fit unit tensor {name!r}")
            if not torch.isfinite(state[name]).all():
                raise ModmetaError(f"bank: the state for domain {domain!r} is not finite in {name!r}")
        self.specialists[domain] = {name: state[name].detach().clone() for name in self.names}
        self.means.pop(domain, None)
        if mean is not None:
            self.means[domain] = mean.detach().clone()

    def remove(self, domain: str) -> None:
        """Forget the specialist of ``domain``; nothing else changes."""
        self.specialist(domain)
        del self.specialists[domain]
        self.means.pop(domain, None)

    def get_extra_state(self) -> dict[str, Any]:
        """Return the specialists, which are as many as there are domains, for ``state_dict``."""
        return {"specialists": self.specialists, "means": self.means}

    def set_extra_state(self, state: dict[str, Any]) -> None:
        """Take the specialists from a ``state_dict``."""
        # Copies: a bank that is filled from another one must not change with it.
        self.specialists = {
            domain: {name: tensor.clone() for name, tensor in specialist.items()}
            for domain, specialist in state["specialists"].items()
        }
        self.means = {domain: mean.clone() for domain, mean in state["means"].items()}

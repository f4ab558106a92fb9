"""The bank: where an adaptation starts from. One universal initial value and specialists of known domains."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, Self

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
        self._width = model.backbone.feature_dim
        self._names_of = {unit.name: model.learned_names(unit) for unit in model.units}
        self.names = [name for names in self._names_of.values() for name in names]
        self.prior = nn.ParameterList([nn.Parameter(self._fresh[name].clone()) for name in self.names])
        self.specialists: dict[str, State] = {}
        self.means: dict[str, Tensor] = {}

    def initial(self) -> State:
        """Return the universal initial state; its learned tensors carry gradients to the bank."""
        return self._fresh | dict(zip(self.names, self.prior, strict=True))

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
            ModmetaError: if the state is of other units, or it or the mean holds a number that is not finite.
        """
        for name in self.names:
            if name not in state or state[name].shape != self._fresh[name].shape:
                raise ModmetaError(f"bank: the state for domain {domain!r} does not fit unit tensor {name!r}")
            if not torch.isfinite(state[name]).all():
                raise ModmetaError(f"bank: the state for domain {domain!r} is not finite in {name!r}")
        if mean is not None and (mean.shape != (self._width,) or not torch.isfinite(mean).all()):
            raise ModmetaError(f"bank: the mean for domain {domain!r} must be {self._width} finite numbers")
        self.specialists[domain] = {n: state[n].detach().to(self._fresh[n].device, copy=True) for n in self.names}
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
        """Take copies of the specialists from a ``state_dict``.

        Raises:
            ModmetaError: if one is of other units or holds a number that is not finite.
        """
        self.specialists, self.means = {}, {}
        for domain, specialist in state["specialists"].items():
            self.add(domain, specialist, state["means"].get(domain))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        # These are no parameters or buffers, whose number a state_dict would fix, but they move with them.
        self._fresh = {name: fn(tensor) for name, tensor in self._fresh.items()}
        self.specialists = {d: {name: fn(t) for name, t in state.items()} for d, state in self.specialists.items()}
        self.means = {domain: fn(mean) for domain, mean in self.means.items()}
        return super()._apply(fn, recurse)

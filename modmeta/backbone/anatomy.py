"""What is known of a model's forward pass: its sites, its cuts and what runs between them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from math import inf
from typing import TypeVar

from torch import Tensor

from modmeta.backbone.cut import Cut, Resume
from modmeta.backbone.shell import Observer, Slot
from modmeta.backbone.site import Site
from modmeta.backbone.trace import parent
from modmeta.errors import ModmetaError, unknown

FEATURES = "features"
F = TypeVar("F", Slot, Observer)


@dataclass(frozen=True)
class Anatomy:
    """What one recorded forward pass and the proofs of its cuts tell about a model.

    Attributes:
        sites: all sites, in execution order.
        cuts: verified cuts, in execution order; between two of them lies at least one site.
        resumes: by cut, how to go on from it.
        entered: by module path, the tick at which the module begins to run.
        left: by cut, the tick at which its module ends.
    """

    sites: tuple[Site, ...]
    cuts: tuple[Cut, ...]
    resumes: Mapping[str, Resume]
    entered: Mapping[str, int]
    left: Mapping[str, int]

    def site(self, name: str) -> Site:
        """Return the site called ``name``.

        Raises:
            ModmetaError: if there is none.
        """
        if name not in self._sites:
            raise unknown("site", name, self._sites)
        return self._sites[name]

    def cut(self, name: str) -> Cut:
        """Return the cut called ``name``.

        Raises:
            ModmetaError: if there is none.
        """
        if name not in self._cuts:
            raise unknown("cut", name, self._cuts)
        return self._cuts[name]

    def cut_before(self, names: Iterable[str], tensors: Mapping[str, object]) -> str | None:
        """Return the last cut before all sites, modules and tensors named, or None if there is none.

        Raises:
            ModmetaError: if a name is neither a site nor one of ``tensors``.
        """
        begin: float = inf
        for name in names:
            module = parent(name) if name in tensors else name
            if name == FEATURES:
                continue
            if module not in self.entered:
                raise unknown("site", name, self._sites)
            begin = min(begin, self.entered[module])
        if begin == inf:
            return FEATURES
        before = [name for name, left in self.left.items() if left < begin]
        return before[-1] if before else None

    def macs(self, start: str | None) -> int:
        """Return the multiply-accumulates of all layers' weights behind the cut ``start``, per image."""
        if start == FEATURES:
            return 0
        after = -1 if start is None else self.cut(start).order
        # Blocks hold layers that are sites themselves.
        return sum(site.macs for site in self.sites if site.order > after and site.kind != "block")

    def acting(self, functions: Mapping[str, F], start: str | None, stop: str | None) -> dict[str, F]:
        """Return those of the slots or observers whose sites begin to run between two cuts.

        Raises:
            ModmetaError: if a site does not exist or is never called.
        """
        begin = -1 if start is None else self.left[start]
        end = inf if stop is None else self.left[stop]
        for name in functions:
            if not self.site(name).called:
                raise ModmetaError(
                    f"the model never calls site {name!r}, it only reads its weight; use an overlay there"
                )
        return {name: function for name, function in functions.items() if begin < self.entered[name] < end}

    def check(self, x: Tensor, start: str, stop: str | None) -> None:
        """Raise a ModmetaError unless the model can go on with ``x`` at ``start`` and get to ``stop``."""
        cut = self.cut(start)
        if tuple(x.shape[1:]) != cut.shape:
            raise ModmetaError(
                f"activations at cut {start!r} have shape (B, {', '.join(map(str, cut.shape))}), "
                f"not {tuple(x.shape)}; give what run(..., stop={start!r}) returned"
            )
        if stop is not None and self.cut(stop).order < cut.order:
            raise ModmetaError(f"start {start!r} lies behind stop {stop!r}; swap them")

    @cached_property
    def _sites(self) -> dict[str, Site]:
        return {site.name: site for site in self.sites}

    @cached_property
    def _cuts(self) -> dict[str, Cut]:
        return {cut.name: cut for cut in self.cuts}

"""The contract of an adapter module, and the registry that modules of every origin join."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import ClassVar, TypeVar

from torch import Tensor, nn

from modmeta.backbone import Site
from modmeta.registry import Registry

MODULES: Registry[type[AdapterModule]] = Registry("adapter module", group="modmeta.modules")

M = TypeVar("M", bound="type[AdapterModule]")


def register_module(name: str, *, override: bool = False) -> Callable[[M], M]:
    """Register an :class:`AdapterModule` subclass under ``name``, as a class decorator."""

    def add(cls: M) -> M:
        cls.name = name
        return MODULES.register(name, override=override)(cls)

    return add


@dataclass(frozen=True)
class Cost:
    """What one module adds at one site.

    Attributes:
        parameters: numbers that an adaptation stores.
        macs: forward multiply-accumulates per image, on top of the backbone's own.
    """

    parameters: int
    macs: int = 0


class AdapterModule(nn.Module):
    """A small change of what a backbone computes at one site; the identity when fresh.

    A subclass says what it acts on with ``kinds`` and implements one of two ways to act:

    * :meth:`overlay` returns changed copies of the site's tensors (weights or statistics). It merges
      into the backbone exactly and costs nothing at prediction.
    * :meth:`forward` computes a new output of the site from its input and output (a *slot*).

    Its ``nn.Parameter``s are what the inner loop moves. Scale them so that a step of 0.01 is a change of
    about one per cent: the policy's learning rates then mean the same for every module. Its buffers are
    what :meth:`observe` reads off the support images without any gradient.

    Args:
        site: the place in the backbone. A subclass adds its own options as keyword arguments.
    """

    name: ClassVar[str]
    kinds: ClassVar[frozenset[str] | set[str]]
    requires: ClassVar[frozenset[str] | set[str]] = frozenset()
    """Tensors that a site must own for the module to have a meaning there (``running_mean``, ...)."""

    def __init__(self, site: Site) -> None:
        super().__init__()
        self.site = site

    @classmethod
    def fits(cls, site: Site) -> bool:
        """Whether the module has a meaning at ``site``."""
        return site.kind in cls.kinds and set(cls.requires) <= set(site.shapes)

    def overlay(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return changed copies of some of the site's tensors.

        Args:
            tensors: the site's own tensors by local name (``weight``, ``running_mean``, ...), with the
                changes of modules that come earlier on the same site.
        """
        return {}

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """Return the site's new output from its input ``x`` and its output ``y``."""
        return y

    def observe(self, x: Tensor, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return new values for this module's buffers from the site's input on the support images.

        Args:
            x: what reaches the site, batch first.
            tensors: the site's own tensors by local name.
        """
        return {}

    def cost(self, site: Site) -> Cost:
        """Return what the module adds at ``site``; an overlay adds no computation."""
        return Cost(sum(tensor.numel() for tensor in [*self.parameters(), *self.buffers()]))

    @classmethod
    def overrides(cls, method: str) -> bool:
        """Whether the subclass implements ``overlay``, ``forward`` or ``observe`` itself."""
        return getattr(cls, method) is not getattr(AdapterModule, method)

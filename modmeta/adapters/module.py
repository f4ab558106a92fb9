"""The contract of an adapter module, and the registry that modules of every origin join."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Self, TypeVar

from torch import Tensor, nn

from modmeta.backbone import Rerun, Site
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


@dataclass(frozen=True)
class Layer:
    """The layer that a slot sits on, in the midst of a forward pass.

    Attributes:
        run: runs the layer on another input, under the same overlay and with the slots that come earlier on it.
        carried: what the modules of one unit hand on to each other within this pass; empty when it begins. By
            the name of the site that wrote it: a layer that is run again then reads what it read before.
    """

    run: Rerun
    carried: dict[str, Tensor]


class AdapterModule(nn.Module):
    """A small change of what a backbone computes at one site; the identity when fresh.

    A subclass says what it acts on with ``kinds`` and implements one of three ways to act:

    * :meth:`overlay` returns changed copies of the site's tensors (weights or statistics). It merges
      into the backbone exactly and costs nothing at prediction.
    * :meth:`forward` computes a new output of the site from its input and output (a *slot*).
    * :meth:`rerun` is a slot that may run the site's layer again, on an input of its own.

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

    @classmethod
    def build(cls, sites: Sequence[Site], **options: Any) -> dict[str, Self]:
        """Return the fresh modules of one unit, by site name.

        Args:
            sites: the unit's sites, in execution order.
            **options: the module's options.
        """
        return {site.name: cls(site, **options) for site in sites}

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

    def rerun(self, x: Tensor, y: Tensor, layer: Layer) -> Tensor:
        """Return the site's new output, with the layer at hand; by default, what :meth:`forward` returns."""
        output: Tensor = self(x, y)
        return output

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
        """Whether the subclass implements ``overlay``, ``forward``, ``rerun`` or ``observe`` itself."""
        return getattr(cls, method) is not getattr(AdapterModule, method)

    @classmethod
    def is_slot(cls) -> bool:
        """Whether the subclass computes a new output of its site."""
        return cls.overrides("forward") or cls.overrides("rerun")

"""What an adaptation is given, and what it returns."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from modmeta.adaptation.heads import Classifier
from modmeta.adaptation.plan import Plan
from modmeta.adapters import State


@dataclass(frozen=True)
class Support:
    """The images that a model adapts to.

    Attributes:
        images: ``(S, 3, H, W)``, uint8 or float in 0..1.
        labels: ``(S,)`` index into ``classes``, or None for unlabelled images.
        classes: names of the classes to tell apart.
        domain: an explicit label of the domain, if one is known.
        hidden: a source domain that must not be used, because the images are from it (meta-training).
    """

    images: Tensor
    labels: Tensor | None
    classes: tuple[str, ...]
    domain: str | None = None
    hidden: str | None = None

    @property
    def ways(self) -> int:
        """Number of classes."""
        return len(self.classes)


@dataclass(frozen=True)
class Adapted:
    """A model adapted to one domain: plain tensors to predict with.

    Attributes:
        state: the adapter modules' tensors.
        plan: what was carried out; all gates are closed where nothing was adapted.
        classifier: the head.
        classes: names of the classes.
        report: plain data on how it came about, for the card and the tables.
    """

    state: State
    plan: Plan
    classifier: Classifier
    classes: tuple[str, ...]
    report: dict[str, Any] = field(default_factory=dict)

"""What an adaptation is given, and what it returns."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from modmeta.adaptation.heads import Classifier
from modmeta.adaptation.plan import Plan
from modmeta.adapters import State
from modmeta.adapters.adapter_file import HEAD, PRIOR_HEAD, AdapterFile, has_prior
from modmeta.errors import ModmetaError


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

    def keeping(self, rows: Tensor) -> Support:
        """Return a support with some of the images, to tell the same classes apart.

        Args:
            rows: indices, or ``(S,)`` bool.
        """
        labels = None if self.labels is None else self.labels[rows]
        return replace(self, images=self.images[rows], labels=labels)


@dataclass(frozen=True)
class Adapted:
    """A model adapted to one domain: plain tensors to predict with.

    Attributes:
        state: the adapter modules' tensors.
        plan: what was carried out; all gates are closed where nothing was adapted.
        classifier: the head, or whatever else makes logits ``(B, C)`` of features ``(B, D)``.
        classes: names of the classes.
        report: plain data on how it came about, for the card and the tables.
        prior: the unadapted backbone's part in the answer, logits of its features that are added; None adds nothing.
    """

    state: State
    plan: Plan
    classifier: Callable[[Tensor], Tensor]
    classes: tuple[str, ...]
    report: dict[str, Any] = field(default_factory=dict)
    prior: Classifier | None = None

    def to_file(self, provenance: dict[str, Any]) -> AdapterFile:
        """Return what an adapter file keeps of it, without gradients.

        Args:
            provenance: where it comes from, as plain data.

        Raises:
            ModmetaError: if what classifies is no linear classifier.
        """
        if not isinstance(self.classifier, Classifier):
            raise ModmetaError(
                f"an adapter file holds a linear classifier, which {type(self.classifier).__name__} is not: "
                f"this learner can be tested, but has no adapter file; take one with a closed-form head"
            )
        parts = {"": self.classifier} | ({} if self.prior is None else {PRIOR_HEAD: self.prior})
        return AdapterFile(
            classes=self.classes,
            plan=self.plan.to_dict(),
            state={name: tensor.detach() for name, tensor in self.state.items()},
            classifier={part + name: getattr(own, name).detach() for part, own in parts.items() for name in HEAD},
            head={part + "normalize": own.normalize for part, own in parts.items()},
            provenance=provenance,
        )

    @classmethod
    def from_file(cls, file: AdapterFile, device: torch.device | str = "cpu") -> Adapted:
        """Rebuild what :meth:`to_file` returned, on ``device``.

        Raises:
            ModmetaError: if the plan or the head's options are malformed.
        """
        try:
            with torch.device(device):
                plan = Plan.from_dict(file.plan)
        except (TypeError, ValueError, KeyError, RuntimeError, OverflowError) as error:
            raise ModmetaError(f"the adapter file's plan is malformed ({error}); write it again with adapt") from error
        prior = PRIOR_HEAD + "normalize"
        if not {"normalize"} <= file.head.keys() <= {"normalize", prior} or not all(
            isinstance(value, bool) for value in file.head.values()
        ):
            raise ModmetaError(f"the adapter file's head needs 'normalize', and may have {prior!r}; both true or false")

        def classifier(part: str) -> Classifier:
            tensors = {name: file.classifier[part + name].to(device) for name in HEAD}
            return Classifier(**tensors, normalize=file.head[part + "normalize"])

        state = {name: tensor.to(device) for name, tensor in file.state.items()}
        beside = classifier(PRIOR_HEAD) if has_prior(file.head) else None
        return cls(state, plan, classifier(""), file.classes, prior=beside)

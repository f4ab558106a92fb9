"""The host: many domains' adapters over one backbone, exchanged while threads predict."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from threading import Lock
from typing import TypeVar

import torch
from torch import Tensor

from modmeta.adaptation import Adapted
from modmeta.adapters import AdaptedBackbone
from modmeta.adapters.adapter_file import AdapterFile, checked_tensors, read_adapter, tensor_digest
from modmeta.errors import ModmetaError, unknown

T = TypeVar("T")


@dataclass(frozen=True)
class Version:
    """Which adapter answered.

    Attributes:
        domain: the domain that it serves.
        number: a running number of the host's adapters; none is given twice.
        sha256: checksum of its tensors, the same as in its adapter file.
    """

    domain: str
    number: int
    sha256: str


@dataclass(frozen=True, eq=False)
class Prediction:
    """The answer to one image.

    Attributes:
        logits: ``(C,)``.
        classes: names of the classes.
        adapter: what gave the answer.
    """

    logits: Tensor
    classes: tuple[str, ...]
    adapter: Version

    @property
    def label(self) -> str:
        """The most probable class."""
        return self.classes[int(self.logits.argmax())]

    @property
    def probability(self) -> float:
        """The probability of :attr:`label`."""
        return float(self.logits.softmax(-1).max())


@dataclass(frozen=True, eq=False)
class _Resident:
    """An adapter that is ready to answer; it never changes."""

    version: Version
    model: AdaptedBackbone
    adapted: Adapted
    overlay: Mapping[str, Tensor]

    def logits(self, images: Tensor) -> Tensor:
        slots = self.model.slots(self.adapted.state, self.adapted.plan.gate_of())
        logits = self.adapted.classifier(self.model.backbone.run(images, self.overlay, slots=slots))
        return logits if self.adapted.prior is None else logits + self.adapted.prior(self.model.backbone(images))


class AdapterHost:
    """Predicts for many domains with one shared backbone, any number of threads at a time.

    What is resident is one immutable mapping. A change publishes a new one, so predicting takes no lock, an answer
    comes from exactly one adapter, and one batch never sees half a change. What an adapter changes in the backbone's
    tensors is computed once, when it arrives: it takes the memory of those tensors.

    Args:
        model: the backbone, and the units that adapters may have open.
        *others: the same backbone object with other units, for adapters of other trainings.
        history: earlier versions of a domain that are kept for :meth:`rollback`.

    Raises:
        ModmetaError: if the models do not share one backbone.
    """

    def __init__(self, model: AdaptedBackbone, *others: AdaptedBackbone, history: int = 1) -> None:
        if any(other.backbone is not model.backbone for other in others):
            raise ModmetaError("a host has one backbone; build every AdaptedBackbone on the same Backbone object")
        self._models = (model, *others)
        self._fingerprint = model.backbone.fingerprint()
        self._device = next(model.backbone.parameters()).device
        self._residents: Mapping[str, _Resident] = {}
        self._earlier: dict[str, deque[_Resident]] = {}
        self._history = history
        self._numbers = count(1)
        self._writing = Lock()

    @property
    def versions(self) -> dict[str, Version]:
        """What answers for every domain now."""
        return {domain: resident.version for domain, resident in self._residents.items()}

    @torch.no_grad()
    def predict(self, images: Tensor, domain: str | Sequence[str]) -> list[Prediction]:
        """Answer every image with its domain's adapter, as it was resident when the call began.

        Args:
            images: ``(B, 3, H, W)``, uint8 or float in 0..1.
            domain: the domain of all images, or one for each.

        Returns:
            ``B`` predictions, in the order of the images.

        Raises:
            ModmetaError: for a domain without an adapter, or a number of domains other than that of the images.
        """
        residents = self._residents  # the one look: a batch of many domains is consistent, too
        domains = [domain] * len(images) if isinstance(domain, str) else list(domain)
        if len(domains) != len(images):
            raise ModmetaError(f"predict: {len(images)} images have {len(domains)} domains; give one for each image")
        rows: dict[str, list[int]] = {}
        for row, name in enumerate(domains):
            rows.setdefault(name, []).append(row)
        groups = [(_find(residents, name), indices) for name, indices in rows.items()]
        answers: dict[int, Prediction] = {}
        for resident, indices in groups:
            logits = resident.logits(images if len(groups) == 1 else images[indices])
            for row, each in zip(indices, logits, strict=True):
                answers[row] = Prediction(each, resident.adapted.classes, resident.version)
        return [answers[row] for row in range(len(images))]

    # -- changes: prepared beside the traffic, then published at once

    def add(self, domain: str, adapted: Adapted) -> Version:
        """Serve a new domain with what an adaptation returned.

        Only an adapter file says which backbone it is for: here it must be the host's.

        Raises:
            ModmetaError: if the domain has an adapter, or the adapter does not fit the host's units.
        """
        resident = self._prepare(domain, *self._placed(adapted))
        with self._writing:
            if domain in self._residents:
                raise ModmetaError(f"domain {domain!r} has an adapter; replace it, or remove it first")
            return self._publish(resident)

    def replace(self, domain: str, adapted: Adapted) -> Version:
        """Serve a domain with another adapter from now on, and keep the old one for :meth:`rollback`.

        Raises:
            ModmetaError: if the domain has no adapter, or the new one does not fit the host's units.
        """
        _find(self._residents, domain)
        resident = self._prepare(domain, *self._placed(adapted))
        with self._writing:
            self._keep(_find(self._residents, domain))
            return self._publish(resident)

    def load(self, domain: str, path: str | Path) -> Version:
        """Serve a domain with an adapter file from now on, in place of an earlier adapter if it has one.

        Raises:
            ModmetaError: if the file is damaged or for another backbone or other units.
        """
        model, content = self._fitting(lambda model: read_adapter(path, model, self._fingerprint))
        resident = self._prepare(domain, model, content)
        with self._writing:
            if domain in self._residents:
                self._keep(self._residents[domain])
            return self._publish(resident)

    def rollback(self, domain: str) -> Version:
        """Serve a domain with its previous adapter again; the present one is forgotten.

        Raises:
            ModmetaError: if the domain has no adapter, or no earlier one is kept.
        """
        with self._writing:
            _find(self._residents, domain)
            if not self._earlier.get(domain):
                raise ModmetaError(f"domain {domain!r} has no earlier adapter to go back to; replace or remove it")
            return self._publish(self._earlier[domain].pop())

    def remove(self, domain: str) -> None:
        """Stop serving a domain, and forget its earlier adapters; nothing else changes.

        Raises:
            ModmetaError: if the domain has no adapter.
        """
        with self._writing:
            _find(self._residents, domain)
            self._residents = {name: each for name, each in self._residents.items() if name != domain}
            self._earlier.pop(domain, None)

    # -- inside

    @torch.no_grad()
    def _prepare(self, domain: str, model: AdaptedBackbone, content: AdapterFile) -> _Resident:
        # Copies, for whoever made them may go on to change them; laid out as in a file, so that both answer alike.
        tensors = {name: tensor.clone() for name, tensor in checked_tensors(content, model).items()}
        adapted = Adapted.from_file(content.holding(tensors), self._device)
        version = Version(domain, next(self._numbers), tensor_digest(tensors))
        return _Resident(version, model, adapted, model.overlay(adapted.state, adapted.plan.gate_of()))

    def _placed(self, adapted: Adapted) -> tuple[AdaptedBackbone, AdapterFile]:
        content = adapted.to_file({})
        return self._fitting(lambda model: checked_tensors(content, model))[0], content

    def _publish(self, resident: _Resident) -> Version:
        self._residents = {**self._residents, resident.version.domain: resident}
        return resident.version

    def _keep(self, resident: _Resident) -> None:
        self._earlier.setdefault(resident.version.domain, deque(maxlen=self._history)).append(resident)

    def _fitting(self, attempt: Callable[[AdaptedBackbone], T]) -> tuple[AdaptedBackbone, T]:
        """Return the first model for which an attempt succeeds, and what it gives."""
        faults = []
        for model in self._models:
            try:
                return model, attempt(model)
            except ModmetaError as fault:
                faults.append(fault)
        raise faults[0]


def _find(residents: Mapping[str, _Resident], domain: str) -> _Resident:
    if domain not in residents:
        raise unknown("domain", domain, residents, where="the host")
    return residents[domain]

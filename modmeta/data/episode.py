"""What the data modules hand to a learner: one adaptation task, or one batch of source images."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor

T = TypeVar("T")


@dataclass(frozen=True, eq=False)
class Episode:
    """One adaptation task: a few labelled images of one domain, and images to be judged on.

    Support and query are sorted by label, and no image is in both.

    Attributes:
        index: the number from which the episode was drawn, unique within its split.
        domain: the domain that all images come from.
        classes: label ``i`` in this episode means ``classes[i]``.
        shots: support images per class.
        support: labelled images ``(S, 3, H, W)``, uint8.
        support_labels: ``(S,)``, int64.
        support_ids: ``(S,)``, int64, rows of the image store.
        query: images ``(Q, 3, H, W)``, uint8.
        query_labels: ``(Q,)``, int64.
        query_ids: ``(Q,)``, int64, rows of the image store.
        shift: the simulated shift that all images went through, ``augmented`` if each was only deformed on its own,
            or None for the images as they are on disk. Only in the last case do the ids identify the pixels, as
            caches need it.
        strength: the strength of that shift in 0..1.
    """

    index: int
    domain: str
    classes: tuple[str, ...]
    shots: int
    support: Tensor
    support_labels: Tensor
    support_ids: Tensor
    query: Tensor
    query_labels: Tensor
    query_ids: Tensor
    shift: str | None = None
    strength: float = 0.0

    def to(self, device: torch.device | str, non_blocking: bool = False) -> Episode:
        """Return the episode with its tensors on ``device``; Lightning calls this."""
        return _to(self, device, non_blocking)


@dataclass(frozen=True, eq=False)
class SourceBatch:
    """A supervised batch over all training domains.

    Attributes:
        images: ``(B, 3, H, W)``, uint8.
        labels: ``(B,)``, int64, index into the data module's ``classes``.
        domains: ``(B,)``, int64, index into the data module's ``train_domains``.
    """

    images: Tensor
    labels: Tensor
    domains: Tensor

    def to(self, device: torch.device | str, non_blocking: bool = False) -> SourceBatch:
        """Return the batch with its tensors on ``device``; Lightning calls this."""
        return _to(self, device, non_blocking)


def _to(item: T, device: torch.device | str, non_blocking: bool) -> T:
    moved: dict[str, Any] = {
        field.name: value.to(device, non_blocking=non_blocking)
        for field in dataclasses.fields(item)  # type: ignore[arg-type]
        if isinstance(value := getattr(item, field.name), Tensor)
    }
    return dataclasses.replace(item, **moved)  # type: ignore[type-var]

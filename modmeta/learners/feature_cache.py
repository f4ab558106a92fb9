"""Frozen features and hidden activations of images on disk, kept while backbone and images stay the same."""

from __future__ import annotations

from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor

from modmeta.adapters import AdaptedBackbone
from modmeta.data import RowCache

_LARGEST_ROW = 32_768  # numbers per image; earlier activations are larger than the image and cheaper to recompute


class FeatureCache:
    """What the unadapted backbone computes up to a cut, per image and cut.

    Args:
        model: the backbone and its units.
        rows: number of images in the store.
        key: content key of the image store.
        folder: where to keep the rows; None keeps them in memory.
    """

    def __init__(self, model: AdaptedBackbone, rows: int, key: str, folder: str | None) -> None:
        self.model = model
        self.rows = rows
        self.key = key
        self._root = folder
        self._caches: dict[str, RowCache] = {}

    def get(self, images: Tensor, cut: str | None, ids: Tensor | None = None) -> Tensor:
        """Return the activations of ``images`` at ``cut``; the images themselves for None.

        Args:
            images: ``(B, 3, H, W)``.
            cut: name of a cut, ``"features"``, or None.
            ids: ``(B,)`` rows of the store whose pixels these are; None where no row's pixels are.
        """
        if cut is None:
            return images
        backbone = self.model.backbone
        shape = (backbone.feature_dim,) if cut == "features" else _cut_shape(self.model, cut)
        if ids is None or torch.Size(shape).numel() > _LARGEST_ROW:
            return self._compute(images, cut)
        if cut not in self._caches:
            path = None if self.folder is None else self.folder / cut
            self._caches[cut] = RowCache(path, self.rows, shape)
        rows = ids.cpu()

        def compute(missing: Tensor) -> Tensor:
            position = {int(row): place for place, row in enumerate(rows)}
            chosen = torch.tensor([position[int(row)] for row in missing], device=images.device)
            # One image at a time: batch sizes change the last bit, and a row must not depend on its neighbours.
            return torch.cat([self._compute(images[one : one + 1], cut) for one in chosen.tolist()])

        return self._caches[cut].get(rows, compute).to(images.device)

    @cached_property
    def folder(self) -> Path | None:
        """Where the rows lie; named when first needed, as a checkpoint may still change the backbone before that."""
        name = f"{self.model.backbone.fingerprint().removeprefix('sha256:')[:16]}-{self.key[:16]}"
        return None if self._root is None else Path(self._root) / name

    @torch.no_grad()
    def _compute(self, images: Tensor, cut: str) -> Tensor:
        return self.model(images, {}, {}, stop=cut)


def _cut_shape(model: AdaptedBackbone, name: str) -> tuple[int, ...]:
    return next(cut.shape for cut in model.backbone.cuts if cut.name == name)

"""Consistency: an image and its slightly changed versions are predicted alike."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from modmeta.adaptation.signals.signal import Seen, Signal, register_signal
from modmeta.errors import ModmetaError, refuse_outside


@register_signal("consistency")
class Consistency(Signal):
    """Kullback-Leibler divergence of the predictions of an image's views from that of the image, which counts as fixed.

    Xie et al., "Unsupervised Data Augmentation for Consistency Training", NeurIPS 2020. The views are the mirrored
    image and two that are shifted diagonally, up left and down right, their border repeated. Predicting the same
    of all images satisfies it, too: alone it is to be taken for few steps.

    Args:
        flip: whether to mirror; not where left and right matter, as with digits.
        shift: share of the image's side to shift by, in 0..0.5; 0 does not shift.
    """

    def __init__(self, flip: bool = True, shift: float = 0.1) -> None:
        refuse_outside({"signals: shift": shift}, 0, 0.5)
        if not flip and not shift:
            raise ModmetaError("signals: consistency without flip and shift compares nothing; give one of them")
        self.flip = flip
        self.shift = shift
        self.count = int(flip) + (2 if shift else 0)

    def views(self, images: Tensor) -> list[Tensor]:
        """Return the images mirrored, and shifted both ways."""
        mirrored = [images.flip(-1)] if self.flip else []
        return mirrored + [_shifted(images, by) for by in (self.shift, -self.shift) if by]

    def loss(self, seen: Seen) -> Tensor:
        """Return the mean divergence over images and views, in nats."""
        target = seen.classify(seen.features).log_softmax(-1).detach()
        views = seen.classify(seen.views.flatten(0, 1)).log_softmax(-1)
        return F.kl_div(views, target.repeat(self.count, 1), reduction="batchmean", log_target=True)


def _shifted(images: Tensor, share: float) -> Tensor:
    for axis in (-2, -1):
        side = images.shape[axis]
        by = max(1, round(abs(share) * side)) * (1 if share > 0 else -1)
        places = (torch.arange(side, device=images.device) + by).clamp(0, side - 1)
        images = images.index_select(axis, places)
    return images

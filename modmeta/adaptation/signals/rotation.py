"""Rotation: the features tell by how many quarter turns an image was rotated."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from modmeta.adaptation.signals.signal import Seen, Signal, register_signal
from modmeta.errors import refuse_outside


@register_signal("rotation")
class Rotation(Signal):
    """Squared error of predicting the quarter turn of an image from the other images, in closed form.

    Gidaris, Singh and Komodakis, "Unsupervised Representation Learning by Predicting Image Rotations", ICLR 2018; as
    an inner loss: Sun et al., "Test-Time Training with Self-Supervision for Generalization under Distribution Shifts",
    ICML 2020. Their trained head is a ridge regression here that is solved anew at every step, on centred features of
    unit length, and every image is judged by the one that all its four turns are left out of. So a single image
    teaches nothing, nor does a domain whose images have no upright.

    Args:
        ridge: strength of the regression, above 0.
    """

    count = 3

    def __init__(self, ridge: float = 0.1) -> None:
        refuse_outside({"signals: ridge": ridge}, 0, above=True)
        self.ridge = ridge

    def views(self, images: Tensor) -> list[Tensor]:
        """Return the images after one, two and three quarter turns."""
        return [images.rot90(turns, (-2, -1)) for turns in (1, 2, 3)]

    def loss(self, seen: Seen) -> Tensor:
        """Return the mean squared error per image and turn.

        With ``H`` the matrix that takes targets ``Y`` to fitted values and ``H_i`` its block of an image, the errors
        without the image are ``(I - H_i)^-1 (Y - H Y)_i``.
        """
        turned = torch.cat([seen.features[None], seen.views]).transpose(0, 1)  # (S, 4, D)
        images, turns, _ = turned.shape
        x = turned.flatten(0, 1)
        x = F.normalize(x - x.mean(0), dim=-1)
        identity = torch.eye(len(x), dtype=x.dtype, device=x.device)
        targets = identity[:turns, :turns].repeat(images, 1) - 1 / turns
        # I - H, by way of which nothing is subtracted that is nearly the same.
        rest = self.ridge * torch.linalg.inv(x @ x.T + self.ridge * identity)
        blocks = rest.unflatten(0, (images, turns)).unflatten(2, (images, turns)).diagonal(dim1=0, dim2=2)
        errors = torch.linalg.solve(blocks.permute(2, 0, 1), (rest @ targets).unflatten(0, (images, turns)))
        return errors.square().sum(-1).mean()

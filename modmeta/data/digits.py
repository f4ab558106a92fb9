"""Embedded domains for a first run: scikit-learn's digits in seven drawing styles."""

from __future__ import annotations

import hashlib
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import functional as F

from modmeta.data.images import Ids, ImageStore
from modmeta.data.shifts.blur import smooth
from modmeta.data.shifts.geometry import warp
from modmeta.data.shifts.texture import edges

SIDE = 32  # pixels at which the styles are drawn
VERSION = 1  # part of the key; raise it when a change here changes pixels

Style = Callable[[Tensor, torch.Generator], Tensor]  # strokes (B, 1, H, W) in 0..1 -> images (B, 3, H, W)


class DigitsDomains(ImageStore):
    """The 1,797 handwritten digits that come with scikit-learn, as seven domains of disjoint images.

    The original digits are 8 x 8 pixels. Each goes to one domain and is drawn there in that domain's
    style, about 25 images per class and domain.

    Args:
        image_size: side of the square images, in pixels.
    """

    def __init__(self, image_size: int = SIDE) -> None:
        strokes, digits = _strokes()
        domains = sorted(STYLES)
        row_domains = _deal(digits, len(domains))
        super().__init__(
            domains,
            [str(digit) for digit in range(10)],
            row_domains,
            digits,
            image_size,
            hashlib.sha256(f"digits {VERSION} {image_size}".encode()).hexdigest(),
        )
        self._images = torch.empty(len(digits), 3, SIDE, SIDE, dtype=torch.uint8)
        for index, name in enumerate(domains):
            rows = torch.from_numpy(np.flatnonzero(row_domains == index))
            drawn = STYLES[name](strokes[rows], torch.Generator().manual_seed(index))
            self._images[rows] = drawn.clamp(0, 1).mul(255).round().to(torch.uint8)

    def load(self, ids: Ids) -> Tensor:
        """Return the images of some rows, ``(n, 3, image_size, image_size)``, uint8."""
        images = self._images.index_select(0, torch.as_tensor(ids))
        if self.image_size == SIDE:
            return images
        return F.resize(images, [self.image_size] * 2, InterpolationMode.BILINEAR, antialias=True)


def _strokes() -> tuple[Tensor, np.ndarray]:
    """Return the digits as soft white strokes on black, ``(N, 1, SIDE, SIDE)`` in 0..1, and their labels."""
    from sklearn.datasets import load_digits  # half a second that runs on other data need not pay

    data = load_digits()
    small = torch.from_numpy(data.images).float().div(16).unsqueeze(1)
    large = F.resize(small, [SIDE - 4, SIDE - 4], InterpolationMode.BICUBIC, antialias=True)
    crisp = torch.sigmoid(12 * (F.pad(large, [2, 2, 2, 2]) - 0.36))
    return crisp, data.target.astype(np.int64)


def _deal(digits: np.ndarray, domains: int) -> np.ndarray:
    """Deal the images of each class out to the domains in turn, in a fixed shuffled order."""
    order = np.random.Generator(np.random.Philox(VERSION)).permutation(len(digits))
    by_class = order[np.argsort(digits[order], kind="stable")]
    dealt = np.empty(len(digits), dtype=np.int64)
    dealt[by_class] = np.arange(len(digits)) % domains
    return dealt


def _paint(strokes: Tensor, ground: Tensor | float, color: Tensor | float) -> Tensor:
    ground, color = torch.as_tensor(ground), torch.as_tensor(color)
    return (ground + (color - ground) * strokes).expand(-1, 3, -1, -1)


def _rgb(red: float, green: float, blue: float) -> Tensor:
    return torch.tensor([red, green, blue]).view(1, 3, 1, 1)


def _blurred(strokes: Tensor, generator: torch.Generator) -> Tensor:
    """A pale photograph out of focus."""
    return _paint(smooth(strokes, 2.2), _rgb(0.55, 0.52, 0.48), _rgb(0.2, 0.22, 0.3))


def _chalk(strokes: Tensor, generator: torch.Generator) -> Tensor:
    """Broken chalk on a green board."""
    grain = smooth(torch.rand(strokes.shape, generator=generator), 0.6)
    dust = 0.25 * torch.rand(strokes.shape, generator=generator)
    broken = (strokes * (2.6 * grain - 0.5)).clamp(0, 1)
    return _paint(broken, _rgb(0.1, 0.3, 0.2) + dust, _rgb(0.95, 0.95, 0.85))


def _ink(strokes: Tensor, generator: torch.Generator) -> Tensor:
    """White on black, as the digits came."""
    return _paint(strokes, 0.0, 1.0)


def _neon(strokes: Tensor, generator: torch.Generator) -> Tensor:
    """Glowing tubes of many colours on dark violet."""
    drawn = torch.rand((len(strokes), 3, 1, 1), generator=generator)
    low, high = drawn.amin(1, keepdim=True), drawn.amax(1, keepdim=True)
    color = (drawn - low) / (high - low)  # saturated: one channel off, one fully on
    glow = (edges(strokes.expand(-1, 3, -1, -1)) * 1.5).clamp(0, 1) + 0.8 * smooth(strokes, 2.5)
    return _rgb(0.12, 0.02, 0.2) + glow * color


def _paper(strokes: Tensor, generator: torch.Generator) -> Tensor:
    """Dark blue pen on ruled cream paper."""
    ruled = torch.ones(1, 1, SIDE, 1)
    ruled[:, :, 3::8] = 0.75
    return _paint(strokes, _rgb(0.97, 0.94, 0.85) * ruled, _rgb(0.08, 0.1, 0.4))


def _sketch(strokes: Tensor, generator: torch.Generator) -> Tensor:
    """Pencil outlines on white."""
    outline = (edges(strokes.expand(-1, 3, -1, -1)) * 1.8).clamp(0, 1)
    return _paint(outline, 1.0, 0.25)


def _slanted(strokes: Tensor, generator: torch.Generator) -> Tensor:
    """Leaning letters in red on yellow stripes."""
    ground = _rgb(0.95, 0.8, 0.2) + 0.25 * torch.sin(torch.arange(SIDE) * 1.3).view(1, 1, 1, -1)
    return _paint(warp(strokes, [[1.1, 0.55, 0], [0, 1.1, 0]]), ground, _rgb(0.7, 0.05, 0.05))


STYLES: dict[str, Style] = {
    "blurred": _blurred,
    "chalk": _chalk,
    "ink": _ink,
    "neon": _neon,
    "paper": _paper,
    "sketch": _sketch,
    "slanted": _slanted,
}

"""Shifts of texture and surface: weather, paper, drawing styles."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as nnF
from torch import Tensor
from torchvision.transforms.v2 import functional as F

from modmeta.data.shifts.draws import uniform
from modmeta.data.shifts.registry import register_shift


def edges(images: Tensor) -> Tensor:
    """Return the Sobel gradient magnitude of the brightness, ``(B, 1, H, W)``, up to about 1."""
    grey = nnF.pad(F.rgb_to_grayscale(images), (1, 1, 1, 1), mode="replicate")
    across = grey[..., 2:] - grey[..., :-2]
    down = grey[..., 2:, :] - grey[..., :-2, :]
    across = (across[..., :-2, :] + 2 * across[..., 1:-1, :] + across[..., 2:, :]) / 4
    down = (down[..., :-2] + 2 * down[..., 1:-1] + down[..., 2:]) / 4
    return torch.hypot(across, down)


def _places(images: Tensor) -> tuple[Tensor, Tensor]:
    height, width = images.shape[-2:]
    return torch.linspace(-1, 1, height).view(-1, 1), torch.linspace(-1, 1, width).view(1, -1)


@register_shift("fog")
def fog(images: Tensor, strength: float, generator: torch.Generator) -> Tensor:
    """Uneven mist in front of everything."""
    coarse = torch.rand((1, 1, 4, 4), generator=generator)
    mist = F.resize(coarse, list(images.shape[-2:]), antialias=True)
    return images + (0.95 - images) * strength * (0.5 + 0.4 * mist)


@register_shift("vignette")
def vignette(images: Tensor, strength: float, generator: torch.Generator) -> Tensor:
    """Dark towards the edges, around a centre that is somewhat off."""
    y, x = _places(images)
    up, left = (uniform(-0.3, 0.3, generator) for _ in range(2))
    return images * (1 - strength * ((y - up) ** 2 + (x - left) ** 2).clamp(max=1))


@register_shift("stripes")
def stripes(images: Tensor, strength: float, generator: torch.Generator) -> Tensor:
    """Coloured bars in front, like a fence."""
    y, x = _places(images)
    angle, phase = uniform(0, math.pi, generator), uniform(0, 2 * math.pi, generator)
    color = torch.rand((3, 1, 1), generator=generator)
    wave = torch.sin(4 * math.pi * (x * math.cos(angle) + y * math.sin(angle)) + phase)
    return images + (color - images) * 0.9 * strength * (3 * wave).clamp(0, 1)


@register_shift("sketch")
def sketch(images: Tensor, strength: float, generator: torch.Generator) -> Tensor:
    """Dark outlines on white paper."""
    return images.lerp((1 - 2 * edges(images)).clamp(0, 1).expand_as(images), strength)


@register_shift("random_conv")
def random_conv(images: Tensor, strength: float, generator: torch.Generator) -> Tensor:
    """A random texture filter over all channels that keeps each image's brightness and contrast."""
    kernel = torch.randn((3, 3, 3, 3), generator=generator)
    filtered = nnF.conv2d(nnF.pad(images, (1, 1, 1, 1), mode="replicate"), kernel)
    spread, mean = torch.std_mean(images, dim=(1, 2, 3), keepdim=True)
    filtered_spread, filtered_mean = torch.std_mean(filtered, dim=(1, 2, 3), keepdim=True)
    standard = (filtered - filtered_mean) / filtered_spread.clamp(min=1e-6)
    return images.lerp(standard * spread + mean, strength)


@register_shift("spectrum")
def spectrum(images: Tensor, strength: float, generator: torch.Generator) -> Tensor:
    """Another amplitude of the low frequencies, with the phase, hence the shapes, as they were."""
    height, width = images.shape[-2:]
    low = 5  # cycles per image, whatever its resolution
    gains = torch.ones(3, height, width // 2 + 1)
    drawn = torch.randn((2, 3, low, low), generator=generator).mul(0.8 * strength).exp()
    rows, columns = min(low, height // 2), min(low, width // 2 + 1)
    gains[:, :rows, :columns] = drawn[0, :, :rows, :columns]
    gains[:, -rows:, :columns] = drawn[1, :, :rows, :columns]
    gains[:, 0, 0] = 1  # the mean is left to brightness and color_cast
    # In double precision, as a transform's last digit depends on the number of threads.
    changed = torch.fft.irfft2(torch.fft.rfft2(images.double()) * gains, s=(height, width))
    return changed.to(images.dtype)

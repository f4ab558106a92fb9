"""From decoded images to what a timm model takes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import timm.data
import torch
from torch import Tensor, nn

from modmeta.errors import ModmetaError


def preprocessing_of(model: nn.Module, image_size: int | None) -> dict[str, Any]:
    """Return image size, mean, std, interpolation and crop share that a timm model expects, as plain data.

    Args:
        model: a timm model.
        image_size: height and width in pixels, if other than the model's default.
    """
    config = timm.data.resolve_model_data_config(model)
    return {
        "image_size": image_size or config["input_size"][-1],
        "mean": list(config["mean"]),
        "std": list(config["std"]),
        "interpolation": config["interpolation"],
        "crop_pct": config["crop_pct"],
    }


def prepare(images: Tensor, preprocessing: Mapping[str, Any], like: Tensor) -> Tensor:
    """Return images normalised, in channels-last format, with device and dtype of ``like``.

    Args:
        images: (B, 3, H, W), uint8 in 0..255 or float in 0..1.
        preprocessing: see :func:`preprocessing_of`.
        like: a tensor of the model.

    Raises:
        ModmetaError: if their shape or dtype is another one.
    """
    size = preprocessing["image_size"]
    if images.ndim != 4 or tuple(images.shape[1:]) != (3, size, size):
        raise ModmetaError(
            f"the backbone takes images of shape (B, 3, {size}, {size}), not {tuple(images.shape)}; "
            "resize them or set image_size"
        )
    if images.dtype != torch.uint8 and not images.is_floating_point():
        raise ModmetaError(f"images are {images.dtype}; give uint8 in 0..255 or float in 0..1")
    # Channels last by hand: `vmap` knows no memory formats.
    x = images.permute(0, 2, 3, 1).to(like.device, like.dtype).contiguous()
    if images.dtype == torch.uint8:
        x = x / 255
    mean, std = x.new_tensor(preprocessing["mean"]), x.new_tensor(preprocessing["std"])
    return ((x - mean) / std).permute(0, 3, 1, 2)

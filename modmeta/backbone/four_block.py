"""Four blocks: the small network that few-shot learning measures itself on, as a timm model.

Vinyals et al., "Matching Networks for One Shot Learning", NeurIPS 2016; the network of MAML, Reptile and ProtoNet.
"""

from __future__ import annotations

from typing import Any

import torch
from timm.layers import to_2tuple
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from torch import Tensor, nn
from torch.nn import functional as F


class BatchStatisticsNorm2d(nn.Module):
    """Batch normalisation by the statistics of the batch at hand, in training and in evaluation alike.

    MAML's published code does the same, and so do its successors: with it, what a query image scores depends on the
    other images of its batch, so all queries of an episode go through as one batch.

    Under a transform of ``torch.func`` or a tracer, mean and variance are computed in plain operations: those of
    ``F.batch_norm(training=True)`` lose their second derivatives under ``torch.func.vmap``, and a compiler can make
    nothing of them. Otherwise PyTorch's own kernel does it, which is faster.

    Args:
        channels: number of channels.
        eps: added to the variance.
    """

    def __init__(self, channels: int, eps: float = 1e-5) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """Return ``(B, C, H, W)`` with mean ``bias`` and deviation ``weight`` in every channel."""
        if not _transformed():
            return F.batch_norm(x, None, None, self.weight, self.bias, training=True, eps=self.eps)
        mean = x.mean((0, 2, 3), keepdim=True)
        # A variance is the same whatever constant is taken off first. Off comes the mean's value; `zero` carries its
        # gradient, which so takes no pass over the maps that the gradients to weight and bias do not take anyway.
        constant = mean.detach()
        centred, zero = x - constant, mean - constant
        variance = (centred * centred).mean((0, 2, 3), keepdim=True) - zero * zero
        scale = self.weight[:, None, None] * (variance + self.eps).rsqrt()
        return centred * scale + (self.bias[:, None, None] - zero * scale)


def _transformed() -> bool:
    """Return whether a transform of ``torch.func``, or a mode such as a tracer's, sees what is computed here."""
    return torch._C._functorch.peek_interpreter_stack() is not None or torch._C._len_torch_dispatch_stack() > 0


class ConvBlock(nn.Module):
    """3x3 convolution, batch normalisation, ReLU and 2x2 max-pooling.

    The convolution has no bias, as the norm would take it out again. The ReLU comes after the pooling: the result is
    the same, at a quarter of the work.
    """

    def __init__(self, inputs: int, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(inputs, channels, 3, padding=1, bias=False)
        self.norm = BatchStatisticsNorm2d(channels)
        nn.init.xavier_uniform_(self.conv.weight)

    def forward(self, x: Tensor) -> Tensor:
        """Return ``(B, C, H // 2, W // 2)``."""
        return F.max_pool2d(self.norm(self.conv(x)), 2).relu()


class FourBlock(nn.Module):
    """Four convolutional blocks on grey images; the features are the last map, flattened.

    Images come with three channels, as to any timm model, and are averaged to the one that the first convolution
    takes.

    Args:
        img_size: side of the images in pixels, or height and width; 16 or more.
        width: channels of every block.
        num_classes: outputs of a linear classifier; 0 leaves it out.
        in_chans: channels of the images.
    """

    def __init__(
        self, img_size: int | tuple[int, int] = 28, width: int = 64, num_classes: int = 1000, in_chans: int = 3
    ) -> None:
        super().__init__()
        height, breadth = to_2tuple(img_size)
        if min(height, breadth) < 16:
            raise ValueError(f"img_size is {img_size}; four halvings need 16 pixels or more")
        self.in_chans = in_chans
        self.blocks = nn.Sequential(*(ConvBlock(inputs, width) for inputs in (1, width, width, width)))
        self.num_features = self.head_hidden_size = width * (height // 16) * (breadth // 16)
        self.feature_info = [
            {"num_chs": width, "reduction": 2 ** (index + 1), "module": f"blocks.{index}"} for index in range(4)
        ]
        self.reset_classifier(num_classes)

    def reset_classifier(self, num_classes: int) -> None:
        """Put a fresh linear classifier for ``num_classes`` in place; 0 leaves it out."""
        self.num_classes = num_classes
        self.head: nn.Module = nn.Linear(self.num_features, num_classes) if num_classes else nn.Identity()

    def get_classifier(self) -> nn.Module:
        """Return the classifier."""
        return self.head

    def forward_features(self, x: Tensor) -> Tensor:
        """Return the last map ``(B, C, H // 16, W // 16)`` of images ``(B, 3, H, W)``."""
        maps: Tensor = self.blocks(x.mean(1, keepdim=True))
        return maps

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Return features ``(B, D)`` of the last map, or what the classifier makes of them."""
        features = x.flatten(1)
        return features if pre_logits else self.head(features)

    def forward(self, x: Tensor) -> Tensor:
        """Return logits ``(B, num_classes)``; features ``(B, D)`` without a classifier."""
        return self.forward_head(self.forward_features(x))


_CFG = {
    "input_size": (3, 28, 28),
    "fixed_input_size": True,
    "num_classes": 1000,
    "mean": (0.0, 0.0, 0.0),
    "std": (1.0, 1.0, 1.0),
    "interpolation": "bilinear",
    "crop_pct": 1.0,
    "first_conv": "blocks.0.conv",
    "classifier": "head",
}
default_cfgs = generate_default_cfgs(dict.fromkeys(("four_block", "four_block_32", "test_four_block"), _CFG))


def _create(variant: str, pretrained: bool, **options: Any) -> FourBlock:
    model: FourBlock = build_model_with_cfg(FourBlock, variant, pretrained, **options)
    return model


@register_model
def four_block(pretrained: bool = False, **options: Any) -> FourBlock:
    """Four blocks of 64 channels, for 28x28 pixels: 111,680 parameters."""
    return _create("four_block", pretrained, **options)


@register_model
def four_block_32(pretrained: bool = False, **options: Any) -> FourBlock:
    """Four blocks of 32 channels, MAML's choice for mini-ImageNet."""
    return _create("four_block_32", pretrained, **{"width": 32, **options})


@register_model
def test_four_block(pretrained: bool = False, **options: Any) -> FourBlock:  # noqa: PT028 - timm's word for tiny
    """Four blocks of 4 channels, for tests."""
    return _create("test_four_block", pretrained, **{"width": 4, **options})

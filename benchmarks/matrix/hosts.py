"""Backbones with random weights in which, as in trained ones, no branch is closed."""

from __future__ import annotations

from importlib.metadata import version

import torch
from torch import nn

from modmeta.backbone import Backbone

ARCHITECTURES = (
    "resnet18",
    "tf_efficientnet_lite0",
    "mobilenetv3_small_100",
    "convnext_atto",
    "regnety_002",
    "fastvit_t8",
    "repvit_m0_9",
    "vit_tiny_patch16_224",
    "deit_tiny_patch16_224",
    "swin_tiny_patch4_window7_224",
    "swinv2_tiny_window8_256",
    "beit_base_patch16_224",
    "eva02_tiny_patch14_224",
    "mobilevit_xxs",
    "poolformer_s12",
    "levit_128s",
    "edgenext_xx_small",
)


def host(name: str, image_size: int | None, seed: int = 0) -> Backbone:
    """Return a backbone with random weights whose every weight has an effect.

    timm starts layer scales and the last gamma of residual branches at 0 or close to it, which trained weights are
    not: those below 0.01 are drawn anew from 0.5..1 (weight matrices from a normal distribution of deviation 0.02).
    BatchNorm's statistics are those of 8 random images, so that features neither vanish nor explode.

    Args:
        name: name of a timm model.
        image_size: height and width in pixels; None for the model's default.
        seed: what weights and statistics are a function of.
    """
    backbone = Backbone(name, pretrained=False, image_size=image_size, seed=seed)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        for key, tensor in backbone.model.named_parameters():
            if float(tensor.abs().max()) < 1e-2 and "bias" not in key:
                if tensor.numel() == max(tensor.shape, default=1):
                    tensor.copy_(0.5 + 0.5 * torch.rand(tensor.shape, generator=generator))
                else:
                    tensor.copy_(0.02 * torch.randn(tensor.shape, generator=generator))
        norms = [module for module in backbone.model.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
        for norm in norms:
            norm.reset_running_stats()
            norm.momentum = None  # the plain mean over all batches seen
        if norms:
            torch.default_generator.manual_seed(seed)  # stochastic depth
            size = backbone.image_size
            with backbone.trainable():
                backbone.train_forward(torch.rand(8, 3, size, size, generator=generator))
    return backbone


def versions(*packages: str) -> str:
    """Return ``"torch 2.15.0, ..."`` for the packages that decide about the figures."""
    return ", ".join(f"{package} {version(package)}" for package in ("torch", "timm", *packages))

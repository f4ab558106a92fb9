"""An adapted model as one plain module: what is left of it once nothing has to be swapped any more."""

from __future__ import annotations

import copy
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from modmeta.adapters import AdaptedBackbone, Unit
from modmeta.adapters.adapter_file import HEAD, PRIOR_HEAD, AdapterFile, has_prior
from modmeta.backbone.anatomy import FEATURES
from modmeta.backbone.shell import hooked


def gates_of(content: AdapterFile) -> dict[str, float]:
    """Return the gates of an adapter file's plan by unit name."""
    return dict(zip(content.plan["units"], content.plan["gates"], strict=True))


def slot_units(model: AdaptedBackbone, content: AdapterFile) -> list[Unit]:
    """Return the active units that compute something new instead of changing weights."""
    return [unit for unit in model.active(gates_of(content)) if unit.module.is_slot()]


@torch.no_grad()
def merged_backbone(model: AdaptedBackbone, content: AdapterFile) -> nn.Module:
    """Return a copy of the timm model with the tensors of all active units written into it, slots left out."""
    merged = _copied(model)
    tensors = dict([*merged.named_parameters(), *merged.named_buffers()])
    for name, tensor in model.overlay(content.state, gates_of(content)).items():
        tensors[name].copy_(tensor)
    return merged.requires_grad_(False)


def _copied(model: AdaptedBackbone) -> nn.Module:
    return copy.deepcopy(model.backbone.model).cpu().to(memory_format=torch.contiguous_format).eval()


class ClosedHead(nn.Module):
    """The classifier of an adapter file, as a module.

    Args:
        content: the adapter file.
        part: what the names of its tensors begin with.
    """

    weight: Tensor
    bias: Tensor
    center: Tensor
    scale: Tensor

    def __init__(self, content: AdapterFile, part: str = "") -> None:
        super().__init__()
        self.normalize = bool(content.head[f"{part}normalize"])
        for name in HEAD:
            tensor = content.classifier[f"{part}{name}"].detach().cpu()
            self.register_buffer(name, tensor.clone(memory_format=torch.contiguous_format))

    def forward(self, features: Tensor) -> Tensor:
        """Return logits ``(B, C)`` of features ``(B, D)``."""
        x = features - self.center
        if self.normalize:
            x = F.normalize(x, dim=-1)
        return self.scale * (x @ self.weight + self.bias)


class ClosedModel(nn.Module):
    """Images to logits and probabilities, with normalisation, slots and head inside.

    Nothing is left of the overlay, which would be computed again with every call.

    Args:
        model: the adapted model, left as it is.
        content: the adapter file.
    """

    mean: Tensor
    std: Tensor
    feature_scale: Tensor

    def __init__(self, model: AdaptedBackbone, content: AdapterFile) -> None:
        super().__init__()
        self.backbone = merged_backbone(model, content)
        self.head = ClosedHead(content)
        self.prior = self.prior_head = None
        if has_prior(content.head):
            self.prior = _copied(model)
            self.prior_head = ClosedHead(content, PRIOR_HEAD)
        for name in ("mean", "std"):
            values = torch.tensor(model.backbone.preprocessing[name])
            self.register_buffer(name, values[:, None, None])
        own = torch.ones(model.backbone.own_dim)
        scale = [own, model.backbone.tap_scale.cpu()] if model.backbone.taps else [own]
        self.register_buffer("feature_scale", torch.cat(scale))
        # A function, because what the modules of a slot hand on to each other belongs to one pass.
        self._slots = partial(model.slots, content.state, gates_of(content))
        self.eval().requires_grad_(False)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Return logits and probabilities, both ``(B, C)``.

        Args:
            images: ``(B, 3, H, W)``, uint8 in 0..255 or float32 in 0..1.
        """
        x = images.float() / 255 if images.dtype == torch.uint8 else images
        x = (x - self.mean) / self.std
        slots = self._slots()
        at_features = slots.pop(FEATURES, None)
        with hooked(self.backbone, slots, {}):
            features = self.backbone(x) * self.feature_scale
        if at_features is not None:
            features = at_features(features, features, lambda x: x)
        logits = self.head(features)
        if self.prior is not None and self.prior_head is not None:
            logits = logits + self.prior_head(self.prior(x) * self.feature_scale)
        return logits, logits.softmax(-1)

"""Export to timm: a state dict that an untouched model loads, with the head in timm's own classifier if it fits."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import timm
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from modmeta.adapters import AdaptedBackbone
from modmeta.adapters.adapter_file import AdapterFile, has_prior
from modmeta.errors import ModmetaError
from modmeta.serving.export_module import ClosedHead, merged_backbone, slot_units

HEAD_SUFFIX = ".head.safetensors"
"""Ending of the second file, where the head does not fit into timm's classifier."""
_SAME = 1e-4


def write_state_dict(
    path: Path, model: AdaptedBackbone, content: AdapterFile, metadata: dict[str, Any], dtype: torch.dtype
) -> str:
    """Write the merged tensors; see :func:`modmeta.serving.export.export_adapter`."""
    if has_prior(content.head):
        raise ModmetaError(
            "the unadapted backbone has a share in the answer (prior_share), and a state dict holds one network; use "
            "--format torch_export or onnx"
        )
    slots = slot_units(model, content)
    if slots:
        raise ModmetaError(
            f"units {', '.join(unit.name for unit in slots)} compute something new instead of changing weights, so no "
            f"state dict of {model.backbone.name} can hold them; use --format torch_export or onnx"
        )
    if model.backbone.taps:
        raise ModmetaError(
            f"the features hold what taps read at {', '.join(model.backbone.taps)}, which no timm model returns; use "
            "--format torch_export or onnx"
        )
    body = merged_backbone(model, content)
    creation = _creation(model)
    whole = None
    reason = "the head scales features to unit length, which timm's classifier does not"
    if not content.head["normalize"]:
        whole = _with_classifier(body, content, {**creation, "num_classes": len(content.classes)}, model)
        reason = f"timm's classifier of {model.backbone.name} gives other logits with its weights"
    if whole is not None:
        creation["num_classes"] = len(content.classes)
        head: dict[str, Any] = {"place": "classifier"}
        note = "the head is in timm's own classifier"
    else:
        head_path = path.with_suffix(HEAD_SUFFIX)
        head = {"place": head_path.name, "normalize": content.head["normalize"]}
        note = f"the head is in {head_path.name}, because {reason}"
        _save(ClosedHead(content), head_path, {**metadata, "head": head})
    _save(whole or body, path, {**metadata, "create_model": creation, "head": head})
    return note


def open_state_dict(path: Path) -> Callable[[Tensor], Tensor]:
    """Load what was written into an untouched timm model, and return the function from images to logits."""
    metadata = _metadata(path)
    model = _create(metadata["create_model"])
    model.load_state_dict(load_file(path), strict=True)
    # As the live model runs: another format rounds differently, which would hide small mistakes.
    model.to(memory_format=torch.channels_last)
    mean, std = (torch.tensor(metadata["preprocessing"][name])[:, None, None] for name in ("mean", "std"))
    place = metadata["head"]["place"]
    head = None if place == "classifier" else load_file(path.with_name(place))

    def logits(images: Tensor) -> Tensor:
        prepared = ((images / 255 - mean) / std).contiguous(memory_format=torch.channels_last)
        x: Tensor = model(prepared)
        if head is None:
            return x
        x = x - head["center"]
        if metadata["head"]["normalize"]:
            x = nn.functional.normalize(x, dim=-1)
        return head["scale"] * (x @ head["weight"] + head["bias"])

    return logits


def _creation(model: AdaptedBackbone) -> dict[str, Any]:
    """Return the arguments of ``timm.create_model``."""
    creation: dict[str, Any] = {"model_name": model.backbone.name, "num_classes": 0}
    if getattr(model.backbone.model, "pretrained_cfg", {}).get("fixed_input_size"):
        creation["img_size"] = model.backbone.image_size
    return creation


def _create(creation: Mapping[str, Any]) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        return timm.create_model(**creation).eval()


@torch.no_grad()
def _with_classifier(
    body: nn.Module, content: AdapterFile, creation: Mapping[str, Any], model: AdaptedBackbone
) -> nn.Module | None:
    """Return ``body`` with timm's classifier computing the head, or None where that is not the same.

    Models with several classifiers average them (distilled ones), so each becomes the head.
    """
    whole = _create(creation)
    tensors = whole.state_dict()
    if not body.state_dict().keys() <= tensors.keys():
        return None
    whole.load_state_dict({**tensors, **body.state_dict()})
    # Folding the centre into the bias subtracts large numbers from each other.
    head = {name: tensor.detach().cpu().double() for name, tensor in content.classifier.items()}
    weight = (head["scale"] * head["weight"]).T
    bias = head["scale"] * (head["bias"] - head["center"] @ head["weight"])
    classifiers = whole.get_classifier()  # type: ignore[operator]
    for classifier in classifiers if isinstance(classifiers, (tuple, list)) else [classifiers]:
        for layer in classifier.modules():
            if isinstance(layer, nn.BatchNorm1d) and layer.running_var is not None:
                layer.running_var.fill_(1 - layer.eps)  # a fresh one divides by a little more than 1
            if isinstance(layer, (nn.Linear, nn.Conv2d)) and layer.weight.numel() == weight.numel():
                layer.weight.copy_(weight.reshape(layer.weight.shape))
                if layer.bias is not None:
                    layer.bias.copy_(bias)
    # Hidden layers, a missing bias, a centre too far off for float32: whatever it is, it shows in the numbers.
    size = model.backbone.image_size
    images = torch.rand(2, 3, size, size, generator=torch.Generator().manual_seed(0))
    x = model.backbone.prepare(images)
    same = bool((whole(x) - ClosedHead(content)(body(x))).abs().max() <= _SAME)
    return whole if same else None


def _save(module: nn.Module, path: Path, metadata: Mapping[str, Any]) -> None:
    tensors = {name: tensor.detach().clone().contiguous() for name, tensor in module.state_dict().items()}
    # One key only: with more, their order would differ from process to process.
    save_file(tensors, path, {"modmeta": json.dumps(metadata, sort_keys=True, allow_nan=False)})


def _metadata(path: Path) -> dict[str, Any]:
    with safe_open(path, "pt") as file:
        found: dict[str, Any] = json.loads(file.metadata()["modmeta"])
    return found

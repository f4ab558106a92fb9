"""timm models with random, published or local weights, and one clear line when that cannot be."""

from __future__ import annotations

import os
import re
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

import timm
import torch
from timm.models import load_state_dict
from torch import Tensor, nn

import modmeta.backbone.four_block  # noqa: F401 - registers its models with timm
from modmeta.backbone.trace import parent
from modmeta.errors import ModmetaError, unknown

_OTHERWISE = "pass the path of a weight file as pretrained, or choose random weights with pretrained: false"


def create(name: str, pretrained: bool | str, image_size: int | None, seed: int) -> nn.Module:
    """Return a timm model without its classifier, in eval mode, on the CPU, in channels-last format.

    Args:
        name: timm model name, with or without a weight tag.
        pretrained: True for timm's published weights, a path for a local file, False for random weights.
        image_size: height and width in pixels; None for the model's default.
        seed: what random weights are a function of; the global random state is left alone.

    Raises:
        ModmetaError: if the name is unknown, the size does not suit the model, or the weights cannot be had.
    """
    _check_name(name)
    options: dict[str, Any] = {"num_classes": 0}
    if image_size is not None and _wants_image_size(name):
        options["img_size"] = image_size
    source = pretrained
    if pretrained is True:
        source = _cached(name) or _reachable(name)
    with torch.random.fork_rng(devices=[]), torch.device("cpu"):
        # torch.manual_seed would seed the accelerators too, which fork_rng was told not to restore.
        torch.default_generator.manual_seed(seed)
        if isinstance(source, (str, Path)):
            model = _load_file(name, Path(source), options)
        else:
            model = _build(name, bool(source), options)
    return model.eval().to(memory_format=torch.channels_last)


def _check_name(name: str) -> None:
    if ":" in name:  # "hf-hub:..." and "local-dir:..." name a place, which timm looks up
        return
    architecture, _, tag = name.partition(".")
    if not timm.is_model(architecture):
        raise unknown("backbone", architecture, timm.list_models())
    published = timm.list_pretrained(f"{architecture}.*")
    if tag and name not in published:
        raise unknown("weight tag of a backbone", name, published)


def _wants_image_size(name: str) -> bool:
    if ":" in name:
        return False
    cfg = timm.get_pretrained_cfg(name)
    return bool(cfg is not None and cfg.fixed_input_size)


def _build(name: str, pretrained: bool, options: dict[str, Any]) -> nn.Module:
    try:
        return timm.create_model(name, pretrained=pretrained, **options)
    except Exception as error:
        size = f" at image_size {options['img_size']}" if "img_size" in options else ""
        advice = _OTHERWISE if pretrained else "choose another backbone or image_size"
        raise ModmetaError(f"cannot create backbone {name!r}{size}: {first_line(error)}; {advice}") from error


def _cached(name: str) -> str | None:
    """Return the path of published weights that were downloaded before, so that no network is needed."""
    from huggingface_hub import try_to_load_from_cache  # timm's own dependency; slow to import

    cfg = None if ":" in name else timm.get_pretrained_cfg(name)
    if cfg is None or not cfg.hf_hub_id or cfg.custom_load:
        return None
    names = (cfg.hf_hub_filename,) if cfg.hf_hub_filename else ("model.safetensors", "pytorch_model.bin")
    found = (try_to_load_from_cache(cfg.hf_hub_id, file) for file in names)
    return next((path for path in found if isinstance(path, str)), None)


def _reachable(name: str) -> bool:
    """Return True if weights can be downloaded; timm itself would retry for most of a minute."""
    cfg = None if ":" in name else timm.get_pretrained_cfg(name)
    if cfg is not None and not cfg.has_weights:
        raise ModmetaError(f"backbone {name!r} has no published weights; {_OTHERWISE}")
    if os.environ.get("HF_HUB_OFFLINE", "").lower() in ("1", "on", "yes", "true"):
        raise ModmetaError(f"HF_HUB_OFFLINE is set and backbone {name!r} is not in the cache; {_OTHERWISE}")
    hub = os.environ.get("HF_ENDPOINT", "https://huggingface.co")
    try:
        urllib.request.urlopen(urllib.request.Request(hub, method="HEAD"), timeout=5).close()
    except urllib.error.HTTPError:
        return True  # it answered
    except (OSError, ValueError) as error:
        raise ModmetaError(
            f"cannot reach {hub} for the weights of backbone {name!r} ({first_line(error)}); {_OTHERWISE}"
        ) from error
    return True


def _load_file(name: str, path: Path, options: dict[str, Any]) -> nn.Module:
    if not path.is_file():
        raise ModmetaError(f"weight file {str(path)!r} of backbone {name!r} does not exist; {_OTHERWISE}")
    try:
        tensors: dict[str, Any] = load_state_dict(str(path), weights_only=True)
        if not tensors or not all(isinstance(value, Tensor) for value in tensors.values()):
            raise ValueError("it is not a dictionary of tensors")
    except Exception as error:
        raise ModmetaError(
            f"cannot read weight file {str(path)!r}: {first_line(error)}; "
            "give a complete .safetensors file or a PyTorch file that holds only tensors"
        ) from error
    cfg = timm.get_pretrained_cfg(name)
    given = (cfg.classifier if cfg is not None else None) or ()
    classifiers = (given,) if isinstance(given, str) else tuple(given)
    body = {key: value for key, value in tensors.items() if parent(key) not in classifiers}
    # timm forgives missing tensors once it drops a classifier itself; told of none, it stays strict.
    strict = {"num_classes": 0, "classifier": None, "label_offset": 0}
    try:
        return _load(name, body, strict, options)
    except Exception as error:
        misfits = _misfits(error)
        heads = tuple(f"{parent(classifier) or classifier}." for classifier in classifiers)
        if set(misfits) == {"unexpected"} and all(key.startswith(heads) for key in misfits["unexpected"]):
            return _load(name, tensors, {}, options)  # a classifier of several layers, and nothing is missing
        found = [f"{len(keys)} {what} (first: {keys[0]})" for what, keys in misfits.items()]
        reason = f"tensors {', '.join(found)}" if found else first_line(error)
        raise ModmetaError(
            f"weight file {str(path)!r} does not fit backbone {name!r}: {reason}; "
            "name the architecture and image_size that it was saved with"
        ) from error


def _load(name: str, tensors: dict[str, Any], overlay: dict[str, Any], options: dict[str, Any]) -> nn.Module:
    overlay = {**overlay, "state_dict": dict(tensors), "custom_load": False}
    model = timm.create_model(name, pretrained=True, pretrained_cfg_overlay=overlay, **options)
    for attribute in ("pretrained_cfg", "default_cfg"):  # else the weights stay in memory twice
        getattr(model, attribute, {}).pop("state_dict", None)
    return model


def _misfits(error: Exception) -> dict[str, list[str]]:
    """Return the tensors that ``load_state_dict`` complains about, by what is wrong with them."""
    text = str(error)
    found = {
        what.lower(): re.findall(r'"([^"]+)"', "".join(re.findall(rf"{what} key\(s\) in state_dict: (.*)", text)))
        for what in ("Missing", "Unexpected")
    }
    found["of another shape"] = re.findall(r"size mismatch for ([^\s:]+)", text)
    return {what: keys for what, keys in found.items() if keys}


def first_line(error: BaseException) -> str:
    """Return type and message of an error in one short line."""
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:200]}" if text else type(error).__name__

"""One hash that tells whether two backbones compute the same thing."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor


def fingerprint(architecture: str, tensors: Mapping[str, Tensor], preprocessing: Mapping[str, Any]) -> str:
    """Return ``"sha256:..."`` over an architecture, its tensors and its preprocessing.

    Device, memory format and ``requires_grad`` of the tensors do not matter.

    Args:
        architecture: name of the timm architecture.
        tensors: all parameters and buffers by name.
        preprocessing: what is done to images beforehand, as plain data.
    """
    digest = hashlib.sha256()
    digest.update(json.dumps([architecture, preprocessing], sort_keys=True).encode())
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        digest.update(json.dumps([name, str(tensor.dtype), list(tensor.shape)]).encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return f"sha256:{digest.hexdigest()}"

"""Taps: features that are read off layers before the last."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from modmeta.backbone.discovery import map_channel_dim
from modmeta.errors import ModmetaError, unknown

_POOLED = "modmeta_pooled"


def tap(model: nn.Module, names: Sequence[str]) -> None:
    """Make a model append to its features the mean and the deviation over positions of what modules return.

    Middle layers tell apart what the last one, trained for other classes and another domain, no longer does: Evci et
    al., "Head2Toe: Utilizing Intermediate Representations for Better Transfer Learning", ICML 2022.

    The tensors of the model stay as they are. Copies of it keep their taps.

    Args:
        model: a model that returns features ``(B, D)``; from now on ``(B, D + 2 C + ...)``.
        names: paths of modules that return maps or tokens of ``C`` channels.

    Raises:
        ModmetaError: if there is no such module, or one is named twice.
    """
    modules = dict(model.named_modules())
    for name in names:
        if not name or name not in modules:
            raise unknown("tap", name, [each for each in modules if each])
        if list(names).count(name) > 1:
            raise ModmetaError(f"tap {name!r} is named twice; name it once")
    channels_last = getattr(model, "output_fmt", None) == "NHWC"
    for name in names:
        modules[name].register_forward_hook(partial(_pool, name, channels_last))
    if names:
        model.register_forward_hook(partial(_append, tuple(names)))


def _pool(name: str, channels_last: bool, module: nn.Module, _args: Any, output: Any) -> None:
    if not isinstance(output, Tensor) or output.ndim not in (3, 4):
        raise ModmetaError(f"tap {name!r} returns neither maps nor tokens; name another module, such as a block")
    dim = map_channel_dim(output.shape[1:], channels_last) % output.ndim
    positions = [axis for axis in range(1, output.ndim) if axis != dim]
    variance, mean = torch.var_mean(output, positions, correction=0)
    # Kept on the module: each copy of a model that runs has modules of its own. The square root has no slope at 0.
    vars(module)[_POOLED] = torch.cat([mean, (variance + 1e-6).sqrt()], dim=1)


def _append(names: tuple[str, ...], model: nn.Module, _args: Any, features: Tensor) -> Tensor:
    pooled = [vars(model.get_submodule(name)).pop(_POOLED, None) for name in names]
    # A part of the model that begins behind a tap cannot know it; its NaN shows when the cut there is put to the proof.
    return torch.cat([features, *(each if each is not None else features * torch.nan for each in pooled)], dim=1)

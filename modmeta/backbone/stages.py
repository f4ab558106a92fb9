"""Where the stages of a backbone end."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import prod

from torch import nn

from modmeta.backbone.cut import Cut
from modmeta.backbone.trace import Call


def stage_ends(model: nn.Module, calls: Mapping[str, Call], cuts: Sequence[Cut]) -> list[int]:
    """Return the ticks at which the stages of ``model`` end, first stage first.

    timm's ``feature_info`` says so for most models. Its entries of the same reduction are one stage, as it
    lists every block of a plain transformer. Without it, a stage ends where the resolution changes.

    Args:
        model: a timm model.
        calls: its recorded calls.
        cuts: its cuts, in execution order.
    """
    told = _told(model)
    if told and all(module in calls for module, _ in told):
        places = [(calls[module].left, reduction) for module, reduction in told]
    else:
        places = [(calls[cut.name].left, -_positions(cut.shape)) for cut in cuts if len(cut.shape) > 1]
    following = [*(resolution for _, resolution in places[1:]), None]
    return [end for (end, resolution), after in zip(places, following, strict=False) if resolution != after]


def _told(model: nn.Module) -> list[tuple[str, int]]:
    info = getattr(model, "feature_info", None)
    entries = info if isinstance(info, list) else getattr(info, "info", None) or []
    return [(entry["module"], entry["reduction"]) for entry in entries if entry.get("module")]


def _positions(shape: tuple[int, ...]) -> int:
    # Maps: the square part of the shape; tokens: (N, C).
    if len(shape) == 3:
        return shape[1] * (shape[2] if shape[1] == shape[2] else shape[0])
    return prod(shape[:-1])

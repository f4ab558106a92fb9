"""Finds the sites and cuts of a model by running it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import ceil, prod
from typing import Any

import torch
from torch import Tensor, nn

from modmeta.backbone.anatomy import Anatomy
from modmeta.backbone.cut import BATCH, Cut, Resume, in_sequence, probe, verified
from modmeta.backbone.kinds import channel_dim_of, channels_of, kind_of
from modmeta.backbone.shell import share
from modmeta.backbone.site import Site
from modmeta.backbone.stages import stage_ends
from modmeta.backbone.trace import Call, nearest_called, parent, trace


def examine(model: nn.Module, image_size: int, feature_dim: int, taps: Sequence[str] = ()) -> Anatomy:
    """Find the sites and cuts of a timm model; the model itself is not touched.

    Args:
        model: a timm model without classifier.
        image_size: height and width of its images, in pixels.
        feature_dim: length of its feature vectors.
        taps: modules that the features read directly.
    """
    shell = share(model)
    calls = trace(shell, probe(shell, BATCH, image_size))
    resumes = verified(shell, calls, image_size, taps)
    entered = {name: calls[nearest_called(name, calls)].entered for name, _ in model.named_modules()}

    kinds = {name: kind for name, module in shell.named_modules() if (kind := kind_of(name, module))}
    kinds |= dict.fromkeys(_blocks(shell, resumes, kinds), "block")
    rank = {name: place for place, (name, _) in enumerate(shell.named_modules())}
    names = sorted(kinds, key=lambda name: (entered[name], rank[name]))

    last = len(names)  # the order of the features
    before = {cut: sum(entered[name] < calls[cut].left for name in names) - 1 for cut in resumes}
    cuts: list[Cut] = []
    for cut, order in before.items():
        if cuts and cuts[-1].order == order:
            cuts.pop()  # the later of two cuts with no site in between spares more work
        cuts.append(Cut(cut, order, max(order, 0) / max(last, 1), calls[cut].per_image(BATCH) or ()))

    ends = stage_ends(model, calls, cuts)
    layers = [name for name, kind in kinds.items() if kind != "block"]
    positions = {name: _positions(name, channels_of(shell.get_submodule(name)), calls) for name in layers}
    macs = {
        name: round(positions[name] * shell.get_submodule(name).get_parameter("weight").numel())
        for name in layers
        if kinds[name] != "norm"
    }
    sites = []
    for order, name in enumerate(names):
        place: dict[str, Any] = {
            "name": name,
            "kind": kinds[name],
            "order": order,
            "depth": order / last,
            "stage": min(sum(end < entered[name] for end in ends), max(len(ends) - 1, 0)),
            "block": sum(cut.order < order for cut in cuts),
        }
        module = shell.get_submodule(name)
        if kinds[name] == "block":
            inside = sum(count for layer, count in macs.items() if layer.startswith(f"{name}."))
            channels_last = getattr(model, "output_fmt", None) == "NHWC"
            sites.append(_block(module, calls[name], place, inside, channels_last))
        else:
            sites.append(_layer(module, calls.get(name), place, macs.get(name, 0), ceil(positions[name])))
    stage, block = max(len(ends) - 1, 0), len(cuts)
    sites.append(Site("features", "features", last, 1.0, stage, block, {}, feature_dim, 1, -1, 0))
    return Anatomy(
        tuple(sites),
        tuple(cuts),
        {cut.name: resumes[cut.name] for cut in cuts},
        entered,
        {cut.name: calls[cut.name].left for cut in cuts},
    )


def _blocks(model: nn.Module, resumes: Mapping[str, Resume], layers: Mapping[str, str]) -> list[str]:
    """Return the elements of sequences that can be cut and hold layers, innermost ones only."""
    holding = [
        name for name in resumes if in_sequence(model, name) and any(layer.startswith(f"{name}.") for layer in layers)
    ]
    return [name for name in holding if not any(other.startswith(f"{name}.") for other in holding)]


def _block(module: nn.Module, call: Call, place: dict[str, Any], macs: int, channels_last: bool) -> Site:
    shape = call.per_image(BATCH) or ()
    dim = map_channel_dim(shape, channels_last)
    channels = shape[0 if dim == 1 else -1]
    return Site(
        **place,
        shapes={},
        channels=channels,
        groups=1,
        channel_dim=dim,
        macs=macs,
        positions=prod(shape) // channels,
        any_length=_takes_any_length(module, call),
    )


def _layer(module: nn.Module, call: Call | None, place: dict[str, Any], macs: int, positions: int) -> Site:
    named = [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]
    return Site(
        **place,
        shapes={local: tuple(tensor.shape) for local, tensor in named if tensor.is_floating_point()},
        channels=channels_of(module),
        groups=module.groups if isinstance(module, nn.Conv2d) else 1,
        channel_dim=channel_dim_of(module, call.output.ndim if call and call.output is not None else None),
        macs=macs,
        called=call is not None,
        positions=positions,
    )


@torch.no_grad()
def _takes_any_length(module: nn.Module, call: Call) -> bool:
    """Return whether a module from (B, N, C) to (B, N, C) runs on one token more.

    What knows the places of its tokens (windows, convolutions, rotary and relative positions) does not.
    """
    given = call.args[0] if call.args else None
    if not isinstance(given, Tensor) or call.output is None:
        return False
    # What is told of the place of a single token would be broadcast to all.
    if given.ndim != 3 or given.shape != call.output.shape or given.shape[1] == 1:
        return False
    longer = torch.cat([given, given[:, :1]], dim=1)
    try:
        output = module(longer, *call.args[1:], **call.kwargs)
    except Exception:  # blocks of all origins fail in ways of their own
        return False
    return isinstance(output, Tensor) and output.shape == longer.shape


def _positions(name: str, channels: int, calls: dict[str, Call]) -> float:
    """Return at how many pixels or tokens per image a layer's weight is applied."""
    if name in calls:
        return calls[name].numel / (BATCH * channels)
    # Its weight is read by an ancestor: as many positions as that one returns.
    user = calls[nearest_called(parent(name), calls)]
    if user.output is None or user.output.ndim < 2:
        return 1.0
    shape: Sequence[int] = user.output.shape
    return user.output.numel() / (BATCH * shape[map_channel_dim(shape[1:], False)])


def map_channel_dim(shape: Sequence[int], channels_last: bool) -> int:
    """Return the channel axis of activations whose shape without batch is ``shape``; maps are square."""
    if len(shape) != 3:
        return -1
    if shape[0] == shape[1] == shape[2]:
        return -1 if channels_last else 1
    return 1 if shape[1] == shape[2] else -1

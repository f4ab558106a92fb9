"""Finds the sites and cuts of a model by running it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import nn

from modmeta.backbone.anatomy import Anatomy
from modmeta.backbone.cut import BATCH, Cut, Resume, in_sequence, probe, verified
from modmeta.backbone.kinds import channel_dim_of, channels_of, kind_of
from modmeta.backbone.shell import share
from modmeta.backbone.site import Site
from modmeta.backbone.stages import stage_ends
from modmeta.backbone.trace import Call, nearest_called, parent, trace


def examine(model: nn.Module, image_size: int, feature_dim: int) -> Anatomy:
    """Find the sites and cuts of a timm model; the model itself is not touched.

    Args:
        model: a timm model without classifier.
        image_size: height and width of its images, in pixels.
        feature_dim: length of its feature vectors.
    """
    shell = share(model)
    calls = trace(shell, probe(shell, BATCH, image_size))
    resumes = verified(shell, calls, image_size)
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
    sites = [
        _site(
            shell.get_submodule(name),
            name,
            kinds[name],
            order=order,
            depth=order / last,
            stage=min(sum(end < entered[name] for end in ends), max(len(ends) - 1, 0)),
            block=sum(cut.order < order for cut in cuts),
            calls=calls,
            channels_last=getattr(model, "output_fmt", None) == "NHWC",
        )
        for order, name in enumerate(names)
    ]
    sites.append(Site("features", "features", last, 1.0, max(len(ends) - 1, 0), len(cuts), {}, feature_dim, 1, -1, 0))
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


def _site(
    module: nn.Module,
    name: str,
    kind: str,
    *,
    order: int,
    depth: float,
    stage: int,
    block: int,
    calls: dict[str, Call],
    channels_last: bool,
) -> Site:
    call = calls.get(name)
    if kind == "block":
        shape = (call.per_image(BATCH) if call else None) or ()
        dim = _map_channel_dim(shape, channels_last)
        return Site(name, kind, order, depth, stage, block, {}, shape[0 if dim == 1 else -1], 1, dim, 0)
    shapes = {
        local: tuple(tensor.shape)
        for local, tensor in [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]
        if tensor.is_floating_point()
    }
    dim = channel_dim_of(module, call.output.ndim if call and call.output is not None else None)
    macs = 0
    if kind != "norm":
        macs = round(_positions(name, channels_of(module), calls) * module.get_parameter("weight").numel())
    groups = module.groups if isinstance(module, nn.Conv2d) else 1
    return Site(
        name,
        kind,
        order,
        depth,
        stage,
        block,
        shapes,
        channels_of(module),
        groups,
        dim,
        macs,
        call is not None,
    )


def _positions(name: str, channels: int, calls: dict[str, Call]) -> float:
    """Return at how many pixels or tokens per image a layer's weight is applied."""
    if name in calls:
        return calls[name].numel / (BATCH * channels)
    # Its weight is read by an ancestor: as many positions as that one returns.
    user = calls[nearest_called(parent(name), calls)]
    if user.output is None or user.output.ndim < 2:
        return 1.0
    shape: Sequence[int] = user.output.shape
    return user.output.numel() / (BATCH * shape[_map_channel_dim(shape[1:], False)])


def _map_channel_dim(shape: Sequence[int], channels_last: bool) -> int:
    """Return the channel axis of activations whose shape without batch is ``shape``; maps are square."""
    if len(shape) != 3:
        return -1
    if shape[0] == shape[1] == shape[2]:
        return -1 if channels_last else 1
    return 1 if shape[1] == shape[2] else -1

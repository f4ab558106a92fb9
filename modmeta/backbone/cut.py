"""Points at which a backbone's forward pass can be split in two, and the proof that it can."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from modmeta.backbone.shell import call, resume_at
from modmeta.backbone.trace import Call, parent

BATCH = 2  # images in the pass that is recorded; the proof uses another number, so that shapes must follow it


@dataclass(frozen=True)
class Cut:
    """A module after which the forward pass can be stopped and taken up again, bit for bit the same.

    Attributes:
        name: path of the module whose output is handed over.
        order: order of the last site that begins before the cut (-1 if none does); what lies behind the
            cut are exactly the sites of a higher order.
        depth: ``order`` as a share of the backbone, from 0 to 1.
        shape: shape of the activations handed over, without the batch.
    """

    name: str
    order: int
    depth: float
    shape: tuple[int, ...]


@dataclass(frozen=True)
class Resume:
    """How to take up a forward pass behind a module: see :func:`modmeta.backbone.shell.resume_at`."""

    skipped: Mapping[str, tuple[int, ...]]
    dense: bool


@torch.no_grad()
def verified(
    model: nn.Module, calls: Mapping[str, Call], image_size: int, taps: Sequence[str] = ()
) -> dict[str, Resume]:
    """Return the modules at which ``model`` can be cut, in the order in which they finish.

    Every candidate (a module of the top level or in a sequence, called once, that returns one tensor with the
    batch first) is put to the proof: the rest of the model, run on what it returned and on NaN for all else,
    must give the features of the whole model bit for bit and leave the activations as they were. Not on zeros
    for all else: residual branches of fresh models return zero, and would seem unused.

    Args:
        model: a shared copy in eval mode; it is left as it was.
        calls: its recorded calls on ``BATCH`` images.
        image_size: height and width of the images, in pixels.
        taps: modules that the features read directly, see :func:`modmeta.backbone.taps.tap`.
    """
    candidates = _candidates(model, calls)
    tried = candidates | {outer for name in candidates for outer in _ancestors(name) if _hands_over(calls, outer)}
    hidden: dict[str, Tensor] = {}
    handles = [
        model.get_submodule(name).register_forward_hook(
            # A clone, as the next module may well write into it.
            lambda _module, _args, output, name=name: hidden.__setitem__(name, output.clone())
        )
        for name in tried
    ]
    try:
        expected = model(probe(model, BATCH + 1, image_size))
    finally:
        for handle in handles:
            handle.remove()
    found = {}
    bypassed: set[str] = set()
    tapped = {outer for name in taps for outer in (name, *_ancestors(name))}
    for name in sorted(tried, key=lambda name: calls[name].entered):
        # What goes past a module goes past all that is inside it: no need to try.
        if bypassed.intersection(_ancestors(name)):
            continue
        resume = Resume(_skipped(name, calls), dense=False)
        given = hidden[name].clone()
        features = _features(model, name, resume, given, image_size)
        if features is None:
            resume = Resume(resume.skipped, dense=True)
            features = _features(model, name, resume, given, image_size)
        if features is None or not torch.equal(features, expected):
            # Except where the way past it begins within.
            bypassed |= {name} - tapped
        # Activations are kept and used again, so a model that writes into them cannot be cut there.
        elif name in candidates and torch.equal(given, hidden[name]):
            found[name] = resume
    return dict(sorted(found.items(), key=lambda item: calls[item[0]].left))


def probe(model: nn.Module, batch: int, image_size: int) -> Tensor:
    """Return (batch, 3, H, W) random images for ``model``, the same ones at every call."""
    weight = next(tensor for tensor in model.parameters() if tensor.is_floating_point())
    generator = torch.Generator("cpu").manual_seed(0)
    images = torch.randn(batch, image_size, image_size, 3, generator=generator, device="cpu")
    return images.to(weight).permute(0, 3, 1, 2)


def in_sequence(model: nn.Module, name: str) -> bool:
    """Return whether the module is an element of a Sequential, of a ModuleList or of the like.

    The like (timm's RegStage): a module whose children are blocks of one class.
    """
    holder = model.get_submodule(parent(name))
    if isinstance(holder, (nn.Sequential, nn.ModuleList)):
        return True
    children = list(holder.children())
    return len({type(child) for child in children}) == 1 and all(any(child.children()) for child in children)


def _candidates(model: nn.Module, calls: Mapping[str, Call]) -> set[str]:
    names = set()
    seen: set[int] = set()
    for name, call_ in sorted(calls.items(), key=lambda item: item[1].left):
        if not _hands_over(calls, name) or not (parent(name) == "" or in_sequence(model, name)):
            continue
        # A Sequential returns what its last element returned: one cut, and the element names it.
        if id(call_.output) not in seen:
            seen.add(id(call_.output))
            names.add(name)
    return names


def _hands_over(calls: Mapping[str, Call], name: str) -> bool:
    return name != "" and name in calls and calls[name].per_image(BATCH) is not None


def _skipped(cut: str, calls: Mapping[str, Call]) -> dict[str, tuple[int, ...]]:
    """Return the modules that are over when the cut is reached, outermost ones only, with their shapes."""
    begun = calls[cut].entered
    skipped: dict[str, tuple[int, ...]] = {}
    for name, call_ in sorted(calls.items(), key=lambda item: item[1].entered):
        shape = call_.per_image(BATCH)
        if name and call_.left < begun and shape is not None and not skipped.keys() & _ancestors(name):
            skipped[name] = shape
    return skipped


def _ancestors(name: str) -> set[str]:
    found = set()
    while name := parent(name):
        found.add(name)
    return found


def _features(model: nn.Module, name: str, resume: Resume, given: Tensor, image_size: int) -> Tensor | None:
    undo = resume_at(model, name, resume.skipped, resume.dense)
    try:
        return call(model, given, {}, name, image_size)
    except (RuntimeError, ValueError, AssertionError):
        return None  # the model cannot do without what is skipped
    finally:
        for undo_one in undo:
            undo_one()

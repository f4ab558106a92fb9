"""What a checkpoint says about itself, and what it must agree with to be loaded."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from modmeta import __version__
from modmeta.errors import ModmetaError
from modmeta.learners.parts import LearnerParts


def describe(learner: LearnerParts) -> dict[str, Any]:
    """Return what a checkpoint of ``learner`` must be checked against, as plain data."""
    backbone = learner.model.backbone
    return {
        "version": __version__,
        "learner": f"{type(learner).__module__}.{type(learner).__qualname__}",
        "backbone": backbone.name,
        "preprocessing": backbone.preprocessing,
        "fingerprint": backbone.fingerprint(calibrated=False),
        "trained_source": bool(learner.source.epochs),
        "units": [unit.name for unit in learner.model.units],
    }


def check(found: Mapping[str, Any] | None, learner: LearnerParts, *, weights: bool) -> None:
    """Refuse a checkpoint of another backbone or set of units.

    Args:
        found: what :func:`describe` said when it was written; None if nothing did.
        learner: the learner that is to take it.
        weights: whether the backbone's own weights must agree, where source training has not changed them.

    Raises:
        ModmetaError: saying what was found and what was expected.
    """
    if found is None:
        raise ModmetaError("the checkpoint was not written by a modmeta learner; give one of a modmeta run")
    ours = describe(learner)
    compared = {"backbone": "backbone", "preprocessing": "preprocessing", "units": "set of units"}
    if weights and not found["trained_source"]:
        compared["fingerprint"] = "backbone fingerprint"
    for key, noun in compared.items():
        if found[key] != ours[key]:
            raise ModmetaError(f"the checkpoint is for another {noun}: it has {found[key]}, this model {ours[key]}")


def check_shapes(state: Mapping[str, Any], learner: LearnerParts) -> None:
    """Refuse tensors of other shapes than the learner's own of the same names.

    Raises:
        ModmetaError: naming the first such tensor, its shape and the one that was expected.
    """
    own = learner.state_dict()
    for name, tensor in state.items():
        expected = own.get(name)
        if isinstance(tensor, Tensor) and isinstance(expected, Tensor) and tensor.shape != expected.shape:
            raise ModmetaError(
                f"the checkpoint does not fit the model: tensor {name} has the shape {tuple(tensor.shape)} there, and "
                f"{tuple(expected.shape)} here; give the options that the fit had"
            )


def plain(value: Any) -> Any:
    """Return lists, dicts, strings and numbers only: what loading a checkpoint without unpickling allows."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return plain(dataclasses.asdict(value))
    if isinstance(value, Mapping) or hasattr(value, "items"):
        return {str(key): plain(each) for key, each in value.items() if key != "_instantiator"}
    if isinstance(value, (list, tuple)):
        return [plain(each) for each in value]
    return value

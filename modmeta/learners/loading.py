"""From a checkpoint file back to a learner, without unpickling code and without any weights download."""

from __future__ import annotations

from argparse import ArgumentError
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from jsonargparse import ArgumentParser

from modmeta import __version__
from modmeta.errors import ModmetaError
from modmeta.learners.base import MetaLearner
from modmeta.learners.checkpoint_io import load_plain


def read_checkpoint(path: str | Path) -> dict[str, Any]:
    """Read a checkpoint of a modmeta learner as plain data.

    Raises:
        ModmetaError: if it is missing, broken, holds code, or is not of modmeta.
    """
    checkpoint = load_plain(path)
    if "modmeta" not in checkpoint:
        raise ModmetaError(f"checkpoint {path} was not written by a modmeta learner; give one of a modmeta run")
    return checkpoint


def load_learner(path: str | Path) -> MetaLearner:
    """Rebuild the learner of a checkpoint, ready to adapt.

    The class must be known already: a learner of a user's own file is known once that file is imported.

    Raises:
        ModmetaError: if the file or its class cannot be used.
    """
    checkpoint = read_checkpoint(path)
    name = checkpoint["modmeta"]["learner"]
    known = {f"{cls.__module__}.{cls.__qualname__}": cls for cls in _subclasses(MetaLearner)}
    if name not in known:
        raise ModmetaError(f"checkpoint {path} holds a learner {name}; give the file that defines it with --modules")
    arguments = dict(checkpoint["hyper_parameters"])
    # The checkpoint brings the weights.
    arguments["backbone"] = {**arguments["backbone"], "pretrained": False}
    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(known[name])
    try:
        built = parser.instantiate_classes(parser.parse_object(arguments))
    except (ArgumentError, TypeError, ValueError) as error:
        reason = " ".join(str(error).split())[:200]
        raise ModmetaError(f"checkpoint {path} holds arguments that {name} refuses ({reason}); fit again") from error
    learner = known[name](**vars(built))
    learner.from_checkpoint = True
    try:
        learner.on_load_checkpoint(checkpoint)
        learner.load_state_dict(checkpoint["state_dict"])
    except (KeyError, RuntimeError) as error:
        version = checkpoint["modmeta"].get("version", "before 0.1")
        reason = " ".join(str(error).split())[:200]
        raise ModmetaError(
            f"checkpoint {path} of version {version} does not fit this one, {__version__} ({reason}); fit again"
        ) from error
    return learner.eval()


def _subclasses(cls: type[MetaLearner]) -> Iterator[type[MetaLearner]]:
    yield cls
    for child in cls.__subclasses__():
        yield from _subclasses(child)

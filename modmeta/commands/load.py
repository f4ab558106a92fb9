"""A checkpoint, a device and the user's files: what adapt and predict begin with."""

from __future__ import annotations

import argparse

import torch

from modmeta.commands.plugins import import_files, resolve_file
from modmeta.errors import ModmetaError
from modmeta.learners import MetaLearner, load_learner


def load(options: argparse.Namespace) -> MetaLearner:
    """Return the learner that the options ``modules``, ``checkpoint`` and ``accelerator`` describe.

    Raises:
        ModmetaError: if one of them cannot be had.
    """
    if options.accelerator == "cuda" and not torch.cuda.is_available():
        raise ModmetaError("--accelerator cuda: this machine has no usable GPU; leave the option out")
    import_files([resolve_file(name) for name in options.modules])
    learner = load_learner(options.checkpoint)
    if not learner.trained:
        raise ModmetaError(f"checkpoint {options.checkpoint} ends before meta-training began; fit for more epochs")
    return learner.to(options.accelerator)

"""Learn how to adapt one frozen vision backbone to new domains."""

from __future__ import annotations

from importlib import import_module
from typing import Any

__version__ = "0.1.0"

_HOMES = {
    "AdaptedBackbone": "modmeta.adapters",
    "AdapterModule": "modmeta.adapters",
    "AtomicCheckpointIO": "modmeta.learners",
    "Backbone": "modmeta.backbone",
    "BackboneConfig": "modmeta.learners",
    "Cost": "modmeta.adapters",
    "DomainDataModule": "modmeta.data",
    "MetaLearner": "modmeta.learners",
    "ModmetaError": "modmeta.errors",
    "ModularMetaLearner": "modmeta.learners",
    "Site": "modmeta.backbone",
    "SourceConfig": "modmeta.learners",
    "SourceLearner": "modmeta.learners",
    "Support": "modmeta.adaptation",
    "UnitConfig": "modmeta.adapters",
    "load_learner": "modmeta.learners",
    "register_head": "modmeta.adaptation",
    "register_module": "modmeta.adapters",
    "register_shift": "modmeta.data",
}


def __getattr__(name: str) -> Any:
    # Public names load when they are first used, so that the command line answers before torch would be imported.
    if name not in _HOMES:
        raise AttributeError(f"module 'modmeta' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOMES])

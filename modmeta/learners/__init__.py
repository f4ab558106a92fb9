"""LightningModules that meta-train something over episodes."""

from modmeta.learners.base import MetaLearner
from modmeta.learners.loading import load_learner, read_checkpoint
from modmeta.learners.metrics import EpisodeMetrics, Result
from modmeta.learners.modular import ModularMetaLearner
from modmeta.learners.source import BackboneConfig, SourceConfig, SourceLearner

__all__ = [
    "BackboneConfig",
    "EpisodeMetrics",
    "MetaLearner",
    "ModularMetaLearner",
    "Result",
    "SourceConfig",
    "SourceLearner",
    "load_learner",
    "read_checkpoint",
]
